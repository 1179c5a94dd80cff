"""Owns the row "login week": days of a campaign that always has work, at two sites whose logins cost a code, while
every connection is cut once an hour.

Real: sshd, PAM (pam_google_authenticator with RATE_LIMIT 3 30 and DISALLOW_REUSE at one site, pam_oath at the other),
the loop of `flctl round`, logins, transfers, jobs. Simulated: the time. sshd with its PAM modules and everything that
runs at the sites are under libfaketime; flctl's own `time.time` is shifted by as much; whenever flctl would wait, both
go on to the moment that it waits for, or to the next cut. Monotonic clocks of flctl and sshd are left alone.

python -m tests.chaos.login_week HOURS SEED PER_DAY FOLDER     # what `run` starts; the result on stdout
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.chaos.results import Result
from tests.ssh_campaigns import SshCampaign
from tests.ssh_sites import secret_file
from tests.testbed import NUMBER
from tests.testbed.attempts import count
from tests.testbed.procs import Daemon, descendants, end
from tests.testbed.sshd import Sshd

DAY, HOUR = 86400.0, 3600.0
PER_DAY = 12
GAP_MOST = 3
"""A site with work may be left alone for so many times the day's share of one login."""
BED = f"week{NUMBER or ''}"
"""Its servers, accounts and clock are those of FLCTL_TESTBED, so that two weeks may be lived through at once."""
CLOCK = Path(f"/var/lib/flctl-testbed/login-{BED}.clock")
ROOT = Path(__file__).resolve().parents[2]
SHARED, SHARED_FOR = Path("/dev/shm"), 60.0
"""Where libfaketime keeps a semaphore and a memory per process, and for how many seconds a dead one's may be in use by
its children."""

TRAINER = """\
import os, time
ends = time.time() + {seconds}
while time.time() < ends:
    time.sleep(0.1)
"""
"""What comes before the small trainer's own lines: a job of simulated hours."""

right_time = time.time


def run(*, seed: int, trials: int | None) -> Result:
    """`trials`: days; None: seven."""
    began, days = time.monotonic(), trials or 7
    told = lived_through(24 * days, seed)
    notes = told.pop("notes")
    return Result(
        row="login week",
        trials=days,
        failures=len(notes),
        seconds=time.monotonic() - began,
        figures=told,
        notes=notes,
    )


def lived_through(hours: int, seed: int, *, per_day: int = PER_DAY) -> dict[str, Any]:
    """The figures of so many hours, and as `notes` what went wrong in them. In a process of its own: its time is not
    ours."""
    with tempfile.TemporaryDirectory(prefix="flctl-week-") as folder:
        Path(folder).chmod(0o755)
        words = [sys.executable, "-m", "tests.chaos.login_week", str(hours), str(seed), str(per_day), folder]
        done = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def sweep() -> None:
    """Remove what libfaketime left of processes that were killed: a later one with the same pid could not begin (exit
    status 1), and an sshd with it would be ended by its own sandbox."""
    for path in SHARED.glob("*faketime_*"):
        pid = path.name.rpartition("_")[2]
        with suppress(FileNotFoundError):
            if not Path(f"/proc/{pid}").exists() and right_time() - path.stat().st_mtime > SHARED_FOR:
                path.unlink()


class Clock:
    """The simulated time: the right one and an offset, which flctl, the sshds and the sites share."""

    def __init__(self) -> None:
        self.offset = 0.0
        self.move(0.0)
        time.time = lambda: right_time() + self.offset

    def move(self, seconds: float) -> None:
        self.offset += seconds
        draft = CLOCK.with_suffix(".draft")
        draft.write_text(f"+{self.offset:.3f}\n")
        draft.chmod(0o644)
        draft.rename(CLOCK)

    def stop(self) -> None:
        time.time = right_time


