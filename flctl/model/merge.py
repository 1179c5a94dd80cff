"""The making of the next model: contributions streamed through a rule into a draft, chunk by chunk."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from flctl.errors import AggregationRefused, Interrupted
from flctl.model import rules
from flctl.model.chunks import DTYPES, Chunk, blemish, steady_arithmetic
from flctl.model.draft import Draft, fresh_draft
from flctl.model.manifest import carried_files, hash_folder
from flctl.model.shards import CHUNK, Reader, Shards, Tensor, open_shards
from flctl.model.verify import match
from flctl.records import FileEntry

__all__ = ["Source", "hash_folder", "merge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One contribution to a merge; `weight` is its n_k, before normalisation."""

    site: str
    number: int
    folder: Path
    weight: float


def merge(
    base: Path,
    contributions: Sequence[Source],
    draft: Path,
    *,
    progress: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    chunk: int = CHUNK,
) -> tuple[FileEntry, ...]:
    """Write the average of the contributions into the new folder `draft`; returns its manifest.

    Files, headers and everything but the values of float tensors are the base's. All is on the disk for good when this
    returns; the caller adds flctl.json and renames. `progress` is told the bytes of weights written so far (of
    `open_shards(base).size`); `stop` is asked between chunks, and yes raises Interrupted. The bits depend neither on
    the order of `contributions` nor on `chunk` (elements). Whatever is raised (AggregationRefused, BudgetRefused,
    ConfigurationError, Interrupted), the draft is gone and nothing else was touched."""
    ours = open_shards(base)
    carried = carried_files(ours)
    needed = ours.size + sum((base / path).stat().st_size for path in carried)
    with ExitStack() as stack:
        stack.enter_context(steady_arithmetic())
        average = _Average(ours, _ordered(contributions), chunk, stack)
        made = stack.enter_context(fresh_draft(draft, needed=needed))
        _weights(made, ours, average, chunk, progress or _silent, stop or _never)
        for path in carried:
            made.copy(base, path)
    return made.entries


def _weights(
    made: Draft,
    ours: Shards,
    average: "_Average",
    chunk: int,
    progress: Callable[[int], None],
    stop: Callable[[], bool],
) -> None:
    written = 0
    for shard in ours.files:
        with made.file(shard.name) as file:
            file.write(average.base.header(shard))
            written += shard.data
            for tensor in shard.tensors:
                for start, count in tensor.pieces(chunk):
                    if stop():
                        raise Interrupted("stopped while merging; the draft is removed")
                    data = average.piece(tensor, start, count)
                    file.write(data)
                    written += len(data)
                    progress(written)


class _Average:
    """The contributions of one merge, and the few buffers they flow through."""

    def __init__(self, ours: Shards, sources: Sequence[Source], chunk: int, stack: ExitStack) -> None:
        shares = rules.shares([source.weight for source in sources])
        self._shares = {torch.float64: shares, torch.float32: tuple(rules.single(share) for share in shares)}
        self._theirs = [open_shards(source.folder, site=source.site) for source in sources]
        for theirs in self._theirs:
            match(theirs, ours)
        self.base = stack.enter_context(Reader(ours))
        self._readers = [stack.enter_context(Reader(theirs)) for theirs in self._theirs]
        self._chunk = Chunk(chunk)
        # The pages of a buffer that is never used (usually the float64 ones) are never taken from the system.
        self._buffers = {
            dtype: (torch.empty(chunk, dtype=dtype), torch.empty(chunk, dtype=dtype)) for dtype in self._shares
        }

    def piece(self, tensor: Tensor, start: int, count: int) -> memoryview:
        """The new model's bytes of one chunk, valid until the next call."""
        if not tensor.averaged:
            return self._chunk.read(self.base, tensor, start, count)
        precision = torch.float64 if tensor.dtype == "F64" else torch.float32
        total, product = (buffer[:count] for buffer in self._buffers[precision])
        rules.fedavg(self._values(tensor, start, count), self._shares[precision], total, product)
        if not rules.finite(total, DTYPES[tensor.dtype]):
            raise self._infinite(tensor, start, count)
        return self._chunk.rounded(total, tensor.dtype)

    def _values(self, tensor: Tensor, start: int, count: int) -> Iterator[torch.Tensor]:
        for theirs, reader in zip(self._theirs, self._readers, strict=True):
            yield self._chunk.load(reader, theirs.tensors[tensor.name], start, count)

    def _infinite(self, tensor: Tensor, start: int, count: int) -> AggregationRefused:
        for theirs, values in zip(self._theirs, self._values(tensor, start, count), strict=True):
            if what := blemish(values):
                return AggregationRefused(f"{theirs.folder}: tensor {tensor.name!r} holds {what}", site=theirs.site)
        return AggregationRefused(f"the average of tensor {tensor.name!r} is too large for {tensor.dtype}")


def _ordered(contributions: Sequence[Source]) -> list[Source]:
    """By site and run number, whatever the order of arrival: sums of floats depend on it."""
    if not contributions:
        raise AggregationRefused("there is nothing to merge: no contribution")
    (place, times), *_ = Counter((source.site, source.number) for source in contributions).most_common(1)
    if times > 1:
        raise AggregationRefused(f"run {place[1]} is given {times} times", site=place[0])
    return sorted(contributions, key=lambda source: (source.site, source.number))


def _silent(_: int) -> None:
    pass


def _never() -> bool:
    return False
