"""Owns when a site is contacted next: pure functions over its contact record, its runs and what a login costs there."""

import random
import time
from collections.abc import Sequence
from dataclasses import replace

from flctl.errors import FlctlError, LoginNeeded, SiteUnreachable
from flctl.facility.profile import Site
from flctl.records import Contact, Failure, Held, Run, Stage

BACKOFF_FIRST, BACKOFF_MOST = 10.0, 900.0
"""Seconds before the second try of a site in trouble, and the most between two tries."""
SETTLING = 5.0
"""Seconds after an expected start or end at which a look is worth it."""


def next_due(site: Site, runs: Sequence[Run], now: float, *, stays: bool) -> float:
    """When to look at a site again that was just reached. Where each login costs a one-time code and this process does
    not stay, that is at expected starts and ends of jobs and otherwise at the long interval."""
    if any(run.stage == Stage.ORDERED and not is_held(run.held) for run in runs):
        return now
    costly = site.connection == "ssh" and site.login.kind == "key+totp"
    interval = site.poll.login_every if costly and not stays else site.poll.every
    moments = [now + interval]
    for run in runs:
        if run.job.absent_at is not None:
            moments.append(run.job.absent_at + site.poll.absence)
        expected = (run.job.expected_start, run.job.expected_end)
        moments += [moment + SETTLING for moment in expected if moment is not None and moment > now]
    return max(now + min(1.0, interval), min(moments))


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
    that could not even be tried (no agent, an expired certificate) is not: it works once a person has renewed it."""
    failures = contact.failures + 1
    pause = min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** min(failures - 1, 10)) * random.uniform(0.8, 1.2)
    held, lost = contact.held, contact.unreachable_since
    if isinstance(error, LoginNeeded) and error.attempted:
        held = Held(reason=error.message, since=now)
    if isinstance(error, SiteUnreachable):
        lost = lost or now
    return replace(
        contact,
        due=now + pause,
        known_at=now,
        failures=failures,
        unreachable_since=lost,
        held=held,
        trouble=failure_of(error),
    )


def is_held(held: Held | None) -> bool:
    return held is not None and (held.until is None or held.until > time.time())


def failure_of(error: FlctlError) -> Failure:
    return Failure(code=error.code, exit_code=error.exit_code, message=error.message, hint=error.hint)
