"""Gaussian noise from a cryptographic generator, the same bits on every machine for who has the seed.

ChaCha20's key stream (RFC 8439) through the transform of Box and Muller (1958, doi:10.1214/aoms/1177706645). torch's
generator will not do: it is seeded with 32 bits, which can be tried one by one. Nor will a library's logarithm and
cosine: they differ in the last bit from one processor to the next. Here are only operations whose results IEEE 754
fixes."""

import hmac
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

Floats = NDArray[numpy.float64]

PIECE = 1 << 14  # values at a time: their buffers stay in the processor's cache
PAIR, BLOCK = 16, 64  # bytes of the stream that make two values; bytes of one ChaCha20 block

# Series in x^2 that end where the next term is below 2^-53 of the sum for the arguments that they get.
ARTANH = [1 / (2 * k + 1) for k in range(10)]  # artanh(x) / x, |x| < 0.172
SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(8)]  # sin(x) / x, |x| <= pi / 4
COSINE = [(-1) ** k / math.factorial(2 * k) for k in range(9)]  # cos(x), |x| <= pi / 4
LN2 = 0.6931471805599453
ROOT = 0.7071067811865476


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Values of N(0, deviation^2), a function of the seed, the tensor's name and the value's place in it; so neither
    chunks, nor threads, nor ranks change it. `seed`: 64 hexadecimal digits.

    A value has 64 random bits in its length and 64 in its direction, and is at most 9.5 deviations. It is made in
    float64 and added in float64, and only the sum is rounded to float32: the gaps between a generator's values, by
    which noise can be told from what it hides (Mironov 2012), lie 29 bits below what is released. In a float64
    checkpoint nothing lies above them."""

    seed: str
    deviation: float

    def add(self, values: torch.Tensor, name: str, start: int) -> None:
        """Add the noise of tensor `name` from element `start` on to `values`, in place; one rounding."""
        key = hmac.digest(bytes.fromhex(self.seed), name.encode(errors="surrogatepass"), "sha256")
        for place in range(0, len(values), PIECE):
            piece = values[place : place + PIECE]
            piece.add_(torch.from_numpy(normal(key, start + place, len(piece)) * self.deviation))


def normal(key: bytes, start: int, count: int) -> Floats:
    """`count` independent values of N(0, 1), from number `start` on of the endless sequence that belongs to `key`."""
    first = start // 2
    words = _stream(key, first * PAIR, ((start + count + 1) // 2 - first) * PAIR)
    length = numpy.sqrt(-2.0 * _log((words[0::2].astype(numpy.float64) + 0.5) * 2.0**-64))
    across, along = _direction(words[1::2])
    made = numpy.empty(len(words))
    made[0::2] = length * along
    made[1::2] = length * across
    return made[start % 2 :][:count]


def _stream(key: bytes, begin: int, size: int) -> NDArray[numpy.uint64]:
    """Bytes of the key's stream as words. The nonce is 0: a key is used for one stream only."""
    block, skipped = divmod(begin, BLOCK)
    cipher = Cipher(ChaCha20(key, struct.pack("<QQ", block, 0)), mode=None).encryptor()
    return numpy.frombuffer(cipher.update(bytes(skipped + size)), dtype="<u8", offset=skipped)


def _log(x: Floats) -> Floats:
    """ln(x) = e ln(2) + 2 artanh((m - 1) / (m + 1)) for x = m 2^e, m between the roots of 1/2 and of 2."""
    m, e = numpy.frexp(x)
    small = m < ROOT
    m = numpy.where(small, 2.0 * m, m)
    s = (m - 1.0) / (m + 1.0)
    return (e - small) * LN2 + 2.0 * s * _series(ARTANH, s * s)


def _direction(words: NDArray[numpy.uint64]) -> tuple[Floats, Floats]:
    """(sin, cos) of an even angle: two bits say which quarter of the circle, 62 how far from its middle."""
    quarter = words >> numpy.uint64(62)
    part = (words & numpy.uint64((1 << 62) - 1)).astype(numpy.float64) + 0.5
    x = (part * 2.0**-62 - 0.5) * (math.pi / 2)
    square = x * x
    sine, cosine = x * _series(SINE, square), _series(COSINE, square)
    turned = (quarter & numpy.uint64(1)).astype(bool)
    sign = 1.0 - (quarter & numpy.uint64(2)).astype(numpy.float64)
    return sign * numpy.where(turned, cosine, sine), sign * numpy.where(turned, -sine, cosine)


def _series(terms: Sequence[float], x: Floats) -> Floats:
    """terms[0] + terms[1] x + terms[2] x^2 + ..., by Horner's rule."""
    total = numpy.full_like(x, terms[-1])
    for term in terms[-2::-1]:
        total *= x
        total += term
    return total
