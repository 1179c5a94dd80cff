"""Chunks of tensors: a fixed buffer of bytes, seen as torch values."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flctl.model.header import ITEMSIZE
from flctl.model.shards import Reader, Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WIDEST = 8


def single_threaded() -> None:
    """The same for a thread of ours; torch counts per thread."""
    torch.set_flush_denormal(False)
    torch.set_num_threads(1)


@contextmanager
def steady_arithmetic() -> Iterator[None]:
    """One thread and subnormal numbers, for the block. torch's own threads meet after every operation: on two busy
    cores that made a merge of seconds last twenty, and on two free ones it gained nothing over the memory's speed. A
    library may have switched subnormals off in this thread, and with them the arithmetic that is promised."""
    torch.set_flush_denormal(False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Chunk:
    """A buffer for up to `elements` values of any dtype; what it returned is gone with the next use."""

    def __init__(self, elements: int) -> None:
        self._bytes = bytearray(elements * WIDEST)
        self._view = memoryview(self._bytes)
        self._values = {name: torch.frombuffer(self._bytes, dtype=dtype) for name, dtype in DTYPES.items()}

    def read(self, reader: Reader, tensor: Tensor, start: int, count: int) -> memoryview:
        """The bytes of `count` elements from `start` on."""
        view = self._view[: count * ITEMSIZE[tensor.dtype]]
        reader.read(tensor, start, view)
        return view

    def seen(self, dtype: str, count: int) -> torch.Tensor:
        """What was read last, as values of that dtype."""
        return self._values[dtype][:count]

    def load(self, reader: Reader, tensor: Tensor, start: int, count: int) -> torch.Tensor:
        """The same elements as values of their own dtype, which is one of DTYPES."""
        self.read(reader, tensor, start, count)
        return self._values[tensor.dtype][:count]

    def rounded(self, values: torch.Tensor, dtype: str) -> memoryview:
        """The bytes of `values` in `dtype`, rounded to nearest, ties to even."""
        target = self._values[dtype][: len(values)]
        target.copy_(values)
        return self._view[: len(values) * target.element_size()]


def blemish(values: torch.Tensor) -> str:
    """What keeps the values from being averaged: "NaN", "Inf" or nothing."""
    if values.isnan().any():
        return "NaN"
    return "Inf" if values.isinf().any() else ""


def stays_finite(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are finite when rounded to `dtype`. Rounding keeps their order, so the two ends tell."""
    return bool(torch.stack(torch.aminmax(values)).to(dtype).isfinite().all())
