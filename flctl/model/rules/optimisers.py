"""Rules that take the contributions' mean update Delta = sum_k p_k (x_k - b_k) for a gradient, and step with an
optimiser at home.

Every product, sum, quotient and root is rounded on its own, and every constant once, to the precision of the sums. The
defaults are the same in every dialect; where a library's own differ, the option says so."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flctl.model.rules.averaging import power

if TYPE_CHECKING:
    from torch import Tensor

    from flctl.model.inputs import Inputs
    from flctl.model.rules import Step

Dialect = Literal["paper", "flower", "appfl"]
MOMENTUM, VARIANCE = "momentum", "variance"


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAvgM:
    """The server's SGD with momentum."""

    dialect: Dialect = "paper"
    """one formula in all three, but APPFL's has no lr"""
    lr: float = 1.0
    """eta (Flower: 1)"""
    momentum: float = 0.9
    """beta (APPFL's examples: 0.9; Flower: 0)"""

    def __post_init__(self) -> None:
        _check(lr=self.lr, momentum=self.momentum)
        if self.dialect == "appfl" and self.lr != 1:
            raise ValueError(f"in the appfl dialect there is no lr: it must be 1, not {self.lr}")


def fedavgm(x: "Inputs", o: FedAvgM) -> "Step":
    """m = beta m + Delta, w = w + eta m, m_0 = 0 (Hsu et al. 2019, arXiv:1909.06335; the same in Flower 1.41 and,
    with eta = 1, in APPFL 1.12)."""
    momentum = (x.remembered(MOMENTUM, 0.0) * o.momentum).add_(x.update())
    return (momentum * o.lr).add_(x.current), {MOMENTUM: momentum}


@dataclass(frozen=True, slots=True, kw_only=True)
class DiLoCo:
    """The outer optimiser: SGD with Nesterov momentum."""

    lr: float = 0.7
    """eta"""
    momentum: float = 0.9
    """beta"""

    def __post_init__(self) -> None:
        _check(lr=self.lr, momentum=self.momentum)


def diloco(x: "Inputs", o: DiLoCo) -> "Step":
    """m = beta m + Delta, w = w + eta (Delta + beta m), m_0 = 0: torch.optim.SGD(nesterov=True) on the outer gradient
    -Delta (Douillard et al. 2023, arXiv:2311.08105, algorithm 1, whose p_k are equal)."""
    delta = x.update()
    momentum = (x.remembered(MOMENTUM, 0.0) * o.momentum).add_(delta)
    return (momentum * o.momentum).add_(delta).mul_(o.lr).add_(x.current), {MOMENTUM: momentum}


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAdagrad:
    """Adagrad at the server."""

    dialect: Dialect = "paper"
    """flower: v_0 = 0 and no momentum; the others: v_0 = tau^2"""
    lr: float = 0.1
    """eta (Flower: 0.1; APPFL's examples: 0.01)"""
    tau: float = 1e-3
    """what keeps the step finite where updates are small (Flower and APPFL's examples: 0.001)"""
    beta1: float = 0.0
    """momentum (the paper's experiments and Flower: none; APPFL's examples: 0.9)"""

    def __post_init__(self) -> None:
        _check(lr=self.lr, tau=self.tau, beta1=self.beta1)
        if self.dialect == "flower" and self.beta1:
            raise ValueError(f"in the flower dialect there is no momentum: beta1 must be 0, not {self.beta1}")


def fedadagrad(x: "Inputs", o: FedAdagrad) -> "Step":
    """m = beta1 m + (1 - beta1) Delta, v = v + Delta^2, w = w + eta m / (sqrt(v) + tau) (Reddi et al. 2020,
    arXiv:2003.00295, algorithm 2)."""
    delta = x.update()
    momentum = _mean(x, delta, o.beta1)
    variance = (delta * delta).add_(x.remembered(VARIANCE, _first(o.dialect, o.tau)))
    return _stepped(x, momentum, variance, o.lr, o.tau), {MOMENTUM: momentum, VARIANCE: variance}


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAdam:
    """Adam at the server."""

    dialect: Dialect = "paper"
    """flower: v_0 = 0, and a bias correction one step ahead; the others: v_0 = tau^2 and no correction"""
    lr: float = 0.1
    """eta (Flower and APPFL's examples: 0.1)"""
    tau: float = 1e-3
    """what keeps the step finite where updates are small (Flower and APPFL's examples: 0.001)"""
    beta1: float = 0.9
    """momentum (Flower and APPFL's examples: 0.9)"""
    beta2: float = 0.99
    """memory of the squared updates (Flower and APPFL's examples: 0.99)"""

    def __post_init__(self) -> None:
        _check(lr=self.lr, tau=self.tau, beta1=self.beta1, beta2=self.beta2)


