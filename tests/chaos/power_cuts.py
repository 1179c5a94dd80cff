"""The row "power cuts": a campaign lives on an ext4 image, and at random moments the raw image is copied, as a power
cut would leave it: what was not flushed is not there. On the copy nothing that was acknowledged may be lacking, every
record must be whole, and the campaign must go on to the models of an undisturbed one, each run trained once. The sites
lie elsewhere, so that home goes back a little in time and they do not.

`python -m tests.chaos.power_cuts COMMAND...` is flctl itself with a log of each durable write: begun, acknowledged.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flctl.campaign.workspace import Workspace
from tests.campaigns import Campaign
from tests.chaos.results import Result

ROUNDS = 3
SIZE = 48 << 20
OPTIONS = "loop,commit=300,noatime"
"""Nothing but a flush makes anything durable: the file system's own, every 5 s by default, comes too late."""
LONGEST = 90.0


@dataclass(slots=True, kw_only=True)
class Told:
    """What flctl said was durable: the sha256 of each file that may be there, the last journal line, what was moved."""

    allowed: dict[str, set[str]] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    sequence: int = 0
    moved: set[str] = field(default_factory=set)
    count: int = 0

    def read(self, log: Path, root: Path) -> None:
        for line in log.read_text().splitlines() if log.exists() else []:
            what, _, rest = line.partition(" ")
            self.count += what in ("acked", "moved", "journaled")
            if what == "journaled":
                self.sequence = max(self.sequence, int(rest))
            elif what == "moved":
                self.moved.add(os.path.relpath(rest, root))
            else:
                digest, _, path = rest.partition(" ")
                name = os.path.relpath(path, root)
                if what == "acked":
                    self.allowed[name] = {digest}
                    self.acknowledged.add(name)
                else:
                    self.allowed.setdefault(name, set()).add(digest)


