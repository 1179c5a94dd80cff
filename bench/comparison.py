"""flctl beside its rivals, and beside plain reading and writing."""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench import ours
from bench.environments import Unavailable, programs_of, versions_in
from bench.measure import run, warm
from bench.models import Checked, Models, checked, our_run, plain_run, trouble_in
from bench.ours import Floor
from bench.rivals import RIVALS, Rival
from bench.workplace import fresh, memory

IMPORTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One program's runs. `imports` are seconds of a process that only imports the same modules; `room` the bytes of
    memory that were available before them. Without runs, `trouble` says why."""

    name: str
    note: str
    version: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    imports: tuple[float, ...] = ()
    runs: tuple[Checked, ...] = ()
    room: int = 0
    trouble: str = ""

    @property
    def import_time(self) -> float:
        return statistics.median(self.imports)


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """flctl and plain copies in turn, from one state of the page cache."""

    cold: bool
    ours: tuple[Checked, ...]
    floor: tuple[Floor, ...]

    @property
    def trouble(self) -> str:
        return trouble_in(self.ours)

    @property
    def our_time(self) -> float:
        return statistics.median(checked.run.wall for checked in self.ours)

    @property
    def our_rest(self) -> float:
        """Without the import of libraries."""
        return statistics.median(checked.rest for checked in self.ours)

    @property
    def by_pairs(self) -> float:
        """Ours, without imports, to the plain copy: what the disk does for others it does to both of a pair."""
        pairs = zip(self.ours, self.floor, strict=True)
        return statistics.median(checked.rest / floor.total for checked, floor in pairs)

    @property
    def floor_time(self) -> float:
        return statistics.median(floor.total for floor in self.floor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`hashing`: seconds of plain sha256 over the contributions."""

    flctl: Result
    rivals: tuple[Result, ...]
    against: tuple[Against, ...]
    hashing: float


def compare(models: Models, names: Sequence[str], repetitions: int, rivals_runs: int, *, cold: bool) -> Comparison:
    rivals = tuple(_rival(models, rival, rivals_runs) for rival in RIVALS if rival.name.lower() in names)
    _say("flctl and plain copies in turn")
    states = (False, True) if cold else (False,)
    against = tuple(_against(models, repetitions, cold=state) for state in states)
    versions = versions_in(sys.executable)
    flctl = Result(
        name="flctl",
        versions=versions,
        version=versions["flctl"],
        note="flctl aggregate --rule fedavg",
        imports=tuple(checked.imports for checked in against[0].ours),
        runs=against[0].ours,
        room=memory("MemAvailable"),
    )
    warm(models.files)
    hashing = ours.hashing(models.contributions, models.log)
    return Comparison(flctl=flctl, rivals=rivals, against=against, hashing=hashing)


def _against(models: Models, repetitions: int, *, cold: bool) -> Against:
    """Each goes first every second time: what one leaves to the disk slows the other."""
    runs, floors = [], []
    for repetition in range(repetitions):
        if repetition % 2:
            floors.append(plain_run(models, cold=cold))
        runs.append(our_run(models, cold=cold))
        if not repetition % 2:
            floors.append(plain_run(models, cold=cold))
    return Against(cold=cold, ours=tuple(runs), floor=tuple(floors))


def _rival(models: Models, rival: Rival, repetitions: int) -> Result:
    _say(f"{rival.name}: environment")
    try:
        programs = programs_of(rival)
    except Unavailable as error:
        return Result(name=rival.name, note=rival.note, trouble=f"not installed: {error}")
    versions = versions_in(programs / "python")
    imports = _import_times(rival.imports(programs), models)
    _say(f"{rival.name}: run")
    room = memory("MemAvailable")
    runs = []
    for _ in range(repetitions):
        with fresh(models.root / "output") as output:
            warm(models.files)
            runs.append(checked(models, rival.command(programs, models.job(output)), output))
    return Result(
        name=rival.name,
        versions=versions,
        version=versions[rival.distribution],
        note=rival.note,
        imports=imports,
        runs=tuple(runs),
        room=room,
    )


def _import_times(command: list[str], models: Models) -> tuple[float, ...]:
    """After a run that brings the library into the page cache."""
    return tuple([run(command, models.log).wall for _ in range(IMPORTS + 1)][1:])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
