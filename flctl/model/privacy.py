"""Differential privacy at the server: clipped updates and Gaussian noise on their sum."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 16  # values drawn at once; part of what a seed means


@dataclass(frozen=True, slots=True, kw_only=True)
class Privacy:
    """`clip`: the l2 norm C that each contribution's update is clipped to. `noise_multiplier`: z; the noise added to
    sum_k c_k clip(x_k - b_k) has the standard deviation z C max_k(c_k). `seed` makes the noise repeatable for whoever
    knows it, so it must never leave home."""

    clip: float
    noise_multiplier: float = 0.0
    seed: str = ""


def new_seed() -> str:
    return secrets.token_hex(32)


def clipping(norms: Sequence[float], clip: float) -> tuple[float, ...]:
    """min(1, C / norm) for each update (McMahan et al. 2018, arXiv:1710.06963, section 2)."""
    return tuple(1.0 if norm <= clip else clip / norm for norm in norms)


def gaussian_noise(seed: str, deviation: float) -> Callable[[str, int, int], "torch.Tensor"]:
    """noise(tensor name, first element, elements): values of N(0, deviation^2) in float32, a function of the seed and
    the place of each value, so that neither chunks nor threads change it."""
    import torch

    def block(name: str, place: int) -> torch.Tensor:
        digest = sha256(f"{seed}/{name}/{place}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randn(BLOCK, generator=generator)

    def noise(name: str, start: int, count: int) -> torch.Tensor:
        first, last = start // BLOCK, (start + count - 1) // BLOCK
        drawn = torch.cat([block(name, place) for place in range(first, last + 1)])
        return drawn[start - first * BLOCK :][:count].mul_(deviation)

    return noise
