"""Owns when a site is contacted next: pure functions over its contact record, its runs and what a login costs there."""

import random
import time
from collections.abc import Sequence
from dataclasses import replace

from flctl.errors import FlctlError, LoginNeeded, LoginPaused, LoginTooSoon, SiteUnreachable
from flctl.facility.allowance import SKEW_NOTED
from flctl.facility.certificates import clock
from flctl.facility.profile import Site
from flctl.records import Contact, Failure, Held, Run, Stage

BACKOFF_FIRST, BACKOFF_MOST = 10.0, 900.0
"""Seconds before the second try of a site in trouble, and the most between two tries."""
DAY = 86400.0
STEP, BURST = 30.0, 1800.0
"""A site is contacted once in so many seconds in the long run (twice as often as `poll.every`, where that is less), and
more often only as long as that does not take more than half an hour of it in advance: 60 contacts. No defect of ours
makes more than 180 in an hour."""
PACE = 0.1
"""What is told too late is late by this part of the time that it took, at most."""
SETTLING = 5.0
"""Seconds after an expected start or end at which a look is worth it."""


def next_due(site: Site, runs: Sequence[Run], now: float, *, stays: bool) -> float:
    """When to look at a site again that was just reached: at expected starts and ends of its jobs, and otherwise after
    an interval: where this process does not stay, each look is a login, so that they are as far apart as the day's
    logins allow, and further where each costs a one-time code."""
    if any(run.stage == Stage.ORDERED and not is_held(run.held) for run in runs):
        return now
    changed = max((run.changed_at for run in runs), default=now)
    interval = pace(site, now - changed)
    if site.connection == "ssh" and not stays:
        interval = max(between_ticks(site), 0.0 if site.login.coded else interval)
    moments = [now + interval]
    for run in runs:
        seconds = (run.job.absent_at, run.job.never_at, run.job.again_at)
        moments += [at for first in seconds if first is not None and (at := first + site.poll.absence) > now]
        moments += [moment + SETTLING for moment in _expected(run, site) if moment is not None and moment > now]
        if run.held is not None and run.held.until is not None and run.held.until > now:
            moments.append(run.held.until)
    return max(now + min(1.0, interval), min(moments))


def _expected(run: Run, site: Site) -> tuple[float | None, float | None]:
    """When the run's job begins and ends, as the scheduler has it. Where it says nothing of the end: as if the job had
    begun at once, or when it is expected to, and took its whole walltime."""
    job, end = run.job, run.job.expected_end
    if end is None and run.stage in (Stage.QUEUED, Stage.RUNNING):
        begins = job.started_at or job.expected_start or run.changed_at
        end = begins + (job.walltime or site.shape.walltime)
    return job.expected_start, end


def between_ticks(site: Site) -> float:
    """Seconds between two looks of ticks at least, each of which is a login."""
    return max(site.poll.login_every if site.login.coded else site.poll.every, DAY / site.login.per_day)


def pace(site: Site, quiet: float) -> float:
    """Seconds between two looks at a site where nothing changed for `quiet` seconds: a tenth of them, between
    `poll.every` and `poll.most`."""
    return min(max(site.poll.every, quiet * PACE), max(site.poll.every, site.poll.most))


def is_due(contact: Contact, runs: Sequence[Run], now: float) -> bool:
    """Whether the site of these open runs is to be contacted: its time has come, or it was given a new order since that
    time was set, or the clock was set back since; but never more often than at the pace that a site bears."""
    waiting = [run for run in runs if not is_held(run.held)]
    if is_held(contact.held) or not waiting or now + BURST < contact.paced <= now + BURST + STEP:
        return False
    if contact.known_at > now + STEP:
        return True
    ordered = any(run.stage == Stage.ORDERED and run.changed_at > contact.known_at for run in waiting)
    return contact.due <= now or ordered


def reached(contact: Contact, site: Site, now: float, due: float) -> Contact:
    paced = _paced(contact, now, min(STEP, site.poll.every / 2))
    contact = replace(contact, due=due, known_at=now, reached_at=now, paced=paced)
    return replace(contact, failures=0, unreachable_since=None, trouble=None)


def postponed(contact: Contact, error: LoginTooSoon, now: float) -> Contact:
    """The record where no login was tried, and none may be before a moment; why, if that is not a minute away."""
    trouble = failure_of(error) if isinstance(error, LoginPaused) else contact.trouble
    due = max(now + 1.0, error.until + 0.5)
    return replace(contact, due=due, known_at=now, trouble=trouble, paced=_paced(contact, now, STEP))


def _paced(contact: Contact, now: float, step: float) -> float:
    """One contact more. What lies further in the future than a pace can was written before the clock was set back."""
    begun = contact.paced if contact.paced <= now + BURST + STEP else now
    return max(begun, now) + step


def failed(contact: Contact, error: FlctlError, now: float) -> Contact:
    """The record after a contact that failed: tried again after a growing, jittered pause; a refused login is held. One
    that could not even be tried (no agent, an expired certificate) is not: it works once a person has renewed it, and
    until then it costs the site nothing to look again soon."""
    pause = _pause(contact)
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
        failures=contact.failures + 1,
        unreachable_since=lost,
        login_until=until,
        held=held,
        trouble=failure_of(error),
        paced=_paced(contact, now, STEP),
    )


def _pause(contact: Contact) -> float:
    """Seconds until the next try, with decorrelated jitter: at random, up to three times the last pause, so that sites
    and campaigns which failed together do not come back together."""
    if not contact.failures:
        return BACKOFF_FIRST * random.uniform(0.8, 1.2)
    last = min(max(contact.due - contact.known_at, BACKOFF_FIRST), BACKOFF_MOST)
    return min(BACKOFF_MOST, random.uniform(BACKOFF_FIRST, 3 * last))


def is_held(held: Held | None) -> bool:
    return held is not None and (held.until is None or held.until > time.time())


def for_a_person(held: Held | None) -> bool:
    """Whether a hold does not end by itself."""
    return held is not None and held.until is None


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


def clock_differs(name: str, contact: Contact) -> str:
    """A warning if our clock and the site's differ by more than is good for codes and certificates; else empty."""
    if contact.skew is None or abs(contact.skew) <= SKEW_NOTED:
        return ""
    where = "ahead of" if contact.skew > 0 else "behind"
    return f"{name}: this machine's clock is {abs(contact.skew):.0f} s {where} the site's: is it kept right (NTP)?"


def _expected_end(run: Run, site: Site, now: float) -> float:
    """As the scheduler expects it; else its walltime after its start, or after now."""
    start = run.job.started_at or max(now, run.job.expected_start or now)
    return run.job.expected_end or start + site.shape.walltime


def failure_of(error: FlctlError) -> Failure:
    return Failure(code=error.code, exit_code=error.exit_code, message=error.message, hint=error.hint)
