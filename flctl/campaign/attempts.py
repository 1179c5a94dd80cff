"""Owns the next attempt of a run: when flctl opens one by itself, and the one place where any is opened.

An attempt that ended without success is revoked at its site first (its owner taken, its job cancelled by name), so what
it may still do there is nobody's: another folder, another token, and no record of it is ever read again.
"""

import time
from dataclasses import replace

from flctl.campaign import budget, contacts
from flctl.campaign.config import Configuration
from flctl.campaign.workspace import Workspace
from flctl.facility.certificates import clock
from flctl.facility.profile import Site
from flctl.records import Attempt, Cause, Failure, Held, Job, Run, Stage, token_of

AGAIN = frozenset({Cause.INFRASTRUCTURE, Cause.LOST})
"""Ends for which neither the program nor its order is to blame."""

PAUSE_MOST = 3600.0
"""Seconds between two submissions to a queue that is full, at most; at first it is `poll.every`."""


def tries(run: Run) -> int:
    """Attempts since a person last decided about the run, the present one with them; those for which its queue had no
    room were none."""
    count = 1
    for attempt in reversed(run.past):
        if not attempt.automatic:
            break
        count += attempt.cause != Cause.FULL
    return count


def pause(run: Run, site: Site, *, stays: bool) -> float:
    """Seconds to wait before a run whose queue was full is submitted again: twice as long each time in a row."""
    times = 0
    for attempt in reversed(run.past):
        if attempt.cause != Cause.FULL:
            break
        times += 1
    seconds = float(min(PAUSE_MOST, site.poll.every * 2 ** min(times, 12)))
    return seconds if stays else max(seconds, contacts.between_ticks(site))


def may_follow(run: Run, most: int) -> bool:
    """Whether flctl tries a failed run again by itself: what failed was not the job's own fault, or it ran out of time
    and its checkpoint goes further than that of any attempt before; at most `most` tries in a row, but as many as it
    takes where the queue is full."""
    if run.stage != Stage.FAILED or run.skipped or run.failure is None:
        return False
    if run.failure.cause == Cause.FULL:
        return True
    if tries(run) >= most:
        return False
    if run.failure.cause == Cause.TIME:
        return (run.job.progress or 0) > max((attempt.progress or 0 for attempt in run.past), default=0)
    return run.failure.cause in AGAIN


def opened(workspace: Workspace, run: Run, *, automatic: bool) -> Run:
    """The run with its next attempt: a new token, a new folder, a new job. Not yet written."""
    number, why = run.attempt + 1, run.failure
    ended = Attempt(
        number=run.attempt,
        job_id=run.job.id,
        cause=why.cause if why else None,
        reason=why.message if why else "",
        progress=run.job.progress,
        automatic=automatic,
    )
    return replace(
        run,
        stage=Stage.ORDERED,
        attempt=number,
        job=Job(token=token_of(workspace.id, run.site, run.number, number)),
        held=None,
        failure=None,
        contribution=None,
        skipped=False,
        past=(*run.past, ended),
        spent=budget.used_by(run, budget.default_rate(workspace, run)),
    )


def followed(workspace: Workspace, configuration: Configuration, site: Site, run: Run, *, stays: bool) -> Run:
    """The run as judged, or with its next attempt if flctl opens that by itself. The failure is journaled; run and next
    attempt are one record, so that nobody sees a failure that is already made good. Where the queue was full, it begins
    after a pause. `stays`: another contact costs no login."""
    most = configuration.retry.attempts
    if not may_follow(run, most):
        return run
    why = run.failure
    workspace.journal.append(
        "run",
        site=run.site,
        number=run.number,
        attempt=run.attempt,
        work=run.order.work,
        stage=run.stage,
        job_id=run.job.id,
        reason=why.message if why else "",
        cause=why.cause if why else None,
        progress=run.job.progress,
    )
    following = opened(workspace, run, automatic=True)
    if why is None or why.cause != Cause.FULL:
        return following
    now = time.time()
    return replace(following, held=Held(reason=why.message, since=now, until=now + pause(run, site, stays=stays)))


def waits_for_a_person(run: Run) -> bool:
    """Whether an open run is held because of what happened to its job: only retry, skip or cancel go on from there."""
    return run.open and run.held is not None and run.failure is not None


def why_held(run: Run) -> Failure:
    """A held run as the error it is."""
    return run.failure or budget.held_by_budget(run)


def line_of_next(run: Run) -> str:
    """That flctl tries again by itself, and why, as a line of text."""
    last = run.past[-1]
    went = f" from step {last.progress}" if last.progress else ""
    if run.held is not None and run.held.until is not None:
        went = f" at {clock(run.held.until)}"
    return f"{run.site}: run {run.number:04d}: {last.reason}; attempt {run.attempt} follows{went}"
