"""Owns who drives a campaign: one host, whom each site knows by a record of its own; and noticing that a campaign's
folder went back in time. It is looked at in each process's first contact with a site, in one command.

`driver.json` at a site, one line: {"host", "name", "epoch", "serial", "since"}. The greater epoch wins (a take-over
raises it); in one epoch there is one host. Each process of that host that begins to work at the site raises the
serial, at home first: a site that has seen more of us than we remember knows a later state of this folder.
"""

import json
import re
import socket
import time
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from flctl import faults
from flctl.campaign.workspace import Workspace
from flctl.errors import Locked
from flctl.facility.shell import quote, read_file
from flctl.records import Driver
from flctl.words import printable

if TYPE_CHECKING:
    from flctl.campaign.session import Session

MACHINE_IDS = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
HOST = re.compile(r"[0-9a-f]{64}")
ATTEMPT = re.compile(r"(\d{4,6})-([1-9]\d{0,3})")
TAKE_OVER = "go on there; if that host does so no more, make this one the driver: flctl adopt --takeover"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a site knows of the driver (None: no record that can be read), and the attempts in its runs/ by number."""

    driver: Driver | None
    serial: int
    attempts: dict[int, int]


def this_host() -> tuple[str, str]:
    """What this machine is known by (a hash of its machine-id, else of its name), and its name."""
    name = socket.gethostname()
    for path in MACHINE_IDS:
        try:
            text = path.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if re.fullmatch(r"[0-9a-f]{32}", text):
            return sha256(f"flctl {text}".encode()).hexdigest(), printable(name, 60)
    return sha256(f"flctl name {name}".encode()).hexdigest(), printable(name, 60)


def ours(workspace: Workspace) -> Driver:
    """The campaign's driver, which is this host; Locked if it is another. A campaign without one is this host's."""
    host, name = this_host()
    driver = workspace.driver()
    if driver is None:
        driver = Driver(host=host, name=name, since=round(time.time(), 3))
        workspace.save_driver(driver)
    elif driver.host != host:
        raise Locked(f"this campaign is driven from {_who(driver)}, not from this host ({name})", hint=TAKE_OVER)
    return driver


def begin(session: "Session") -> Seen:
    """This process begins to work at a site: say so there, and see what the site knows. Locked if another host drives
    the campaign, or another copy of its folder."""
    workspace, site = session.workspace, session.site.name
    mine, contact = ours(workspace), workspace.contact(site)
    serial = contact.serial + 1
    workspace.save_contact(site, replace(contact, serial=serial))
    faults.point("driver", site)
    answers = session.ask({**_look(session), "say": _say(session, mine, serial)})
    faults.point("driver-said", site)
    seen = _seen(answers["driver"].stdout, answers["runs"].stdout)
    theirs = seen.driver
    _refuse_another(mine, theirs, site)
    if theirs is not None and theirs.epoch == mine.epoch and seen.serial >= serial:
        workspace.save_contact(site, replace(workspace.contact(site), serial=seen.serial + 1))
        workspace.journal.append("folder went back", site=site, serial=serial - 1, seen=seen.serial)
    return seen


def check(session: "Session") -> None:
    """Locked if a site says that another host drives the campaign, or another copy of its folder; nothing is changed
    there."""
    _refuse_another(ours(session.workspace), look(session).driver, session.site.name)


def _refuse_another(mine: Driver, theirs: Driver | None, site: str) -> None:
    if theirs is not None and theirs.epoch >= mine.epoch and (theirs.epoch, theirs.host) != (mine.epoch, mine.host):
        what = "another copy of this folder on this host" if theirs.host == mine.host else _who(theirs)
        raise Locked(f"the campaign is driven from {what}", hint=TAKE_OVER, site=site)


def look(session: "Session") -> Seen:
    """What a site knows; nothing is changed there."""
    answers = session.ask(_look(session))
    return _seen(answers["driver"].stdout, answers["runs"].stdout)


def take_over(workspace: Workspace, seen: list[Seen]) -> Driver:
    """Make this host the driver, in an epoch after all that are known. Sites that could not be asked learn of it in the
    next contact; one that knows a later epoch refuses then."""
    before = workspace.driver()
    epochs = [item.driver.epoch for item in seen if item.driver] + ([before.epoch] if before else [])
    host, name = this_host()
    driver = Driver(host=host, name=name, epoch=max(epochs, default=0) + 1, since=round(time.time(), 3))
    workspace.save_driver(driver)
    workspace.journal.append("take-over", host=name, epoch=driver.epoch, before=before.name if before else None)
    return driver


def guard(workspace: Workspace) -> str:
    """A shell command that succeeds at a site, in the campaign's folder there, unless another drives the campaign."""
    mine = ours(workspace)
    return f"{{ test ! -e driver.json || {_mine(mine)}; }}"


