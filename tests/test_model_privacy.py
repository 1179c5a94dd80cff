"""Privacy at the server: updates within their norm; noise that is Gaussian, secret, and the same bits from its seed."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flctl.errors import AggregationRefused, ConfigurationError
from flctl.model.merge import Made, Recipe, Source, merge
from flctl.model.noise import PIECE, Noise, normal
from flctl.model.privacy import Privacy, new_seed
from flctl.model.rules import RULES
from tests.checkpoints import Tensors, read_weights, write_weights
from tests.test_model_ranks import MPIEXEC

SEED = "1f" * 32
KEY = bytes.fromhex(SEED)
SHAPES = {"embed": (60, 9), "norm": (9,), "layer.w": (33, 17)}
MANY = 1 << 18

# RFC 8439, appendix A.1, test vector 1: the key stream's first block for a key, nonce and counter of 0
STREAM = bytes.fromhex(
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
)


def weights(dtype: str, seed: int, spread: float = 1.0) -> dict[str, tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    kind = np.float64 if dtype == "F64" else np.float32
    return {name: (dtype, rng.normal(scale=spread, size=shape).astype(kind)) for name, shape in SHAPES.items()}


def moved(base: Tensors, seed: int, norm: float) -> dict[str, tuple[str, np.ndarray]]:
    """The base with an update of that l2 norm over all its tensors."""
    updates = {name: array.astype(np.float64) for name, (_, array) in weights("F64", seed).items()}
    length = norm_of(updates.values())
    return {
        name: (dtype, (array + updates[name] * (norm / length)).astype(array.dtype))
        for name, (dtype, array) in base.items()
    }


def norm_of(arrays: Any) -> float:
    return math.sqrt(math.fsum(float(value) ** 2 for array in arrays for value in np.ravel(array)))


def difference(one: Tensors, other: Tensors) -> dict[str, np.ndarray]:
    return {name: one[name][1].astype(np.float64) - other[name][1].astype(np.float64) for name in one}


class Round:
    """A base, and what sites trained from it."""

    def __init__(self, root: Path, dtype: str = "F32", norms: Sequence[float] = (0.5, 2.0, 30.0)) -> None:
        self.root, self.base = root, weights(dtype, 0)
        self.folder = write_weights(root / "base", self.base)
        self.given = [moved(self.base, place + 1, norm) for place, norm in enumerate(norms)]
        self.sources = [
            Source(
                site=f"site-{place}",
                number=1,
                folder=write_weights(root / f"from-{place}", tensors),
                weight=place + 1,
                steps=5,
            )
            for place, tensors in enumerate(self.given)
        ]
        self.made = 0

    def merge(self, clip: float = 0.0, noise: float = 0.0, seed: str = SEED, **more: Any) -> tuple[Made, Tensors]:
        privacy = Privacy(clip=clip, noise_multiplier=noise, seed=seed) if clip else None
        recipe = Recipe(rule=more.pop("rule", "fedavg"), options=more.pop("options", {}), privacy=privacy)
        self.made += 1
        draft = self.root / f"made-{self.made}"
        made = merge(self.folder, more.pop("sources", self.sources), draft, recipe=recipe, **more)
        return made, read_weights(draft)


# The noise


def test_noise_is_the_rfcs_key_stream_through_box_and_mullers_transform() -> None:
    words = [int.from_bytes(STREAM[place : place + 8], "little") for place in range(0, 64, 8)]
    expected = []
    for length, angle in zip(words[0::2], words[1::2], strict=True):
        radius = math.sqrt(-2 * math.log((length + 0.5) / 2**64))
        turn = (angle + 0.5) / 2**64 * 2 * math.pi - math.pi / 4
        expected += [radius * math.cos(turn), radius * math.sin(turn)]
    np.testing.assert_allclose(normal(bytes(32), 0, 8), expected, rtol=1e-14, atol=1e-15)


def test_a_seed_gives_the_same_bits_for_ever() -> None:
    """Models are verified by making them again, on other machines and with later versions of all libraries."""
    bits = normal(KEY, 0, 100_000).astype("<f8").tobytes()
    assert sha256(bits).hexdigest() == "d5e36104ee874f78b36ac8fdc61f82c1ee67d1f139be5ed9d891816ed75910f7"


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3 * PIECE), st.integers(1, 2 * PIECE), st.lists(st.integers(1, 2 * PIECE), max_size=4))
def test_a_value_depends_on_its_place_alone(start: int, count: int, cuts: list[int]) -> None:
    noise = Noise(seed=SEED, deviation=0.25)
    whole = torch.zeros(start + count)
    noise.add(whole, "w", 0)
    parts = torch.zeros(count)
    edges = sorted({0, count, *(cut for cut in cuts if cut < count)})
    for begin, end in pairwise(edges):
        noise.add(parts[begin:end], "w", start + begin)
    assert parts.numpy().tobytes() == whole[start:].numpy().tobytes()


def test_far_places_of_a_tensor_are_reached_without_what_lies_before() -> None:
    far = 2**36 + 3  # beyond the 32 bits of the RFC's block counter
    assert normal(KEY, far, 5).tobytes() == normal(KEY, far - 2, 9)[2:7].tobytes()
    assert not np.allclose(normal(KEY, far, 5), normal(KEY, 3, 5))


@pytest.mark.parametrize("start", [0, 10 * MANY])
@pytest.mark.parametrize("seed", [SEED, "00" * 32, "c4" * 32])
def test_noise_is_normal(seed: str, start: int) -> None:
    """Fixed seeds, so these limits of four standard errors are passed by luck only once, when they are written."""
    values = normal(bytes.fromhex(seed), start, MANY)
    error = 1 / math.sqrt(MANY)
    assert abs(values.mean()) < 4 * error
    assert abs(values.std() - 1) < 4 * error / math.sqrt(2)
    assert abs(stats.skew(values)) < 4 * error * math.sqrt(6)
    assert abs(stats.kurtosis(values)) < 4 * error * math.sqrt(24)
    assert stats.kstest(values, "norm").pvalue > 0.001
    assert (
        stats.kstest(np.abs(values[np.abs(values) > 2]), lambda x: 1 - stats.norm.sf(x) / stats.norm.sf(2)).pvalue
        > 0.001
    )


def test_values_of_a_pair_neighbours_tensors_and_seeds_are_independent() -> None:
    def drawn(seed: str, name: str, start: int = 0) -> np.ndarray:
        values = torch.zeros(MANY, dtype=torch.float64)
        Noise(seed=seed, deviation=1.0).add(values, name, start)
        return values.numpy()

    first = drawn(SEED, "a")
    others = {
        "pair": (first[0::2], first[1::2]),
        "next": (first[:-2], first[2:]),
        "block": (first[:-8], first[8:]),
        "tensor": (first, drawn(SEED, "b")),
        "stretch": (first, drawn(SEED, "a", MANY)),
        "seed": (first, drawn("1e" + SEED[2:], "a")),
    }
    for what, (one, other) in others.items():
        limit = 4 / math.sqrt(len(one))
        assert abs(np.corrcoef(one, other)[0, 1]) < limit, what
        assert abs(np.corrcoef(one**2, other**2)[0, 1]) < limit, what


def test_each_of_the_256_bits_of_a_seed_counts() -> None:
    """torch's generator looks at 32 of the bits that it is given: its noise can be found by trying them all."""
    found = set()
    for bit in range(256):
        values = torch.zeros(4)
        Noise(seed=(int(SEED, 16) ^ (1 << bit)).to_bytes(32, "big").hex(), deviation=1.0).add(values, "w", 0)
        found.add(values.numpy().tobytes())
    assert len(found) == 256


