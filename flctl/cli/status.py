"""`flctl status`: what the records say."""

import time
from typing import Annotated, Any

import typer

from flctl.campaign.workspace import Workspace
from flctl.cli.moving import find
from flctl.cli.output import Grid, print_json, seconds
from flctl.codec import to_data
from flctl.errors import ConfigurationError, LoginPaused
from flctl.records import Run

NOTE_MOST = 60


def register(app: typer.Typer) -> None:
    app.command()(status)


def status(
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Runs of earlier models too.")] = False,
) -> None:
    """Show the newest model, what each site is doing, and what waits for you. Reads records only."""
    from flctl.campaign.report import summary

    workspace = find(context.obj)
    runs = workspace.runs()
    data = summary(workspace, runs) | _space(workspace, runs)
    if json:
        print_json("status", status="ok", exit_code=0, data=data)
    else:
        _print(workspace, runs, data, everything)


def _space(workspace: Workspace, runs: tuple[Run, ...]) -> dict[str, Any]:
    """How many more rounds fit where, and what is to be feared for the plan."""
    from flctl.campaign.space import purges, rooms, too_small

    plan = workspace.plan()
    fears = purges(workspace, runs, time.time())
    try:
        found, small = rooms(workspace, plan.sites if plan else tuple(workspace.profiles)), too_small(workspace, plan)
    except ConfigurationError:  # flctl.toml is being edited; the records can be shown all the same
        found, small = [], []
    rows = [to_data(room) | {"rounds": room.rounds} for room in found]
    return {"space": rows, "warnings": [*small, *fears]}


def _print(workspace: Workspace, runs: tuple[Run, ...], data: dict[str, Any], everything: bool) -> None:
    from flctl.campaign.privacy import line

    model, plan = data["model"], workspace.plan()
    print(f"campaign {workspace.label} in {workspace.root}")
    print(f"model {model['version']:04d}  sha256 {model['sha256'][:16]}  {model['path']}")
    if adapter := model["adapter"]:
        targets = adapter.get("target_modules") or []
        of = f" on {', '.join(targets) if isinstance(targets, list) else targets}" if targets else ""
        rank, alpha = adapter.get("r", "?"), adapter.get("lora_alpha", "?")
        print(f"  a LoRA adapter: r={rank}, alpha={alpha}{of}; the base, sha256 {adapter['frozen'][:16]}, stays frozen")
    for warning in model["warnings"]:
        print(f"  merged with a warning: {warning}")
    if model["privacy"]:
        print(f"privacy: {line(model['privacy'])}")
    if plan is not None and plan.target > model["version"]:
        print(f"plan: models {plan.first:04d} to {plan.target:04d} by {', '.join(plan.sites)}")
    elif plan is not None and plan.evaluates is not None and any(run.open for run in runs):
        print(f"plan: model {plan.evaluates:04d} is evaluated at {', '.join(plan.sites)}")
    elif plan is not None and plan.ended:
        print(f"the plan ended at model {plan.target:04d}: {plan.ended}")
    _print_runs(workspace, runs, data, everything)
    _print_sites(workspace, runs, data)
    _print_means(data)
    print("logins so far: " + ", ".join(_logins(site, row) for site, row in data["logins"].items()))


def _print_runs(workspace: Workspace, runs: tuple[Run, ...], data: dict[str, Any], everything: bool) -> None:
    from flctl.campaign.report import ago, alternative, failed_runs, state_of

    model = data["model"]
    grid = Grid(("site", "run", "work", "for model", "state", "since", "job", "steps", "queued", "ran", "note"))
    shown = [run for run in runs if everything or run.open or run.order.round >= model["version"]]
    rows = {(row["site"], row["number"]): row for row in data["runs"]}
    for run in sorted(shown, key=lambda run: (run.order.round, run.site, run.number)):
        row = rows[run.site, run.number]
        grid.add(
            run.site,
            f"{run.number}.{run.attempt}",
            run.order.work,
            f"{run.order.round:04d}",
            state_of(run, workspace.contact(run.site)),
            ago(run.changed_at),
            row["job_id"] or "",
            str(row["steps"] or ""),
            seconds(row["queue_seconds"]),
            seconds(row["train_seconds"]),
            row["note"] if len(row["note"]) <= NOTE_MOST else row["note"][: NOTE_MOST - 3] + "...",
        )
    if shown:
        grid.show()
    for run in failed_runs(workspace):
        if run.failure is not None and not run.skipped:
            retry = f"flctl retry {run.site}"
            print(f"{run.site}: run {run.number:04d} failed: {run.failure.message}")
            print(f"  -> {run.failure.hint if retry in run.failure.hint else retry}, or {alternative(workspace, run)}")


def _print_sites(workspace: Workspace, runs: tuple[Run, ...], data: dict[str, Any]) -> None:
    """What waits for a person, or for a time, and until when logins are good."""
    from flctl.campaign.contacts import hold_of, remedy_of
    from flctl.campaign.report import notices
    from flctl.facility.certificates import clock

    contacts = {site: workspace.contact(site) for site in workspace.profiles}
    for site, contact in contacts.items():
        if held := hold_of(contact):
            print(f"{site} is HELD: {held.reason}\n  -> {remedy_of(site, contact)}")
        elif contact.trouble is not None and contact.trouble.code == LoginPaused.code:
            print(f"{site}: {contact.trouble.message}")
    for site, row in data["logins"].items():
        if row["until"] is not None and row["until"] > time.time() and not hold_of(contacts[site]):
            print(f"{site}: logged in until {clock(row['until'])}")
        if row["warning"]:
            print(row["warning"])
    for notice in (notice for run in runs for notice in notices(run)):
        print(notice)


def _print_means(data: dict[str, Any]) -> None:
    """Node-hours and space."""
    from flctl.campaign.space import Room
    from flctl.campaign.space import line as line_of

    for row in data["node_hours"]:
        if row["used"] or row["max"]:
            limit = f" of {row['max']:.4g}" if row["max"] else ""
            figures = f"{row['used']:.4g} used{limit}, {row['reserved']:.4g} reserved"
            print(f"node-hours, {row['site'] or 'all sites'}: {figures}")
    for row in data["space"]:
        print(f"space, {line_of(Room(site=row['site'], free=row['free'], per_round=row['per_round']))}")
    for warning in data["warnings"]:
        print(warning)


def _logins(site: str, row: dict[str, Any]) -> str:
    of_day = f" ({row['today']} of {row['per_day']} within 24 h)" if row["today"] else ""
    return f"{site} {row['count']}{of_day}"
