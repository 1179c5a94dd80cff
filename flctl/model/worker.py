"""One thread's part of a merge: a piece of one tensor in, the bytes of the next model and of the rule's state out."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from flctl.errors import AggregationRefused
from flctl.model.chunks import DTYPES, Chunk, blemish, stays_finite
from flctl.model.header import MASTER
from flctl.model.inputs import Given, Inputs
from flctl.model.rules import Rule
from flctl.model.shards import Reader, Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`count` elements of a tensor of the base, from element `start` on."""

    tensor: Tensor
    start: int
    count: int


class Worker:
    """Makes pieces, one at a time. `outputs`: the rule's state tensors to be kept, and perhaps MASTER."""

    def __init__(
        self, given: Given, rule: Rule, options: Any, outputs: Sequence[str], chunk: int, stack: ExitStack
    ) -> None:
        self._given, self._rule, self._options, self._outputs = given, rule, options, outputs
        self._inputs = Inputs(given, chunk, stack)
        self._results = [Chunk(chunk) for _ in range(1 + len(outputs))]

    def make(self, piece: Piece) -> list[memoryview]:
        """The new model's bytes of the piece, then those of each output (none where it has no such tensor), valid until
        the next call."""
        tensor = piece.tensor
        self._inputs.aim(tensor, piece.start, piece.count)
        if not tensor.averaged:
            return [self._inputs.carried(), *(memoryview(b"") for _ in self._outputs)]
        values, state = self._rule.step(self._inputs, self._options)
        self._check(values, DTYPES[tensor.dtype], piece, f"the new model's tensor {tensor.name!r}")
        made = [self._results[0].rounded(values, tensor.dtype)]
        for name, result in zip(self._outputs, self._results[1:], strict=True):
            if name == MASTER:
                kept = values if tensor.dtype in ("BF16", "F16") else None
            else:
                kept = state[name]
                self._check(kept, kept.dtype, piece, f"the rule's state {name} of tensor {tensor.name!r}")
            precision = "F64" if tensor.dtype == "F64" else "F32"
            made.append(memoryview(b"") if kept is None else result.rounded(kept, precision))
        return made

    def _check(self, values: torch.Tensor, dtype: torch.dtype, piece: Piece, what: str) -> None:
        if not stays_finite(values, dtype):
            raise self._unusable(piece, dtype, what)

    def _unusable(self, piece: Piece, dtype: torch.dtype, what: str) -> AggregationRefused:
        """Which contribution is to blame, if one is."""
        chunk, name = Chunk(piece.count), piece.tensor.name
        bases = [base for base in self._given.bases if base is not None]
        for shards in (*self._given.theirs, self._given.ours, *bases, *self._given.state.values()):
            if name not in shards.tensors:
                continue
            with Reader(shards) as reader:
                if found := blemish(chunk.load(reader, shards.tensors[name], piece.start, piece.count)):
                    return AggregationRefused(f"{shards.folder}: tensor {name!r} holds {found}", site=shards.site)
        return AggregationRefused(f"{what} has values too large for {str(dtype).removeprefix('torch.')}")
