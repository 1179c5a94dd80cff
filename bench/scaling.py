"""How flctl's time and memory grow with the size of the model and with the number of contributions."""

import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.checkpoints import SMALL, TINYLLAMA, Shape
from bench.measure import can_drop_caches
from bench.models import Checked, Models, made, our_run, plain_run, trouble_in
from bench.ours import Floor
from bench.workplace import GB, free_bytes, memory, require

SPARE = 15 * GB
THREE = (5, 3, 2)
SIXTEEN = tuple(range(1, 17))
MIDDLE = Shape(hidden=2560, intermediate=6912, layers=37, kv_heads=4)
LARGEST = [Shape(hidden=4096, intermediate=11008, layers=layers, kv_heads=8) for layers in (36, 28, 22, 18)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One size from one state of the page cache."""

    billions: str
    contributions: int
    moved: int
    cold: bool
    runs: tuple[Checked, ...]
    floor: tuple[Floor, ...]

    @property
    def wall(self) -> float:
        return statistics.median(checked.run.wall for checked in self.runs)

    @property
    def cpu(self) -> float:
        return statistics.median(checked.run.cpu for checked in self.runs)

    @property
    def peak(self) -> int:
        return max(checked.run.peak for checked in self.runs)

    @property
    def fetched(self) -> int:
        """Bytes from the disk, in the run that had most of them."""
        return max(checked.run.fetched for checked in self.runs)

    @property
    def floor_time(self) -> float:
        return statistics.median(floor.total for floor in self.floor)

    @property
    def trouble(self) -> str:
        return trouble_in(self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """A least-squares line through the sizes of three contributions: seconds, CPU seconds and MB of peak memory for
    each GB read and written; `fixed` the seconds at no GB, `miss` the largest distance of a time from the line."""

    cold: bool
    wall: float
    cpu: float
    memory: float
    fixed: float
    miss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    points: tuple[Point, ...]
    slopes: tuple[Slope, ...]
    notes: tuple[str, ...]


def scale(root: Path, repetitions: int) -> Scaling:
    """Nothing made here stays: the sizes would not fit on the disk together."""
    require(root, int((len(SIXTEEN) + 1) * SMALL.size + SPARE))
    shapes, notes = _sizes(free_bytes(root))
    if not can_drop_caches():
        notes.append("not root: no cold runs")
    points: list[Point] = []
    for shape, weights in [*((shape, THREE) for shape in shapes), (SMALL, SIXTEEN)]:
        folder = root / "scaling"
        folder.mkdir()
        try:
            points += _points(made(folder, shape, weights, own_base=False), repetitions)
        finally:
            shutil.rmtree(folder)
    return Scaling(points=tuple(points), slopes=tuple(_slopes(points)), notes=tuple(notes))


def _sizes(free: int) -> tuple[list[Shape], list[str]]:
    """Those whose contributions and output leave enough of the disk; the largest is chosen to fit."""
    fitting = [shape for shape in (SMALL, TINYLLAMA, MIDDLE) if _demand(shape) + SPARE <= free]
    largest = next((shape for shape in LARGEST if _demand(shape) + SPARE <= free), None)
    if largest is None:
        return fitting, [f"{free / GB:.0f} GB of disk are free, too few for a larger size"]
    left = (free - _demand(largest)) / GB
    remark = f"the largest size is {largest.billions} billion: {free / GB:.0f} GB of disk are free, {left:.0f} stay so"
    return [*fitting, largest], [remark]


def _demand(shape: Shape) -> int:
    return (len(THREE) + 1) * shape.size


def _points(models: Models, repetitions: int) -> Iterator[Point]:
    """Warm only where inputs and output fit into memory."""
    if models.moved < 0.9 * memory("MemAvailable"):
        yield _point(models, repetitions, cold=False)
    if can_drop_caches():
        yield _point(models, repetitions, cold=True)


def _point(models: Models, repetitions: int, *, cold: bool) -> Point:
    state = "cold" if cold else "warm"
    count = len(models.contributions)
    print(f"{models.shape.billions} billion parameters, {count} contributions, {state}", file=sys.stderr, flush=True)
    pairs = [(our_run(models, cold=cold), plain_run(models, cold=cold)) for _ in range(repetitions)]
    return Point(
        billions=models.shape.billions,
        contributions=count,
        moved=models.moved,
        cold=cold,
        runs=tuple(checked for checked, _ in pairs),
        floor=tuple(floor for _, floor in pairs),
    )


def _slopes(points: Sequence[Point]) -> Iterator[Slope]:
    for cold in (False, True):
        chosen = [
            point for point in points if point.cold == cold and point.contributions == len(THREE) and not point.trouble
        ]
        if len(chosen) < 2:
            continue
        gigabytes = np.array([point.moved / GB for point in chosen])
        walls = np.array([point.wall for point in chosen])
        slope, fixed = np.polyfit(gigabytes, walls, 1)
        yield Slope(
            cold=cold,
            wall=float(slope),
            cpu=float(np.polyfit(gigabytes, [point.cpu for point in chosen], 1)[0]),
            memory=float(np.polyfit(gigabytes, [point.peak / 1e6 for point in chosen], 1)[0]),
            fixed=float(fixed),
            miss=float(np.max(np.abs(slope * gigabytes + fixed - walls))),
        )
