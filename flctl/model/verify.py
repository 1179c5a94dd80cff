"""The gates: may this contribution be averaged with others into a successor of its base."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flctl.errors import AggregationRefused
from flctl.model.folder import check_model
from flctl.model.shards import CHUNK, Reader, Shards, open_shards

__all__ = ["Report", "check", "check_model", "match"]

SHOWN = 3  # names in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the gates saw: numbers of tensors, values and bytes of weights; l2 norms, in float64 and over the float
    tensors, of contribution - base and of the base."""

    tensors: int
    parameters: int
    bytes: int
    update_norm: float
    base_norm: float


def match(theirs: Shards, ours: Shards) -> Shards:
    """`theirs`, which has the same tensors, shapes and dtypes, whatever the shards; else AggregationRefused naming
    tensors and site."""
    missing = [name for name in ours.tensors if name not in theirs.tensors]
    extra = [name for name in theirs.tensors if name not in ours.tensors]
    for names, what in ((missing, "missing"), (extra, "not in the base")):
        if names:
            raise _refused(theirs, f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {what}")
    for name, tensor in ours.tensors.items():
        given = theirs.tensors[name]
        if given.shape != tensor.shape:
            shapes = f"{list(given.shape)}, the base's has {list(tensor.shape)}"
            raise _refused(theirs, f"tensor {name!r} has shape {shapes}")
        if given.dtype != tensor.dtype:
            raise _refused(theirs, f"tensor {name!r} is {given.dtype}, the base's is {tensor.dtype}")
    return theirs


def check(contribution: Path, base: Path, *, site: str, chunk: int = CHUNK) -> Report:
    """The gates of a fetched contribution: the base's tensors, all finite. Raises AggregationRefused naming tensor and
    site. Streamed: the memory needed is that of a few chunks."""
    ours = open_shards(base)
    theirs = match(open_shards(contribution, site=site), ours)
    update, before = _norms(theirs, ours, chunk)
    return Report(
        tensors=len(ours.tensors),
        parameters=sum(tensor.count for tensor in ours.tensors.values()),
        bytes=sum(tensor.end - tensor.begin for tensor in ours.tensors.values()),
        update_norm=update,
        base_norm=before,
    )


def _norms(theirs: Shards, ours: Shards, chunk: int) -> tuple[float, float]:
    """(of the update, of the base). A NaN or an Inf anywhere makes a sum of squares NaN or Inf, so one look at each sum
    tells; only then are the values searched."""
    import torch

    from flctl.model.chunks import Chunk, steady_arithmetic

    buffer = Chunk(chunk)
    update, before = torch.empty(chunk, dtype=torch.float64), torch.empty(chunk, dtype=torch.float64)
    updates, befores = 0.0, 0.0
    with steady_arithmetic(), Reader(theirs) as their_reader, Reader(ours) as our_reader:
        for name, tensor in ours.tensors.items():
            for start, count in tensor.pieces(chunk) if tensor.averaged else ():
                x, b = update[:count], before[:count]
                b.copy_(buffer.load(our_reader, tensor, start, count))
                x.copy_(buffer.load(their_reader, theirs.tensors[name], start, count))
                befores += float(b.dot(b))
                updates += float(x.sub_(b).dot(x))
                if not math.isfinite(updates + befores):
                    raise _unusable(theirs, ours, name, chunk)
    return math.sqrt(updates), math.sqrt(befores)


def _unusable(theirs: Shards, ours: Shards, name: str, chunk: int) -> AggregationRefused:
    from flctl.model.chunks import Chunk, blemish

    buffer = Chunk(chunk)
    for shards in (ours, theirs):
        tensor = shards.tensors[name]
        with Reader(shards) as reader:
            for start, count in tensor.pieces(chunk):
                if what := blemish(buffer.load(reader, tensor, start, count)):
                    return _refused(shards, f"tensor {name!r} holds {what}")
    return _refused(theirs, f"tensor {name!r} holds values too large for a norm in float64")


def _refused(theirs: Shards, reason: str) -> AggregationRefused:
    return AggregationRefused(f"{theirs.folder}: {reason}", site=theirs.site)


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"tensor {names[0]!r}"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"tensors {', '.join(repr(name) for name in names[:SHOWN])}{more}"