def fedadam(x: "Inputs", o: FedAdam) -> "Step":
    """m = beta1 m + (1 - beta1) Delta, v = beta2 v + (1 - beta2) Delta^2, w = w + eta m / (sqrt(v) + tau) (Reddi et al.
    2020, arXiv:2003.00295, algorithm 2); in Flower 1.41 eta_r = eta sqrt(1 - beta2^(r+1)) / (1 - beta1^(r+1)) in
    round r = 1, 2, ..."""
    delta = x.update()
    momentum = _mean(x, delta, o.beta1)
    variance = (delta * delta).mul_(1 - o.beta2).add_(x.remembered(VARIANCE, _first(o.dialect, o.tau)) * o.beta2)
    lr = o.lr
    if o.dialect == "flower":
        lr *= math.sqrt(1 - power(o.beta2, x.step + 1)) / (1 - power(o.beta1, x.step + 1))
    return _stepped(x, momentum, variance, lr, o.tau), {MOMENTUM: momentum, VARIANCE: variance}


@dataclass(frozen=True, slots=True, kw_only=True)
class FedYogi:
    """Yogi at the server."""

    dialect: Dialect = "paper"
    """flower: v_0 = 0; the others: v_0 = tau^2"""
    lr: float = 0.01
    """eta (Flower and APPFL's examples: 0.01)"""
    tau: float = 1e-3
    """what keeps the step finite where updates are small (Flower and APPFL's examples: 0.001)"""
    beta1: float = 0.9
    """momentum (Flower and APPFL's examples: 0.9)"""
    beta2: float = 0.99
    """memory of the squared updates (Flower and APPFL's examples: 0.99)"""

    def __post_init__(self) -> None:
        _check(lr=self.lr, tau=self.tau, beta1=self.beta1, beta2=self.beta2)


def fedyogi(x: "Inputs", o: FedYogi) -> "Step":
    """m = beta1 m + (1 - beta1) Delta, v = v - (1 - beta2) Delta^2 sign(v - Delta^2), w = w + eta m / (sqrt(v) + tau)
    (Reddi et al. 2020, arXiv:2003.00295, algorithm 2)."""
    delta = x.update()
    momentum = _mean(x, delta, o.beta1)
    square = delta * delta
    before = x.remembered(VARIANCE, _first(o.dialect, o.tau))
    change = (before - square).sign_().mul_(square).mul_(1 - o.beta2)
    variance = before - change
    return _stepped(x, momentum, variance, o.lr, o.tau), {MOMENTUM: momentum, VARIANCE: variance}


def idle_momentum(o: FedAvgM | DiLoCo | FedAdagrad | FedAdam | FedYogi) -> tuple[str, ...]:
    """The momentum's name where it is forgotten after each step: it need not be kept."""
    share = o.momentum if isinstance(o, (FedAvgM, DiLoCo)) else o.beta1
    return () if share else (MOMENTUM,)


def _mean(x: "Inputs", delta: "Tensor", beta1: float) -> "Tensor":
    return (delta * (1 - beta1)).add_(x.remembered(MOMENTUM, 0.0) * beta1)


def _stepped(x: "Inputs", momentum: "Tensor", variance: "Tensor", lr: float, tau: float) -> "Tensor":
    return (momentum * lr).div_(_root(variance).add_(tau)).add_(x.current)


def _root(values: "Tensor") -> "Tensor":
    """The square root, correctly rounded by numpy. torch asks MKL, where there is one, and that is off in the last bit
    of 17 in 100 float32 values."""
    import numpy
    import torch

    return torch.from_numpy(numpy.sqrt(values.numpy()))


def _first(dialect: Dialect, tau: float) -> float:
    return 0.0 if dialect == "flower" else tau * tau


def _check(*, lr: float, tau: float = 1.0, **shares: float) -> None:
    for name, value in {"lr": lr, "tau": tau}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, not {value}")
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be from 0 to below 1, not {value}")
