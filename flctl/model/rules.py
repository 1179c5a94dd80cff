"""The arithmetic of each rule on one chunk of one tensor.

FedAvg (McMahan et al. 2017, arXiv:1602.05629, algorithm 1): x = sum_k (n_k / sum n) x_k. To give the same bits
everywhere, the order of the operations and every rounding are fixed here, and numpy can follow them one by one."""

import math
import struct
from collections.abc import Iterable, Sequence

import torch

from flctl.errors import AggregationRefused


def shares(weights: Sequence[float]) -> tuple[float, ...]:
    """p_k = n_k / sum(n) in float64. The sum is the correctly rounded one, as builtin sum() adds floats differently
    from Python 3.12 on."""
    for weight in weights:
        if not math.isfinite(weight) or weight <= 0:
            raise AggregationRefused(f"a weight of {weight} cannot be averaged with; it must be positive")
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def single(share: float) -> float:
    """`share` rounded once to float32."""
    return float(struct.unpack("<f", struct.pack("<f", share))[0])


def fedavg(
    values: Iterable[torch.Tensor], shares: Iterable[float], total: torch.Tensor, product: torch.Tensor
) -> torch.Tensor:
    """total = (...((0 + p_1 x_1) + p_2 x_2) + ...), each product and each sum rounded to the dtype of `total`.

    `total` and `product` are the two buffers, of the chunk's length; each of `values` is used up before the next is
    asked for, so that they may share a buffer. Not addcmul or add(alpha=p): they may fuse product and sum."""
    total.zero_()
    for x, share in zip(values, shares, strict=True):
        product.copy_(x)
        product.mul_(share)
        total.add_(product)
    return total


def finite(total: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether all of `total` stays finite when rounded to `dtype`. Rounding keeps the order, so the ends tell."""
    return bool(torch.stack(torch.aminmax(total)).to(dtype).isfinite().all())
