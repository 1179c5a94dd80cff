"""Owns the look at a job's log at its site."""

import re

from flctl.campaign.config import load_profile
from flctl.campaign.engine import Engine
from flctl.campaign.planning import affected
from flctl.campaign.session import clean
from flctl.campaign.steps.attempt import remote_folder
from flctl.errors import JobFailed
from flctl.facility.shell import MISSING, quote

LIMIT = 64 * 1024


def read_log(engine: Engine, site: str, lines: int) -> str:
    """The last lines of the log of the site's newest attempt, at most 64 KiB, without control characters."""
    workspace = engine.workspace
    run = affected(workspace, site, "has a log", list(workspace.runs(site)))[-1]
    with workspace.lock_site(site) as lock:
        session = engine.access.session(load_profile(workspace, site), lock)
        path = remote_folder(session, run) / "log"
        command = f"test -e {quote(path)} || exit {MISSING}; tail -n {lines} {quote(path)} | tail -c {LIMIT}"
        answer = session.ask({"log": command})["log"]
    if answer.status == MISSING:
        return f"{site}: run {run.number:04d} (attempt {run.attempt}) has no log yet; it is {run.stage}"
    if answer.status != 0:
        raise JobFailed(f"{path} cannot be read: {clean(answer.stderr)}", hint="flctl status", site=site)
    session.note_read(path, answer.stdout)
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07", "", answer.stdout)
    return "".join(c for c in text if c.isprintable() or c in "\n\t").rstrip("\n")
