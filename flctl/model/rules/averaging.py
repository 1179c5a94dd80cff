"""Rules that are weighted sums: FedAvg, and the mixing that asynchronous policies and FedNova need.

To give the same bits everywhere, the order of the operations and every rounding are fixed, and numpy can follow them
one by one."""

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flctl.errors import AggregationRefused

if TYPE_CHECKING:
    from torch import Tensor

    from flctl.model.inputs import Inputs
    from flctl.model.rules import Facts, Step


MOST = 2.0**100  # of a weight: sums of many stay far from the end of float32
MOST_STEPS = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOptions:
    """A rule without options."""


def fedavg(x: "Inputs", o: NoOptions) -> "Step":
    """w = sum_k p_k x_k, p_k = n_k / sum(n) (McMahan et al. 2017, arXiv:1602.05629, algorithm 1)."""
    return x.average(), {}


def fedasync(x: "Inputs", o: NoOptions) -> "Step":
    """w = (1 - sum_k c_k) w + sum_k c_k x_k, with final coefficients c_k = alpha s(staleness) (Xie et al. 2019,
    arXiv:1903.03934, algorithm 1, with one x_k; several at once: FedCompass, Li et al. 2023, arXiv:2309.14675)."""
    rest = 1.0 - math.fsum(x.coefficients)
    return x.weighted_values().add_(x.current * rest), {}


def fedbuff(x: "Inputs", o: NoOptions) -> "Step":
    """w = w + sum_k c_k (x_k - b_k), b_k each contribution's own base, with final coefficients
    c_k = eta_g s(staleness) / K (Nguyen et al. 2022, arXiv:2106.06639, algorithm 1)."""
    return x.current + x.update(), {}


@dataclass(frozen=True, slots=True, kw_only=True)
class FedNova:
    """What the sites' local solver was; nothing said: plain SGD (and what is close to it, as AdamW)."""

    momentum: float = 0.0
    """rho of the sites' SGD with momentum"""
    lr: float = 0.0
    """the sites' learning rate, needed with mu"""
    mu: float = 0.0
    """of FedProx's proximal term"""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be from 0 to below 1, not {self.momentum}")
        if self.mu and not 0 < self.lr * self.mu < 1:
            raise ValueError(f"mu needs an lr with 0 < lr * mu < 1, not {self.lr} * {self.mu}")
        if self.mu and self.momentum:
            raise ValueError("momentum and mu cannot be combined: the paper gives no norm for both")


def fednova_coefficients(facts: "Facts", o: FedNova) -> tuple[float, ...]:
    """c_k = tau_eff p_k / |a_k|, tau_eff = sum_k p_k |a_k| (Wang et al. 2020, arXiv:2007.07481, section 4); |a_k| is
    the l1 norm of the weights with which tau_k local steps' gradients add up in the update."""
    lengths = [_length(steps, o) for steps in facts.steps]
    parts = shares(facts.weights)
    effective = math.fsum(part * length for part, length in zip(parts, lengths, strict=True))
    return tuple(effective * part / length for part, length in zip(parts, lengths, strict=True))


def _length(steps: int, o: FedNova) -> float:
    if not 1 <= steps <= MOST_STEPS:
        raise AggregationRefused(
            f"fednova needs the number of local steps of every contribution, from 1 to {MOST_STEPS}"
        )
    if o.momentum:
        return (steps - o.momentum * (1 - power(o.momentum, steps)) / (1 - o.momentum)) / (1 - o.momentum)
    if o.mu:
        return (1 - power(1 - o.lr * o.mu, steps)) / (o.lr * o.mu)
    return float(steps)


def power(base: float, exponent: int) -> float:
    """By multiplication (squares), as pow() may differ in the last bit between two systems."""
    result = 1.0
    while exponent:
        if exponent % 2:
            result *= base
        base, exponent = base * base, exponent // 2
    return result


def shares(weights: Sequence[float]) -> tuple[float, ...]:
    """p_k = n_k / sum(n) in float64. The sum is the correctly rounded one, as builtin sum() adds floats differently
    from Python 3.12 on."""
    total = math.fsum(_usable(weights, "weight"))
    return tuple(weight / total for weight in weights)


def _usable(values: Sequence[float], what: str) -> Sequence[float]:
    for value in values:
        if not 0 < value <= MOST:  # NaN is neither
            raise AggregationRefused(f"a {what} of {value} cannot be merged with; it must be positive, at most 2^100")
    return values


def normalised(facts: "Facts", o: object) -> tuple[float, ...]:
    """p_k, in the order of the contributions."""
    return shares(facts.weights)


def final(facts: "Facts", o: object) -> tuple[float, ...]:
    """The weights as they are: a policy made them."""
    return tuple(_usable(facts.weights, "coefficient"))


def convex(facts: "Facts", o: object) -> tuple[float, ...]:
    """The weights as they are, which leave a share of at least 0 to the global model."""
    given = final(facts, o)
    if math.fsum(given) > 1:
        raise AggregationRefused(f"the coefficients sum to {math.fsum(given):g}; fedasync needs at most 1")
    return given


def single(share: float) -> float:
    """`share` rounded once to float32."""
    return float(struct.unpack("<f", struct.pack("<f", share))[0])


def weighted(values: Iterable["Tensor"], coefficients: Sequence[float], total: "Tensor", product: "Tensor") -> "Tensor":
    """total = (...((0 + c_1 x_1) + c_2 x_2) + ...), each product and each sum rounded to the dtype of `total`.

    `total` and `product` are two buffers of the chunk's length; each of `values`, of that dtype, is used up before the
    next is asked for, and may lie in `product`. Not addcmul or add(alpha=c): they may fuse product and sum."""
    import torch

    first = True
    for x, coefficient in zip(values, coefficients, strict=True):
        if first:
            torch.mul(x, coefficient, out=total).add_(0.0)  # 0 + c x, which is +0.0 where c x is -0.0
            first = False
        else:
            total.add_(torch.mul(x, coefficient, out=product))
    return total
