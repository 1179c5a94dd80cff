"""Rules that some bad contributions cannot move at will. They look at no n_k, which a bad site would choose: every
contribution counts alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from flctl.model.geometry import distances
from flctl.model.rules.averaging import NoOptions, weighted

if TYPE_CHECKING:
    from torch import Tensor

    from flctl.model.inputs import Inputs
    from flctl.model.rules import Facts, Step

FEWEST = 3


def median(x: "Inputs", o: NoOptions) -> "Step":
    """Of each value the median; of an even number the mean of the two in the middle (Yin et al. 2018, arXiv:1803.01498,
    definition 1)."""
    rows = _ordered(x.stack())
    return _mean(rows, (len(rows) - 1) // 2), {}


def too_few(count: int, o: object) -> str:
    if count >= FEWEST:
        return ""
    given = "1 contribution is its own median" if count == 1 else "the median of 2 contributions is their mean"
    return f"{given}, so a bad one is not outvoted; no robust rule can work with fewer than {FEWEST}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrimmedMean:
    """How much is cut off."""

    beta: float = 0.2
    """the share of the contributions that is cut off at each end, rounded down to whole ones (Flower: 0.2)"""

    def __post_init__(self) -> None:
        if not 0 < self.beta < 0.5:
            raise ValueError(f"beta must be above 0 and below 0.5, as it is cut off at each end; not {self.beta}")


def trimmed_mean(x: "Inputs", o: TrimmedMean) -> "Step":
    """Of each value the mean without the floor(beta K) smallest and as many largest (Yin et al. 2018, arXiv:1803.01498,
    definition 2)."""
    rows = _ordered(x.stack())
    return _mean(rows, _cut(len(rows), o)), {}


def trims_nothing(count: int, o: TrimmedMean) -> str:
    if reason := too_few(count, o):
        return reason
    if _cut(count, o):
        return ""
    return (
        f"a beta of {o.beta} cuts none of {count} contributions off, which leaves the plain mean; it needs "
        f"{math.ceil(1 / Decimal(str(o.beta)))} contributions, or a beta of at least 1/{count}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Krum:
    """How many bad contributions are to be withstood."""

    f: int = 1
    """at most so many are bad (Flower: 0)"""

    def __post_init__(self) -> None:
        if self.f < 0:
            raise ValueError(f"f must be at least 0, not {self.f}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiKrum:
    """How many bad contributions are to be withstood, and how many are averaged."""

    f: int = 1
    """at most so many are bad (Flower: 0)"""
    m: int = 0
    """so many are averaged, from 1 to n - f - 2; 0: n - f - 2 (Flower: 1)"""

    def __post_init__(self) -> None:
        if self.f < 0 or self.m < 0:
            raise ValueError(f"f and m must be at least 0, not {self.f} and {self.m}")


def krum_choice(facts: "Facts", o: Krum) -> tuple[float, ...]:
    """1 for the contribution with the lowest score, the sum of the squared distances from its update to the n - f - 2
    nearest others (Blanchard et al. 2017, arXiv:1703.02757). Of equal scores the first contribution's wins: with n = 3
    and f = 0, two always are equal."""
    return _chosen(facts, o.f, 1)


def multikrum_choice(facts: "Facts", o: MultiKrum) -> tuple[float, ...]:
    """1/m for the m contributions with the lowest scores of Krum (Blanchard et al. 2017, arXiv:1703.02757), m at most
    n - f - 2, as in its authors' own program (github.com/LPD-EPFL/ByzantineMomentum, aggregators/krum.py)."""
    return _chosen(facts, o.f, o.m or len(facts.weights) - o.f - 2)


def krum_needs(count: int, o: Krum | MultiKrum) -> str:
    if count < 2 * o.f + 3:
        few = f"; no robust rule can work with fewer than {FEWEST}"
        most = f", enough for f = {(count - 3) // 2}" if count >= FEWEST else few
        return (
            f"to withstand f = {o.f} bad contributions it needs at least {2 * o.f + 3} (n >= 2f + 3), and there "
            f"{'is' if count == 1 else 'are'} {count}{most}"
        )
    if isinstance(o, MultiKrum) and o.m > count - o.f - 2:
        return f"m = {o.m} is too many of {count} contributions; with f = {o.f} at most {count - o.f - 2} (n - f - 2)"
    return ""


def alike(facts: "Facts", o: object) -> tuple[float, ...]:
    """1/K for each, whatever its weight."""
    return (1 / len(facts.weights),) * len(facts.weights)


def _chosen(facts: "Facts", f: int, m: int) -> tuple[float, ...]:
    scores = _scores(distances(facts.gram()), f)
    best = sorted(range(len(scores)), key=lambda place: (scores[place], place))[:m]
    return tuple(1 / m if place in best else 0.0 for place in range(len(scores)))


def _scores(apart: Sequence[Sequence[float]], f: int) -> list[float]:
    """Krum's, for the matrix of the squared distances."""
    others = [[*row[:place], *row[place + 1 :]] for place, row in enumerate(apart)]
    return [math.fsum(sorted(row)[: len(apart) - f - 2]) for row in others]


def _cut(count: int, o: TrimmedMean) -> int:
    """floor(beta K) for beta as it is written: 0.29 of 100 are 29, though not for its nearest binary fraction."""
    return int(Decimal(str(o.beta)) * count)


def _ordered(stack: "Tensor") -> "list[Tensor]":
    """The rows with each column sorted, by odd-even transposition: for so few rows 10 times faster than torch.sort. A
    NaN anywhere in a column fills all of it."""
    rows = list(stack)
    for turn in range(len(rows)):
        for low in range(turn % 2, len(rows) - 1, 2):
            one, other = rows[low], rows[low + 1]
            rows[low], rows[low + 1] = one.minimum(other), one.maximum(other)
    return rows


def _mean(rows: "list[Tensor]", cut: int) -> "Tensor":
    """Of the sorted rows without `cut` at each end. Where the lowest or the highest is an Inf, 0 * Inf makes it NaN: an
    Inf is refused like everywhere, not outvoted. Which of -0 and +0 is lower is open, but both end as +0."""
    kept = rows[cut : len(rows) - cut]
    size = len(rows[0])
    mean = weighted(kept, [1 / len(kept)] * len(kept), rows[0].new_empty(size), rows[0].new_empty(size))
    return mean.add_(rows[0] * 0.0).add_(rows[-1] * 0.0)
