"""Owns random draws that are the same on every machine: gamma and Dirichlet variates, normals, shares made whole.

Only `random.Random.random()` is promised to give the same numbers for the same seed in every Python, and the system's
`log` and `exp` may differ in the last bit. Decimal's `ln`, `exp` and `sqrt` are rounded correctly everywhere, and its
exponents are wide enough that no variate of an extreme alpha becomes 0.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext

_CONTEXT = Context(prec=40, Emin=MIN_EMIN, Emax=MAX_EMAX)
_ONE = Decimal(1)


@contextmanager
def exactly() -> Iterator[None]:
    """The arithmetic that all functions of this module are to be called in."""
    with localcontext(_CONTEXT):
        yield


def stream(seed: int, *names: object) -> random.Random:
    """The dice of one purpose: what is drawn elsewhere does not change what they show."""
    return random.Random("/".join(map(str, (seed, *names))))


def normal(dice: random.Random) -> Decimal:
    """Of mean 0 and variance 1 (Marsaglia's polar method)."""
    while True:
        x, y = (2 * Decimal(dice.random()) - 1 for _ in range(2))
        square = x * x + y * y
        if 0 < square < 1:
            return x * (-2 * square.ln() / square).sqrt()


def gamma(shape: Decimal, dice: random.Random) -> Decimal:
    """Of scale 1 (Marsaglia and Tsang 2000; for shapes below 1, their boost by a power of a uniform)."""
    if shape < 1:
        return gamma(shape + 1, dice) * (_uniform(dice).ln() / shape).exp()
    d = shape - _ONE / 3
    c = 1 / (9 * d).sqrt()
    while True:
        x = normal(dice)
        v = (1 + c * x) ** 3
        if v > 0 and _uniform(dice).ln() < x * x / 2 + d - d * v + d * v.ln():
            return d * v


def _uniform(dice: random.Random) -> Decimal:
    """Between 0 and 1, neither of them."""
    return Decimal(dice.random() or 2.0**-54)


def dirichlet(parameters: Sequence[Decimal], dice: random.Random) -> list[Decimal]:
    """Shares that add up to 1, of the Dirichlet distribution with these parameters, each above 0."""
    drawn = [gamma(parameter, dice) for parameter in parameters]
    total = sum(drawn)
    return [value / total for value in drawn]


def whole(total: int, weights: Sequence[Decimal]) -> list[int]:
    """`total` divided in proportion to the weights, by largest remainder: each part is its quota rounded down or up,
    and they add up. Of equal remainders the first wins."""
    scale = sum(weights)
    quotas = [total * weight / scale for weight in weights]
    parts = [int(quota) for quota in quotas]
    first = sorted(range(len(parts)), key=lambda place: (parts[place] - quotas[place], place))
    for place in first[: total - sum(parts)]:
        parts[place] += 1
    return parts
