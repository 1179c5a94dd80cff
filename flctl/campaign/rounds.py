"""Owns the loop behind `flctl round`: ticks with pauses, until the plan is fulfilled or only a person can help."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from flctl.campaign.attempts import why_held
from flctl.campaign.contacts import failure_of, for_a_person, hold_of, is_held, remedy_of
from flctl.campaign.engine import Engine
from flctl.campaign.planning import is_open
from flctl.campaign.report import alternative, failed_runs
from flctl.campaign.workspace import Workspace
from flctl.errors import (
    AggregationRefused,
    Interrupted,
    JobFailed,
    Locked,
    LoginNeeded,
    LoginPaused,
    WaitElapsed,
    exit_code_of,
)
from flctl.policy import Decision
from flctl.policy.evaluating import CANCELLED
from flctl.records import Contact, Failure, Plan, Run, Stage, Work

UNREACHABLE_PATIENCE = 900.0
"""Seconds for which `round` goes on trying a site that it had reached before; ticks never give up."""
TRANSFER_TRIES = 3
FATAL = {"configuration", "host_key", "login_needed", "budget_refused", "locked", "internal"}
LONGEST_PAUSE, WHILE_OTHERS_DECIDE = 5.0, 0.5
"""Seconds between two ticks at most; and while another flctl holds the campaign's lock."""

