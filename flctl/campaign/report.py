"""What a campaign's records say, as data for people and programs: status, round and tick."""

import time
from contextlib import suppress
from typing import Any

from flctl.campaign.budget import standing, used_by
from flctl.campaign.causes import advice
from flctl.campaign.contacts import clock_differs, hold_of, outlives
from flctl.campaign.gates import warnings_of
from flctl.campaign.privacy import shown
from flctl.campaign.workspace import Workspace
from flctl.codec import to_data
from flctl.errors import ConfigurationError
from flctl.facility.allowance import used
from flctl.facility.certificates import clock
from flctl.facility.profile import load_site
from flctl.records import Contact, Contribution, Run, Stage, Work


def run_row(run: Run, contact: Contact) -> dict[str, Any]:
    """One run as `status --json` gives it; an open run of a held site is held."""
    job, given = run.job, run.contribution
    return {
        "site": run.site,
        "number": run.number,
        "attempt": run.attempt,
        "work": run.order.work,
        "base": run.order.base,
        "round": run.order.round,
        "stage": run.stage,
        "held": to_data(run.held or (hold_of(contact) if run.open else None)),
        "job_id": job.id,
        "steps": given.steps if given else None,
        "samples": given.samples if given else None,
        "queue_seconds": _between(job.claimed_at, job.started_at),
        "train_seconds": _between(job.started_at, job.ended_at),
        "estimated_start": job.expected_start if run.open else None,
        "node_hours": round(used_by(run), 6),
        "progress": job.progress,
        "attempts": to_data(run.past),
        "note": _note(run),
        "cause": run.failure.cause if run.failure else None,
        "hint": run.failure.hint if run.failure else "",
    }


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else round(max(0.0, end - begin), 3)


def _note(run: Run) -> str:
    if run.failure is not None:
        return run.failure.message
    if run.contribution is not None:
        return _given(run, run.contribution)
    if not run.open or not run.job.state:
        return ""
    words = [run.job.state + (f": {run.job.reason}" if run.job.reason not in ("", "None") else "")]
    if run.job.never:
        words.append("can never run")
    if run.job.progress:
        words.append(f"step {run.job.progress} saved")
    if run.job.expected_start is not None:
        words.append(f"estimated start {clock(run.job.expected_start)}")
    return ", ".join(words)


def _given(run: Run, given: Contribution) -> str:
    """What is worth knowing of a result besides its numbers."""
    words = []
    if run.order.work == Work.TRAIN and given.steps < run.order.steps:
        words.append(f"{given.steps} of {run.order.steps} steps: it was ended early")
    spent = given.metrics.get("privacy")
    if isinstance(spent, dict) and all(isinstance(spent.get(key), (int, float)) for key in ("epsilon", "delta")):
        words.append(f"DP-SGD: epsilon {spent['epsilon']:.3g} at delta {spent['delta']:g}")
    return ", ".join(words)


def summary(workspace: Workspace, runs: tuple[Run, ...]) -> dict[str, Any]:
    """The campaign, its newest model, its runs."""
    model = workspace.newest_model()
    record, frozen = workspace.model_record(model.version), workspace.frozen()
    contacts = {site: workspace.contact(site) for site in {run.site for run in runs}}
    ordered = sorted(runs, key=lambda run: (run.order.round, run.site, run.number))
    return {
        "campaign": {"name": workspace.name, "id": workspace.id, "path": str(workspace.root)},
        "model": {
            "version": model.version,
            "path": str(workspace.model_folder(model.version)),
            "sha256": model.sha256,
            "warnings": warnings_of(record),
            "privacy": shown(record),
            "adapter": {**frozen.adapter, "frozen": frozen.sha256} if frozen else None,
        },
        "node_hours": standing(workspace),
        "logins": {site: _logins(workspace, site, runs) for site in workspace.profiles},
        "runs": [run_row(run, contacts[run.site]) for run in ordered],
    }


