"""Owns the look at a job's log at its site."""

from flctl.campaign.border import LOG_MOST
from flctl.campaign.config import load_profile
from flctl.campaign.engine import Engine
from flctl.campaign.planning import affected
from flctl.campaign.steps.attempt import remote_folder
from flctl.errors import JobFailed
from flctl.facility.shell import MISSING, quote
from flctl.words import plain, printable


def read_log(engine: Engine, site: str, lines: int) -> str:
    """The last lines of the log of the site's newest attempt, at most 64 KiB, without control characters."""
    workspace = engine.workspace
    run = affected(workspace, site, "has a log", list(workspace.runs(site)))[-1]
    with workspace.lock_site(site) as lock:
        session = engine.access.session(load_profile(workspace, site), lock)
        path = remote_folder(session, run) / "log"
        command = f"test -e {quote(path)} || exit {MISSING}; tail -n {lines} {quote(path)} | tail -c {LOG_MOST}"
        answer = session.ask({"log": command})["log"]
    if answer.status == MISSING:
        return f"{site}: run {run.number:04d} (attempt {run.attempt}) has no log yet; it is {run.stage}"
    if answer.status != 0:
        raise JobFailed(f"{path} cannot be read: {printable(answer.stderr)}", hint="flctl status", site=site)
    text = answer.stdout[-LOG_MOST:]
    session.note_read(path, text)
    return plain(text.replace("\t", "    ")).rstrip("\n")