def _mine(mine: Driver) -> str:
    """A test of the record in `driver.json`: it is ours, or of an epoch before ours."""
    epoch = "$(sed -n 's/.*\"epoch\": \\([0-9][0-9]*\\).*/\\1/p' driver.json)"
    return (
        f'{{ epoch={epoch}; test "${{epoch:-0}}" -lt {mine.epoch} || '
        f'{{ test "$epoch" -eq {mine.epoch} && grep -q \'"host": "{mine.host}"\' driver.json; }}; }}'
    )


def _look(session: "Session") -> dict[str, str]:
    return {
        "driver": read_file(session.root / "driver.json", limit=4096),
        "runs": f"ls {quote(session.root / 'runs')} 2>/dev/null",
    }


def _say(session: "Session", mine: Driver, serial: int) -> str:
    """Write the site's record, unless another drives. That it cannot be written (a full quota) stops nobody: what is
    there is still to be fetched."""
    head = json.dumps({"host": mine.host, "name": mine.name, "epoch": mine.epoch})[:-1]
    draft = '".driver.json.$$"'
    return (
        f"mkdir -p {quote(session.root)} && cd {quote(session.root)} || exit 0\n"
        f"serial={serial}\n"
        f"if test -e driver.json; then\n"
        f"  {_mine(mine)} || exit 0\n"
        "  theirs=$(sed -n 's/.*\"serial\": \\([0-9]\\{1,9\\}\\)[,}].*/\\1/p' driver.json)\n"
        '  test "${theirs:-0}" -lt "$serial" || serial=$((theirs + 1))\n'
        "fi\n"
        f'printf \'%s, "serial": %s, "since": %s}}\\n\' {quote(head)} "$serial" {mine.since} >{draft} || exit 0\n'
        f"if test -e driver.json; then mv -f {draft} driver.json; else ln {draft} driver.json; rm -f {draft}; fi"
    )


def _seen(record: str, names: str) -> Seen:
    """Both are a site's words: what is not as flctl writes it is left out."""
    attempts: dict[int, int] = {}
    for name in names.split():
        if found := ATTEMPT.fullmatch(name):
            number, attempt = int(found[1]), int(found[2])
            attempts[number] = max(attempt, attempts.get(number, 0))
    try:
        data = json.loads(record)
        host, epoch, serial = data["host"], data["epoch"], data["serial"]
        since = float(data["since"])
        if not (HOST.fullmatch(host) and 0 < epoch < 10**9 and 0 <= serial < 10**9 and 0 <= since < 1e11):
            raise ValueError("no record of a driver")
        driver = Driver(host=host, name=printable(str(data["name"]), 60), epoch=int(epoch), since=since)
    except (ValueError, KeyError, TypeError, RecursionError):
        return Seen(driver=None, serial=0, attempts=attempts)
    return Seen(driver=driver, serial=int(serial), attempts=attempts)


def _who(driver: Driver) -> str:
    since = min(max(0.0, driver.since), 1 << 33)
    return f"{driver.name} since {time.strftime('%Y-%m-%d %H:%M', time.localtime(since))}"