def _logins(workspace: Workspace, site: str, runs: tuple[Run, ...]) -> dict[str, Any]:
    """How often a site was logged in to for this campaign, when last, and until when what that used is good; how many
    logins of all campaigns `today` counts (24 hours) and `per_day` allows; the clocks' difference in seconds."""
    contact, warning = workspace.contact(site), ""
    today, per_day = 0, None
    # To check a profile takes long, so it is read only where it matters.
    if contact.logins or contact.login_until:
        with suppress(ConfigurationError):
            profile = load_site(workspace.profiles[site])
            its = [run for run in runs if run.site == site]
            warning = outlives(contact, profile, its, time.time())
            if profile.connection == "ssh" and contact.logins:
                today, per_day = used(profile), profile.login.per_day
    return {
        "count": contact.logins,
        "today": today,
        "per_day": per_day,
        "last": contact.login_at,
        "until": contact.login_until,
        "skew": contact.skew,
        "warning": "\n".join(filter(None, (warning, clock_differs(site, contact)))),
    }


def progress(workspace: Workspace, *, done: bool) -> dict[str, Any]:
    """The summary, whether the plan is fulfilled, and what is awaited at which site until when."""
    runs = workspace.runs()
    return summary(workspace, runs) | {"done": done, "waiting": waiting(workspace, runs)}


def notices(run: Run) -> list[str]:
    """What there is to say of an open run besides its row: why it waits for a person or for long, and what to do; why
    an earlier attempt of it ended."""
    if not run.open:
        return []
    lines, name = [], f"{run.site}: run {run.number:04d}"
    if run.held is not None and run.held.until is not None:
        lines.append(f"{name} waits until {clock(run.held.until)}\n  -> flctl release {run.site} tries it now")
    elif run.held is not None:
        remedy = run.failure.hint if run.failure else f"flctl release {run.site}"
        lines.append(f"{name} is HELD: {run.held.reason}\n  -> {remedy}")
    elif words := advice(run.job, run.site):
        lines.append(f"{name}, job {run.job.id}: {run.job.state}: {run.job.reason}\n  -> {words}")
    if run.past:
        last = run.past[-1]
        lines.append(f"{name} is at attempt {run.attempt}; attempt {last.number} ended: {last.reason}")
    return lines


def waiting(workspace: Workspace, runs: tuple[Run, ...]) -> list[dict[str, Any]]:
    rows = []
    for run in runs:
        if run.open:
            contact = workspace.contact(run.site)
            rows.append(
                {
                    "site": run.site,
                    "number": run.number,
                    "stage": run.stage,
                    "since": run.changed_at,
                    "due": contact.due or None,
                    "held": to_data(run.held or hold_of(contact)),
                    "trouble": contact.trouble.message if contact.trouble else None,
                }
            )
    return rows


def alternative(workspace: Workspace, run: Run) -> str:
    """What a person may do about a failed run instead of `flctl retry`."""
    if run.order.work == Work.MERGE:
        return 'aggregate_at = "" in flctl.toml'
    if run.order.work == Work.EVALUATE:
        return "go on without it: no model waits for an evaluation"
    plan = workspace.plan()
    if plan is not None and set(plan.sites) - plan.skips(run.order.round) - {run.site}:
        return f"flctl skip {run.site}"
    return "flctl cancel, which ends the plan"


def failed_runs(workspace: Workspace) -> list[Run]:
    """Each site's last run of its kind and round in the current plan, where it failed."""
    last: dict[tuple[str, Work, int], Run] = {}
    newest, plan = workspace.newest_model().version, workspace.plan()
    for run in workspace.runs():
        if plan is not None and run.order.plan == plan.number:
            last[run.site, run.order.work, run.order.round] = run
    return [
        run
        for run in last.values()
        if run.stage == Stage.FAILED and (run.order.round > newest or run.order.work == Work.EVALUATE)
    ]


def state_of(run: Run, contact: Contact) -> str:
    """What a site is doing, in words."""
    held = run.held or (hold_of(contact) if run.open else None)
    if held is not None:
        return f"HELD: {held.reason}" if held.until is None else f"waits: {held.reason}"
    if contact.trouble is not None and run.open:
        return f"{run.stage}; {contact.trouble.message}"
    return run.stage


def ago(moment: float | None) -> str:
    """A duration since a moment as a person says it: 12 s, 5 min, 3 h, 2 d."""
    if moment is None:
        return ""
    seconds = max(0, int(time.time() - moment))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