def test_new_seeds_are_256_bits_and_never_the_same() -> None:
    seeds = {new_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert {len(bytes.fromhex(seed)) for seed in seeds} == {32}


def test_noise_is_added_in_float64_and_the_sum_rounded_once() -> None:
    values = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    summed = torch.from_numpy(values.copy())
    Noise(seed=SEED, deviation=0.3).add(summed, "w", 11)
    plain = torch.zeros(1000, dtype=torch.float64)
    Noise(seed=SEED, deviation=0.3).add(plain, "w", 11)
    assert summed.numpy().tobytes() == (values.astype(np.float64) + plain.numpy()).astype(np.float32).tobytes()


# Clipping


@pytest.mark.parametrize("dtype", ["F64", "F32"])
def test_each_update_is_clipped_to_the_norm_over_all_tensors(dtype: str, tmp_path: Path) -> None:
    """numpy's clip(x_k - b), its norm at most C (1 + 1e-6), and shorter updates left as they are."""
    clip, round_ = 1.0, Round(tmp_path, dtype)
    made, model = round_.merge(clip)
    updates = [difference(tensors, round_.base) for tensors in round_.given]
    norms = [norm_of(update.values()) for update in updates]
    scales = [min(1.0, clip / norm) for norm in norms]
    assert list(made.scales.values()) == pytest.approx(scales, rel=1e-12)
    assert [scale == 1.0 for scale in scales] == [True, False, False]
    shares = [1 / 6, 2 / 6, 3 / 6]
    tolerance = 1e-13 if dtype == "F64" else 1e-6
    for name, (_, array) in round_.base.items():
        expected = array + sum(
            share * scale * update[name] for share, scale, update in zip(shares, scales, updates, strict=True)
        )
        np.testing.assert_allclose(model[name][1], expected, rtol=tolerance, atol=tolerance)
    for source, norm in zip(round_.sources, norms, strict=True):
        _, alone = round_.merge(clip, sources=[source])
        left = norm_of(difference(alone, round_.base).values())
        assert left <= clip * (1 + 1e-6)
        assert left == pytest.approx(min(norm, clip), rel=1e-5)


@pytest.mark.parametrize("dtype", ["F64", "F32"])
def test_a_clip_that_nothing_reaches_changes_no_bit(dtype: str, tmp_path: Path) -> None:
    round_ = Round(tmp_path, dtype)
    made, clipped = round_.merge(31.0)
    unclipped, plain = round_.merge()
    assert set(made.scales.values()) == {1.0}
    assert unclipped.scales == {}
    assert made.files == unclipped.files
    deltas = [difference(tensors, round_.base) for tensors in round_.given]
    for name, (_, array) in round_.base.items():
        expected = array + sum((place + 1) / 6 * delta[name] for place, delta in enumerate(deltas))
        np.testing.assert_allclose(clipped[name][1], expected, rtol=2e-6, atol=1e-6)
    assert plain.keys() == clipped.keys()


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.bounded])
def test_an_update_of_any_length_counts_as_a_clipped_one(rule: str, tmp_path: Path) -> None:
    """What `bounded` promises: a contribution a thousand times as far away makes the same model."""
    near, far = Round(tmp_path / "near", "F64", (1.0, 50.0)), Round(tmp_path / "far", "F64", (1.0, 50_000.0))
    models = []
    for round_ in (near, far):
        sources = [replace(source, weight=0.25) for source in round_.sources]
        models.append(round_.merge(0.7, rule=rule, sources=sources)[1])
    for name, gap in difference(*models).items():
        np.testing.assert_allclose(gap, 0, atol=1e-10, err_msg=name)
    assert norm_of(difference(models[0], near.base).values()) > 1e-4


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if not rule.bounded])
def test_a_rule_that_is_not_bounded_cannot_be_private(rule: str, tmp_path: Path) -> None:
    round_ = Round(tmp_path, norms=(1.0,) * 7)
    sources = [replace(source, weight=0.1) for source in round_.sources]
    with pytest.raises(ConfigurationError, match="cannot be private") as caught:
        round_.merge(1.0, rule=rule, sources=sources)
    assert "fedavg" in caught.value.hint
    assert rule not in caught.value.hint.split(", ")
    assert not (tmp_path / "made-1").exists()


