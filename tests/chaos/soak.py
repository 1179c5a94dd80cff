"""Owns the row "soak": many rounds on two real Slurm sites under random faults; all are made, and nothing grows.

The first half of the rounds is made by one long-lived `flctl round`, whose connections are cut while sshd and slurmctld
are restarted around it; its memory and open files are read from /proc. The second half by processes that are killed,
while jobs are killed too. The models must be those of a campaign that was never disturbed.

python -m tests.chaos.soak --rounds 100 --hours 8       # one campaign of so many rounds after the other
"""

import argparse
import contextlib
import json
import random
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from tests.campaigns import Campaign
from tests.chaos import checker, results
from tests.chaos.beds import federation, keys_only, made
from tests.chaos.driven import Driven
from tests.chaos.proxy import Proxy
from tests.chaos.results import ROWS, Result
from tests.federation import SITES
from tests.testbed import Testbed, TestbedError

CALM = (2.0, 6.0)
"""Seconds between two faults."""
PER_ROUND = 120.0
"""Seconds that a round may take here, faults included."""
GROWTH, FILES = 1.10, 4
"""Memory at the end over that at the beginning, and open files more than then, that still count as flat."""


class Soak:
    """One campaign under random faults."""

    def __init__(self, bed: Testbed, roads: dict[str, Proxy], *, seed: int, rounds: int) -> None:
        self.bed, self.roads, self.rounds, self.random = bed, roads, rounds, random.Random(seed)
        profiles = {
            site: {"login": {"host": road.address, "port": road.port, "per_day": 10000}, "train": {"seconds": 0.5}}
            for site, road in roads.items()
        }
        self.driven = Driven(federation(bed, "soak", **profiles), rounds=rounds)
        self.faults: dict[str, int] = {}
        self.samples: list[tuple[int, int]] = []
        self.retries = 0

    # Faults

    def disturb(self, faults: dict[str, Callable[[str], None]], until: threading.Event) -> None:
        """A fault at a site now and then, until told to stop."""
        while not until.wait(self.random.uniform(*CALM)):
            name, site = self.random.choice(sorted(faults)), self.random.choice(SITES)
            self.faults[name] = self.faults.get(name, 0) + 1
            try:
                faults[name](site)
            except TestbedError as error:
                self.driven.notes.append(f"the fault {name} at {site} could not be made: {error}")
            self.operate()

    def cut(self, site: str) -> None:
        self.roads[site].strike(self.random.choice(("reset", "close")))

    def sshd(self, site: str) -> None:
        self.bed.facilities[site].sshd.restart()

    def slurmctld(self, site: str) -> None:
        slurm = self.bed.facilities[site].slurm
        slurm.controller.stop(grace=0)
        time.sleep(self.random.uniform(0, 2))
        slurm.controller.start()

    def operate(self) -> None:
        """What a facility's operators do: a node that Slurm drained over a controller's crash is resumed."""
        for facility in self.bed.facilities.values():
            slurm = facility.slurm
            with contextlib.suppress(TestbedError):  # the controller may not answer yet; the next time will do
                if re.search("drain|down", slurm.command("sinfo", "-h", "-N", "-o", "%T")):
                    slurm.command("scontrol", "update", f"NodeName={slurm.name}01", "State=RESUME")

    def job(self, site: str) -> None:
        """SIGKILL to the job, its script included: no record is written."""
        slurm = self.bed.facilities[site].slurm
        running: list[str] = []
        with contextlib.suppress(TestbedError):
            running = [job for job, state in slurm.jobs().items() if state == "RUNNING"]
        for job in running:
            with contextlib.suppress(TestbedError):  # it may have ended meanwhile
                slurm.command("scancel", "--full", "-s", "KILL", job)

    @contextlib.contextmanager
    def disturbed(self, *faults: Callable[[str], None]) -> Iterator[None]:
        ends = threading.Event()
        named = {fault.__name__: fault for fault in faults}
        thread = threading.Thread(target=self.disturb, args=(named, ends))
        thread.start()
        try:
            yield
        finally:
            ends.set()
            thread.join()

    # The two halves

    def long_lived(self, rounds: int) -> None:
        """One process makes these rounds; if it gives up on a site, a person starts it again."""
        deadline = time.monotonic() + rounds * PER_ROUND
        with self.disturbed(self.cut, self.sshd, self.slurmctld):
            while self.driven.version < rounds and time.monotonic() < deadline:
                self.samples = []
                output = self.bed.user.home / "soak.points"
                with output.open("w") as file:
                    process = self.bed.popen(
                        "round", "--rounds", str(rounds), cwd=self.driven.place, stdout=file, stderr=subprocess.STDOUT
                    )
                    self.watch(process, deadline)
        if self.driven.version < rounds:
            self.driven.notes.append(f"only {self.driven.version} of {rounds} rounds by the long-lived process")

    def watch(self, process: "subprocess.Popen[bytes]", deadline: float) -> None:
        """Sample the process's memory (kB) and open files once a second until it ends."""
        self.driven.processes += 1
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
            with contextlib.suppress(OSError, ValueError, StopIteration):
                status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                memory = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
                self.samples.append((memory, len(list(Path(f"/proc/{process.pid}/fd").iterdir()))))
            time.sleep(1)

    def killed(self) -> None:
        """The other rounds, by processes that are killed at random points, with jobs that are killed."""
        deadline = time.monotonic() + self.rounds * PER_ROUND
        with self.disturbed(self.cut, self.job):
            while not self.driven.done and time.monotonic() < deadline:
                fault = f"*:{self.random.randint(30, 400)}"
                more = str(self.rounds - self.first)
                self.driven.processes += 1
                environment = {"FLCTL_FAULT": fault}
                self.driven.federation.flctl("round", "--rounds", more, env=environment, timeout=300)
                self.person()
        self.driven.finish_with(lambda: (self.person(), self.driven.federation.flctl("round", "--rounds", more)))

    def person(self) -> None:
        """What a person does who is told that a job was killed: try it again."""
        waiting = [path for path in (self.driven.place / "runs").glob("*/*/run.json") if _for_a_person(path)]
        if waiting:
            self.retries += 1
            self.driven.federation.flctl("retry")

    @property
    def first(self) -> int:
        return self.rounds // 2

    def run(self, final: str) -> list[str]:
        self.long_lived(self.first)
        if self.driven.version < self.first:
            return self.driven.notes
        found = self.flat()
        self.killed()
        found += self.driven.judged(final=final, attempts_may_fail=True)
        for site in SITES:
            contact = json.loads((self.driven.place / "runs" / site / "contact.json").read_text())
            if contact["held"]:
                found.append(f"{site} is held: {contact['held']['reason']}")
        return found

    def flat(self) -> list[str]:
        """Whether the last third of the samples is about as large as the second (the first brings the libraries)."""
        third = len(self.samples) // 3
        if third < 5:
            return []
        (memory, files), (memory_last, files_last) = (
            tuple(median(column) for column in zip(*part, strict=True))
            for part in (self.samples[third : 2 * third], self.samples[2 * third :])
        )
        found = []
        if memory_last > memory * GROWTH:
            found.append(f"memory grew from {memory:,.0f} to {memory_last:,.0f} kB")
        if files_last > files + FILES:
            found.append(f"open files grew from {files:.0f} to {files_last:.0f}")
        return found


