"""Owns `flctl site test` and `flctl site trust`: a campaign's sites, tried before a round depends on them."""

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath

from flctl.campaign.batch_side import try_batch
from flctl.campaign.config import load_configuration, load_profile, whole_profile
from flctl.campaign.contacts import failure_of, is_held
from flctl.campaign.engine import Engine
from flctl.campaign.etiquette import may_ask
from flctl.campaign.foresight import outdated
from flctl.campaign.outlook import want_of
from flctl.campaign.rehearsal import script_of
from flctl.campaign.session import Session
from flctl.campaign.workspace import Workspace
from flctl.errors import ConfigurationError, FlctlError, Interrupted, LoginNeeded, LoginTooSoon, exit_code_of
from flctl.facility import limits
from flctl.facility.certificates import clock
from flctl.facility.findings import verdicts
from flctl.facility.openssh import login_place, transfer_place
from flctl.facility.probe import PATIENCE, QUERIES, Check, around, noise, questions, space_left
from flctl.facility.profile import Site
from flctl.facility.shell import Answer, Program, quote
from flctl.records import Failure, FileEntry
from flctl.words import printable

PROBE_TIMEOUT = 10.0 * PATIENCE
"""Seconds for all questions together; each has a limit of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReport:
    """What `site test` found. `failure`: why the site could not be tested at all, or no longer."""

    site: str
    checks: tuple[Check, ...]
    logins: int
    failure: Failure | None = None

    @property
    def count(self) -> str:
        """`14 checks: 12 ok, 1 warn, 1 fail; 1 login`."""
        results = [check.result for check in self.checks]
        tally = ", ".join(f"{results.count(kind)} {kind}" for kind in ("ok", "warn", "fail") if kind in results)
        return f"{limits.count(len(results), 'check')}: {tally}; {limits.count(self.logins, 'login')}"


def examine(engine: Engine, name: str, *, batch: float | None = None) -> SiteReport:
    """Log in once and look. `batch`: seconds to wait for a tiny job; None: no job. Raises only LoginTooSoon (the caller
    may wait) and Interrupted."""
    checks: list[Check] = []
    before = engine.workspace.contact(name).logins
    failure, engine.access.sparing = None, True
    try:
        profile = _profile(engine.workspace, name, checks)
        with engine.workspace.lock_site(name) as lock:
            if _door_is_open(engine, profile, checks):
                session = engine.access.session(profile, lock, equip=False)
                checks += _within(session, engine.runtime / name)
                if batch is not None:
                    checks.append(
                        _guarded("python in a job", lambda: try_batch(session, wait=batch, pause=engine.stop.wait))
                    )
    except (LoginTooSoon, Interrupted):
        raise
    except FlctlError as error:
        if isinstance(error, LoginNeeded):
            engine.access.hold(name, error)
        failure = failure_of(error)
        checks.append(_failed(error.code.replace("_", " ") if checks else "profile", error))
    finally:
        engine.access.drop(name)
    logins = engine.workspace.contact(name).logins - before
    return SiteReport(site=name, checks=tuple(checks), logins=logins, failure=failure)


def _profile(workspace: Workspace, name: str, checks: list[Check]) -> Site:
    """The site's profile, which must be filled in."""
    profile = whole_profile(workspace, name)
    checks.append(Check(name="profile", result="ok", detail=f"{profile.connection}, {profile.scheduler.kind}"))
    return profile


def _door_is_open(engine: Engine, profile: Site, checks: list[Check]) -> bool:
    """Look at addresses and host keys first. A held site is left alone: the login says so."""
    held = engine.workspace.contact(profile.name).held
    if profile.connection == "local" or is_held(held):
        return True
    from flctl.facility.doorstep import look

    found, ready = look(profile, engine.workspace.root / "known_hosts")
    checks += found
    return ready


def _within(session: Session, scratch: Path) -> list[Check]:
    """Everything that the login answers. A check that fails does not keep the others from being made."""
    workspace, site = session.workspace, session.site
    equipped, checks = _equipped(session), list[Check]()
    work, data, script = str(session.root), session.data, _script(session, checks)
    asked = questions(site, session.scheduler, work=work, data=data, script=script)
    queries = QUERIES & asked.keys()
    if not may_ask(session, len(queries)):
        asked = {name: command for name, command in asked.items() if name not in queries}
    program, began = Program.of(asked), time.time()
    output = session.connection.run(program.script, timeout=PROBE_TIMEOUT)
    answers = program.answers(output.stdout, asked, site=site.name)
    checks.append(_login(session, answers["who"]))
    if site.connection == "ssh":
        from flctl.facility.doorstep import behind

        checks += behind(site, workspace.root / "known_hosts")
        checks.append(noise(around(output.stdout, program.nonce), output.stderr, answers))
    checks.append(equipped or _guarded("transfer", lambda: _transfer(session, scratch, answers.get("rsync"))))
    want = want_of(workspace, load_configuration(workspace), site, workspace.plan())
    checks += verdicts(site, session.scheduler, answers, work=work, data=data, now=began, want=want)
    remember_space(session, answers["space"])
    return checks


