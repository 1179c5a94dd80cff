"""The models of one measurement, and flctl and the plain copy run on them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from bench import ours
from bench.checking import Wrong, worst_error
from bench.checkpoints import Shape, checkpoint, linked, size_of, weight_files
from bench.measure import Run, drop_caches, run, warm
from bench.ours import Floor
from bench.rivals import Job
from bench.workplace import fresh


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """A base and contributions of one shape. `root` is the folder for outputs and logs."""

    root: Path
    shape: Shape
    base: Path
    contributions: tuple[Path, ...]
    weights: tuple[int, ...]

    @property
    def files(self) -> list[Path]:
        return [file for folder in self.contributions for file in weight_files(folder)]

    @property
    def moved(self) -> int:
        """The bytes that must be read and written."""
        return size_of(self.files) + self.shape.size

    @property
    def log(self) -> Path:
        return self.root / "log"

    def job(self, output: Path) -> Job:
        return Job(contributions=self.contributions, weights=self.weights, output=output, scratch=self.root)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A run and the worst error of what it wrote, None if it wrote nothing right. `imports`: of flctl, the seconds that
    a process took just before which only imports; a machine's other work slows both."""

    run: Run
    error: float | None
    imports: float = 0.0

    @property
    def rest(self) -> float:
        return self.run.wall - self.imports


def trouble_in(runs: Iterable[Checked]) -> str:
    """The first, or nothing."""
    return next((checked.run.trouble for checked in runs if checked.run.trouble), "")


def made(root: Path, shape: Shape, weights: tuple[int, ...], *, own_base: bool = True) -> Models:
    """Contributions in one, two, three, one... shards. Without `own_base`, the base is the first contribution."""
    name = f"{shape.billions}b"
    sites = tuple(
        checkpoint(root / f"{name}-site-{number}", shape, seed=number, shards=(number - 1) % 3 + 1)
        for number, _ in enumerate(weights, 1)
    )
    folder = root / f"{name}-base"
    base = checkpoint(folder, shape, seed=0, shards=1) if own_base else linked(folder, sites[0])
    return Models(root=root, shape=shape, base=base, contributions=sites, weights=weights)


def checked(models: Models, command: list[str], output: Path) -> Checked:
    """A wrong output is trouble like any other."""
    done = run(command, models.log, cwd=models.root)
    if done.trouble:
        return Checked(run=done, error=None)
    try:
        shares = models.job(output).shares
        return Checked(run=done, error=worst_error(models.contributions, shares, output))
    except (Wrong, OSError, ValueError, KeyError) as error:
        return Checked(run=replace(done, trouble=f"wrong: {error}"), error=None)


def our_run(models: Models, *, cold: bool) -> Checked:
    with fresh(models.root / "output") as output:
        _before(models, cold=cold)
        imports = run(ours.IMPORTS, models.log).wall
        command = ours.command(models.base, models.contributions, models.weights, output)
        return replace(checked(models, command, output), imports=imports)


def plain_run(models: Models, *, cold: bool) -> Floor:
    _before(models, cold=cold)
    return ours.floor(models.contributions, models.root / "plain", models.log)


def _before(models: Models, *, cold: bool) -> None:
    """Cold: the libraries are read again, so that only the models come from the disk."""
    if not cold:
        return warm(models.files)
    drop_caches()
    run(ours.IMPORTS, models.log)
    return None
