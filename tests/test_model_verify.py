"""The gates: what may not be averaged is refused, by the name of its tensor and of its site."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flctl.errors import AggregationRefused
from flctl.model.verify import FARTHEST, Look, Report, check, compared, deviation
from tests.checkpoints import FLOATS, NUMPY, Tensors, from_bf16, random_values, raw_file, to_bf16, write_weights

Model = dict[str, tuple[str, np.ndarray]]


def a_model(seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    return {
        "embed": ("F32", rng.normal(size=(20, 4)).astype(np.float32)),
        "half": ("F16", rng.normal(size=30).astype(np.float16)),
        "brain": ("BF16", to_bf16(rng.normal(size=(3, 5)).astype(np.float32))),
        "double": ("F64", rng.normal(size=9)),
        "steps": ("I64", np.array([7], np.int64)),
    }


def refusal_of(base: Tensors, contribution: Tensors, folder: Path) -> AggregationRefused:
    write_weights(folder / "base", base)
    write_weights(folder / "out", contribution)
    with pytest.raises(AggregationRefused) as refusal:
        check(folder / "out", folder / "base", site="karolina", chunk=8)
    assert refusal.value.site == "karolina"
    assert refusal.value.exit_code == 8
    assert "karolina" in str(refusal.value)
    return refusal.value


CHANGES: dict[str, tuple[Callable[[Model], object], str]] = {
    "missing": (lambda m: m.pop("half"), "tensor 'half' is missing"),
    "extra": (lambda m: m.update(more=("U8", np.zeros(1, np.uint8))), "tensor 'more' is not in the base"),
    "renamed": (lambda m: m.update(Half=m.pop("half")), "tensor 'half' is missing"),
    "transposed": (
        lambda m: m.update(brain=("BF16", m["brain"][1].T)),
        "'brain' has shape [5, 3], the base's has [3, 5]",
    ),
    "flat": (
        lambda m: m.update(brain=("BF16", m["brain"][1].ravel())),
        "'brain' has shape [15], the base's has [3, 5]",
    ),
    "other_float": (
        lambda m: m.update(half=("BF16", m["half"][1].view(np.uint16))),
        "'half' is BF16, the base's is F16",
    ),
    "other_integer": (lambda m: m.update(steps=("F64", np.array([7.0]))), "'steps' is F64, the base's is I64"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_missing_extra_or_misshapen_tensor_is_named_with_its_site(case: str, tmp_path: Path) -> None:
    change, reason = CHANGES[case]
    contribution = a_model(1)
    change(contribution)
    assert reason in refusal_of(a_model(), contribution, tmp_path).message


def test_of_many_missing_tensors_some_are_named(tmp_path: Path) -> None:
    base = {f"layer.{number}": ("F32", np.zeros(2, np.float32)) for number in range(10)}
    contribution = {"layer.0": base["layer.0"]}
    reason = "tensors 'layer.1', 'layer.2', 'layer.3' and 6 more are missing"
    assert reason in refusal_of(base, contribution, tmp_path).message


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
@pytest.mark.parametrize("name", ["embed", "half", "brain", "double"])
@pytest.mark.parametrize("place", [0, 8, -1])
def test_nan_and_inf_are_named_with_tensor_and_site(
    name: str, value: float, what: str, place: int, tmp_path: Path
) -> None:
    contribution = a_model(1)
    dtype, array = contribution[name]
    bits = to_bf16(np.array([value], np.float32))[0] & 0xFFC0 if dtype == "BF16" else value
    array.reshape(-1)[place] = bits
    assert f"tensor {name!r} holds {what}" in refusal_of(a_model(), contribution, tmp_path).message


def test_every_nan_pattern_of_bf16_is_found(tmp_path: Path) -> None:
    base = {"w": ("BF16", np.zeros(1, np.uint16))}
    for bits in (0x7F81, 0x7FFF, 0x7FC0, 0xFF81, 0xFFFF):
        assert "holds NaN" in refusal_of(base, {"w": ("BF16", np.array([bits], np.uint16))}, tmp_path).message


def test_a_base_that_holds_nan_is_not_blamed_on_the_site(tmp_path: Path) -> None:
    base = a_model()
    base["embed"][1][2, 2] = np.nan
    write_weights(tmp_path / "base", base)
    write_weights(tmp_path / "out", a_model(1))
    with pytest.raises(AggregationRefused, match="base: tensor 'embed' holds NaN") as refusal:
        check(tmp_path / "out", tmp_path / "base", site="karolina")
    assert refusal.value.site is None


def test_values_too_large_for_a_norm_are_refused(tmp_path: Path) -> None:
    base, contribution = ({"w": ("F64", np.full(3, value))} for value in (0.0, 1e200))
    assert "too large" in refusal_of(base, contribution, tmp_path).message


def test_the_largest_float32_values_are_measured(tmp_path: Path) -> None:
    most = np.finfo(np.float32).max
    write_weights(tmp_path / "base", {"w": ("F32", np.full(1000, -most, np.float32))})
    write_weights(tmp_path / "out", {"w": ("F32", np.full(1000, most, np.float32))})
    report = check(tmp_path / "out", tmp_path / "base", site="karolina")
    assert report.update_norm == pytest.approx(2 * float(most) * 1000**0.5, rel=1e-12)


def test_a_contribution_that_cannot_be_read_is_its_sites_fault(tmp_path: Path) -> None:
    write_weights(tmp_path / "base", a_model())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(raw_file("{}", b"")[:-1])
    with pytest.raises(AggregationRefused, match=r"karolina: .*out/model\.safetensors: truncated"):
        check(tmp_path / "out", tmp_path / "base", site="karolina")


def test_values_of_integer_tensors_are_free(tmp_path: Path) -> None:
    other = a_model()
    other["steps"] = ("I64", np.array([99], np.int64))
    write_weights(tmp_path / "base", a_model())
    write_weights(tmp_path / "out", other)
    report = check(tmp_path / "out", tmp_path / "base", site="karolina")
    assert report.update_norm == 0.0
    assert (report.tensors, report.parameters, report.bytes) == (5, 80 + 30 + 15 + 9 + 1, 320 + 60 + 30 + 72 + 8)


def squares(model: Tensors, base: Tensors | None) -> float:
    def values(tensors: Tensors, name: str) -> np.ndarray:
        dtype, array = tensors[name]
        return (from_bf16(array) if dtype == "BF16" else array).astype(np.float64).ravel()

    floats = [name for name, (dtype, _) in model.items() if dtype in FLOATS]
    parts = [values(model, name) - (values(base, name) if base else 0) for name in floats]
    return float(np.sqrt(sum((part**2).sum() for part in parts)))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    dtypes=st.lists(st.sampled_from([name for name in NUMPY if name != "F64"]), min_size=1, max_size=4),
    shape=st.lists(st.integers(0, 9), max_size=3),
    chunk=st.sampled_from([1, 5, 1 << 20]),
    shards=st.lists(st.sampled_from("123"), min_size=4, max_size=4),
)
def test_norms_are_those_of_numpy_in_float64(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    dtypes: list[str],
    shape: list[int],
    chunk: int,
    shards: list[str],
) -> None:
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("norms")
    base, contribution = (
        {f"t{place}": (dtype, random_values(dtype, shape, rng)) for place, dtype in enumerate(dtypes)} for _ in range(2)
    )
    write_weights(folder / "base", base)
    write_weights(folder / "out", contribution, {name: shards[place] for place, name in enumerate(contribution)})
    report = check(folder / "out", folder / "base", site="karolina", chunk=chunk)
    assert report == Report(
        tensors=len(dtypes),
        parameters=sum(array.size for _, array in base.values()),
        bytes=sum(array.nbytes for _, array in base.values()),
        update_norm=pytest.approx(squares(contribution, base), rel=1e-12),  # type: ignore[arg-type]
        base_norm=pytest.approx(squares(base, None), rel=1e-12),  # type: ignore[arg-type]
    )


def looks(norms: dict[str, float], past: dict[str, list[float]] | None = None, **more: float) -> dict[str, Look]:
    return compared(norms, past or {}, {}, norm_limit=more.get("norm_limit", 6.0), cosine_limit=None)


def test_a_deviation_is_measured_in_median_absolute_deviations() -> None:
    """The median of 1, 2, 3, 4, 10 is 3, their distances from it are 2, 1, 0, 1, 7, whose median is 1."""
    found = deviation(9.0, [1.0, 2.0, 3.0, 4.0, 10.0])
    assert (found.count, found.median, found.deviations) == (5, 3.0, 6.0)
    assert deviation(1.0, [1.0, 2.0, 3.0, 4.0]).deviations == 1.5  # median 2.5, MAD 1


def test_a_small_deviation_counts_in_both_directions() -> None:
    assert deviation(0.0, [9.0, 10.0, 11.0]).deviations == 10.0
    assert deviation(20.0, [9.0, 10.0, 11.0]).deviations == 10.0


def test_values_that_lie_close_together_by_chance_make_no_neighbour_unusual() -> None:
    """The spread is at least a tenth of the median: 1.2 is 2 such tenths from 1, though 200 times the MAD."""
    assert deviation(1.2, [0.999, 1.0, 1.001]).deviations == pytest.approx(2.0)


@pytest.mark.parametrize(("norm", "others", "far"), [(0.0, [0.0] * 3, 0.0), (1e-9, [0.0] * 3, FARTHEST)])
def test_where_nothing_moves_every_move_is_as_far_as_can_be(norm: float, others: list[float], far: float) -> None:
    assert deviation(norm, others).deviations == far
    assert deviation(2.0, [2.0, 2.0, 2.0]).deviations == 0.0


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_others_are_too_few_to_judge_by(count: int) -> None:
    found = deviation(1e9, [1.0] * count)
    assert (found.count, found.median, found.deviations) == (count, None, None)
    seen = looks({str(place): 1.0 for place in range(count)} | {"far": 1e9})["far"]
    assert (seen.reasons, seen.judged) == ({}, False)


def test_an_update_is_compared_with_the_others_and_with_its_own_past() -> None:
    seen = looks({"a": 1.0, "b": 1.1, "c": 1.2, "d": 5.0}, {"a": [5.0, 5.1, 5.2], "b": [5.0, 5.1]})
    assert {name: sorted(one.reasons) for name, one in seen.items()} == {"a": ["norm"], "b": [], "c": [], "d": ["norm"]}
    assert "the median of this site's own before (limit 6)" in seen["a"].reasons["norm"]
    assert "the median of the other updates (limit 6)" in seen["d"].reasons["norm"]
    assert "35.5 deviations from 1.1, the" in seen["d"].reasons["norm"]
    assert seen["d"].worst == seen["d"].others.deviations
    assert (seen["b"].judged, seen["b"].past.count) == (True, 2)


def test_the_limit_itself_is_not_too_far() -> None:
    assert not looks({"a": 1.0, "b": 1.0, "c": 1.0, "d": 2.0}, norm_limit=10.0)["d"].reasons
    assert looks({"a": 1.0, "b": 1.0, "c": 1.0, "d": 2.0}, norm_limit=9.9)["d"].reasons


def test_the_least_cosine_is_a_limit_of_its_own() -> None:
    norms, cosines = {"a": 1.0, "b": 1.0, "c": 9.0}, {"a": 0.5, "b": -0.25, "c": 0.0}
    seen = compared(norms, {}, cosines, norm_limit=None, cosine_limit=0.0)
    assert {name: list(one.reasons) for name, one in seen.items()} == {"a": [], "b": ["cosine"], "c": []}
    assert seen["b"].reasons["cosine"] == "the update's cosine to the mean is -0.25 (limit 0)"
    assert (seen["c"].others.count, seen["c"].judged) == (0, True)
    two = compared({"a": 1.0, "b": 1.0}, {}, cosines, norm_limit=None, cosine_limit=0.0)
    assert all(one.cosine is None and not one.judged for one in two.values())


@settings(max_examples=100, deadline=None)
@given(
    norms=st.lists(st.floats(0, 1e150), min_size=2, max_size=6),
    scale=st.sampled_from([2.0**-40, 2.0, 2.0**60]),
)
def test_a_deviation_is_finite_and_free_of_scale(norms: list[float], scale: float) -> None:
    norm, *others = norms
    found = deviation(norm, others).deviations
    if len(others) < 3:
        assert found is None
    else:
        assert found is not None
        assert 0 <= found <= FARTHEST
        if min(norms) > 1e-100:
            assert deviation(norm * scale, [other * scale for other in others]).deviations == pytest.approx(found)
