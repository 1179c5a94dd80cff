"""`flctl plan`: what the next rounds would do and cost at each site, before anything does."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flctl.campaign.workspace import Workspace
from flctl.cli.moving import a_person, find, moving, patiently
from flctl.cli.output import print_failures, print_json
from flctl.errors import exit_code_of
from flctl.records import Failure, Plan

if TYPE_CHECKING:
    from flctl.campaign.outlook import Outlook, Told

Problems = list[tuple[str, Failure]]


def register(app: typer.Typer) -> None:
    app.command()(plan)


def plan(
    context: typer.Context,
    sites: Annotated[list[str] | None, typer.Option("--sites", help="Sites: a b | a,b | all.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="How many new models. Default: 1.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimizer steps of each run.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="For job scripts. Default: plan/.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no site: limits and what is remembered.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show what the next rounds would do and cost at each site: resources against limits and budgets, estimated start,
    bytes, logins, space; write the job scripts. Logs in to each site once; submits nothing."""
    from flctl.campaign.rehearsal import considered, private_after, scripts_of, write_scripts

    workspace = find(context.obj)
    drafted, problems = considered(workspace, sites or [], rounds, steps)
    views: tuple[Outlook, ...] = ()
    scripts: list[Path] = []
    private = None
    if drafted is not None:
        views, more = _forecast(workspace, drafted, offline=offline, json=json)
        problems += [("", problem) for problem in more]
        problems += [(view.site, problem) for view in views for problem in view.problems]
        scripts = write_scripts(out or workspace.root / "plan", scripts_of(workspace, drafted))
        private = private_after(workspace, drafted)
    code = exit_code_of([problem.exit_code for _, problem in problems])
    if json:
        data = {**_data(drafted, views), "privacy": private, "scripts": [str(path) for path in scripts]}
        print_json("plan", status="error" if code else "ok", exit_code=code, data=data, errors=problems)
    else:
        if drafted is not None:
            _print(workspace, drafted, views, private, scripts)
        print_failures(problems)
    raise typer.Exit(code)


def _forecast(
    workspace: Workspace, plan: Plan, *, offline: bool, json: bool
) -> "tuple[tuple[Outlook, ...], list[Failure]]":
    """Each site, and what speaks against all of them together."""
    from flctl.campaign.config import load_configuration
    from flctl.campaign.outlook import Matter, forecast, whole_budget

    configuration = load_configuration(workspace)
    matter = Matter(workspace=workspace, configuration=configuration, plan=plan, now=time.time())
    told = {} if offline else _ask(workspace, matter.names, json=json)
    return forecast(matter, told), whole_budget(matter)


def _ask(workspace: Workspace, names: list[str], *, json: bool) -> "Mapping[str, Told]":
    from flctl.campaign.inquiry import inquire

    with moving(workspace, command="plan" if json else "", terminal=a_person()) as engine:
        return {name: patiently(partial(inquire, engine, name), engine.stop) for name in names}


def _data(plan: Plan | None, views: "tuple[Outlook, ...]") -> dict[str, Any]:
    from flctl.codec import to_data

    if plan is None:
        return {"first": None, "target": None, "steps": None, "sites": []}
    return {"first": plan.first, "target": plan.target, "steps": plan.steps, "sites": to_data(views)}


def _print(
    workspace: Workspace,
    plan: Plan,
    views: "tuple[Outlook, ...]",
    private: dict[str, Any] | None,
    scripts: list[Path],
) -> None:
    from flctl.campaign.budget import standing
    from flctl.campaign.config import load_configuration
    from flctl.campaign.foresight import exposed, outdated
    from flctl.campaign.privacy import line
    from flctl.campaign.space import too_small
    from flctl.facility.limits import size

    print(f"plan: models {plan.first:04d} to {plan.target:04d}, {plan.steps} steps a run, by {', '.join(plan.sites)}")
    for view in views:
        print(f"\n{view.site}")
        for name, text in _rows(view):
            print(f"  {name:<10}  {text}")
    hours, whole = sum(view.node_hours_plan for view in views), standing(workspace)[-1]
    used = f"{whole['used']:.4g} of {whole['max']:.4g}" if whole["max"] else f"{whole['used']:.4g}"
    moved = size(sum(view.bytes_out + view.bytes_in for view in views))
    print(f"\ntogether    {hours:.4g} node-hours at most, {used} used so far; {moved} a round")
    for warning in too_small(workspace, plan):
        print(f"space       {warning}")
    for warning in (*exposed(workspace, load_configuration(workspace), plan), *outdated(workspace, plan.sites)):
        print(f"security    {warning}")
    if private:
        print(f"privacy     after model {plan.target:04d}: {line(private)}")
    print(f"scripts     {', '.join(str(path) for path in scripts)}")
    print("nothing was submitted")


def _rows(view: "Outlook") -> list[tuple[str, str]]:
    from flctl.campaign.outlook import hours, logins, resources, rooms_of
    from flctl.facility.limits import count, size
    from flctl.facility.probe import start_in_words

    account = f", account {view.account}" if view.account else ""
    again = "; the newest one is there already" if view.resident else ""
    files = f"{size(view.bytes_out)} there, {size(view.bytes_in)} back each round{again}"
    if view.bytes_frozen:
        files += f"; the frozen base, {size(view.bytes_frozen)}, goes there once"
    free = f"{size(view.free)} free" if view.free is not None else "not known yet"
    rows = [
        ("job", f"{count(view.jobs, 'job')} a round: {resources(view)}{account}"),
        ("starts", start_in_words(view.told.start)),
        ("node-hours", f"{hours(view)}; {view.node_hours_plan:.4g} for the plan"),
        ("files", files),
        ("logins", logins(view)),
        ("space", f"{free}, {size(view.need)} wanted ({rooms_of(view)})"),
    ]
    if view.purge_days:
        rows.append(("purge", f"files that nobody touches for {view.purge_days} days are removed"))
    if view.told.balance:
        rows.append(("balance", view.told.balance))
    rows += [("note", note) for note in view.notes]
    return rows + [("PROBLEM", problem.message) for problem in view.problems]