def test_a_nan_is_refused_by_site_and_not_clipped_away(tmp_path: Path) -> None:
    round_ = Round(tmp_path)
    round_.given[1]["norm"][1][2] = np.nan
    write_weights(tmp_path / "from-1", round_.given[1])
    with pytest.raises(AggregationRefused, match="NaN") as caught:
        round_.merge(1.0, 1.0)
    assert caught.value.site == "site-1"


# Noise on a merge


@pytest.mark.parametrize("dtype", ["F64", "F32"])
def test_the_noise_of_a_merge_is_z_times_c_times_the_largest_share(dtype: str, tmp_path: Path) -> None:
    round_ = Round(tmp_path, dtype)
    _, clipped = round_.merge(0.8)
    _, noisy = round_.merge(0.8, 1.7)
    drawn = difference(noisy, clipped)
    values = np.concatenate([array.ravel() for array in drawn.values()])
    deviation = 1.7 * 0.8 * 3 / 6
    assert values.std() == pytest.approx(deviation, rel=4 / math.sqrt(2 * values.size))
    for name, array in drawn.items():
        expected = torch.zeros(array.size, dtype=torch.float64)
        Noise(seed=SEED, deviation=deviation).add(expected, name, 0)
        np.testing.assert_allclose(array.ravel(), expected.numpy(), atol=1e-12 if dtype == "F64" else 1e-6)


