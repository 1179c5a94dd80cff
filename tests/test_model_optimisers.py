"""The rules against published programs' vectors and against numpy; their state from model to model; the same bits
always."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from flctl.errors import AggregationRefused, ConfigurationError
from flctl.model.geometry import gram
from flctl.model.manifest import hash_file
from flctl.model.merge import Made, Recipe, Source, merge
from flctl.model.rules import RULES
from flctl.model.shards import CHUNK, open_shards
from flctl.model.state import read_state
from tests.checkpoints import NUMPY, Tensors, from_bf16, read_weights, to_bf16, write_weights

# Two sites, two rounds, three values. What becomes of them was printed by appfl 1.12.0 and flwr 1.41.0, and for the
# rules that those lack worked out from the papers.
START = [1, -2, 0.5]
A1, A2 = [1.2, -1.7, 0.1], [1.5, -1.9, 0.2]
B1, B2 = [0.4, -2.6, 0.9], [0.8, -2.1, 0.6]
SITES = ("a", "b", "c", "d", "e")


def model(folder: Path, values: Sequence[float]) -> Path:
    return write_weights(folder, {"w": ("F64", np.array(values, np.float64))})


def values_of(folder: Path) -> list[float]:
    return read_weights(folder)["w"][1].tolist()


def close(values: Sequence[float]) -> Any:
    return pytest.approx(values, rel=0, abs=1e-12)


class Campaign:
    """Merges one after the other, each on the model and the state that the one before left."""

    def __init__(self, root: Path, rule: str, **options: Any) -> None:
        self.root, self.recipe = root, Recipe(rule=rule, options=options)
        self.models = [model(root / "0", START)]

    def merge(self, *given: tuple[Sequence[float], float, int], steps: Sequence[int] = (0, 0)) -> list[float]:
        """`given`: for each site its values, its weight or coefficient, and the version of its base."""
        place = len(self.models)
        sources = [
            Source(
                site=site,
                number=place,
                folder=model(self.root / f"{site}-{place}", values),
                weight=weight,
                steps=count,
                base=self.models[base],
            )
            for site, (values, weight, base), count in zip(SITES, given, (*steps, 0, 0), strict=False)
        ]
        base, draft = self.models[-1], self.root / str(place)
        merge(base, sources, draft, recipe=self.recipe, state=read_state(base / "state"))
        self.models.append(draft)
        return values_of(draft)


ROUNDS = [
    ("fedavg", {}, (1, 1), [0.8, -2.15, 0.5], [1.15, -2.0, 0.4]),
    ("fedavg", {}, (300, 100), [1.0, -1.925, 0.3], [1.325, -1.95, 0.3]),
    ("fedavgm", {}, (300, 100), [1.0, -1.925, 0.3], [1.325, -1.8825, 0.12]),
    ("fedavgm", {"dialect": "appfl"}, (300, 100), [1.0, -1.925, 0.3], [1.325, -1.8825, 0.12]),
    ("fedavgm", {"dialect": "flower", "lr": 1.0}, (300, 100), [1.0, -1.925, 0.3], [1.325, -1.8825, 0.12]),
    *(
        (
            "fedadam",
            {"dialect": dialect, "lr": 0.1, "tau": 1e-3, "beta1": 0.9, "beta2": 0.99},
            (300, 100),
            [1.0, -1.9124416056932199, 0.4048739483244112],
            [1.0969712883937608, -1.8806318927990617, 0.28373293191303395],
        )
        for dialect in ("paper", "appfl")
    ),
    (
        "fedadam",
        {"dialect": "flower"},
        (300, 100),
        [1.0, -1.934488842199694, 0.4292895439615745],
        [1.0616956861997517, -1.896142576509493, 0.34975775883675525],
    ),
    *(
        (
            "fedyogi",
            {"dialect": dialect, "lr": 0.1},
            (300, 100),
            [1.0, -1.9124483603305231, 0.4048750780274961],
            [1.0969704030023943, -1.8807468000230059, 0.28419107087130385],
        )
        for dialect in ("paper", "appfl")
    ),
    (
        "fedyogi",
        {"dialect": "flower", "lr": 0.1},
        (300, 100),
        [1.0, -1.911764705882353, 0.4047619047619048],
        [1.0970149253731332, -1.8806928455833396, 0.2839857341514893],
    ),
    (
        "fedadagrad",
        {"dialect": "appfl", "beta1": 0.9},
        (300, 100),
        [1.0, -1.9901324444839472, 0.49004987500078123],
        [1.0099692781063967, -1.977626973441223, 0.4766857743951708],
    ),
    (
        "fedadagrad",
        {"dialect": "flower"},
        (300, 100),
        [1.0, -1.9013157894736843, 0.40049751243781095],
        [1.0996932515337312, -1.9551607034063736, 0.35579812572128044],
    ),
    ("diloco", {}, (1, 1), [0.734, -2.1995, 0.5], [1.17388, -2.019215, 0.367]),
    ("diloco", {}, (3, 1), [1.0, -1.90025, 0.234], [1.43225, -1.9238925, 0.20838]),
]


@pytest.mark.parametrize(("rule", "options", "weights", "first", "second"), ROUNDS)
def test_two_rounds_end_where_the_published_programs_end(
    rule: str,
    options: dict[str, Any],
    weights: tuple[int, int],
    first: list[float],
    second: list[float],
    tmp_path: Path,
) -> None:
    campaign = Campaign(tmp_path, rule, **options)
    assert campaign.merge((A1, weights[0], 0), (B1, weights[1], 0)) == close(first)
    assert campaign.merge((A2, weights[0], 1), (B2, weights[1], 1)) == close(second)


def polynomial(staleness: int, power: float = 0.5) -> float:
    return (1 + staleness) ** -power


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (
            0.6,  # Xie et al. 2019
            [
                [1.12, -1.82, 0.26],
                [0.8145298705274115, -2.1509259735953044, 0.5315290039756342],
                [1.1053502166379443, -2.0444670990922584, 0.3908731598529185],
                [0.9758010913450612, -2.0680277135787533, 0.4795981639305883],
            ],
        ),
        (
            0.9 / 2,  # APPFL: divided by the number of sites
            [
                [1.09, -1.865, 0.32],
                [0.870443344441577, -2.0988755678774504, 0.5045548698896889],
                [1.070767045570495, -2.0355937496811385, 0.4076461037056153],
                [0.9846094992503602, -2.056087693039208, 0.46885273871145133],
            ],
        ),
    ],
)
def test_fedasync_takes_each_arrival_with_its_own_staleness(
    alpha: float, expected: list[list[float]], tmp_path: Path
) -> None:
    campaign = Campaign(tmp_path, "fedasync")
    arrivals = [(A1, 0), (B1, 0), (A2, 1), (B2, 2)]
    for version, ((values, base), model_values) in enumerate(zip(arrivals, expected, strict=True)):
        coefficient = alpha * polynomial(version - base)
        assert campaign.merge((values, coefficient, base)) == close(model_values)


def test_fedasync_takes_a_buffer_of_arrivals(tmp_path: Path) -> None:
    """APPFL's FedBuff: towards the sites' values from the current model, whatever they were trained from."""
    campaign = Campaign(tmp_path, "fedasync")
    assert campaign.merge((A1, 0.45, 0), (B1, 0.45, 0)) == close([0.82, -2.135, 0.5])
    expected = [1.0273746750430837, -2.0444734578895227, 0.44954058453981605]
    assert campaign.merge((A2, 0.45 * polynomial(1), 0), (B2, 0.45, 1)) == close(expected)


def test_fedbuff_adds_updates_from_the_sites_own_bases(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, "fedbuff")
    assert campaign.merge((A1, 1 / 2, 0), (B1, 1 / 2, 0)) == close([0.8, -2.15, 0.5])
    expected = [0.9767766952966369, -2.0896446609406727, 0.44393398282201785]
    assert campaign.merge((A2, polynomial(1) / 2, 0), (B2, 1 / 2, 1)) == close(expected)


def test_fedcompass_merges_a_group_as_fedasync_does(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, "fedasync")
    given_values = (A1, 0.9 * polynomial(0) / 2, 0), (B1, 0.9 * polynomial(3) / 2, 0)
    assert campaign.merge(*given_values) == close([0.955, -2.0, 0.41])


def test_fedqueue_averages_with_weights_that_staleness_lowers(tmp_path: Path) -> None:
    """Harmonic staleness 1 / (1 + 0.5 tau), tau 0 and 2."""
    merged = Campaign(tmp_path, "fedavg").merge((A1, 3, 0), (B1, 1 / (1 + 0.5 * 2), 0))
    assert merged == close([1.0857142857142856, -1.8285714285714285, 0.21428571428571427])


def test_fednova_counts_an_update_per_local_step(tmp_path: Path) -> None:
    merged = Campaign(tmp_path, "fednova").merge((A1, 300, 0), (B1, 100, 0), steps=(10, 30))
    assert merged == close([1.15, -1.7375, 0.1])


def test_fednova_knows_momentum_and_the_proximal_term(tmp_path: Path) -> None:
    lengths = {
        "momentum": (41.381059609, 213.81520424476952),
        "proximal": ((1 - 0.999**10) / 0.001, (1 - 0.999**30) / 0.001),
    }
    for name, options in (("momentum", {"momentum": 0.9}), ("proximal", {"lr": 0.1, "mu": 0.01})):
        campaign = Campaign(tmp_path / name, "fednova", **options)
        a, b = lengths[name]
        effective = 0.75 * a + 0.25 * b
        expected = [
            w + effective * (0.75 / a * (one - w) + 0.25 / b * (other - w))
            for w, one, other in zip(START, A1, B1, strict=True)
        ]
        assert campaign.merge((A1, 300, 0), (B1, 100, 0), steps=(10, 30)) == close(expected)


@pytest.mark.parametrize(
    ("rule", "options", "reason"),
    [
        ("fedavgm", {"dialect": "appfl", "lr": 0.5}, "there is no lr"),
        ("fedadagrad", {"dialect": "flower", "beta1": 0.9}, "there is no momentum"),
        ("fedadam", {"lr": 0}, "lr must be above 0, not 0"),
        ("fedadam", {"tau": 0}, "tau must be above 0"),
        ("fedyogi", {"beta2": 1}, "beta2 must be from 0 to below 1"),
        ("fedadam", {"lr": float("nan")}, "lr must be above 0"),
        ("diloco", {"momentum": -0.1}, "momentum must be from 0"),
        ("fedadam", {"dialect": "flwr"}, "dialect must be 'paper' or 'flower' or 'appfl', not 'flwr'"),
        ("fedadam", {"beta3": 0.9}, "no option 'beta3'; did you mean beta"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_its_name(
    rule: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        Campaign(tmp_path, rule, **options).merge((A1, 1, 0), (B1, 1, 0))


# numpy as the reference

State = dict[str, np.ndarray]


def stepped(
    rule: str, o: Mapping[str, Any], w: np.ndarray, updates: Sequence[np.ndarray], kept: State, step: int
) -> tuple[np.ndarray, State]:
    """One step with shares 3, 1, 1 in the precision of `w`, every operation and every constant rounded to it."""
    p = w.dtype.type
    total = np.zeros_like(w)
    for share, update in zip((3 / 5, 1 / 5, 1 / 5), updates, strict=True):
        total = total + p(share) * update
    zero = np.zeros_like(w)
    if rule in ("fedavgm", "diloco"):
        m = kept.get("momentum", zero) * p(o["momentum"]) + total
        move = m if rule == "fedavgm" else m * p(o["momentum"]) + total
        return move * p(o["lr"]) + w, {"momentum": m} if o["momentum"] else {}
    flower = o["dialect"] == "flower"
    m = total * p(1 - o["beta1"]) + kept.get("momentum", zero) * p(o["beta1"])
    v = kept.get("variance", np.full_like(w, 0 if flower else p(o["tau"] * o["tau"])))
    lr = o["lr"]
    if rule == "fedadagrad":
        v = total * total + v
    elif rule == "fedyogi":
        v = v - np.sign(v - total * total) * (total * total) * p(1 - o["beta2"])
    else:
        v = (total * total) * p(1 - o["beta2"]) + v * p(o["beta2"])
        if flower:
            powers = [np.prod([beta] * (step + 1)) for beta in (o["beta1"], o["beta2"])]
            lr = lr * np.sqrt(1 - powers[1]) / (1 - powers[0])
    state = {"momentum": m, "variance": v} if o["beta1"] else {"variance": v}
    return (m * p(lr)) / (np.sqrt(v) + p(o["tau"])) + w, state


def wide(dtype: str, array: np.ndarray, precision: type = np.float64) -> np.ndarray:
    return (from_bf16(array) if dtype == "BF16" else array).astype(precision)


def narrow(dtype: str, array: np.ndarray) -> np.ndarray:
    return to_bf16(array) if dtype == "BF16" else array.astype(NUMPY[dtype])


def contributions(root: Path, base: Path, rng: np.random.Generator, count: int = 3) -> list[Source]:
    """Updates of any size that a step may have; some values do not move."""
    sources = []
    for place in range(count):
        tensors = {}
        for name, (dtype, array) in read_weights(base).items():
            size = rng.choice([0.0, 1e-4, 0.1, 1.0], array.shape, p=[0.1, 0.3, 0.5, 0.1])
            moved = wide(dtype, array) + rng.normal(size=array.shape) * size if dtype in ("BF16", *FLOATS) else array
            tensors[name] = (dtype, narrow(dtype, moved.astype(np.float32) if dtype == "BF16" else moved))
        folder = write_weights(root / f"{base.name}-{SITES[place]}", tensors)
        sources.append(Source(site=SITES[place], number=1, folder=folder, weight=[3, 1, 1][place]))
    return sources


FLOATS = ("F16", "F32", "F64")
ULP = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
OPTIMISERS = ["fedavgm", "diloco", "fedadagrad", "fedadam", "fedyogi"]


@st.composite
def recipes(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    rule = draw(st.sampled_from(OPTIMISERS))
    if rule in ("fedavgm", "diloco"):
        return rule, {"lr": draw(st.floats(0.01, 1)), "momentum": draw(st.sampled_from([0.0, 0.9]))}
    options = {
        "dialect": draw(st.sampled_from(["paper", "flower", "appfl"])),
        "lr": draw(st.floats(0.01, 1)),
        "tau": draw(st.floats(1e-4, 0.1)),
        "beta1": draw(st.sampled_from([0.0, 0.9])),
        "beta2": draw(st.floats(0.9, 0.999)),
    }
    if rule == "fedadagrad":
        del options["beta2"]
        if options["dialect"] == "flower":
            options["beta1"] = 0.0
    return rule, options


@settings(max_examples=25, deadline=None)
@given(recipe=recipes(), dtype=st.sampled_from(["BF16", *FLOATS]), seed=st.integers(0, 2**32))
def test_every_optimiser_has_the_bits_of_numpy_over_three_rounds(
    recipe: tuple[str, dict[str, Any]], dtype: str, seed: int
) -> None:
    """And within the rounding of the checkpoint's dtype the values that float64 gives."""
    rule, options = recipe
    rng = np.random.default_rng(seed)
    precision = np.float64 if dtype == "F64" else np.float32
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        first = narrow(dtype, rng.normal(size=300).astype(precision))
        base = write_weights(root / "0", {"w": (dtype, first)})
        exact: State = {}
        for step in (1, 2, 3):
            sources = contributions(root, base, rng)
            draft = root / str(step)
            merge(base, sources, draft, recipe=Recipe(rule=rule, options=options), state=read_state(base / "state"))
            w = wide(dtype, read_weights(base)["w"][1], precision)
            given_values = [wide(dtype, read_weights(source.folder)["w"][1], precision) for source in sources]
            kept = state_of(base)
            expected, state = stepped(rule, options, w, [x - w for x in given_values], kept, step)
            got = read_weights(draft)["w"][1]
            assert got.tobytes() == narrow(dtype, expected).tobytes()
            assert {key: array.tobytes() for key, array in state_of(draft).items()} == {
                key: array.tobytes() for key, array in state.items()
            }

            w64 = w.astype(np.float64)
            truth, exact = stepped(rule, options, w64, [x - w64 for x in given_values], exact, step)
            error = np.abs(wide(dtype, got) - truth)
            # float32 rounds operands of up to 10, and the quotient of a small update by tau enlarges that
            arithmetic = 0 if dtype == "F64" else 1e-4
            assert (error <= ULP[dtype] * np.abs(truth) * 1.01 + arithmetic + 1e-9).all()
            base = draft


