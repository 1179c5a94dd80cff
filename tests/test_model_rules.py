"""The arithmetic: every rounding is where the formula puts it."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flctl.errors import AggregationRefused, ConfigurationError
from flctl.model.chunks import DTYPES, stays_finite
from flctl.model.rules import RULES, Facts, NoOptions, options_of
from flctl.model.rules.averaging import convex, final, normalised, power, shares, single, weighted
from tests.checkpoints import FLOATS, NUMPY, random_values, reference_fedavg, to_bf16

weights = st.lists(st.integers(1, 10**12), min_size=1, max_size=5)


def averaged(dtype: str, arrays: list[np.ndarray], given_weights: list[float]) -> np.ndarray:
    precision = torch.float64 if dtype == "F64" else torch.float32
    total, product = (torch.empty(len(arrays[0]), dtype=precision) for _ in range(2))
    parts = shares(given_weights)
    if dtype != "F64":
        parts = tuple(single(part) for part in parts)
    values = (torch.frombuffer(bytearray(array.tobytes()), dtype=DTYPES[dtype]) for array in arrays)
    result = weighted((x.to(precision) for x in values), parts, total, product).to(DTYPES[dtype])
    return result.view(torch.uint8).numpy().view(NUMPY[dtype])


@given(dtype=st.sampled_from(list(FLOATS)), seed=st.integers(0, 2**32), weights=weights, size=st.integers(1, 200))
def test_fedavg_has_the_bits_of_the_numpy_reference(dtype: str, seed: int, weights: list[int], size: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [random_values(dtype, (size,), rng) for _ in weights]
    named = [{"x": (dtype, array)} for array in arrays]
    expected = reference_fedavg(named[0], list(zip(map(float, weights), named, strict=True)))["x"][1]
    given_bits = averaged(dtype, arrays, [float(weight) for weight in weights])
    assert given_bits.tobytes() == expected.tobytes()


def test_product_and_sum_are_rounded_apart() -> None:
    """A fused multiply-add, also one that a vectorised torch kernel might use, gives other bits on this input."""
    rng = np.random.default_rng(7)
    x, y = (rng.normal(size=40_000).astype(np.float32) for _ in range(2))
    p, q = (np.float32(part) for part in shares([1, 2]))
    # Both factors have 24 bits, so float64 holds the product exactly.
    fused = (np.float64(q) * y.astype(np.float64) + (p * x).astype(np.float64)).astype(np.float32)
    apart = (p * x) + (q * y)
    assert (fused != apart).sum() > 1000
    assert averaged("F32", [x, y], [1, 2]).tobytes() == apart.tobytes()


def test_a_sum_is_rounded_to_bf16_once_and_ties_go_to_even() -> None:
    """1 + 2^-8 lies between two bf16 numbers: to even is down; 1 + 3 * 2^-8: to even is up."""
    one, below, above = (to_bf16(np.array([value], np.float32)) for value in (1.0, 1.0 + 2**-7, 1.0 + 2**-6))
    assert averaged("BF16", [one, below], [1, 1]).tolist() == one.tolist()
    assert averaged("BF16", [below, above], [1, 1]).tolist() == above.tolist()


def test_subnormal_numbers_are_kept() -> None:
    tiny = np.array([2.0**-149, 2.0**-130], np.float32)
    assert averaged("F32", [tiny, tiny], [1, 1]).tolist() == [0.0, 2.0**-130]  # 2 * round(2^-150) = 0: ties to even
    assert averaged("F32", [tiny * 2, tiny * 2], [1, 1]).tolist() == [2.0**-148, 2.0**-129]


def test_a_negative_zero_becomes_the_zero_that_the_formula_gives() -> None:
    zero = np.array([-0.0], np.float32)
    assert averaged("F32", [zero], [1]).tobytes() == np.array([0.0], np.float32).tobytes()


def test_float64_weights_are_not_rounded_to_float32() -> None:
    x, y = np.array([1.0]), np.array([0.0])
    assert averaged("F64", [x, y], [1, 2])[0] == 1 / 3
    assert averaged("F32", [x.astype(np.float32), y.astype(np.float32)], [1, 2])[0] == np.float32(1 / 3)


@given(weights=st.lists(st.floats(1e-3, 1e12), min_size=1, max_size=6))
def test_shares_divide_by_the_correctly_rounded_sum(weights: list[float]) -> None:
    total = float(sum(Fraction(weight) for weight in weights))
    assert list(shares(weights)) == [weight / total for weight in weights]


@given(share=st.floats(0, 1))
def test_a_share_is_rounded_as_numpy_rounds_it(share: float) -> None:
    assert single(share) == float(np.float32(share))


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused(weight: float) -> None:
    with pytest.raises(AggregationRefused, match="must be positive"):
        shares([1.0, weight])


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (65519.9, torch.float16, True),
        (65520.0, torch.float16, False),
        (3.39e38, torch.bfloat16, True),
        (3.4e38, torch.bfloat16, False),
        (-3.4e38, torch.float32, True),
        (float("-inf"), torch.float32, False),
        (float("nan"), torch.float32, False),
    ],
)
def test_a_sum_that_leaves_the_range_of_the_dtype_is_seen(value: float, dtype: torch.dtype, expected: bool) -> None:
    total = torch.zeros(100)
    total[57] = value
    assert stays_finite(total, dtype) is expected


@pytest.mark.parametrize("weights", [(1e308, 1e308), (2.0**101, 1.0), (float("inf"), 1.0)])
@pytest.mark.parametrize("coefficients", [normalised, final, convex])
def test_a_weight_beyond_what_sums_can_hold_is_refused(coefficients: Any, weights: tuple[float, ...]) -> None:
    facts = Facts(weights=weights, steps=(1, 1), gram=list)
    with pytest.raises(AggregationRefused, match="at most 2\\^100"):
        coefficients(facts, NoOptions())


@pytest.mark.parametrize("steps", [0, -1, 10**20, int("9" * 400)])
def test_a_number_of_local_steps_that_cannot_be_is_refused_at_once(steps: int) -> None:
    facts = Facts(weights=(1.0, 1.0), steps=(5, steps), gram=list)
    for options in ({}, {"momentum": 0.9}, {"lr": 0.1, "mu": 0.1}):
        with pytest.raises(AggregationRefused, match="number of local steps"):
            RULES["fednova"].coefficients(facts, options_of("fednova", options))


def test_an_option_that_no_float_can_hold_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="fedadam"):
        options_of("fedadam", {"lr": int("9" * 400)})


@given(base=st.floats(0, 1), exponent=st.integers(0, 300))
def test_a_power_is_that_of_exact_arithmetic_to_a_few_roundings(base: float, exponent: int) -> None:
    exact = Fraction(base) ** exponent
    if exact > Fraction(2) ** -900:
        assert abs(Fraction(power(base, exponent)) / exact - 1) < Fraction(2, 10**13)


@pytest.mark.parametrize(("rule", "count"), [("krum", 2), ("multikrum", 1), ("krum", 4)])
def test_krum_says_how_many_contributions_it_needs(rule: str, count: int) -> None:
    reason = RULES[rule].refusal(count, options_of(rule, {}))
    assert "needs at least 5 (n >= 2f + 3)" in reason
    assert ("no robust rule can work with fewer than 3" in reason) is (count < 3)
