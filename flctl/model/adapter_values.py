"""The values of adapters: factors whole and in float64, everything else in chunks; checked, and rounded once."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch

from flctl.errors import AggregationRefused
from flctl.model.chunks import DTYPES, Chunk, blemish, stays_finite
from flctl.model.rules.averaging import single, weighted
from flctl.model.shards import CHUNK, Reader, Shards, Tensor


class Values:
    """Reads from the contributions, and from `ours` what is carried. What an iterator yields is gone at its next
    step."""

    def __init__(self, ours: Shards, theirs: Sequence[Shards], stack: ExitStack) -> None:
        self._theirs = theirs
        self._own = stack.enter_context(Reader(ours))
        self._readers = [stack.enter_context(Reader(shards)) for shards in theirs]
        self._chunk = Chunk(CHUNK)

    def whole(self, place: int, name: str) -> torch.Tensor:
        """All of a tensor of one contribution, in float64 and its own shape."""
        tensor = self._theirs[place].tensors[name]
        values = torch.empty(tensor.count, dtype=torch.float64)
        for start, count in tensor.pieces(CHUNK):
            values[start : start + count].copy_(self._finite(place, name, start, count))
        return values.reshape(tensor.shape)

    def rounded(self, values: torch.Tensor, tensor: Tensor) -> Iterator[memoryview]:
        """The bytes of `values` in the dtype of `tensor`."""
        flat = values.reshape(-1)
        for start, count in tensor.pieces(CHUNK):
            yield self._rounded(flat[start : start + count], tensor)

    def means(self, tensor: Tensor, shares: Sequence[float]) -> Iterator[memoryview]:
        """FedAvg of a tensor that is no factor, with the bits of `merge`; integers and bools as `ours` has them."""
        dtype = torch.float64 if tensor.dtype == "F64" else torch.float32
        coefficients = shares if dtype == torch.float64 else [single(share) for share in shares]
        total, product = torch.empty(CHUNK, dtype=dtype), torch.empty(CHUNK, dtype=dtype)
        for start, count in tensor.pieces(CHUNK):
            if not tensor.averaged:
                yield self._chunk.read(self._own, tensor, start, count)
                continue
            part = product[:count]
            given = (part.copy_(self._finite(place, tensor.name, start, count)) for place in range(len(self._theirs)))
            yield self._rounded(weighted(given, coefficients, total[:count], part), tensor)

    def _finite(self, place: int, name: str, start: int, count: int) -> torch.Tensor:
        shards = self._theirs[place]
        values = self._chunk.load(self._readers[place], shards.tensors[name], start, count)
        if found := blemish(values):
            raise AggregationRefused(f"{shards.folder}: tensor {name!r} holds {found}", site=shards.site)
        return values

    def _rounded(self, values: torch.Tensor, tensor: Tensor) -> memoryview:
        if not stays_finite(values, DTYPES[tensor.dtype]):
            raise AggregationRefused(f"tensor {tensor.name!r} of the new adapter is too large for {tensor.dtype}")
        return self._chunk.rounded(values, tensor.dtype)
