"""Owns `flctl site test` and `flctl site trust`: a campaign's sites, tried before a round depends on them."""

import secrets
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath

from flctl.campaign.config import load_profile
from flctl.campaign.contacts import failure_of
from flctl.campaign.engine import Engine
from flctl.campaign.session import Session
from flctl.campaign.workspace import Workspace
from flctl.errors import CodeSpent, ConfigurationError, FlctlError, Interrupted, LoginNeeded, exit_code_of
from flctl.facility.probe import Check, questions, verdicts
from flctl.facility.profile import missing
from flctl.records import Failure, FileEntry

PROBE_TIMEOUT = 180.0
"""Seconds: importing torch from a busy parallel file system takes minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReport:
    """What `site test` found. `failure`: why the site could not be tested at all, or no longer."""

    site: str
    checks: tuple[Check, ...]
    logins: int
    failure: Failure | None = None


def examine(engine: Engine, name: str) -> SiteReport:
    """Log in once and look. Raises only CodeSpent (the caller may wait) and Interrupted."""
    checks: list[Check] = []
    before = engine.workspace.contact(name).logins
    failure = None
    try:
        profile = load_profile(engine.workspace, name)
        empty = missing(profile)
        if empty:
            fix = f"fill them in in {engine.workspace.root / 'sites' / (name + '.toml')}"
            raise ConfigurationError(f"still empty: {', '.join(empty)}", hint=fix, site=name)
        checks.append(Check(name="profile", result="ok", detail=f"{profile.connection}, {profile.scheduler.kind}"))
        with engine.workspace.lock_site(name) as lock:
            session = engine.access.session(profile, lock)
            detail = f"{profile.login.user}@{profile.login.host}, {profile.login.kind}"
            checks.append(
                Check(name="login", result="ok", detail=detail if profile.connection == "ssh" else "this machine")
            )
            checks += _inside(session)
            checks.append(_transfer(session, engine.runtime / name))
    except (CodeSpent, Interrupted):
        raise
    except FlctlError as error:
        if isinstance(error, LoginNeeded):
            engine.access.hold(name, error)
        failure = failure_of(error)
        checks.append(
            Check(name=error.code, result="fail", detail=error.message, fix=error.hint, exit_code=error.exit_code)
        )
    finally:
        engine.access.drop(name)
    logins = engine.workspace.contact(name).logins - before
    return SiteReport(site=name, checks=tuple(checks), logins=logins, failure=failure)


def _inside(session: Session) -> list[Check]:
    work, data = str(session.root), session.data
    answers = session.ask(questions(session.site, session.scheduler, work, data), timeout=PROBE_TIMEOUT)
    files = session.workspace.model_record(session.workspace.newest_model().version)["files"]
    need = 3 * sum(item["size"] for item in files)
    return verdicts(session.site, session.scheduler, answers, work=work, data=data, now=time.time(), need=need)


def _transfer(session: Session, scratch: Path) -> Check:
    """A small file there and back, over the road that models will take."""
    content = secrets.token_bytes(4096)
    name, folder = f".test-{secrets.token_hex(4)}", PurePosixPath(session.root)
    scratch.mkdir(mode=0o700, exist_ok=True)
    (scratch / name).write_bytes(content)
    entry = FileEntry(path=name, size=len(content), sha256=sha256(content).hexdigest())
    began = time.monotonic()
    session.note_moved("out", name, entry)
    session.connection.push(scratch, [name], folder)
    (scratch / "back").mkdir(mode=0o700)
    try:
        session.note_moved("in", name, entry)
        session.connection.pull(folder, [entry], scratch / "back")
        same = (scratch / "back" / name).read_bytes() == content
    finally:
        session.ask({"remove": f"rm -f {folder}/{name}"})
    detail = f"4 KiB there and back in {time.monotonic() - began:.1f} s"
    if not same:
        return Check(name="transfer", result="fail", detail="the file came back changed", exit_code=7)
    return Check(name="transfer", result="ok", detail=detail)


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
