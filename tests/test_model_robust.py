"""The rules that some bad contributions cannot move at will, and the counts for which there can be none."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flctl.errors import AggregationRefused, ConfigurationError
from flctl.model.inputs import Given
from flctl.model.merge import Made, Recipe, Source, merge
from flctl.model.rules import RULES, options_of
from flctl.model.shards import open_shards
from flctl.model.worker import Piece, Worker
from tests.checkpoints import NUMPY, from_bf16, random_values, read_weights, to_bf16, write_weights

SITES = "abcdefghi"


def contributions(root: Path, models: Sequence[np.ndarray], dtype: str = "F64") -> list[Source]:
    return [
        Source(site=site, number=1, folder=write_weights(root / site, {"w": (dtype, values)}), weight=place + 1)
        for place, (site, values) in enumerate(zip(SITES, models, strict=False))
    ]


def merged(root: Path, models: Sequence[np.ndarray], rule: str, dtype: str = "F64", **options: Any) -> Made:
    base = write_weights(root / "base", {"w": (dtype, np.zeros_like(models[0]))})
    return merge(base, contributions(root, models, dtype), root / "draft", recipe=Recipe(rule=rule, options=options))


def result(root: Path) -> np.ndarray:
    return read_weights(root / "draft")["w"][1]


def stepped(root: Path, base: Sequence[float], models: Sequence[Sequence[float]], rule: str, **options: Any) -> Any:
    """The rule's step alone, for a count that a merge refuses."""
    theirs = [open_shards(write_weights(root / f"{n}", {"w": ("F64", np.array(x))})) for n, x in enumerate(models)]
    ours = open_shards(write_weights(root / "base", {"w": ("F64", np.array(base))}))
    alone = len(models)
    numbers = Given(
        ours=ours,
        theirs=tuple(theirs),
        coefficients=(1 / alone,) * alone,
        bases=(None,) * alone,
        scales=(1.0,) * alone,
    )
    with ExitStack() as stack:
        worker = Worker(numbers, RULES[rule], options_of(rule, options), (), 10, stack)
        made = worker.make(Piece(tensor=ours.tensors["w"], start=0, count=len(base)))
        return np.frombuffer(bytes(made[0])).tolist()


# Median and trimmed mean


@pytest.mark.parametrize(
    ("base", "models", "expected"),
    [
        ([1, -2, 0.5], ([1.2, -1.7, 0.1], [0.4, -2.6, 0.9]), [0.8, -2.15, 0.5]),
        ([0.8, -2.15, 0.5], ([1.5, -1.9, 0.2], [0.8, -2.1, 0.6]), [1.15, -2.0, 0.4]),
    ],
)
def test_the_median_of_two_is_that_of_flower(
    base: list[float], models: tuple[list[float], list[float]], expected: list[float], tmp_path: Path
) -> None:
    assert stepped(tmp_path, base, models, "median") == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_step_by_itself_works_for_any_count(rule: str, count: int, tmp_path: Path) -> None:
    models = [[1.0, 5.0], [2.0, -7.0]][:count]
    assert stepped(tmp_path, [0.0, 0.0], models, rule) == np.mean(models, axis=0).tolist()


@settings(max_examples=50, deadline=None)
@given(
    dtype=st.sampled_from(["BF16", "F16", "F32", "F64"]),
    count=st.integers(3, 9),
    seed=st.integers(0, 2**32),
    beta=st.none() | st.floats(0.15, 0.49),
)
def test_median_and_trimmed_mean_are_those_of_numpy(dtype: str, count: int, seed: int, beta: float | None) -> None:
    """In the precision of the sums bit by bit, and so within the rounding of the checkpoint's dtype."""
    rng = np.random.default_rng(seed)
    models = [random_values(dtype, (40,), rng) for _ in range(count)]
    precision = np.float64 if dtype == "F64" else np.float32
    rows = np.sort([from_bf16(x) if dtype == "BF16" else x.astype(precision) for x in models], axis=0)
    cut = (count - 1) // 2 if beta is None else int(Fraction(str(beta)) * count)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        options = {} if beta is None else {"beta": beta}
        rule = "median" if beta is None else "trimmed_mean"
        if not cut:
            with pytest.raises(AggregationRefused, match="leaves the plain mean"):
                merged(root, models, rule, dtype, **options)
            return
        merged(root, models, rule, dtype, **options)
        kept = rows[cut : count - cut]
        expected = np.zeros(40, precision)
        for row in kept:
            expected = expected + row * precision(1 / len(kept))
        narrow = to_bf16(expected) if dtype == "BF16" else expected.astype(NUMPY[dtype])
        assert result(root).tobytes() == narrow.tobytes()
        wide = kept.astype(np.float64).mean(axis=0)
        size = np.abs(kept).max(axis=0).astype(np.float64)
        got = (from_bf16(result(root)) if dtype == "BF16" else result(root)).astype(np.float64)
        ulp = {"F64": 2.0**-50, "F32": 2.0**-21, "F16": 2.0**-11, "BF16": 2.0**-8}[dtype]
        smallest = {"F64": 1e-300, "F32": 1e-44, "F16": 6e-8, "BF16": 1e-40}[dtype]
        assert (np.abs(got - wide) <= ulp * size * 1.01 + smallest).all()


