"""Owns the row "crash matrix": kill -9 at fault points and durable system calls of campaigns on two Slurm sites.

A campaign is killed many times: its processes carry a list of fault points not hit yet, or a system call to be killed
at; after one kill in four the recovery is killed as well, up to three deep. Then it is left in peace, has to make the
same last model as a campaign that was never disturbed, and is judged by the checker.
"""

import random
import time

from tests.chaos.beds import federation, keys_only, made
from tests.chaos.driven import Driven, durable
from tests.chaos.results import ROWS, Result
from tests.testbed import Testbed

ROUNDS = 3
KILLS = 30
"""Of one campaign, before it is left in peace."""
DEEPEST = 3
CALLS = {"fsync": (30, 12), "write": (25, 14), "rename": (20, 5), "mkdir": (10, 6), "connect": (5, 1), "vfork": (10, 2)}
"""Of each system call: how often it is chosen of 100 times, and up to which one of a thread a process is killed. vfork
is where another program is about to begin; a thread's first connect is the one to its site."""


class Matrix:
    """The state of a run of the row: which points are left, what was hit, what was wrong."""

    def __init__(self, bed: Testbed, *, seed: int, trials: int) -> None:
        self.bed, self.trials, self.random = bed, trials, random.Random(seed)
        self.hit: list[str] = []
        self.deep = self.missed = 0
        self.notes: list[str] = []
        self.campaigns = 0
        self.final = ""
        self.targets: list[str] = []
        self._learn(seed)

    def _learn(self, seed: int) -> None:
        """The undisturbed campaign: its last model, and every point it passes. Each seed takes other points first."""
        driven = self._campaign("undisturbed")
        driven.finish()
        self.final = driven.final
        self.notes += driven.judged(final=None)
        lines = sorted(driven.points())
        driven.remove()
        random.Random(0).shuffle(lines)
        share = max(1, self.trials * 6 // 10)
        begin = (seed - 1) * share % len(lines)
        self.targets = (lines[begin:] + lines[:begin])[:share]

    def _campaign(self, name: str) -> Driven:
        self.campaigns += 1
        return Driven(federation(self.bed, f"matrix-{name}"), rounds=ROUNDS)

    def run(self) -> None:
        left: list[str] = []
        for begin in range(0, len(self.targets), KILLS):
            left = self._killed_at_points([*left, *self.targets[begin : begin + KILLS]])
        self.missed = len(left)
        while len(self.hit) < self.trials and self.campaigns < self.trials:
            self._killed_at_calls(min(KILLS, self.trials - len(self.hit)))

    def _killed_at_points(self, batch: list[str]) -> list[str]:
        """One campaign killed at each of these points; those that it did not pass."""
        driven = self._campaign(f"points-{self.campaigns}")
        ticks, wanted = self.random.random() < 0.25, set(batch)
        while not driven.done and wanted:
            step = driven.tick if ticks else driven.round
            before = driven.points()
            if step(fault=";".join(sorted(wanted))):
                hit = self._last(driven, before, wanted)
                wanted.discard(hit)
                self.hit.append(hit)
                self._kill_recovery(driven)
            elif ticks:
                time.sleep(0.5)
        self._end(driven)
        return sorted(wanted)

    def _last(self, driven: Driven, before: "dict[str, int]", wanted: set[str]) -> str:
        """The point at which the process died: the only wanted one that it passed, and it passed it once."""
        new = driven.points() - before  # type: ignore[operator]
        hits = sorted(line for line in new if line in wanted)
        if len(hits) != 1:
            driven.notes.append(f"a process was killed, but not by a fault point: {hits}")
        return hits[0] if hits else "?"

    def _kill_recovery(self, driven: Driven) -> None:
        depth = 1
        while not driven.done and depth < DEEPEST and self.random.random() < 0.25 * depth:
            depth += 1
            if driven.round(fault=f"*:{self.random.randint(1, 12)}"):
                self.deep += 1
                self.hit.append(f"recovery, {depth} deep")

    def _killed_at_calls(self, kills: int) -> None:
        driven = self._campaign(f"calls-{self.campaigns}")
        while not driven.done and kills > 0:
            (call,) = self.random.choices(list(CALLS), [often for often, _ in CALLS.values()])
            count = 1 + int(CALLS[call][1] * self.random.random() ** 2)  # a thread lives for few calls
            hit = driven.round_killed_at(call, count)
            if hit is not None and durable(hit, self.bed.user.home):
                self.hit.append(f"{driven.version} {hit}")
                kills -= 1
        self._end(driven)

    def _end(self, driven: Driven) -> None:
        driven.finish()
        found = driven.judged(final=self.final)
        self.notes += [f"{driven.place.name}: {note}" for note in found]
        print(
            f"  {driven.place.name}: {driven.processes} processes; {len(self.hit)} hit; {found or 'right'}", flush=True
        )
        if not found:
            driven.remove()


def run(*, seed: int, trials: int | None = None, bed: Testbed | None = None) -> Result:
    """Kill at `trials` points. A failure is anything that the checker finds: a double, a loss, another hash, a leak."""
    began = time.monotonic()
    with made(bed) as testbed, keys_only(testbed):
        matrix = Matrix(testbed, seed=seed, trials=trials or ROWS["crash matrix"].trials)
        matrix.run()
    calls = [hit for hit in matrix.hit if hit[:1].isdigit()]
    figures = {
        "distinct": len(set(matrix.hit)),
        "points": len(matrix.hit) - len(calls) - matrix.deep,
        "calls": len(calls),
        "in recovery": matrix.deep,
        "not passed": matrix.missed,
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
