"""Row "controller down": Slurm's controller hangs (SIGSTOP) or is killed while a job is submitted, runs or ends.

The controller's hour is simulated: the profile counts absence and claims in seconds, and the controller is away for as
many claim windows as an hour has by default (12); in a sample for less. Only `campaign tick` moves the campaign, as
cron would: no person helps. A trial fails if the round is not made, if a job trained twice, or if a run was ended while
nobody could say anything of it.
"""

import contextlib
import random
import time

from tests.chaos.beds import made
from tests.chaos.results import Result
from tests.federation import Federation
from tests.testbed import Testbed
from tests.testbed.slurm import Slurm

POLL = {"every": 1, "absence": 2, "claim_window": 15}
HOUR, SAMPLE = 12 * 15, 8
"""Seconds for which the controller is away."""
CASES = tuple((how, when) for when in ("submitting", "running", "ending") for how in ("hangs", "killed"))


def run(*, seed: int, trials: int | None = None, bed: Testbed | None = None) -> Result:
    """`trials` None: every case, each for the simulated hour."""
    began, notes, longest = time.monotonic(), list[str](), 0.0
    cases = list(CASES)
    if trials is not None:
        random.Random(seed).shuffle(cases)
        cases = [cases[number % len(cases)] for number in range(trials)]
    with contextlib.ExitStack() as stack:
        bed = bed or stack.enter_context(made(None))
        for how, when in cases:
            down = time.monotonic()
            notes += [f"{when}, {how}: {note}" for note in trial(bed, how, when, HOUR if trials is None else SAMPLE)]
            longest = max(longest, time.monotonic() - down)
    away = "1 h (simulated)" if trials is None else f"{SAMPLE} s"
    figures = {"away": away, "longest_trial": round(longest), "worst": f"{len(notes)} not completed"}
    seconds = time.monotonic() - began
    return Result(
        row="controller down", trials=len(cases), failures=len(notes), seconds=seconds, figures=figures, notes=notes
    )


def trial(bed: Testbed, how: str, when: str, seconds: float) -> list[str]:
    """What went wrong."""
    bed.reset()
    cluster = bed.facilities["karolina"].slurm
    training = {"seconds": 8 if when == "ending" else 1 if when == "submitting" else seconds + 8}
    federation = Federation(bed, "controller", karolina={"poll": POLL, "train": training})
    notes = list[str]()
    try:
        if when == "submitting":
            stop(cluster, how)
        assert federation.flctl("campaign", "start", "--rounds", "1", "--sites", "karolina").returncode == 0
        if when == "submitting":
            federation.wait(lambda: tick(federation) and any(federation.remote("karolina").glob("runs/*/claim/err")))
        else:
            federation.wait(lambda: tick(federation) and federation.jobs_started("karolina"))
            stop(cluster, how)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if (entry := tick(federation))["attempt"] != 1 or entry["stage"] == "failed":
                notes.append(f"run {entry['stage']}, attempt {entry['attempt']}, while the controller was away")
                break
            time.sleep(0.5)
    finally:
        begin(cluster, how)
    end = time.monotonic() + 120 + training["seconds"]
    while not (federation.place / "models" / "0001").exists() and time.monotonic() < end:
        tick(federation)
        cluster.mend()
        time.sleep(0.5)
    if not (federation.place / "models" / "0001").exists():
        notes.append(f"no model in time; the run is {federation.run('karolina')}")
    # Slurm itself ends a job that it launched just before its controller was killed: it does not remember it.
    ended = [
        past for past in federation.run("karolina")["past"] if how == "killed" and past["cause"] == "infrastructure"
    ]
    if (trained := federation.jobs_started("karolina")) != 1 + len(ended):
        notes.append(f"trained {trained} times")
    return notes


def tick(federation: Federation) -> dict[str, object]:
    """One tick; the run as it is then."""
    federation.flctl("campaign", "tick", timeout=300)
    return federation.run("karolina")


def stop(cluster: Slurm, how: str) -> None:
    if how == "hangs":
        cluster.controller.freeze()
    else:
        cluster.controller.stop(grace=0)


def begin(cluster: Slurm, how: str) -> None:
    if how == "hangs":
        cluster.controller.thaw()
    cluster.start(fresh=False)