class Shifted(Sshd):
    """An sshd whose time, and that of whatever runs at its site, is the simulated one."""

    def __init__(self, **fields: Any) -> None:
        library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        self.variables = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(CLOCK)}
        super().__init__(**fields, environment={**self.variables, "FAKETIME_NO_CACHE": "1"})

    @property
    def _daemon(self) -> Daemon:
        # Each connection's process reads the time when it begins; later it may not: it is in a sandbox.
        own = {"FAKETIME_CACHE_DURATION": "1000000", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        return replace(super()._daemon, environment=self.variables | own)

    def cut(self) -> None:
        """End every connection; the server itself stays."""
        daemon = self._daemon.pid
        for child in descendants(daemon) if daemon else []:
            end(child, grace=0)


@dataclass(kw_only=True)
class Week:
    """What happens while flctl waits, and what is seen then."""

    camp: SshCampaign
    clock: Clock
    hours: int
    per_day: int
    dice: random.Random
    logins: dict[str, list[float]] = field(default_factory=dict)
    cuts: int = 0

    def __post_init__(self) -> None:
        self.began = time.time()
        self.over = self.began + self.hours * HOUR
        self.next_cut = self.began + HOUR
        self.engine: Any = None
        self.gap = 0.0

    def pause(self, seconds: float) -> None:
        """Instead of waiting: go on to the next contact or cut."""
        time.sleep(0.05)  # what ends at the sites now is seen at the next look
        self.look()
        sweep()
        now = time.time()
        if now >= self.over:
            self.engine.stop.set()
            return
        dues = [self.engine.workspace.contact(site).due for site in self.engine.sites_with_open_runs()]
        self.clock.move(max(1.0, min(*dues, self.next_cut, self.over) - now))
        if time.time() >= self.next_cut:
            self.next_cut += HOUR + self.dice.uniform(-600, 600)
            self.cuts += 1
            for server in self.camp.servers.values():
                server.cut()  # type: ignore[attr-defined]

    def look(self) -> None:
        """Note the logins that the servers have seen since we looked, and how long a site with work was left alone."""
        for name, server in self.camp.servers.items():
            seen = self.logins.setdefault(name, [])
            seen += [time.time()] * (count(server.log_text()).logins - len(seen))
            work = [run for run in self.engine.workspace.runs(name) if run.open]
            if work:
                reached = self.engine.workspace.contact(name).reached_at or self.began
                self.gap = max(self.gap, time.time() - max(reached, work[0].created_at))

    def notes(self) -> list[str]:
        """What went wrong."""
        found = []
        for name, server in self.camp.servers.items():
            seen = count(server.log_text())
            if seen.failed_codes or seen.failed_keys:
                found.append(f"{name}: {seen.failed_codes} codes and {seen.failed_keys} keys refused")
            if self.most(name) > self.per_day:
                found.append(f"{name}: {self.most(name)} logins within 24 hours")
            if self.engine.workspace.contact(name).held is not None:
                found.append(f"{name} is held")
        for entry in self.camp.journal():
            if entry["event"] == "trouble" and entry["code"] not in ("site_unreachable", "login_paused"):
                found.append(f"{entry['site']}: {entry['message']}")
            if entry["event"] == "trouble" and "without asking" in entry["message"]:
                found.append(f"{entry['site']}: a rate limit was reached")
        if self.gap > GAP_MOST * DAY / self.per_day:
            found.append(f"{self.gap / HOUR:.1f} hours without a contact")
        models = self.engine.workspace.newest_model().version
        if models < self.hours // 24 or not models:
            found.append(f"only {models} models in {self.hours} hours")
        return found

    def most(self, name: str) -> int:
        """The most logins within any 24 hours."""
        moments = self.logins[name]
        return max((sum(at <= other < at + DAY for other in moments) for at in moments), default=0)


def live(week: Week, runtime: Path) -> None:
    """`flctl round` with more rounds than the days can hold."""
    from flctl.campaign.engine import Engine
    from flctl.campaign.planning import open_plan
    from flctl.campaign.rounds import drive
    from flctl.campaign.workspace import Workspace
    from flctl.errors import Interrupted

    workspace = Workspace(week.camp.place)
    week.engine = Engine(workspace=workspace, runtime=runtime)
    try:
        outcome = drive(week.engine, open_plan(workspace, [], 1000, None), wait=None, pause=week.pause)
        raise RuntimeError(f"flctl round ended: {outcome.errors}")
    except Interrupted:
        week.look()
    finally:
        week.engine.close()


def main(hours: int, seed: int, per_day: int, folder: Path) -> None:
    """Live through the hours; the figures on stdout, as JSON."""
    for name in ("home/.ssh", "state", "camp", "run"):
        (folder / name).mkdir(parents=True, mode=0o700)
    os.environ |= {"HOME": str(folder / "home"), "XDG_STATE_HOME": str(folder / "state")}
    os.environ.pop("SSH_AUTH_SOCK", None)
    os.umask(0o022)
    sweep()
    dice, clock = random.Random(seed), Clock()
    fields = {"address": f"127.0.94.{10 + NUMBER}", "kind": "key+totp"}
    google = Shifted(name=f"{BED}-google", port=24410, user=f"flctl-{BED}-g", rate_limit="3 30", **fields)
    oath = Shifted(name=f"{BED}-oath", port=24411, user=f"flctl-{BED}-o", **fields)
    for server in (google, oath):
        server.stop()  # one that a run which was killed has left
    with google, oath:
        camp = campaign(folder / "camp", [google, oath], dice, per_day)
        week = Week(camp=camp, clock=clock, hours=hours, per_day=per_day, dice=dice)
        try:
            live(week, folder / "run")
            figures = {name: len(moments) for name, moments in week.logins.items()}
            told = {
                "worst": max(week.most(name) for name in week.logins),
                "logins": figures,
                "cuts": week.cuts,
                "failed_codes": {name: count(server.log_text()).failed_codes for name, server in camp.servers.items()},
                "models": week.engine.workspace.newest_model().version,
                "longest_gap_hours": round(week.gap / HOUR, 1),
                "notes": week.notes(),
            }
        finally:
            clock.move(30 * DAY)  # whatever job still runs comes to its end
            camp.clear()
            clock.stop()
    print(json.dumps(told))


def campaign(folder: Path, servers: list[Sshd], dice: random.Random, per_day: int) -> SshCampaign:
    """Both servers' sites, with codes, jobs of some hours, and the logins of a profile that says nothing of them."""
    camp = SshCampaign(folder, *servers, per_day=per_day)
    for server in servers:
        path = camp.place / "sites" / f"{server.name}.toml"
        (folder / server.name).mkdir(exist_ok=True)
        reference = secret_file(folder / server.name, server.reset_codes())
        totp = f'[login.totp]\nautomation = "permitted"\npermission = "by the test"\nsecret = "{reference}"\n'
        text = path.read_text().replace("[scheduler]", f"{totp}\n[scheduler]", 1)
        text = text.replace("every = 1\n", "every = 900\nmost = 3600\n").replace('"00:10:00"', '"12:00:00"')
        path.write_text(text)
        trainer = camp.home(server.name) / "trainer.py"
        hours = dice.uniform(1.0, 4.0)
        trainer.write_text(TRAINER.format(seconds=hours * HOUR) + trainer.read_text())
    return camp


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
