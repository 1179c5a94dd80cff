"""Owns the row "crash matrix": kill -9 at fault points and durable system calls of campaigns on two Slurm sites.

A campaign is killed many times: its processes carry a list of fault points not hit yet, or a system call to be killed
at; after one kill in four the recovery is killed as well, up to three deep. Then it is left in peace, has to make the
same last model as a campaign that was never disturbed, and is judged by the checker.
"""

import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

from tests.chaos import progress
from tests.chaos.beds import federation, keys_only, made
from tests.chaos.driven import Driven, durable
from tests.chaos.progress import Progress
from tests.chaos.results import ROWS, Result
from tests.testbed import Testbed

ROUNDS = 3
UNDISTURBED = "matrix-undisturbed"
"""The campaign of this name, which is in the subjects of some points."""
KILLS = 30
"""Of one campaign, before it is left in peace."""
PROCESSES = 6 * KILLS
"""Of one campaign at most, where it does not get on."""
DEEPEST = 3
CALLS = {"fsync": (30, 12), "write": (25, 14), "rename": (20, 5), "mkdir": (10, 6), "connect": (5, 1), "vfork": (10, 2)}
"""Of each system call: how often it is chosen of 100 times, and up to which one of a thread a process is killed. vfork
is where another program is about to begin; a thread's first connect is the one to its site."""


