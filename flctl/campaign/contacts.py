"""Owns when a site is contacted next: pure functions over its contact record, its runs and what a login costs there."""

import random
import time
from collections.abc import Sequence
from dataclasses import replace

from flctl.errors import FlctlError, LoginNeeded, SiteUnreachable
from flctl.facility.certificates import clock
from flctl.facility.profile import Site
from flctl.records import Contact, Failure, Held, Run, Stage

BACKOFF_FIRST, BACKOFF_MOST = 10.0, 900.0
"""Seconds before the second try of a site in trouble, and the most between two tries."""
PACE = 0.1
"""What is told too late is late by this part of the time that it took, at most."""
SETTLING = 5.0
"""Seconds after an expected start or end at which a look is worth it."""


def next_due(site: Site, runs: Sequence[Run], now: float, *, stays: bool) -> float:
    """When to look at a site again that was just reached: at expected starts and ends of its jobs, and otherwise after
    an interval: the long one where each login costs a one-time code and this process does not stay."""
    if any(run.stage == Stage.ORDERED and not is_held(run.held) for run in runs):
        return now
    costly = site.connection == "ssh" and site.login.coded
    changed = max((run.changed_at for run in runs), default=now)
    interval = site.poll.login_every if costly and not stays else pace(site, now - changed)
    moments = [now + interval]
    for run in runs:
        seconds = (run.job.absent_at, run.job.never_at)
        moments += [first + site.poll.absence for first in seconds if first is not None]
        expected = (run.job.expected_start, run.job.expected_end)
        moments += [moment + SETTLING for moment in expected if moment is not None and moment > now]
    return max(now + min(1.0, interval), min(moments))


def pace(site: Site, quiet: float) -> float:
    """Seconds between two looks at a site where nothing changed for `quiet` seconds: a tenth of them, between
    `poll.every` and `poll.most`."""
    return min(max(site.poll.every, quiet * PACE), max(site.poll.every, site.poll.most))


def is_due(contact: Contact, runs: Sequence[Run], now: float) -> bool:
    """Whether the site of these open runs is to be contacted: its time has come, or it was given a new order since that
    time was set."""
    waiting = [run for run in runs if not is_held(run.held)]
    if is_held(contact.held) or not waiting:
        return False
    ordered = any(run.stage == Stage.ORDERED and run.changed_at > contact.known_at for run in waiting)
    return contact.due <= now or ordered


def reached(contact: Contact, now: float, due: float) -> Contact:
    return replace(contact, due=due, known_at=now, reached_at=now, failures=0, unreachable_since=None, trouble=None)


def postponed(contact: Contact, until: float, now: float) -> Contact:
    return replace(contact, due=until, known_at=now)


def failed(contact: Contact, error: FlctlError, now: float) -> Contact:
    """The record after a contact that failed: tried again after a growing, jittered pause; a refused login is held. One
    that could not even be tried (no agent, an expired certificate) is not: it works once a person has renewed it, and
    until then it costs the site nothing to look again soon."""
    failures = contact.failures + 1
    pause = min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** min(failures - 1, 10)) * random.uniform(0.8, 1.2)
    held, lost, until = contact.held, contact.unreachable_since, contact.login_until
    if isinstance(error, LoginNeeded) and error.attempted:
        held = Held(reason=error.message, since=now)
    elif isinstance(error, LoginNeeded):
        pause, until = BACKOFF_FIRST, None
    if isinstance(error, SiteUnreachable):
        lost = lost or now
    return replace(
        contact,
        due=now + pause,
        known_at=now,
        failures=failures,
        unreachable_since=lost,
        login_until=until,
        held=held,
        trouble=failure_of(error),
    )


def is_held(held: Held | None) -> bool:
    return held is not None and (held.until is None or held.until > time.time())


def hold_of(contact: Contact) -> Held | None:
    """Why a site waits for a person: it is held, or no login could be tried. That ends by itself once one can."""
    if contact.held is None and contact.trouble is not None and contact.trouble.code == LoginNeeded.code:
        return Held(reason=contact.trouble.message, since=contact.known_at)
    return contact.held


def remedy_of(site: str, contact: Contact) -> str:
    """What to type so that a site which waits for a person goes on."""
    hint = contact.trouble.hint if contact.trouble else ""
    if contact.held is None or "flctl release" in hint:
        return hint
    return f"{hint or 'put it right'}, then flctl release {site}"


def outlives(contact: Contact, site: Site, runs: Sequence[Run], now: float) -> str:
    """A warning if the site's jobs are expected to end after what its login is good for, and a person has to renew
    that; else empty."""
    until = contact.login_until
    login = site.login
    if until is None or until <= now or login.renew_unattended or not (login.attended or login.kind == "certificate"):
        return ""
    ends = [_expected_end(run, site, now) for run in runs if run.open and run.stage != Stage.ENDED]
    if max(ends, default=0.0) <= until:
        return ""
    what = "certificate" if login.kind == "certificate" else "connection that is kept"
    return (
        f"{site.name}: the {what} ends {clock(until)}, before the jobs' expected end ({clock(max(ends))}): "
        f"flctl login {site.name} then"
    )


def _expected_end(run: Run, site: Site, now: float) -> float:
    """As the scheduler expects it; else its walltime after its start, or after now."""
    start = run.job.started_at or max(now, run.job.expected_start or now)
    return run.job.expected_end or start + site.shape.walltime


def failure_of(error: FlctlError) -> Failure:
    return Failure(code=error.code, exit_code=error.exit_code, message=error.message, hint=error.hint)
