"""Owns asking a site for a plan: its queues, its free space, when a job would start. Nothing is submitted."""

import time

from flctl.campaign.config import load_profile
from flctl.campaign.contacts import failure_of, is_held
from flctl.campaign.engine import Engine
from flctl.campaign.foresight import way_barred
from flctl.campaign.outlook import Told
from flctl.campaign.rehearsal import script_of
from flctl.campaign.session import Session
from flctl.campaign.trial import PROBE_TIMEOUT, remember_space
from flctl.errors import FlctlError, Interrupted, Locked, LoginNeeded, LoginTooSoon
from flctl.facility import limits
from flctl.facility.probe import bounded, in_login_shell, last_lines, space_commands, trial_command
from flctl.facility.scheduler import QueryFailed
from flctl.facility.shell import Answer
from flctl.records import Failure
from flctl.words import printable


def inquire(engine: Engine, name: str) -> Told:
    """Log in once and ask. A site that cannot be asked without a person says so in a note, and what is remembered of it
    stands in. Raises only LoginTooSoon (the caller may wait) and Interrupted."""
    held = engine.workspace.contact(name).held
    if held is not None and is_held(held):
        return Told(note=f"not asked, the site is held: {held.reason}")
    profile = load_profile(engine.workspace, name)
    if way_barred(profile):
        return Told(note="not asked")
    try:
        with engine.workspace.lock_site(name) as lock:
            return _ask(engine.access.session(profile, lock, equip=False))
    except (LoginTooSoon, Interrupted):
        raise
    except Locked:
        return Told(note="not asked: another flctl is working there")
    except LoginNeeded as error:
        engine.access.hold(name, error)
        if error.attempted:
            return Told(problems=(failure_of(error),))
        return Told(note=f"not asked: {error.message} -> {error.hint}")
    except FlctlError as error:
        return Told(problems=(failure_of(error),))
    finally:
        engine.access.drop(name)


def _ask(session: Session) -> Told:
    scheduler, site = session.scheduler, session.site
    trial = trial_command(scheduler, script_of(session.workspace, site.name))
    queues = scheduler.queues()
    asked = {
        **space_commands(str(session.root)),
        **({"queues": bounded(queues)} if queues else {}),
        **({"trial": trial} if trial else {}),
        **({"balance": bounded(in_login_shell(site.budget.balance))} if site.budget.balance else {}),
    }
    answers = session.ask(asked, timeout=PROBE_TIMEOUT)
    remember_space(session, answers["space"])
    told = _estimated(session, answers["trial"]) if trial else Told()
    found = _limits(session, answers["queues"]) if queues else ()
    balance = last_lines(answers["balance"], site.budget.unit) if "balance" in answers else ""
    return Told(asked=True, start=told.start, balance=balance, note=told.note, problems=(*found, *told.problems))


def _estimated(session: Session, answer: Answer) -> Told:
    try:
        found = session.scheduler.estimate(answer.status, answer.stdout, answer.stderr)
    except QueryFailed as failure:
        return Told(note=f"no estimate: {printable(str(failure))}")
    if found.refusal:
        return Told(problems=(_wrong(session, f"the scheduler would refuse the job: {printable(found.refusal)}"),))
    return Told(start=found.start)


def _limits(session: Session, answer: Answer) -> tuple[Failure, ...]:
    """What the scheduler itself does not allow; what the profile's tables say already is not said twice."""
    now, site = time.time(), session.site
    try:
        seen = session.scheduler.queues_seen(answer.status, answer.stdout, answer.stderr)
    except QueryFailed:
        return ()
    known = limits.too_much(site, now)
    return tuple(
        _wrong(session, printable(reason)) for reason in limits.too_much_there(site, seen, now) if reason not in known
    )


def _wrong(session: Session, message: str) -> Failure:
    site = session.site
    hint = f"change [shapes.{site.scheduler.shape}] or [scheduler] in sites/{site.name}.toml"
    return Failure(code="configuration", exit_code=3, message=message, hint=hint)