class Matrix:
    """The state of a run of the row: which points are left, what was hit, what was wrong. Each campaign has dice of its
    own, so that a run that goes on where another ended throws the same."""

    def __init__(
        self, bed: Testbed, *, seed: int, trials: int, rounds: int = ROUNDS, progress: Progress | None = None
    ) -> None:
        self.bed, self.seed, self.trials, self.rounds = bed, seed, trials, rounds
        self.progress = progress or Progress(None)
        self.hit: list[str] = []
        self.missed: list[str] = []
        self.deep = self.campaigns = 0
        self.notes: list[str] = []
        self.targets: list[str] = []
        self.final = ""

    def run(self) -> None:
        came = self._take(UNDISTURBED, self._undisturbed)
        self.targets, self.final = came["targets"], came["final"]
        if self.notes:
            return  # what the others would be measured by is wrong
        for begin in range(0, len(self.targets), KILLS):
            batch = [*self.missed, *self.targets[begin : begin + KILLS]]
            came = self._take(f"matrix-points-{self.campaigns}", partial(self._killed_at_points, batch))
            self.missed = came["missed"]
        while len(self.hit) < self.trials and self.campaigns < self.trials:
            kills = min(KILLS, self.trials - len(self.hit))
            self._take(f"matrix-calls-{self.campaigns}", partial(self._killed_at_calls, kills))

    def _take(self, name: str, action: "Callable[[str, Random], dict[str, Any]]") -> dict[str, Any]:
        self.campaigns += 1
        came = self.progress.once(name, partial(action, name, Random(f"{self.seed} {name}")))
        self.hit += came["hit"]
        self.notes += came["notes"]
        self.deep += came.get("deep", 0)
        return came

    def _undisturbed(self, name: str, dice: Random) -> dict[str, Any]:
        """Its last model, and every point that it passes. Each seed takes other points first."""
        driven = self._campaign(name)
        driven.finish()
        came = {"final": driven.final, "notes": driven.judged(final=None), "hit": []}
        lines = sorted(driven.points())
        driven.remove()
        Random(0).shuffle(lines)
        share = max(1, self.trials * 6 // 10)
        begin = (self.seed - 1) * share % len(lines)
        return {**came, "targets": (lines[begin:] + lines[:begin])[:share]}

    def _campaign(self, name: str) -> Driven:
        return Driven(federation(self.bed, name), rounds=self.rounds)

    def _killed_at_points(self, batch: list[str], name: str, dice: Random) -> dict[str, Any]:
        """One campaign killed at each of these points; `missed`: those that it did not pass."""
        driven, hit, deep = self._campaign(name), list[str](), 0
        ticks = dice.random() < 0.25
        wanted = {line.replace(UNDISTURBED, name) for line in batch}
        while not driven.done and wanted and driven.processes < PROCESSES and not driven.notes:
            step = driven.tick if ticks else driven.round
            before = driven.points()
            if step(fault=";".join(sorted(wanted))):
                hit.append(_last(driven, before, wanted))
                wanted.discard(hit[-1])
                recovery = self._kill_recovery(driven, dice)
                deep += len(recovery)
                hit += recovery
            elif ticks:
                time.sleep(0.5)
        missed = sorted(line.replace(name, UNDISTURBED) for line in wanted)
        return {**self._ended(driven, hit), "deep": deep, "missed": missed}

    def _kill_recovery(self, driven: Driven, dice: Random) -> list[str]:
        hit, depth = [], 1
        while not driven.done and depth < DEEPEST and dice.random() < 0.25 * depth:
            depth += 1
            if driven.round(fault=f"*:{dice.randint(1, 12)}"):
                hit.append(f"recovery, {depth} deep")
        return hit

    def _killed_at_calls(self, kills: int, name: str, dice: Random) -> dict[str, Any]:
        driven, hit = self._campaign(name), list[str]()
        while not driven.done and len(hit) < kills and driven.processes < PROCESSES and not driven.notes:
            (call,) = dice.choices(list(CALLS), [often for often, _ in CALLS.values()])
            count = 1 + int(CALLS[call][1] * dice.random() ** 2)  # a thread lives for few calls
            words = driven.round_killed_at(call, count)
            if words is not None and durable(words, self.bed.user.home):
                hit.append(f"{driven.version} {words}")
        return self._ended(driven, hit)

    def _ended(self, driven: Driven, hit: list[str]) -> dict[str, Any]:
        """Left in peace, then judged. A campaign with a finding keeps its folders."""
        driven.finish()
        found = driven.judged(final=self.final)
        name = driven.place.name
        print(f"  {name}: {driven.processes} processes; {len(hit)} hit; {found or 'right'}", flush=True)
        if not found:
            driven.remove()
        return {"hit": hit, "notes": [f"{name}: {note}" for note in found]}


def _last(driven: Driven, before: Counter[str], wanted: set[str]) -> str:
    """The point at which the process died: the only wanted one that it passed, and it passed it once."""
    hits = sorted(line for line in driven.points() - before if line in wanted)
    if len(hits) != 1:
        driven.notes.append(f"a process was killed, but not by a fault point: {hits}")
    return hits[0] if hits else "?"


def _digest(hit: str) -> str:
    """Names a point whatever the campaign is called, so that the parts of the row can be put together."""
    return hashlib.sha256(re.sub(r"matrix-(undisturbed|points-\d+|calls-\d+)", "campaign", hit).encode()).hexdigest()[
        :12
    ]


def run(*, seed: int, trials: int | None = None, rounds: int = ROUNDS, bed: Testbed | None = None) -> Result:
    """Kill at `trials` points of campaigns of so many rounds. A failure is anything that the checker finds: a double, a
    loss, another hash, a leak."""
    began, wanted = time.monotonic(), trials or ROWS["crash matrix"].trials
    steps = progress.of("crash matrix", seed=seed, trials=wanted) if bed is None else Progress(None)
    with made(bed) as testbed, keys_only(testbed):
        matrix = Matrix(testbed, seed=seed, trials=wanted, rounds=rounds, progress=steps)
        matrix.run()
    steps.over()
    print(f"  not passed again: {matrix.missed}", flush=True)
    calls = [hit for hit in matrix.hit if hit[:1].isdigit()]
    distinct = sorted({_digest(hit) for hit in matrix.hit})
    figures = {
        "distinct": distinct,
        "points": len(matrix.hit) - len(calls) - matrix.deep,
        "calls": len(calls),
        "in recovery": matrix.deep,
        "not passed": len(matrix.missed),
        "campaigns": matrix.campaigns,
        "worst": "same hash" if not matrix.notes else matrix.notes[0][:60],
    }
    return Result(
        row="crash matrix",
        trials=len(matrix.hit),
        failures=len(matrix.notes),
        seconds=time.monotonic() - began,
        figures=figures,
        notes=tuple(matrix.notes),
    )