def state_of(folder: Path) -> State:
    state = read_state(folder / "state")
    found = {}
    for name in ("momentum", "variance"):
        if state is not None and state.has(name):
            found[name] = read_weights(state.folder / name)["w"][1]
    return found


# For every rule there is

SHAPES = {"one": (33, 7), "two": (41,), "three": (), "none": (0, 4)}
MANY = (0.1, 0.2, 0.15, 0.05, 0.3)  # of five contributions: enough for the robust rules, less than 1 for fedasync
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((rule, {}) for rule in RULES),
    *((rule, {"dialect": "flower"}) for rule in ("fedadam", "fedyogi", "fedadagrad")),
    ("fedadagrad", {"dialect": "appfl", "beta1": 0.9}),
]


def mixed(root: Path) -> tuple[Path, list[Source]]:
    """A model of every float dtype, in two shards, and five contributions; zeros of both signs and subnormals too."""
    rng = np.random.default_rng(11)

    def tensors(base: Tensors | None) -> Tensors:
        made = {"count": ("I64", rng.integers(0, 9, 5))}
        for dtype in ("BF16", *FLOATS):
            for name, shape in SHAPES.items():
                key = f"{dtype}.{name}"
                array = np.asarray(wide(*base[key]) if base else 0) + rng.normal(size=shape) * 0.1
                special = np.asarray(rng.choice([0.0, -0.0, 1e-40, 1.0], shape))
                array = np.where(rng.random(shape) < 0.2, special, array)
                made[key] = (dtype, narrow(dtype, array.astype(np.float32)))
        return made

    start = tensors(None)
    files = {name: "1" if "BF16" in name or name == "count" else "2" for name in start}
    base = write_weights(root / "base", start, files)
    return base, [
        Source(
            site=site,
            number=1,
            folder=write_weights(root / f"from-{site}", tensors(start), files if site != "b" else None),
            weight=weight,
            steps=steps,
        )
        for site, weight, steps in zip(SITES, MANY, (3, 1, 4, 1, 5), strict=True)
    ]


