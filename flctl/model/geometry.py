"""How the updates of one merge lie to each other: inner products over all float tensors, streamed.

Machines, threads and chunk sizes must agree on every bit, but in a BLAS or in a sum along a row the order depends on
the width of the vector unit. So values are multiplied one by one and added up down columns, then the columns' sums in
pairs; the sums of the spans, which are many, are added exactly."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction

from flctl.errors import AggregationRefused, Interrupted
from flctl.model.pipeline import default_threads, desks_for, in_order
from flctl.model.shards import Reader, Shards, Tensor

# These three are part of what the bits are.
SPAN = 1 << 20  # elements of a tensor whose products are added up in a fixed order
BLOCK = 1 << 15  # elements multiplied at once
LANES = 1 << 8  # running sums of each product

MEMORY = 24 << 20  # bytes of all buffers, if one thread's are not more

Matrix = Sequence[Sequence[float]]


def gram(
    ours: Shards,
    theirs: Sequence[Shards],
    bases: Sequence[Shards | None],
    *,
    stop: Callable[[], bool] | None = None,
    threads: int | None = None,
) -> list[list[float]]:
    """sum over all values of (x_i - b_i)(x_j - b_j), in float64; b_i is the contribution's own base, or `ours`.

    AggregationRefused names the contribution and tensor that hold a NaN or an Inf. `stop` is asked now and then, and
    yes raises Interrupted."""
    from flctl.model.chunks import single_threaded, steady_arithmetic

    own = [base or ours for base in bases]
    pairs = [(i, j) for i in range(len(theirs)) for j in range(i, len(theirs))]
    totals = [Fraction(0)] * len(pairs)
    wanted = min(threads or default_threads() + 1, MEMORY // _Desk.size(len(theirs)) - 1) + 1
    count = desks_for(max(2, wanted), files=len(theirs) + len({base.folder for base in own}))
    with ExitStack() as stack:
        stack.enter_context(steady_arithmetic())
        desks = [_Desk(theirs, own, stack) for _ in range(count)]
        pool = stack.enter_context(
            ThreadPoolExecutor(max(1, count - 1), thread_name_prefix="gram", initializer=single_threaded)
        )
        for sums in in_order(_spans(ours, stop or _never), desks, _Desk.products, pool):
            for place, value in enumerate(sums):
                totals[place] += Fraction(value)
    products = dict(zip(pairs, map(float, totals), strict=True))
    places = range(len(theirs))
    return [[products[min(i, j), max(i, j)] for j in places] for i in places]


def distances(products: Matrix) -> list[list[float]]:
    """The squared euclidean distances between the updates, from their inner products: |u|^2 + |v|^2 - 2 uv, and 0 where
    rounding makes that negative."""
    squares = [row[place] for place, row in enumerate(products)]
    return [
        [max(0.0, math.fsum((one, other, -2 * value))) for other, value in zip(squares, row, strict=True)]
        for one, row in zip(squares, products, strict=True)
    ]


def norms(products: Matrix) -> list[float]:
    """The updates' l2 norms."""
    return [math.sqrt(row[place]) for place, row in enumerate(products)]


