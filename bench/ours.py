"""flctl as the benchmarks call it, and the least that any program of its kind must do."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.checkpoints import size_of, weight_files
from bench.measure import Run, run

# What `flctl aggregate` imports; merge brings torch, the others leave it for later.
MODULES = "flctl.cli.main, flctl.model.merge, flctl.model.request, flctl.model.standalone"
IMPORTS = [sys.executable, "-c", f"import {MODULES}"]
PLAIN = [sys.executable, "-I", "-S", str(Path(__file__).with_name("plain.py"))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Seconds of plain reading, writing and bringing to the disk; the interpreter's start is not among them."""

    read: float
    write: float
    sync: float

    @property
    def total(self) -> float:
        return self.read + self.write + self.sync


def command(base: Path, contributions: Sequence[Path], shares: Sequence[int], output: Path) -> list[str]:
    start = [sys.executable, "-m", "flctl.cli.main", "aggregate", *map(str, contributions)]
    how = ["--weights", ",".join(map(str, shares)), "--rule", "fedavg"]
    return [*start, *how, "--base", str(base), "--out", str(output)]


def floor(contributions: Sequence[Path], output: Path, log: Path) -> Floor:
    files = [file for folder in contributions for file in weight_files(folder)]
    size = size_of(weight_files(contributions[0]))
    try:
        return Floor(**_parts(run([*PLAIN, "--out", str(output), "--size", str(size), *map(str, files)], log)))
    finally:
        output.unlink(missing_ok=True)


def hashing(contributions: Sequence[Path], log: Path) -> float:
    """Seconds of sha256 over all weights."""
    files = [str(file) for folder in contributions for file in weight_files(folder)]
    return _parts(run([*PLAIN, *files], log))["hash"]


def _parts(done: Run) -> dict[str, float]:
    if done.trouble:
        raise RuntimeError(f"plain.py: {done.trouble}")
    parts: dict[str, float] = json.loads(done.output)
    return parts
