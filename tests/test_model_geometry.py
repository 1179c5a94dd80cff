"""How updates lie to each other: numpy's inner products, always with the same bits, in little memory."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flctl.errors import AggregationRefused, Interrupted
from flctl.model.geometry import BLOCK, LANES, SPAN, cosines_to_mean, distances, gram, norms
from flctl.model.shards import Shards, open_shards
from tests.checkpoints import Tensors, from_bf16, to_bf16, write_weights

COUNTS = {"F32": SPAN + BLOCK + 5, "BF16": BLOCK + LANES + 1, "F16": 7, "F64": LANES}


def tensors(seed: int) -> dict[str, tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    made = {"count": ("I64", rng.integers(0, 9, 5)), "none": ("F32", np.zeros((0, 3), np.float32))}
    for dtype, count in COUNTS.items():
        values = rng.normal(0, 0.02, count).astype(np.float32)
        kinds = {"F64": np.float64, "F16": np.float16, "F32": np.float32}
        made[dtype] = (dtype, to_bf16(values) if dtype == "BF16" else values.astype(kinds[dtype]))
    return made


def flat(model: Tensors) -> np.ndarray:
    arrays = [from_bf16(array) if dtype == "BF16" else array for dtype, array in model.values() if dtype in COUNTS]
    return np.concatenate([array.astype(np.float64).ravel() for array in arrays])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Shards, np.ndarray]]:
    """A base and three contributions."""
    root = tmp_path_factory.mktemp("models")
    made = [tensors(seed) for seed in range(4)]
    return [(open_shards(write_weights(root / str(place), model)), flat(model)) for place, model in enumerate(made)]


def test_the_products_are_those_of_numpy(models: list[tuple[Shards, np.ndarray]]) -> None:
    (ours, base), *others = models
    updates = np.stack([values - base for _, values in others])
    assert np.allclose(
        gram(ours, [shards for shards, _ in others], [None] * 3), updates @ updates.T, rtol=1e-12, atol=0
    )


def test_each_update_starts_from_its_own_base(models: list[tuple[Shards, np.ndarray]]) -> None:
    (ours, base), (one, first), (two, second), (three, third) = models
    updates = np.stack([first - base, second - third, third - base, base - third])
    products = gram(ours, [one, two, three, ours], [None, three, ours, three])
    assert np.allclose(products, updates @ updates.T, rtol=1e-12, atol=1e-12)
    assert products[2][2] == -products[2][3] == products[3][3]


def test_threads_and_shards_change_no_bit(models: list[tuple[Shards, np.ndarray]], tmp_path: Path) -> None:
    ours, *theirs = [shards for shards, _ in models]
    expected = gram(ours, theirs, [None] * 3)
    for threads in (1, 2, 3, 4):
        assert gram(ours, theirs, [None] * 3, threads=threads) == expected
    split = open_shards(write_weights(tmp_path / "split", tensors(2), {name: name for name in tensors(2)}))
    assert gram(ours, [theirs[0], split, theirs[2]], [None] * 3) == expected


def test_the_order_of_the_contributions_only_permutes_the_products(models: list[tuple[Shards, np.ndarray]]) -> None:
    ours, *theirs = [shards for shards, _ in models]
    expected = np.array(gram(ours, theirs, [None] * 3))
    order = [2, 0, 1]
    assert (np.array(gram(ours, [theirs[place] for place in order], [None] * 3)) == expected[order][:, order]).all()


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
def test_a_bad_value_is_refused_with_its_tensor_and_site(value: float, what: str, tmp_path: Path) -> None:
    model = tensors(1)
    ours = open_shards(write_weights(tmp_path / "base", model))
    good = open_shards(write_weights(tmp_path / "good", model), site="brno")
    model["F32"][1][SPAN + 3] = value
    bad = open_shards(write_weights(tmp_path / "bad", model), site="leonardo")
    with pytest.raises(AggregationRefused, match=f"leonardo: .*bad: tensor 'F32' holds {what}") as refusal:
        gram(ours, [good, bad], [None, None])
    assert refusal.value.site == "leonardo"
    with pytest.raises(AggregationRefused, match=f"tensor 'F32' holds {what}"):
        gram(bad, [good], [None])


def test_values_too_large_to_be_squared_are_refused(tmp_path: Path) -> None:
    huge = open_shards(write_weights(tmp_path / "huge", {"w": ("F64", np.array([1e200]))}))
    zero = open_shards(write_weights(tmp_path / "zero", {"w": ("F64", np.array([0.0]))}))
    with pytest.raises(AggregationRefused, match="updates of tensor 'w' are too large"):
        gram(zero, [huge], [None])


def test_stop_ends_the_comparison(models: list[tuple[Shards, np.ndarray]]) -> None:
    ours, *theirs = [shards for shards, _ in models]
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) == 3

    with pytest.raises(Interrupted):
        gram(ours, theirs, [None] * 3, stop=stop)
    assert len(asked) == 3


MEASURE = """
import re, sys, torch
from pathlib import Path
from flctl.model.geometry import gram
from flctl.model.shards import open_shards
def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
torch.ones(10).add_(1).sum()
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: loading torch is not the comparison
before = peak()
shards = open_shards(Path(sys.argv[1]))
count = int(sys.argv[2])
gram(shards, [shards] * count, [None] * count, threads=int(sys.argv[3]))
print(peak() - before)
"""


@pytest.mark.parametrize(("megabytes", "contributions", "threads"), [(100, 3, 4), (10, 16, 4), (2, 64, 4)])
def test_memory_stays_within_40_megabytes_over_torch(
    megabytes: int, contributions: int, threads: int, tmp_path: Path
) -> None:
    """Whatever the model (the file is a hole, so that it costs no disk) and the number of contributions."""
    elements = megabytes * 500_000
    text = json.dumps({"w": {"dtype": "BF16", "shape": [elements], "data_offsets": [0, elements * 2]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + elements * 2)
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(contributions), str(threads)]
    growth = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert growth < 40e6


# What the products tell

vectors = st.lists(
    st.lists(st.floats(-10, 10).map(lambda value: round(value, 3)), min_size=3, max_size=3), min_size=1, max_size=5
)


def products_of(updates: Sequence[Sequence[float]]) -> list[list[float]]:
    return (np.array(updates) @ np.array(updates).T).tolist()


@given(updates=vectors)
def test_distances_and_norms_are_euclidean(updates: list[list[float]]) -> None:
    array = np.array(updates)
    apart = distances(products_of(updates))
    expected = ((array[:, None] - array[None]) ** 2).sum(-1)
    assert np.allclose(apart, expected, rtol=1e-9, atol=1e-9)
    assert min(map(min, apart)) >= 0
    assert [apart[place][place] for place in range(len(updates))] == [0.0] * len(updates)
    assert np.allclose(norms(products_of(updates)), np.linalg.norm(array, axis=1))


@given(updates=vectors, seed=st.integers(0, 100))
def test_cosines_are_those_to_the_weighted_mean(updates: list[list[float]], seed: int) -> None:
    shares = np.random.default_rng(seed).dirichlet(np.ones(len(updates)))
    for given_shares, parts in ((list(shares), shares), (None, np.full(len(updates), 1 / len(updates)))):
        mean = parts @ np.array(updates)
        found = cosines_to_mean(products_of(updates), given_shares)
        assert all(-1 <= cosine <= 1 for cosine in found)
        if np.linalg.norm(mean) < 1e-3:
            continue
        for update, cosine in zip(np.array(updates), found, strict=True):
            length = np.linalg.norm(update) * np.linalg.norm(mean)
            assert math.isclose(cosine, update @ mean / length if length else 0.0, rel_tol=1e-6, abs_tol=1e-6)


def test_what_does_not_move_has_no_direction() -> None:
    assert cosines_to_mean(products_of([[0, 0], [3, 4]])) == [0.0, 1.0]
    assert cosines_to_mean(products_of([[1, 0], [-1, 0]])) == [0.0, 0.0]
