"""What a rule sees of one chunk of one tensor, and the few buffers that it flows through."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from flctl.model.chunks import Chunk
from flctl.model.header import MASTER
from flctl.model.rules.averaging import single, weighted
from flctl.model.shards import Reader, Shards, Tensor

if TYPE_CHECKING:
    from flctl.model.noise import Noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What one merge reads: the base's weights, and for each contribution, in their order, its weights, coefficient,
    the base it was trained from (None: `ours`) and the factor that clips its update (1: none). `state` is what the
    rule left beside the base, the float32 master weights among it; `step` counts the rule's steps from 1. `noise` is
    added to the sum of the updates."""

    ours: Shards
    theirs: tuple[Shards, ...]
    coefficients: tuple[float, ...]
    bases: tuple[Shards | None, ...]
    scales: tuple[float, ...]
    state: Mapping[str, Shards] = field(default_factory=dict)
    step: int = 1
    noise: "Noise | None" = None

    @property
    def moved(self) -> bool:
        """Whether the model to be changed is not the one that all updates start from, or they are not taken as they
        are: then sums go over updates, not over values."""
        others = any(base is not None for base in self.bases) or any(scale != 1 for scale in self.scales)
        return others or MASTER in self.state or self.noise is not None


class Inputs:
    """One chunk at a time, aimed at by `aim`. Tensors are one-dimensional, float32, or float64 for float64
    checkpoints. What is returned is read-only for a rule, and is gone when the rule returns; what an iterator yields
    is gone at its next step."""

    def __init__(self, given: Given, chunk: int, stack: ExitStack) -> None:
        self._given = given
        self._ours = stack.enter_context(Reader(given.ours))
        self._theirs = [stack.enter_context(Reader(theirs)) for theirs in given.theirs]
        self._bases = [stack.enter_context(Reader(base)) if base else None for base in given.bases]
        self._state = {name: stack.enter_context(Reader(shards)) for name, shards in given.state.items()}
        self._raw, self._side = Chunk(chunk), Chunk(chunk)
        self._coefficients = {
            torch.float64: given.coefficients,
            torch.float32: tuple(single(value) for value in given.coefficients),
        }
        scaled = [c * scale for c, scale in zip(given.coefficients, given.scales, strict=True)]
        self._scaled = {torch.float64: tuple(scaled), torch.float32: tuple(single(value) for value in scaled)}
        self._chunk = chunk
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._kept: dict[str, torch.Tensor] = {}
        self._tensor, self._start, self._count, self._dtype = (
            next(iter(given.ours.tensors.values())),
            0,
            0,
            torch.float32,
        )

    def aim(self, tensor: Tensor, start: int, count: int) -> None:
        self._tensor, self._start, self._count = tensor, start, count
        self._dtype = torch.float64 if tensor.dtype == "F64" else torch.float32
        self._kept.clear()

    # What a rule may ask for

    @property
    def step(self) -> int:
        """1 for the first model that this rule makes of this campaign."""
        return self._given.step

    @property
    def coefficients(self) -> tuple[float, ...]:
        """One per contribution, rounded to the precision of the sums."""
        return self._coefficients[self._dtype]

    @property
    def current(self) -> torch.Tensor:
        """w: the global model, in full precision where that is kept."""
        if MASTER in self._state and self._tensor.name in self._given.state[MASTER].tensors:
            return self._keep(MASTER, lambda: self._remembered(MASTER))
        return self._base()

    def values(self) -> Iterator[torch.Tensor]:
        """x_k, one contribution after the other."""
        for theirs, reader in zip(self._given.theirs, self._theirs, strict=True):
            raw = self._raw.load(reader, theirs.tensors[self._tensor.name], self._start, self._count)
            yield raw if raw.dtype == self._dtype else self._buffer("product").copy_(raw)

    def updates(self) -> Iterator[torch.Tensor]:
        """x_k - b_k, each from its own base, not clipped."""
        for place, x in enumerate(self.values()):
            yield torch.sub(x, self._base_of(place), out=self._buffer("product"))

    def weighted_values(self) -> torch.Tensor:
        """sum_k c_k x_k"""
        return weighted(self.values(), self.coefficients, self._buffer("total"), self._buffer("product"))

    def update(self) -> torch.Tensor:
        """sum_k c_k s_k (x_k - b_k), with the noise asked for; s_k clips."""
        coefficients = self._scaled[self._dtype]
        total = weighted(self.updates(), coefficients, self._buffer("total"), self._buffer("product"))
        if self._given.noise is not None:
            self._given.noise.add(total, self._tensor.name, self._start)
        return total

    def average(self) -> torch.Tensor:
        """sum_k c_k x_k, or where those did not all start from the current model, w + sum_k c_k s_k (x_k - b_k)."""
        return self.update().add_(self.current) if self._given.moved else self.weighted_values()

    def stack(self) -> torch.Tensor:
        """(contributions, elements): the x_k, or where those did not all start from the current model,
        w + (x_k - b_k)."""
        rows = torch.empty(len(self._theirs), self._count, dtype=self._dtype)
        if self._given.moved:
            current = self.current
            for row, update in zip(rows, self.updates(), strict=True):
                torch.add(current, update, out=row)
        else:
            for row, x in zip(rows, self.values(), strict=True):
                row.copy_(x)
        return rows

    def remembered(self, name: str, initial: float) -> torch.Tensor:
        """The rule's state of that name; `initial` everywhere if there is none yet."""
        if name not in self._state:
            return self._keep(name, lambda: torch.full((self._count,), initial, dtype=self._dtype))
        return self._keep(name, lambda: self._remembered(name))

    # Reading

    def carried(self) -> memoryview:
        """The base's bytes, for what is not averaged."""
        return self._raw.read(self._ours, self._tensor, self._start, self._count)

    def _base_of(self, place: int) -> torch.Tensor:
        reader, base = self._bases[place], self._given.bases[place]
        if reader is None or base is None:
            return self._base()
        raw = self._side.load(reader, base.tensors[self._tensor.name], self._start, self._count)
        return self._buffer("own").copy_(raw)

    def _base(self) -> torch.Tensor:
        return self._keep(
            "base",
            lambda: self._buffer("base").copy_(self._side.load(self._ours, self._tensor, self._start, self._count)),
        )

    def _remembered(self, name: str) -> torch.Tensor:
        tensor = self._given.state[name].tensors[self._tensor.name]
        raw = self._side.load(self._state[name], tensor, self._start, self._count)
        return self._buffer(f"state {name}").copy_(raw)

    def _buffer(self, role: str) -> torch.Tensor:
        key = (role, self._dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self._chunk, dtype=self._dtype)
        return self._buffers[key][: self._count]

    def _keep(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What is read once per chunk, however often it is asked for."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]