def twice(base: Path, sources: Sequence[Source], drafts: Path, recipe: Recipe, **how: int) -> list[Made]:
    """Two merges, the second on the first's model and state."""
    drafts.mkdir(exist_ok=True)
    made = [merge(base, sources, drafts / "1", recipe=recipe, **how)]
    state = read_state(drafts / "1" / "state")
    made.append(merge(drafts / "1", sources, drafts / "2", recipe=recipe, state=state, **how))
    return made


def bits(made: Sequence[Made]) -> list[str]:
    return [
        f"{entry.path} {entry.sha256}"
        for one in made
        for entry in (*one.files, *(one.state.files if one.state else ()))
    ]


@pytest.mark.parametrize(("rule", "options"), VARIANTS)
def test_chunks_threads_and_order_of_arrival_change_no_bit_of_any_rule(
    rule: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base, sources = mixed(tmp_path)
    recipe = Recipe(rule=rule, options=options, master=True)
    expected = bits(twice(base, sources, tmp_path / "plain", recipe))
    cases = [(1, 2, 1), (7, 3, 2), (1000, 1, 3), (CHUNK, 3, 4)]
    for chunk, threads, shift in cases:
        arrived = [*sources[shift:], *sources[:shift]][::-1]
        drafts = tmp_path / f"{chunk}-{threads}"
        assert bits(twice(base, arrived, drafts, recipe, chunk=chunk, threads=threads)) == expected


def outcome(root: Path) -> str:
    """All that can be made of the mixed model, as text."""
    base, sources = mixed(root)
    lines = [
        " ".join(bits(twice(base, sources, root / str(place), Recipe(rule=rule, options=options))))
        for place, (rule, options) in enumerate(VARIANTS)
    ]
    products = gram(open_shards(base), [open_shards(source.folder) for source in sources], [None] * len(sources))
    return "\n".join([*lines, str(products)])


def test_the_width_of_the_vector_unit_changes_no_bit(tmp_path: Path) -> None:
    """So a model merged at a site is rebuilt at home bit by bit. Here torch does without AVX."""
    program = "import sys, pathlib, tests.test_model_optimisers as t; print(t.outcome(pathlib.Path(sys.argv[1])))"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    (tmp_path / "narrow").mkdir()
    command = [sys.executable, "-c", program, str(tmp_path / "narrow")]
    narrow_bits = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    (tmp_path / "wide").mkdir()
    assert narrow_bits.splitlines() == outcome(tmp_path / "wide").splitlines()


# State

STATEFUL = [(rule, options) for rule, options in VARIANTS if RULES[rule].state]


@pytest.mark.parametrize(("rule", "options"), STATEFUL)
def test_the_state_lies_beside_the_model_in_files_that_others_can_open(
    rule: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base, sources = mixed(tmp_path)
    made = twice(base, sources, tmp_path, Recipe(rule=rule, options=options))
    kept = set(RULES[rule].state) - ({"momentum"} if rule == "fedadagrad" and "beta1" not in options else set())
    for step, one in enumerate(made, start=1):
        state = one.state
        assert state is not None
        assert (state.rule, state.step, state.folder) == (rule, step, tmp_path / str(step) / "state")
        assert state == read_state(state.folder)
        assert {path.name for path in state.folder.iterdir()} == {*kept, "state.json"}
        assert [hash_file(state.folder, entry.path) for entry in state.files] == list(state.files)
        for name in kept:
            index = json.loads((state.folder / name / "model.safetensors.index.json").read_text())["weight_map"]
            opened = {}
            for path in sorted((state.folder / name).glob("*.safetensors")):
                opened.update(load_file(path))
            assert index.keys() == opened.keys() == {name for name in read_weights(base) if name != "count"}
            for tensor, array in opened.items():
                assert array.dtype == (np.float64 if tensor.startswith("F64") else np.float32)
                assert array.shape == read_weights(base)[tensor][1].shape


def test_the_state_of_another_rule_is_not_used(tmp_path: Path) -> None:
    base, sources = mixed(tmp_path)
    merge(base, sources, tmp_path / "1", recipe=Recipe(rule="fedadam"))
    state = read_state(tmp_path / "1" / "state")
    given_state = merge(tmp_path / "1", sources, tmp_path / "2", recipe=Recipe(rule="fedyogi"), state=state)
    without = merge(tmp_path / "1", sources, tmp_path / "3", recipe=Recipe(rule="fedyogi"))
    assert bits([given_state]) == bits([without])
    assert given_state.state
    assert given_state.state.step == 1


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    base, sources = mixed(tmp_path)
    other = Campaign(tmp_path / "other", "fedadam")
    other.merge((A1, 1, 0), (B1, 1, 0))
    state = read_state(other.models[1] / "state")
    with pytest.raises(AggregationRefused, match="its tensors are not those of the model"):
        merge(base, sources, tmp_path / "draft", recipe=Recipe(rule="fedadam"), state=state)


def test_momentum_that_begins_late_begins_at_zero(tmp_path: Path) -> None:
    """Without momentum none is kept; asking for it later is no error."""
    campaign = Campaign(tmp_path, "fedadagrad", dialect="appfl")
    campaign.merge((A1, 3, 0), (B1, 1, 0))
    assert not (campaign.models[1] / "state" / "momentum").exists()
    campaign.recipe = Recipe(rule="fedadagrad", options={"dialect": "appfl", "beta1": 0.5})
    merged = campaign.merge((A2, 3, 1), (B2, 1, 1))
    first = np.array([0.0, 0.075, -0.2])
    w = np.array(START) + 0.1 * first / (np.sqrt(1e-6 + first**2) + 1e-3)
    delta = 0.75 * np.array(A2) + 0.25 * np.array(B2) - w
    expected = w + 0.1 * 0.5 * delta / (np.sqrt(1e-6 + first**2 + delta**2) + 1e-3)
    assert merged == close(expected.tolist())


@pytest.mark.parametrize(("master", "after"), [(False, [1.0] * 6), (True, [1.0] * 4 + [1 + 2.0**-7] * 2)])
def test_steps_below_half_of_bf16s_last_place_add_up_in_master_weights(
    master: bool, after: list[float], tmp_path: Path
) -> None:
    """Each round moves 1 by 2^-10; between 1 and the next bf16 number, 1 + 2^-7, the half lies at 2^-8."""
    recipe = Recipe(rule="fedavgm", options={"lr": 0.125, "momentum": 0.0}, master=master)
    one = np.array([1.0], np.float32)
    base = write_weights(tmp_path / "0", {"w": ("BF16", to_bf16(one))})
    seen = []
    for version in range(1, 7):
        pushed = from_bf16(read_weights(base)["w"][1])
        folder = write_weights(tmp_path / f"site-{version}", {"w": ("BF16", to_bf16(pushed + 2.0**-7 * one))})
        source = Source(site="a", number=version, folder=folder, weight=1)
        draft = tmp_path / str(version)
        merge(base, [source], draft, recipe=recipe, state=read_state(base / "state"))
        seen.append(from_bf16(read_weights(draft)["w"][1])[0])
        if master:
            kept = read_weights(draft / "state" / "master")["w"]
            assert kept[0] == "F32"
            assert kept[1].tolist() == [1 + version * 2.0**-10]
        else:
            assert not (draft / "state").exists()
        base = draft
    assert seen == after