def test_runs_of_one_site_are_one_contribution_of_the_sum_of_their_shares() -> None:
    privacy = Privacy(clip=2.0, noise_multiplier=3.0, seed=SEED)
    assert privacy.deviation(["a", "b"], [0.25, 0.75]) == 3 * 2 * 0.75
    assert privacy.deviation(["a", "b", "a"], [0.3, 0.4, 0.3]) == 3 * 2 * 0.6


@pytest.mark.parametrize("rule", ["fedavg", "fedadam"])
def test_chunks_threads_and_order_of_arrival_change_no_bit(rule: str, tmp_path: Path) -> None:
    round_ = Round(tmp_path)
    first, _ = round_.merge(0.8, 1.1, rule=rule)
    for chunk, threads in ((1, 1), (7, 3), (256, 2), (1 << 20, 1)):
        made, _ = round_.merge(0.8, 1.1, rule=rule, chunk=chunk, threads=threads, sources=round_.sources[::-1])
        assert made.files == first.files
        assert (made.state and made.state.files) == (first.state and first.state.files)
    other, _ = round_.merge(0.8, 1.1, new_seed(), rule=rule)
    assert other.files != first.files


SCRIPT = """
import json, sys
from pathlib import Path
from flctl.model.merge import Recipe, Source, merge
from flctl.model.privacy import Privacy
from flctl.model.ranks import world
root, ranks = Path(sys.argv[1]), world()
assert ranks.size == 2
sources = [Source(site=f"site-{k}", number=1, folder=root / f"from-{k}", weight=k + 1) for k in range(3)]
privacy = Privacy(clip=0.8, noise_multiplier=1.1, seed=sys.argv[2])
made = merge(root / "base", sources, root / "together", recipe=Recipe(privacy=privacy), chunk=100, ranks=ranks)
if ranks.first:
    print(json.dumps([entry.sha256 for entry in made.files]))
"""


def test_two_ranks_change_no_bit(tmp_path: Path) -> None:
    alone, _ = Round(tmp_path).merge(0.8, 1.1)
    ran = subprocess.run(
        [*MPIEXEC, "2", sys.executable, "-c", SCRIPT, str(tmp_path), SEED],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == [entry.sha256 for entry in alone.files]


def test_integers_are_the_bases_and_get_no_noise(tmp_path: Path) -> None:
    base = {"w": ("F32", np.zeros(5, np.float32)), "count": ("I64", np.arange(4, dtype=np.int64))}
    folder = write_weights(tmp_path / "base", base)
    given_folder = write_weights(tmp_path / "a", {**base, "count": ("I64", np.full(4, 9, np.int64))})
    privacy = Privacy(clip=1.0, noise_multiplier=1.0, seed=SEED)
    source = Source(site="a", number=1, folder=given_folder, weight=1)
    merge(folder, [source], tmp_path / "made", recipe=Recipe(privacy=privacy))
    made = read_weights(tmp_path / "made")
    assert made["count"][1].tolist() == [0, 1, 2, 3]
    assert np.all(made["w"][1] != 0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"clip": 0.0}, "clip must be"),
        ({"clip": math.nan}, "clip must be"),
        ({"clip": math.inf}, "clip must be"),
        ({"clip": 1.0, "noise_multiplier": -1.0, "seed": SEED}, "negative"),
        ({"clip": 1.0, "noise_multiplier": math.inf, "seed": SEED}, "negative"),
        ({"clip": 1.0, "noise_multiplier": 1.0}, "seed"),
        ({"clip": 1.0, "noise_multiplier": 1.0, "seed": SEED[2:]}, "seed"),
    ],
)
def test_what_cannot_be_private_is_no_privacy(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Privacy(**values)
