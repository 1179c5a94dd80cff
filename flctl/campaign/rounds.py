"""Owns the loop behind `flctl round`: ticks with pauses, until the plan is fulfilled or only a person can help."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from flctl.campaign.contacts import failure_of
from flctl.campaign.engine import Engine
from flctl.campaign.planning import is_open
from flctl.campaign.workspace import Workspace
from flctl.errors import AggregationRefused, Locked, LoginNeeded, WaitElapsed, exit_code_of
from flctl.policy import Decision
from flctl.records import Contact, Failure, Run

UNREACHABLE_PATIENCE = 900.0
"""Seconds for which `round` goes on trying a site that it had reached before; ticks never give up."""
TRANSFER_TRIES = 3
FATAL = {"configuration", "host_key", "login_needed", "budget_refused", "internal"}
LONGEST_PAUSE, WHILE_OTHERS_DECIDE = 5.0, 0.5
"""Seconds between two ticks at most; and while another flctl holds the campaign's lock."""

Errors = list[tuple[str, Failure]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a command that moved the campaign ended. `errors`: by site ("" is home), what went wrong on the way."""

    done: bool
    errors: Errors

    @property
    def exit_code(self) -> int:
        return 0 if self.done else exit_code_of([failure.exit_code for _, failure in self.errors])

    @property
    def status(self) -> str:
        if self.exit_code:
            return "error"
        return "partial" if self.errors else "ok"


def drive(engine: Engine, *, wait: float | None, pause: Callable[[float], object]) -> Outcome:
    """Tick until the plan is done, nothing can move without a person, or `wait` seconds are over. `pause(seconds)`
    waits and may show what is going on."""
    workspace = engine.workspace
    deadline = None if wait is None else time.monotonic() + wait
    _try_again(workspace)
    while True:
        decision = engine.tick(stays=True)
        if decision is not None and decision.done:
            return Outcome(done=True, errors=_lasting(engine))
        waiting = [run for run in workspace.runs() if run.open]
        if decision is not None and not any(not _stuck(run, workspace.contact(run.site)) for run in waiting):
            return Outcome(done=False, errors=_explain(engine, decision))
        if deadline is not None and time.monotonic() >= deadline:
            elapsed = WaitElapsed(
                f"--wait of {wait:g} s is over", hint="flctl round goes on; jobs at the sites still run"
            )
            return Outcome(done=False, errors=[*_explain(engine, decision), ("", failure_of(elapsed))])
        pause(_until_due(workspace, waiting, deadline) if waiting else WHILE_OTHERS_DECIDE)


def _try_again(workspace: Workspace) -> None:
    """A person asked: sites in trouble are tried at once, whatever pause they had earned. Held ones stay held."""
    for site in {run.site for run in workspace.runs() if run.open}:
        with suppress(Locked), workspace.lock_site(site, patience=0.0):
            contact = workspace.contact(site)
            if contact.trouble is not None:
                workspace.save_contact(site, replace(contact, due=0.0, failures=0, unreachable_since=None))


def _stuck(run: Run, contact: Contact) -> bool:
    """Whether waiting longer for this run is no use without a person."""
    if run.held is not None or contact.held is not None:
        return True
    if contact.trouble is None:
        return False
    if contact.trouble.code in FATAL:
        return True
    if contact.trouble.code == "site_unreachable":
        lost = time.time() - (contact.unreachable_since or time.time())
        return contact.reached_at is None or lost > UNREACHABLE_PATIENCE
    return contact.failures >= TRANSFER_TRIES


def _lasting(engine: Engine) -> Errors:
    """What failed on the way and was not made good: runs of this process that failed, troubles that still stand."""
    return _unique([(site, failure) for site, failure in engine.errors if failure.code != "site_unreachable"])


def _explain(engine: Engine, decision: Decision | None) -> Errors:
    """Why the plan is not done: failed runs, held sites, sites in trouble, a round that lacks contributions."""
    from flctl.campaign.planning import failed_runs

    workspace = engine.workspace
    errors: Errors = [(run.site, run.failure) for run in failed_runs(workspace) if run.failure and not run.skipped]
    for run in workspace.runs():
        contact = workspace.contact(run.site)
        if run.open and contact.held is not None and contact.trouble is None:
            held = LoginNeeded(f"held: {contact.held.reason}", hint=f"flctl release {run.site}")
            errors.append((run.site, failure_of(held)))
        elif run.open and contact.trouble is not None:
            errors.append((run.site, contact.trouble))
    if decision is not None and decision.lacking:
        names = sorted({site for site, _ in errors if site})
        hint = f"flctl retry {names[0]} or flctl skip {names[0]}" if names else "flctl status"
        errors.append(("", failure_of(AggregationRefused(decision.lacking, hint=hint))))
    return _unique(errors)


def tick_outcome(engine: Engine, decision: Decision | None) -> Outcome:
    """How one tick went: what newly went wrong in it decides the exit code, an idle one is no error."""
    plan = engine.workspace.plan()
    done = plan is None or not is_open(engine.workspace, plan) or (decision is not None and decision.done)
    return Outcome(done=done, errors=_unique(engine.errors))


def _unique(errors: Errors) -> Errors:
    return list(dict.fromkeys(errors))


def _until_due(workspace: Workspace, waiting: list[Run], deadline: float | None) -> float:
    """Seconds to the next contact that is due, short enough to keep the view alive and to see other processes' work."""
    due = min((workspace.contact(run.site).due for run in waiting), default=0.0) - time.time()
    if deadline is not None:
        due = min(due, deadline - time.monotonic())
    return min(LONGEST_PAUSE, max(0.05, due))
