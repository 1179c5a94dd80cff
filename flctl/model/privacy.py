"""Differential privacy at the server: clipped updates, and Gaussian noise on their sum."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from flctl.errors import ConfigurationError

SEED = 32  # bytes: a key of ChaCha20


@dataclass(frozen=True, slots=True, kw_only=True)
class Privacy:
    """The Gaussian mechanism with every site in every merge (McMahan et al. 2018, arXiv:1710.06963, with q = 1): a rule
    gets sum_k c_k clip(x_k - b_k) + N(0, (z C c)^2), where clip(u) = u min(1, C / |u|), |.| is the l2 norm over all
    float tensors together, and c the largest share of one site: max over sites of the sum of its c_k.

    Two merges are neighbours if all that one site contributed is there in one, and in the other the zero update is in
    its place, with the same coefficients ("zero-out", Kairouz et al. 2021, arXiv:2103.00039). That moves the sum by C c
    at most: the sensitivity, z times less than the noise's deviation. Where neighbours may have any other contribution
    in its place, it is 2 C c, and the same noise has the multiplier z / 2.

    So a site's whole contribution is protected, and each text in it at least as well. Not protected: who took part, and
    with which c_k (samples, steps). A site that takes part in fewer merges is protected better than is stated.

    `clip`: C. `noise_multiplier`: z; 0: updates are clipped and nothing is private. `seed`: 64 hexadecimal digits; who
    knows them can take the noise off again, so they must never leave home."""

    clip: float
    noise_multiplier: float = 0.0
    seed: str = ""

    def __post_init__(self) -> None:
        if not (self.clip > 0 and math.isfinite(self.clip)):
            raise ValueError(f"clip must be a positive number, not {self.clip}")
        if not (self.noise_multiplier >= 0 and math.isfinite(self.noise_multiplier)):
            raise ValueError(f"noise_multiplier must not be negative, and is {self.noise_multiplier}")
        if self.noise_multiplier and len(bytes.fromhex(self.seed)) != SEED:
            raise ValueError(f"noise needs a seed of {2 * SEED} hexadecimal digits")

    def scales(self, norms: Sequence[float]) -> tuple[float, ...]:
        """min(1, C / norm) for each update."""
        return tuple(1.0 if norm <= self.clip else self.clip / norm for norm in norms)

    def deviation(self, sites: Sequence[str], coefficients: Sequence[float]) -> float:
        """z C c: of the noise on the sum."""
        parts: dict[str, list[float]] = {}
        for site, coefficient in zip(sites, coefficients, strict=True):
            parts.setdefault(site, []).append(coefficient)
        return self.noise_multiplier * self.clip * max(math.fsum(part) for part in parts.values())


def unbounded(rule: str) -> ConfigurationError:
    """Why the rule cannot be private, and which can."""
    from flctl.model.rules import RULES

    return ConfigurationError(
        f"the rule {rule} does not keep a contribution within its clipped update: it cannot be private",
        hint=f"use one of {', '.join(name for name in RULES if RULES[name].bounded)}, or no [privacy]",
    )


def new_seed() -> str:
    """256 bits from the operating system."""
    return secrets.token_hex(SEED)