Errors = list[tuple[str, Failure]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a command that moved the campaign ended. `errors`: by site ("" is home), what went wrong on the way; `notes`:
    what waits for a person although nothing went wrong now."""

    done: bool
    errors: Errors
    notes: Errors = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 0 if self.done else exit_code_of([failure.exit_code for _, failure in self.errors])

    @property
    def status(self) -> str:
        if self.exit_code:
            return "error"
        return "partial" if self.errors or self.notes else "ok"


def drive(engine: Engine, plan: Plan, *, wait: float | None, pause: Callable[[float], object]) -> Outcome:
    """Tick until the plan is done, nothing can move without a person, or `wait` seconds are over. `pause(seconds)`
    waits and may show what is going on."""
    workspace = engine.workspace
    deadline = None if wait is None else time.monotonic() + wait
    _try_again(workspace)
    while True:
        try:
            decision = engine.tick(stays=True, deadline=deadline)
        except Interrupted:
            if deadline is None or time.monotonic() < deadline:
                raise
            return _elapsed(engine, None, wait)
        if decision is not None and decision.done:
            return _finished(workspace, plan)
        waiting = [run for run in workspace.runs() if run.open]
        # What waits for a model that is not made yet moves nothing by itself (a folder that was put back knows such).
        waiting = [run for run in waiting if workspace.has_model(run.order.base)]
        if decision is not None and not any(not _stuck(run, workspace.contact(run.site)) for run in waiting):
            return Outcome(done=False, errors=_explain(engine, decision))
        if deadline is not None and time.monotonic() >= deadline:
            return _elapsed(engine, decision, wait)
        pause(_until_due(workspace, waiting, deadline) if waiting else WHILE_OTHERS_DECIDE)


def _elapsed(engine: Engine, decision: Decision | None, wait: float | None) -> Outcome:
    error = WaitElapsed(f"--wait of {wait:g} s is over", hint="flctl round goes on; jobs at the sites still run")
    return Outcome(done=False, errors=[*_explain(engine, decision), ("", failure_of(error))])


def _finished(workspace: Workspace, plan: Plan) -> Outcome:
    """Nothing of the plan is left to do: fulfilled, ended by its patience, or by somebody while we waited. A plan that
    only evaluates is fulfilled if every site did."""
    newest, now = workspace.newest_model().version, workspace.plan()
    if plan.evaluates is not None:
        return _evaluated(workspace, plan)
    stopped = now is not None and now.number == plan.number and now.ended not in ("", CANCELLED)
    if newest >= plan.target or stopped:
        return Outcome(done=True, errors=_lasting(workspace, plan))
    error = JobFailed(
        f"the plan was cancelled before model {plan.target:04d} was made; the newest is {newest:04d}",
        hint="flctl round makes the next one",
    )
    return Outcome(done=False, errors=[("", failure_of(error))])


def _evaluated(workspace: Workspace, plan: Plan) -> Outcome:
    runs = {run.site: run for run in workspace.runs() if run.order.plan == plan.number}
    failed = _unique(_lasting(workspace, plan))
    if all(site in runs and runs[site].stage == Stage.FETCHED for site in plan.sites):
        return Outcome(done=True, errors=failed)
    error = JobFailed(f"the evaluation of model {plan.evaluates:04d} was cancelled", hint="flctl evaluate begins anew")
    return Outcome(done=False, errors=failed or [("", failure_of(error))])


def _try_again(workspace: Workspace) -> None:
    """A person asked: sites in trouble are tried at once, whatever pause they had earned. Held ones stay held."""
    for site in {run.site for run in workspace.runs() if run.open}:
        with suppress(Locked), workspace.lock_site(site, patience=0.0):
            contact = workspace.contact(site)
            if contact.trouble is not None:
                workspace.save_contact(site, replace(contact, due=0.0, failures=0, unreachable_since=None))


def _stuck(run: Run, contact: Contact) -> bool:
    """Whether waiting longer for this run is no use without a person."""
    if for_a_person(run.held) or contact.held is not None:
        return True
    if contact.trouble is None:
        return False
    if contact.trouble.code == LoginPaused.code:
        return False
    if contact.trouble.code in FATAL:
        return True
    if contact.trouble.code == "site_unreachable":
        lost = time.time() - (contact.unreachable_since or time.time())
        return contact.reached_at is None or lost > UNREACHABLE_PATIENCE
    return contact.failures >= TRANSFER_TRIES


def _lasting(workspace: Workspace, plan: Plan) -> Errors:
    """What failed on the way and was not made good: the plan's runs that failed or were left out, but no merges: the
    models are there."""
    runs = [run for run in workspace.runs() if run.order.plan == plan.number and run.order.work != Work.MERGE]
    return [(run.site, run.failure) for run in runs if run.failure]


def _explain(engine: Engine, decision: Decision | None) -> Errors:
    """Why the plan is not done: failed runs, held sites, sites in trouble, a round that lacks contributions."""
    workspace = engine.workspace
    errors: Errors = [(run.site, run.failure) for run in failed_runs(workspace) if run.failure and not run.skipped]
    for run in workspace.runs():
        contact = workspace.contact(run.site)
        if run.open and hold_of(contact) is not None:
            errors.append((run.site, _held(run.site, contact)))
        elif run.open and for_a_person(run.held):
            errors.append((run.site, why_held(run)))
        elif run.open and contact.trouble is not None:
            errors.append((run.site, contact.trouble))
    errors += [(site, failure) for site, failure in engine.errors if not site]
    if decision is not None and decision.lacking and not errors:
        errors = _lacking(workspace, decision)
    elif decision is not None and not errors and not any(run.open for run in workspace.runs()):
        errors.append(("", failure_of(AggregationRefused("nothing is under way", hint="flctl status"))))
    return _unique(errors)


def _held(site: str, contact: Contact) -> Failure:
    """Why a held site is not contacted, with what to do first where that is known."""
    held = hold_of(contact)
    return failure_of(LoginNeeded(f"HELD: {held.reason if held else ''}", hint=remedy_of(site, contact)))


def _lacking(workspace: Workspace, decision: Decision | None) -> Errors:
    """That a round cannot close without a person, if so."""
    if decision is None or not decision.lacking:
        return []
    failed = sorted((run for run in failed_runs(workspace) if not run.skipped), key=lambda run: run.site)
    hint = "flctl retry, or flctl cancel ends the plan"
    if failed:
        hint = f"flctl retry {failed[0].site} or {alternative(workspace, failed[0])}"
    return [("", failure_of(AggregationRefused(decision.lacking, hint=hint)))]


def tick_outcome(engine: Engine, decision: Decision | None) -> Outcome:
    """How one tick went: what newly went wrong in it decides the exit code; an idle one is no error."""
    workspace = engine.workspace
    if engine.busy and not engine.worked:
        return Outcome(done=False, errors=[("", failure_of(Locked("another flctl moves this campaign now")))])
    plan = workspace.plan()
    done = plan is None or not is_open(workspace, plan) or (decision is not None and decision.done)
    new = {site for site, _ in engine.errors}
    contacts = {run.site: workspace.contact(run.site) for run in workspace.runs() if run.open}
    held = [(site, _held(site, contact)) for site, contact in contacts.items() if hold_of(contact) and site not in new]
    waiting = [run for run in workspace.runs() if run.open and for_a_person(run.held) and run.site not in new]
    held += [(run.site, why_held(run)) for run in waiting]
    return Outcome(done=done, errors=_unique(engine.errors), notes=[*held, *_lacking(workspace, decision)])


def _unique(errors: Errors) -> Errors:
    return list(dict.fromkeys(errors))


def _until_due(workspace: Workspace, waiting: list[Run], deadline: float | None) -> float:
    """Seconds to the next contact that is due, short enough to keep the view alive and to see other processes' work."""
    records = [workspace.contact(run.site) for run in waiting if not is_held(run.held)]
    due = min((contact.due for contact in records if not is_held(contact.held)), default=time.time() + LONGEST_PAUSE)
    due -= time.time()
    if deadline is not None:
        due = min(due, deadline - time.monotonic())
    return min(LONGEST_PAUSE, max(0.05, due))
