"""An aggregation rule of one's own: Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2) on the mean update."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flctl.model.rules import Rule

if TYPE_CHECKING:
    from flctl.model.inputs import Inputs
    from flctl.model.rules import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Lion:
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99


def lion(x: "Inputs", o: Lion) -> "Step":
    """w = w + eta sign(beta1 m + (1 - beta1) Delta), then m = beta2 m + (1 - beta2) Delta."""
    delta, before = x.update(), x.remembered("momentum", 0.0)
    direction = (before * o.beta1 + delta * (1 - o.beta1)).sign()
    momentum = before * o.beta2 + delta * (1 - o.beta2)
    return x.current + direction * o.lr, {"momentum": momentum}


LION = Rule(step=lion, state=("momentum",), options=Lion, bounded=True)
