"""The gates: what may not be averaged is refused, by the name of its tensor and of its site."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flctl.errors import AggregationRefused
from flctl.model.verify import Report, check
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