class Cuts:
    """One campaign on an image, cut until it is through."""

    def __init__(self, folder: Path, dice: random.Random, *, planted: bool = False) -> None:
        self.dice, self.planted, self.folder = dice, planted, folder
        self.told, self.trials, self.failures = Told(), 0, list[str]()
        self.campaign = Campaign(folder)
        self.campaign.profile("pisa", seconds=0.5)
        self.image, self.mount, self.log = folder / "image", folder / "mount", folder / "log"
        self.mount.mkdir()
        with self.image.open("wb") as file:
            file.truncate(SIZE)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(self.image)], check=True)
        self._mount()
        shutil.copytree(self.campaign.place, self.mount / "camp")
        self.campaign.place = self.mount / "camp"
        os.sync()

    def close(self) -> None:
        subprocess.run(["umount", str(self.mount)], check=False, capture_output=True)

    def run(self, most: int) -> None:
        """Cut, look, go on, until the models are made or there were so many cuts; then to the end without one."""
        through = False
        while self.trials < most and not self.failures and not through:
            through = self._made() or not self._cut()
        if not self.failures and not through and not self._made():
            answer = self.campaign.flctl("round", *self._plan(), timeout=300)
            if answer.returncode != 0:
                self.failures.append(f"the last round ended with {answer.returncode}: {answer.stderr[-300:]}")

    def hashes(self) -> list[str]:
        return [model.sha256 for model in Workspace(self.campaign.place).models()]

    def _made(self) -> bool:
        """Whether the last model is there: one more `flctl round` would make another."""
        return (self.campaign.place / "models" / f"{ROUNDS:04d}" / "flctl.json").exists()

    def _plan(self) -> list[str]:
        """--rounds only as long as no plan is known here: the cut may have come before it was."""
        return [] if (self.campaign.place / "plan.json").exists() else ["--rounds", str(ROUNDS)]

    def _mount(self) -> None:
        subprocess.run(["mount", "-o", OPTIONS, str(self.image), str(self.mount)], check=True)

    def _cut(self) -> bool:
        """Run for a random while, cut, look; False once the campaign was through before."""
        self.log.unlink(missing_ok=True)
        # A journal line that is flushed makes the names before it durable, too: half of the cuts count names alone.
        names, timed = self.dice.random() < 0.5, self.dice.random() < 0.3
        after = 0 if timed else self.dice.randint(1, 30 if names else 60)
        environment = {**os.environ, "CUT_LOG": str(self.log), "CUT_AFTER": str(after), "CUT_NAMES": str(int(names))}
        if self.planted:
            environment["CUT_PLANTED"] = "1"
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.power_cuts", "-C", str(self.campaign.place), "round", *self._plan()],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=Path(__file__).parents[2],
        )
        stopped = self._stop(process, self.dice.uniform(0.3, 4.0) if not after else LONGEST)
        copy = self.folder / "copy"
        if stopped:
            self._copy(copy)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0].decode(errors="replace")
        self.told.read(self.log, self.campaign.place)
        if not stopped:
            if process.returncode != 0:
                self.failures.append(f"flctl ended with {process.returncode}: {output[-500:]}")
            return False
        subprocess.run(["umount", str(self.mount)], check=True)
        copy.rename(self.image)
        self._mount()
        self.trials += 1
        lost = self.losses()
        self.failures += [f"cut {self.trials} (after {after}): {what}" for what in lost]
        return True

    def _stop(self, process: subprocess.Popen[bytes], limit: float) -> bool:
        """SIGSTOP, by ourselves after `limit` seconds or by the program itself; False if it ended before."""
        deadline = time.monotonic() + limit
        while process.poll() is None:
            if time.monotonic() > deadline:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGSTOP)
            if _all_stopped(process.pid):
                return True
            time.sleep(0.005)
        return False

    def _copy(self, copy: Path) -> None:
        """The raw image of one moment: taken again if the file system wrote meanwhile."""
        (line,) = [line for line in Path("/proc/mounts").read_text().splitlines() if line.split()[1] == str(self.mount)]
        written = Path("/sys/block") / Path(line.split()[0]).name / "stat"
        for _ in range(20):
            before = written.read_text().split()[4:9]
            subprocess.run(["cp", "--sparse=always", str(self.image), str(copy)], check=True)
            if written.read_text().split()[4:9] == before and before[-1] == "0":
                return
        raise RuntimeError("the image was never at rest")

    def losses(self) -> list[str]:
        """What is wrong with the campaign's folder on the copy."""
        place, found = self.campaign.place, []
        for name in sorted(self.told.acknowledged):
            path = place / name
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "nothing"
            moved = name.startswith("models/.")  # written in a draft, which has another name since
            if digest not in self.told.allowed[name] and not moved:
                found.append(f"{name} is {digest[:12]}, acknowledged was one of {sorted(self.told.allowed[name])}")
        gone = [name for name in sorted(self.told.moved) if not (place / name).exists()]
        found += [f"{name} was moved to its place and is not there" for name in gone]
        try:
            workspace = Workspace(place)
            entries = [entry["seq"] for entry in workspace.journal]
            if entries != list(range(1, len(entries) + 1)) or len(entries) < self.told.sequence:
                found.append(f"the journal has {len(entries)} lines of {self.told.sequence}")
            found += [str(damage) for damage in workspace.journal.damage()]
            workspace.plan(), workspace.driver(), workspace.runs()
            for site in self.campaign.sites:
                workspace.contact(site)
            for model in workspace.models():
                found += _differing(workspace.model_folder(model.version), workspace.model_record(model.version))
            for run in workspace.runs():
                if run.stage == "fetched" and run.contribution is not None:
                    files = [{"path": e.path, "sha256": e.sha256} for e in run.contribution.files]
                    found += _differing(workspace.attempt_folder(run) / "out", {"files": files})
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        return found


def _differing(folder: Path, record: dict[str, object]) -> list[str]:
    files = record["files"]
    assert isinstance(files, list)
    return [
        f"{folder / item['path']} is not what its record says"
        for item in files
        if not (folder / item["path"]).is_file()
        or hashlib.sha256((folder / item["path"]).read_bytes()).hexdigest() != item["sha256"]
    ]