def cosines_to_mean(products: Matrix, shares: Sequence[float] | None = None) -> list[float]:
    """Of the angle between each update u_k and the mean sum_j p_j u_j; without shares all count alike. An update of
    length 0 has no direction, nor has a mean of length 0: then it is 0."""
    shares = shares or [1 / len(products)] * len(products)
    along = [math.fsum(share * value for share, value in zip(shares, row, strict=True)) for row in products]
    mean = math.sqrt(max(0.0, math.fsum(share * value for share, value in zip(shares, along, strict=True))))
    lengths = [norm * mean for norm in norms(products)]
    return [
        max(-1.0, min(1.0, value / length)) if length else 0.0 for value, length in zip(along, lengths, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """`count` elements of a tensor of the base, from element `start` on."""

    tensor: Tensor
    start: int
    count: int


class _Desk:
    """One thread's buffers: the updates' next block, a row each, and the sums of their products."""

    def __init__(self, theirs: Sequence[Shards], bases: Sequence[Shards], stack: ExitStack) -> None:
        import torch

        from flctl.model.chunks import Chunk

        self._theirs = [(shards, stack.enter_context(Reader(shards))) for shards in theirs]
        folders = {shards.folder: shards for shards in bases}
        readers = {folder: (shards, stack.enter_context(Reader(shards))) for folder, shards in folders.items()}
        self._bases = [readers[shards.folder] for shards in bases]
        self._raw = Chunk(BLOCK)
        self._rows = torch.empty(len(theirs), BLOCK, dtype=torch.float64)
        self._base, self._product = torch.empty(2, BLOCK, dtype=torch.float64)
        self._columns = torch.empty(LANES, dtype=torch.float64)
        self._sums = torch.empty(len(theirs) * (len(theirs) + 1) // 2, LANES, dtype=torch.float64)

    @staticmethod
    def size(count: int) -> int:
        """Bytes of the buffers for so many contributions."""
        return 8 * ((count + 3) * BLOCK + count * (count + 1) // 2 * LANES)

    def products(self, span: _Span) -> list[float]:
        """The inner products of the updates' values of one span: (0, 0), (0, 1), ..., (1, 1), ..."""
        self._sums.zero_()
        for start in range(span.start, span.start + span.count, BLOCK):
            self._add(self._load(span.tensor, start, min(BLOCK, span.start + span.count - start)))
        width = LANES
        while width > 1:
            width //= 2
            self._sums[:, :width].add_(self._sums[:, width : 2 * width])
        found: list[float] = self._sums[:, 0].tolist()
        if not all(map(math.isfinite, found)):
            raise self._unusable(span)
        return found

    def _load(self, tensor: Tensor, start: int, count: int) -> int:
        """The length of the rows, filled up with zeros."""
        width = -(-count // LANES) * LANES
        loaded: Shards | None = None
        for row, (theirs, reader), (base, base_reader) in zip(self._rows, self._theirs, self._bases, strict=True):
            if base is not loaded:  # most have the same one
                self._base[:count].copy_(self._raw.load(base_reader, base.tensors[tensor.name], start, count))
                loaded = base
            row[:count].copy_(self._raw.load(reader, theirs.tensors[tensor.name], start, count))
            row[:count].sub_(self._base[:count])
            row[count:width].zero_()
        return width

    def _add(self, width: int) -> None:
        import torch

        product, sums = self._product[:width], iter(self._sums)
        for place, row in enumerate(self._rows):
            for other in self._rows[place:]:
                torch.mul(row[:width], other[:width], out=product)
                next(sums).add_(torch.sum(product.view(-1, LANES), 0, out=self._columns))

    def _unusable(self, span: _Span) -> AggregationRefused:
        """Which contribution is to blame, if one is."""
        from flctl.model.chunks import blemish

        name = span.tensor.name
        for shards, reader in (*self._theirs, *self._bases):
            for start in range(span.start, span.start + span.count, BLOCK):
                count = min(BLOCK, span.start + span.count - start)
                if found := blemish(self._raw.load(reader, shards.tensors[name], start, count)):
                    return AggregationRefused(f"{shards.folder}: tensor {name!r} holds {found}", site=shards.site)
        return AggregationRefused(f"the updates of tensor {name!r} are too large to be compared in float64")


def _spans(ours: Shards, stop: Callable[[], bool]) -> Iterator[_Span]:
    for shard in ours.files:
        for tensor in shard.tensors:
            for start, count in tensor.pieces(SPAN) if tensor.averaged else ():
                if stop():
                    raise Interrupted("stopped while comparing the updates; nothing was written")
                yield _Span(tensor=tensor, start=start, count=count)


def _never() -> bool:
    return False