def _for_a_person(path: Path) -> bool:
    """Failed, or held because somebody cancelled its job: a kill that comes before the start looks like that."""
    run = json.loads(path.read_text())
    held = run["held"] is not None and run["held"]["until"] is None
    return bool(held if run["stage"] not in ("fetched", "failed") else run["stage"] == "failed" and not run["skipped"])


def undisturbed(rounds: int) -> str:
    """The sha256 of the last model of such a campaign, made on this machine: trainer, seeds and names are the same."""
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), sites=SITES)
        campaign.set("steps = 4", "steps = 2")
        ran = campaign.flctl("round", "--rounds", str(rounds), timeout=60 + rounds * PER_ROUND)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return checker.folder_sha256(campaign.place / "models" / f"{rounds:04d}")


def run(*, seed: int, trials: int | None = None, bed: Testbed | None = None) -> Result:
    """`trials` rounds. A failure is a round not made, a site held, growth, or anything that the checker finds."""
    began, rounds = time.monotonic(), trials or ROWS["soak"].trials
    final = undisturbed(rounds)
    with made(bed) as testbed, keys_only(testbed), contextlib.ExitStack() as stack:
        roads = {
            site: stack.enter_context(Proxy(facility.sshd.address, facility.sshd.port))
            for site, facility in testbed.facilities.items()
        }
        soak = Soak(testbed, roads, seed=seed, rounds=rounds)
        notes = soak.run(final)
        rounds_made = soak.driven.version
        if not notes:
            soak.driven.remove()
    memory = [sample[0] for sample in soak.samples] or [0]
    files = [sample[1] for sample in soak.samples] or [0]
    figures = {
        "worst": f"{max(memory) / 1000:.0f} MB, {max(files)} files",
        "faults": sum(soak.faults.values()),
        "processes": soak.driven.processes,
        "jobs tried again": soak.retries,
    }
    return Result(
        row="soak",
        trials=rounds_made,
        failures=len(notes),
        seconds=time.monotonic() - began,
        figures=figures,
        notes=tuple(notes),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak")
    parser.add_argument("--rounds", type=int, default=ROWS["soak"].trials)
    parser.add_argument("--hours", type=float, default=0.0, help="go on with new campaigns for so long")
    asked = parser.parse_args()
    ends, seed = time.monotonic() + 3600 * asked.hours, 1
    while seed == 1 or time.monotonic() < ends:
        result = run(seed=seed, trials=asked.rounds)
        results.append(result, seed=seed, part=f"campaign {seed}")
        print(
            f"campaign {seed}: {result.trials} rounds, {result.failures} failures; {dict(result.figures)}", flush=True
        )
        print("\n".join(result.notes), flush=True)
        seed += 1


if __name__ == "__main__":
    main()