def _script(session: Session, checks: list[Check]) -> str:
    """The job script of the next run, for a dry run; empty if it cannot be made, which is a check of its own."""
    try:
        return script_of(session.workspace, session.site.name)
    except ConfigurationError as error:
        checks.append(_failed("job script", error))
        return ""


def remember_space(session: Session, answer: Answer) -> None:
    """Keep what is free there, for plans that do not ask."""
    free, contact = space_left(answer), session.workspace.contact(session.site.name)
    if free is not None:
        session.workspace.save_contact(session.site.name, replace(contact, free=free * 1024))


def _login(session: Session, who: Answer) -> Check:
    site, contact = session.site, session.workspace.contact(session.site.name)
    if site.connection == "local":
        return Check(name="login", result="ok", detail=f"this machine, {printable(who.stdout)}")
    detail = f"{site.login.user}@{login_place(site)}, {site.login.kind}: {printable(who.stdout)}"
    if site.login.coded:
        detail += f"; flctl auth test {site.name} shows what it asks"
    until, walltime = contact.login_until, site.shape.walltime
    if until is None:
        return Check(name="login", result="ok", detail=detail)
    detail += f"; good until {clock(until)}"
    if until < time.time() + walltime and not site.login.renew_unattended:
        fix = f"flctl login {site.name} before it ends: a job may run for {limits.clock(walltime)}"
        return Check(name="login", result="warn", detail=detail, fix=fix)
    return Check(name="login", result="ok", detail=detail)


def _equipped(session: Session) -> Check | None:
    """Put flctl's own files there, which is what files are moved for first; why it failed, if it did."""
    try:
        session.place_payload()
    except (LoginTooSoon, Interrupted):
        raise
    except FlctlError as error:
        return _failed("transfer", error)
    return None


def _guarded(name: str, look: Callable[[], Check]) -> Check:
    """A check, or that it failed and why."""
    try:
        return look()
    except (LoginTooSoon, Interrupted):
        raise
    except FlctlError as error:
        return _failed(name, error)


def _failed(name: str, error: FlctlError) -> Check:
    return Check(name=name, result="fail", detail=error.message, fix=error.hint, exit_code=error.exit_code)


def _transfer(session: Session, scratch: Path, version: Answer | None) -> Check:
    """A small file there and back, over the road that models will take."""
    content = secrets.token_bytes(4096)
    name, folder = f".test-{secrets.token_hex(4)}", PurePosixPath(session.root)
    scratch.mkdir(mode=0o700, exist_ok=True)
    (scratch / name).write_bytes(content)
    entry = FileEntry(path=name, size=len(content), sha256=sha256(content).hexdigest())
    began = time.monotonic()
    (scratch / "back").mkdir(mode=0o700, exist_ok=True)
    try:
        session.note_moved("out", name, entry)
        session.connection.push(scratch, [name], folder)
        session.note_moved("in", name, entry)
        session.connection.pull(folder, [entry], scratch / "back")
        same = (scratch / "back" / name).read_bytes() == content
    finally:
        with suppress(FlctlError):
            session.ask({"remove": f"rm -f {quote(folder / name)}"})
    detail = f"4 KiB there and back in {time.monotonic() - began:.1f} s{_road(session, version)}"
    if not same:
        return Check(name="transfer", result="fail", detail="the file came back changed", exit_code=7)
    return Check(name="transfer", result="ok", detail=detail)


def _road(session: Session, version: Answer | None) -> str:
    """Which host and which rsync were at the other end."""
    if session.site.connection == "local":
        return ""
    known = session.workspace.contact(session.site.name).rsync
    said = f"rsync {known}" if known else printable(version.stdout.split("protocol")[0], 60) if version else ""
    warnings = "".join(f"; {warning}" for warning in outdated(session.workspace, [session.site.name]))
    return f" through {transfer_place(session.site)}{', ' + said if said else ''}{warnings}"


def outcome(reports: list[SiteReport]) -> tuple[str, int, list[tuple[str, Failure]]]:
    """(status, exit code, errors) of a test of several sites."""
    failed = [(report.site, check) for report in reports for check in report.checks if check.result == "fail"]
    code = exit_code_of([check.exit_code for _, check in failed])
    errors = [
        (
            site,
            Failure(
                code="site_test", exit_code=check.exit_code, message=f"{check.name}: {check.detail}", hint=check.fix
            ),
        )
        for site, check in failed
    ]
    warned = any(check.result == "warn" for report in reports for check in report.checks)
    return ("error" if code else "partial" if warned else "ok"), code, errors


def trust_host(workspace: Workspace, name: str, fingerprint: str) -> str:
    """Write the site's host key to the campaign's known_hosts, if it has this fingerprint."""
    from flctl.facility.connection import trust

    site = load_profile(workspace, name)
    with workspace.lock_campaign():
        trust(site, fingerprint, workspace.root / "known_hosts")
    workspace.journal.append("trust", site=name, fingerprint=fingerprint)
    return f"{name}: the host key {fingerprint} is trusted from now on"