def _all_stopped(pid: int) -> bool:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return bool(states) and all(state == "T" for state in states)


def undisturbed(folder: Path) -> list[str]:
    """The sha256 of each model of a campaign that nothing befell."""
    campaign = Campaign(folder)
    campaign.profile("pisa", seconds=0.5)
    ran = campaign.flctl("round", "--rounds", str(ROUNDS), timeout=300)
    assert ran.returncode == 0, ran.stderr
    return [model.sha256 for model in Workspace(campaign.place).models()]


def run(*, seed: int, trials: int | None = None, planted: bool = False) -> Result:
    """So many cuts (None: 200), over as many campaigns as it takes. `planted`: folders are not flushed."""
    wanted, began, dice = trials or 200, time.monotonic(), random.Random(seed)
    done = acknowledged = campaigns = 0
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="flctl-cuts-", ignore_cleanup_errors=True) as name:
        expected = [] if planted else undisturbed(_made(Path(name) / "undisturbed"))
        while done < wanted and not (planted and failures):
            campaigns += 1
            cuts = Cuts(_made(Path(name) / f"{campaigns}"), dice, planted=planted)
            try:
                cuts.run(min(wanted - done, 30))
                started = [cuts.campaign.submissions(site) for site in cuts.campaign.sites]
                if not cuts.failures and not planted and cuts.hashes() != expected:
                    cuts.failures.append(f"campaign {campaigns}: other models than the undisturbed one's")
                if not cuts.failures and started != [ROUNDS] * 2:
                    cuts.failures.append(f"campaign {campaigns}: {started} trainings began")
            finally:
                cuts.close()
            if cuts.trials == 0 and not cuts.failures:
                cuts.failures.append(f"campaign {campaigns} ended before it was cut")
            done, acknowledged = done + cuts.trials, acknowledged + cuts.told.count
            failures += cuts.failures
    return Result(
        row="power cuts",
        trials=done,
        failures=len(failures),
        seconds=time.monotonic() - began,
        figures={"campaigns": campaigns, "acknowledged": acknowledged, "worst": f"{len(failures)} lost"},
        notes=failures,
    )


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _replace(old: Any, new: Any) -> None:
    """Put a function in another's place in every module of flctl that has it by now."""
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "flctl"]:
        for name in [name for name, value in vars(module).items() if value is old]:
            setattr(module, name, new)


def _watched() -> None:
    """flctl with a log of what it makes durable; it stops itself after CUT_AFTER of those."""
    from flctl import durable

    log = os.open(os.environ["CUT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    left, names = int(os.environ["CUT_AFTER"]), os.environ["CUT_NAMES"] == "1"
    if os.environ.get("CUT_PLANTED"):
        _replace(durable.fsync_folder, lambda folder: None)
    write_whole, move = durable.write_whole, durable.move

    def say(line: str) -> None:
        nonlocal left
        os.write(log, (line + "\n").encode())
        if not line.startswith(("begun", "journaled") if names else "begun"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGSTOP)

    def watched_write(path: Path, content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest()
        say(f"begun {digest} {path}")
        write_whole(path, content)
        say(f"acked {digest} {path}")

    def watched_move(draft: Path, target: Path) -> None:
        move(draft, target)
        say(f"moved {target}")

    _replace(write_whole, watched_write)
    _replace(move, watched_move)
    from flctl.campaign import journal

    append, made, own = journal.Journal.append, journal._line, threading.local()

    def watched_line(entry: dict[str, Any]) -> bytes:
        own.sequence = entry["seq"]
        return made(entry)

    def watched_append(self: journal.Journal, event: str, **facts: object) -> None:
        append(self, event, **facts)
        say(f"journaled {own.sequence}")

    journal._line = watched_line
    journal.Journal.append = watched_append  # type: ignore[method-assign]
    from flctl.cli.main import main

    main()


if __name__ == "__main__":
    _watched()
