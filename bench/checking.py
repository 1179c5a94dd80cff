"""Whether an output is the weighted average of its inputs: nobody wins by doing nothing.

Reads with numpy only: neither flctl's reader nor a rival's is trusted here."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.checkpoints import elements, weight_files

WINDOW = 256
STEP = 2.0**-8  # of bf16, relative to the value
ALLOWED = 4.0  # steps: libraries that sum in bf16 round several times


class Wrong(Exception):
    """An output that is no average of the inputs; the message says where."""


Place = tuple[Path, int, tuple[int, ...]]


def worst_error(inputs: Sequence[Path], shares: Sequence[float], output: Path) -> float:
    """Of the first, middle and last values of every tensor, in bf16 steps at the largest of the inputs' values."""
    places = [tensors(folder) for folder in inputs]
    results = tensors(output)
    if {name: place[2] for name, place in results.items()} != {name: place[2] for name, place in places[0].items()}:
        raise Wrong("the output has other tensors than the inputs")
    worst = 0.0
    for name, result in results.items():
        count = elements(result[2])
        for start in sorted({0, max(0, count // 2 - WINDOW), max(0, count - WINDOW)}):
            values = [bf16(place[name], start) for place in places]
            expected = sum(share * value for share, value in zip(shares, values, strict=True))
            scale = np.max(np.abs(values), axis=0) * STEP
            error = float(np.max(np.abs(bf16(result, start) - expected) / scale))
            if not error <= ALLOWED:
                raise Wrong(f"{name} is {error:.0f} bf16 steps from the average at element {start}")
            worst = max(worst, error)
    return worst


def tensors(folder: Path) -> dict[str, Place]:
    """File, first byte and shape of each tensor."""
    found: dict[str, Place] = {}
    for path in weight_files(folder):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise Wrong(f"{name} is {entry['dtype']}, not BF16")
            found[name] = (path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
    return found


def bf16(place: Place, start: int) -> npt.NDArray[np.float64]:
    path, begin, shape = place
    with path.open("rb", buffering=0) as file:
        file.seek(begin + 2 * start)
        data = file.read(2 * min(WINDOW, elements(shape) - start))
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