def test_two_wild_contributions_of_five_are_outvoted_whatever_their_weight(tmp_path: Path) -> None:
    """A bad site would claim a large n_k, so none is asked for."""
    rng = np.random.default_rng(0)
    honest = [rng.normal(1, 0.1, 100) for _ in range(3)]
    models = [*honest, np.full(100, 1e6), np.full(100, -1e6)]
    for rule, options in (("median", {}), ("trimmed_mean", {"beta": 0.4})):
        made = merged(tmp_path / rule, models, rule, **options)
        found = result(tmp_path / rule)
        assert (found >= np.min(honest, axis=0)).all()
        assert (found <= np.max(honest, axis=0)).all()
        assert set(made.coefficients.values()) == {1 / 5}


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
def test_a_value_that_is_no_number_is_refused_not_outvoted(rule: str, value: float, what: str, tmp_path: Path) -> None:
    models = [np.full(20, float(place)) for place in range(5)]
    models[3][7] = value
    with pytest.raises(AggregationRefused, match=f"^d: .*tensor 'w' holds {what}"):
        merged(tmp_path, models, rule)


def test_updates_from_other_bases_are_counted_from_the_current_model(tmp_path: Path) -> None:
    """w + (x_k - b_k) is what a contribution stands for."""
    sources = contributions(tmp_path, [np.array([1.0]), np.array([5.0]), np.array([9.0])])
    old = write_weights(tmp_path / "old", {"w": ("F64", np.array([6.0]))})
    base = write_weights(tmp_path / "base", {"w": ("F64", np.array([2.0]))})
    late = Source(site="c", number=1, folder=sources[2].folder, weight=1, base=old)
    merge(base, [*sources[:2], late], tmp_path / "draft", recipe=Recipe(rule="median"))
    assert result(tmp_path).tolist() == [5.0]
    merge(base, [*sources[1:2], late, sources[0]], tmp_path / "again", recipe=Recipe(rule="median"))
    assert read_weights(tmp_path / "again")["w"][1].tolist() == [5.0]


# Krum


def krum_scores(updates: np.ndarray, f: int) -> np.ndarray:
    apart = ((updates[:, None] - updates[None]) ** 2).sum(-1)
    np.fill_diagonal(apart, np.inf)
    return np.sort(apart, axis=1)[:, : len(updates) - f - 2].sum(1)


def poisoned(seed: int, count: int, bad: Sequence[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 5.0 if place in bad else 0.1, 200) for place in range(count)]


@pytest.mark.parametrize(("count", "f"), [(3, 0), (5, 1), (7, 2), (9, 3)])
def test_krum_takes_the_honest_contribution_that_numpy_scores_lowest(count: int, f: int, tmp_path: Path) -> None:
    for seed in range(4):
        bad = range(seed % 2, seed % 2 + max(f, 1))
        models = poisoned(seed, count, bad)
        made = merged(tmp_path / str(seed), models, "krum", f=f)
        best = int(np.argmin(krum_scores(np.stack(models), f)))
        assert best not in bad
        assert made.coefficients == {(SITES[place], 1): float(place == best) for place in range(count)}
        assert result(tmp_path / str(seed)).tobytes() == models[best].tobytes()


