"""Row "site away": the sshd of one site is gone for a day, the other's runs go on, and all is made good by itself.

The day is simulated: time.time of each tick's process is put forward, so that flctl's own pauses, polls and limits
count as they are; sshd, Slurm and the jobs have the real clock. (Under libfaketime connecting fails with EINVAL.) So
that no one-time code depends on either, both sites are entered by key. Only `campaign tick` moves the campaign.
"""

import contextlib
import random
import time

from tests.chaos.beds import keys_only, made
from tests.chaos.results import Result
from tests.federation import SITES, Federation
from tests.testbed import Testbed
from tests.testbed.python import PYTHON

DAY = 24 * 3600
STEP, SAMPLE_STEP = 300, 14400
"""Simulated seconds between two ticks, in the full aim and in a sample."""
ROUNDS = 2
CASES = ("before its first login", "while its job runs")
PROGRAM = """\
import sys, time
real, ahead = time.time, float(sys.argv.pop(1))
time.time = lambda: real() + ahead
from flctl.cli.main import main
sys.argv[0] = "flctl"
sys.exit(main())
"""


def run(*, seed: int, trials: int | None = None, bed: Testbed | None = None) -> Result:
    """`trials` None: every case, with a tick every five simulated minutes."""
    began, notes, tries = time.monotonic(), list[str](), list[int]()
    cases = list(CASES)
    if trials is not None:
        random.Random(seed).shuffle(cases)
        cases = [cases[number % len(cases)] for number in range(trials)]
    with contextlib.ExitStack() as stack:
        bed = bed or stack.enter_context(made(None))
        for case in cases:
            found, tried = trial(bed, case, STEP if trials is None else SAMPLE_STEP)
            notes += [f"away {case}: {note}" for note in found]
            tries.append(tried)
    figures = {"away": "24 h (simulated)", "tries": max(tries), "worst": f"{max(tries)} tries to connect in 24 h"}
    seconds = time.monotonic() - began
    return Result(
        row="site away", trials=len(cases), failures=len(notes), seconds=seconds, figures=figures, notes=notes
    )


class Clock:
    """flctl's clock, `ahead` seconds of the real one."""

    def __init__(self, federation: Federation) -> None:
        self.federation, self.ahead = federation, 0.0

    def tick(self, forward: float = 0.0) -> None:
        self.ahead += forward
        words = (str(PYTHON), "-c", PROGRAM, str(self.ahead), "campaign", "tick")
        self.federation.bed.run(*words, cwd=self.federation.place, timeout=300)


def trial(bed: Testbed, case: str, step: float) -> tuple[list[str], int]:
    """What went wrong, and how often flctl found the site away."""
    bed.reset()
    notes = list[str]()
    with keys_only(bed):
        train = {"seconds": 5}
        federation = Federation(bed, "away", karolina={"train": train}, leonardo={"train": train})
        clock, sshd = Clock(federation), bed.facilities["karolina"].sshd
        started = federation.flctl("campaign", "start", "--rounds", str(ROUNDS), "--sites", ",".join(SITES))
        assert started.returncode == 0, started.stderr
        if case == CASES[1]:
            federation.wait(lambda: clock.tick() or federation.jobs_started("karolina"))
        sshd.stop()
        try:
            began = clock.ahead
            while clock.ahead < began + DAY:
                clock.tick(step)
            if federation.run("leonardo").get("stage") != "fetched":
                notes.append(f"the other site's run is {federation.run('leonardo').get('stage')}")
        finally:
            sshd.start(fresh=False)
        limit = time.monotonic() + 180
        while federation.json("status")["data"]["model"]["version"] < ROUNDS and time.monotonic() < limit:
            clock.tick(60)
            time.sleep(0.2)
        if (made := federation.json("status")["data"]["model"]["version"]) != ROUNDS:
            notes.append(f"model {made} of {ROUNDS} three minutes after its return")
        for site in SITES:
            if (trained := federation.jobs_started(site)) != ROUNDS:
                notes.append(f"{site} trained {trained} times in {ROUNDS} rounds")
        troubles = [entry for entry in federation.journal() if entry["event"] == "trouble"]
    return notes, sum(entry["site"] == "karolina" for entry in troubles)
