"""Owns the methods: how many records of each class each client gets."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeVar

from flctl.dataset.draws import dirichlet, exactly, normal, stream, whole
from flctl.errors import UsageError

T = TypeVar("T")
Counts = list[list[int]]
"""Records by client and class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DualDirichlet:
    """Sizes a ~ Dir(alpha_size p), p_i = 1/M; of each client the mix b_i ~ Dir(alpha_class q), q_j = c_j / sum(c); of
    the c_j records of class j client i gets a_i b_ij / sum_m a_m b_mj (FedCompass, arXiv:2309.14675, Algorithm 5,
    where they are alpha_1 = M and alpha_2 = 0.5; APPFL's defaults are 8 and 0.5). Small alphas: unlike clients."""

    alpha_size: Decimal
    alpha_class: Decimal

    def counts(self, classes: Sequence[int], clients: int, seed: int) -> Counts:
        total = sum(classes)
        sizes = dirichlet([self.alpha_size / clients] * clients, stream(seed, "sizes"))
        mix = [self.alpha_class * count / total for count in classes]
        mixes = [dirichlet(mix, stream(seed, "mix", client)) for client in range(clients)]
        return _by_class(
            classes,
            [[sizes[client] * mixes[client][place] for client in range(clients)] for place in range(len(classes))],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dirichlet:
    """Of each class, the clients' shares ~ Dir(alpha, ..., alpha) (Yurochkin et al., arXiv:1905.12022)."""

    alpha: Decimal

    def counts(self, classes: Sequence[int], clients: int, seed: int) -> Counts:
        shares = [dirichlet([self.alpha] * clients, stream(seed, "class", place)) for place in range(len(classes))]
        return _by_class(classes, shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByClass:
    """Each client has between `least` and `most` classes, each class at least one client; of a class its clients'
    shares are as |N(10, 3)| (FedCompass, Algorithm 4; mean and deviation from APPFL's code)."""

    least: int
    most: int

    def counts(self, classes: Sequence[int], clients: int, seed: int) -> Counts:
        holders = self._holders(len(classes), clients, stream(seed, "holders"))
        shares = []
        for place, having in enumerate(holders):
            dice = stream(seed, "class", place)
            shares.append([abs(10 + 3 * normal(dice)) if client in having else Decimal(0) for client in range(clients)])
        return _by_class(classes, shares)

    def _holders(self, classes: int, clients: int, dice: random.Random) -> list[set[int]]:
        """The clients of each class. First every class is dealt once, then the rest of what each client is to have."""
        if self.most > classes or self.most * clients < classes:
            what = (
                f"there are only {classes} classes, so no client can have {self.most}"
                if self.most > classes
                else f"{clients} clients with at most {self.most} classes each cannot hold all {classes}"
            )
            raise UsageError(what, hint=f"--classes-per-client {-(-classes // clients)}-{classes}")
        wanted = [self.least + _below(self.most - self.least + 1, dice) for _ in range(clients)]
        while sum(wanted) < classes:
            wanted[_one_of([client for client in range(clients) if wanted[client] < self.most], dice)] += 1
        holders: list[set[int]] = [set() for _ in range(classes)]
        for having in holders:
            having.add(client := _one_of([client for client in range(clients) if wanted[client]], dice))
            wanted[client] -= 1
        for client in range(clients):
            for _ in range(wanted[client]):
                _one_of([having for having in holders if client not in having], dice).add(client)
        return holders


Method = DualDirichlet | Dirichlet | ByClass


def divide(method: Method, classes: Sequence[int], clients: int, seed: int) -> Counts:
    """How many records each client gets of each class, which has so many (at least one); every record goes to one
    client, and the same seed gives the same on every machine. UsageError."""
    with exactly():
        return method.counts(classes, clients, seed)


def _by_class(classes: Sequence[int], shares: Sequence[Sequence[Decimal]]) -> Counts:
    """Shares (by class, then client; of any sum) as whole records by client, then class."""
    parts = [whole(count, weights) for count, weights in zip(classes, shares, strict=True)]
    return [list(row) for row in zip(*parts, strict=True)]


def _below(limit: int, dice: random.Random) -> int:
    return int(dice.random() * limit)


def _one_of(items: Sequence[T], dice: random.Random) -> T:
    return items[_below(len(items), dice)]