@pytest.mark.parametrize("m", [0, 1, 3])
def test_multikrum_averages_the_m_that_numpy_scores_lowest(m: int, tmp_path: Path) -> None:
    models = poisoned(3, 7, [2, 5])
    made = merged(tmp_path, models, "multikrum", f=2, m=m)
    many = m or 3  # n - f - 2
    best = sorted(np.argsort(krum_scores(np.stack(models), 2))[:many])
    assert not {2, 5} & set(best)
    assert [place for place in range(7) if made.coefficients[SITES[place], 1]] == best
    assert set(made.coefficients.values()) == {0.0, 1 / many}
    assert np.allclose(result(tmp_path), np.mean([models[place] for place in best], axis=0), rtol=1e-14, atol=1e-15)


def test_of_equal_scores_the_first_contributions_wins(tmp_path: Path) -> None:
    """By site and run number, not by arrival."""
    models = [np.array([9.0]), np.array([1.0]), np.array([2.0])]
    assert merged(tmp_path, models, "krum", f=0).coefficients == {("a", 1): 0.0, ("b", 1): 1.0, ("c", 1): 0.0}
    base = tmp_path / "base"
    again = merge(
        base, contributions(tmp_path, models)[::-1], tmp_path / "2", recipe=Recipe(rule="krum", options={"f": 0})
    )
    assert again.coefficients == {("a", 1): 0.0, ("b", 1): 1.0, ("c", 1): 0.0}


def test_krum_does_not_choose_among_values_that_are_no_numbers(tmp_path: Path) -> None:
    models = poisoned(0, 5, [])
    models[4][3] = np.nan
    with pytest.raises(AggregationRefused, match=r"^e: .*tensor 'w' holds NaN"):
        merged(tmp_path, models, "krum")
    assert not (tmp_path / "draft").exists()


# What cannot be


@pytest.mark.parametrize(
    ("rule", "options", "count", "reason"),
    [
        ("median", {}, 1, "median: 1 contribution is its own median"),
        ("median", {}, 2, "median: the median of 2 contributions is their mean, so a bad one is not outvoted"),
        ("median", {}, 3, ""),
        ("trimmed_mean", {"beta": 0.4}, 2, "no robust rule can work with fewer than 3"),
        ("trimmed_mean", {}, 4, "a beta of 0.2 cuts none of 4 contributions off, .* it needs 5 .* at least 1/4"),
        ("trimmed_mean", {"beta": 0.25}, 4, ""),
        ("trimmed_mean", {}, 5, ""),
        ("krum", {"f": 0}, 2, "no robust rule can work with fewer than 3"),
        ("krum", {"f": 0}, 3, ""),
        ("krum", {}, 4, r"f = 1 bad contributions it needs at least 5 \(n >= 2f \+ 3\), and there are 4, .* f = 0"),
        ("krum", {}, 5, ""),
        ("krum", {"f": 2}, 6, "needs at least 7 .* enough for f = 1"),
        ("multikrum", {"f": 1}, 2, "no robust rule can work with fewer than 3"),
        ("multikrum", {"f": 1}, 4, "needs at least 5"),
        ("multikrum", {"f": 1, "m": 3}, 5, "m = 3 is too many of 5 contributions; with f = 1 at most 2"),
        ("multikrum", {"f": 1, "m": 2}, 5, ""),
    ],
)
def test_a_count_for_which_the_rule_is_not_robust_is_refused(
    rule: str, options: dict[str, Any], count: int, reason: str, tmp_path: Path
) -> None:
    models = [np.array([float(place)]) for place in range(count)]
    if not reason:
        merged(tmp_path, models, rule, **options)
        return
    with pytest.raises(AggregationRefused, match=reason):
        merged(tmp_path, models, rule, **options)
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize(
    ("rule", "options", "reason"),
    [
        ("trimmed_mean", {"beta": 0.5}, "below 0.5, as it is cut off at each end; not 0.5"),
        ("trimmed_mean", {"beta": 0}, "above 0"),
        ("krum", {"f": -1}, "f must be at least 0, not -1"),
        ("krum", {"f": 1.0}, "f must be a whole number, not 1.0"),
        ("multikrum", {"m": -2}, "f and m must be at least 0"),
    ],
)
def test_an_option_that_cannot_be_is_refused(rule: str, options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        merged(tmp_path, [np.array([1.0])] * 5, rule, **options)
