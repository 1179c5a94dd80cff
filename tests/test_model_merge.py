"""The merge: numpy's bits for any shards, chunks and order of arrival; in bounded memory; whole or not at all."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from flctl.errors import AggregationRefused, ConfigurationError, Interrupted
from flctl.model.manifest import hash_folder
from flctl.model.merge import Made, Recipe, Source, merge
from flctl.model.rules import RULES
from flctl.model.shards import CHUNK, open_shards
from flctl.records import FileEntry
from tests.checkpoints import (
    FLOATS,
    NUMPY,
    Tensors,
    from_bf16,
    is_finite,
    random_values,
    read_weights,
    reference_fedavg,
    same_bits,
    to_bf16,
    write_weights,
)

SITES = ("brno", "leonardo", "karolina", "Ostrava", "brno-2")
QUICK = "/dev/shm" if Path("/dev/shm").is_dir() else None  # hundreds of merges, each with its fsync


def sources(root: Path, models: Sequence[Tensors], weights: Sequence[float]) -> list[Source]:
    found = []
    for place, (tensors, weight) in enumerate(zip(models, weights, strict=True)):
        folder = write_weights(root / f"from-{place}", tensors)
        found.append(Source(site=SITES[place], number=place + 1, folder=folder, weight=weight))
    return found


def small(seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    return {
        "embed": ("F32", rng.normal(size=(50, 8)).astype(np.float32)),
        "norm": ("F16", rng.normal(size=8).astype(np.float16)),
        "steps": ("I64", np.array([seed], np.int64)),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A base and its contributions; the shard of each one's tensors; a weight for each contribution."""

    models: list[Tensors]
    files: list[dict[str, str] | None]
    weights: list[float]
    arrival: list[int]
    chunk: int
    threads: int


@st.composite
def merges(draw: st.DrawFn) -> Case:
    names = draw(st.lists(st.sampled_from([f"layer.{i}.w" for i in range(8)]), min_size=1, max_size=6, unique=True))
    shapes = {name: draw(st.just([]) | st.just([1]) | st.lists(st.integers(0, 9), max_size=3)) for name in names}
    dtypes = {name: draw(st.sampled_from([*FLOATS] * 3 + [*NUMPY])) for name in names}
    count = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    models, files = [], []
    for _ in range(count + 1):
        order = draw(st.permutations(names))
        models.append({name: (dtypes[name], random_values(dtypes[name], shapes[name], rng)) for name in order})
        files.append(draw(st.none() | st.fixed_dictionaries({name: st.sampled_from("123") for name in names})))
    weight = st.integers(1, 10**6) | st.floats(1e-6, 1e9)
    return Case(
        models=models,
        files=files,
        weights=draw(st.lists(weight, min_size=count, max_size=count)),
        arrival=draw(st.permutations(range(count))),
        chunk=draw(st.sampled_from([1, 3, 64, 1000])),
        threads=draw(st.integers(1, 3)),
    )


def written(case: Case, root: Path) -> tuple[Path, list[Source], Callable[[Path], Made]]:
    """(the base, the contributions in the order of their sums, their merge into a folder)"""
    folders = [
        write_weights(root / str(place), model, files)
        for place, (model, files) in enumerate(zip(case.models, case.files, strict=True))
    ]
    arrived = [
        Source(site=SITES[place], number=place + 1, folder=folders[place + 1], weight=case.weights[place])
        for place in case.arrival
    ]
    ordered = sorted(arrived, key=lambda source: source.site)
    return folders[0], ordered, partial(merge, folders[0], arrived, chunk=case.chunk, threads=case.threads)


@settings(max_examples=250, deadline=None)
@given(merges())
def test_a_merge_has_the_bits_of_the_numpy_reference_and_lies_next_to_the_exact_average(case: Case) -> None:
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        base, ordered, merged_into = written(case, Path(name))
        contributions = [(source.weight, case.models[source.number]) for source in ordered]
        expected = reference_fedavg(case.models[0], contributions)
        if not is_finite(expected):  # shares that sum to a little over 1, and values next to the largest
            with pytest.raises(AggregationRefused, match="too large"):
                merged_into(Path(name, "draft"))
            return
        entries = merged_into(Path(name, "draft")).files
        made = read_weights(Path(name, "draft"))
        assert same_bits(made, expected)
        for tensor, (dtype, array) in made.items():
            if dtype in FLOATS:
                near_the_exact_average(dtype, array, [(weight, model[tensor][1]) for weight, model in contributions])
            else:
                assert array.tobytes() == case.models[0][tensor][1].tobytes()
        assert entries == hash_folder(Path(name, "draft"))
        assert [entry.path for entry in entries] == sorted(path.name for path in base.iterdir())


def near_the_exact_average(dtype: str, made: np.ndarray, given_values: Sequence[tuple[float, np.ndarray]]) -> None:
    """Half a unit in the last place of the checkpoint's dtype for the one rounding at the end, and what n products and
    sums may lose before (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1): n + 3 roundings of
    the sum of absolute values, and n times half the smallest number. The average is taken in long double, of the
    weights as they are."""
    count, wide = len(given_values), np.longdouble
    precision = np.float64 if dtype == "F64" else np.float32
    values = [(from_bf16(array) if dtype == "BF16" else array).astype(wide) for _, array in given_values]
    shares = [wide(weight) / sum(wide(weight) for weight, _ in given_values) for weight, _ in given_values]
    exact = sum(share * value for share, value in zip(shares, values, strict=True))
    size = sum(share * abs(value) for share, value in zip(shares, values, strict=True))
    found = from_bf16(made) if dtype == "BF16" else made
    with np.errstate(under="ignore"):
        last = np.spacing(abs(found)).astype(wide) * (2**16 if dtype == "BF16" else 1)
    slack = 2 if np.finfo(wide).eps > 1e-18 and dtype == "F64" else 1  # no long double: the reference errs as well
    unit, least = (wide(limit) / 2 for limit in (np.finfo(precision).eps, np.finfo(precision).smallest_subnormal))
    lost = slack * ((count + 3) * unit * size + count * least)
    assert (abs(found.astype(wide) - exact) <= last / 2 * (1 + wide(2) ** -20) + lost).all()


def test_order_of_arrival_and_chunk_size_do_not_change_a_byte(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    models = [{"w": ("F32", rng.normal(size=(33, 7)).astype(np.float32))} for _ in range(3)]
    base = write_weights(tmp_path / "base", models[0])
    given_sources = sources(tmp_path, models, [5, 3, 2])
    first = merge(base, given_sources, tmp_path / "draft-0").files
    for place, (chunk, order) in enumerate([(1, (2, 1, 0)), (7, (1, 0, 2)), (100, (2, 0, 1))], start=1):
        arrived = [given_sources[number] for number in order]
        assert merge(base, arrived, tmp_path / f"draft-{place}", chunk=chunk).files == first


def a_llama(seed: int, layers: int = 2, width: int = 512, words: int = 9000) -> Tensors:
    """Names, shapes and sizes as in a model of 16 million values, in bfloat16."""
    rng = np.random.default_rng(seed)
    shapes = {
        "model.embed_tokens.weight": (words, width),
        "lm_head.weight": (words, width),
        "model.norm.weight": (width,),
    }
    for layer in range(layers):
        place = f"model.layers.{layer}"
        shapes |= {f"{place}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{place}.mlp.{name}_proj.weight": (width * 11 // 4, width) for name in ("gate", "up")}
        shapes |= {f"{place}.mlp.down_proj.weight": (width, width * 11 // 4), f"{place}.norm.weight": (width,)}
    return {name: ("BF16", to_bf16(rng.standard_normal(shape, np.float32) * 0.02)) for name, shape in shapes.items()}


def test_one_to_three_threads_and_any_chunks_give_one_sha256_on_a_sharded_model(tmp_path: Path) -> None:
    models = [a_llama(seed) for seed in range(4)]
    folders = [
        write_weights(
            tmp_path / str(place), model, {name: str((place + number) % 3) for number, name in enumerate(model)}
        )
        for place, model in enumerate(models)
    ]
    given_sources = [
        Source(site=site, number=1, folder=folder, weight=weight)
        for site, folder, weight in zip(SITES, folders[1:], (5, 3, 2), strict=False)
    ]
    expected = reference_fedavg(models[0], [(5, models[1]), (2, models[3]), (3, models[2])])
    first = merge(folders[0], given_sources, tmp_path / "draft", threads=1).files
    assert sum(entry.size for entry in first) > 30e6
    assert same_bits(read_weights(tmp_path / "draft"), expected)
    for threads, chunk in ((1, 100_003), (2, CHUNK), (2, 1 << 20), (3, CHUNK), (3, 77_777)):
        shutil.rmtree(tmp_path / "draft")
        assert merge(folders[0], given_sources[::-1], tmp_path / "draft", threads=threads, chunk=chunk).files == first


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_depends_on_threads_chunks_or_order_of_arrival(rule: str, tmp_path: Path) -> None:
    """Two merges in a row, so that the second goes on from the state of the first."""
    shape, dtypes = (61, 13), ("BF16", "F16", "F32", "F64")
    models = [
        {
            f"w.{dtype}": (dtype, random_small(dtype, shape, place))
            for place, dtype in enumerate(dtypes, start=10 * seed)
        }
        for seed in range(8)
    ]
    base = write_weights(tmp_path / "base", models[0], {f"w.{dtype}": dtype[0] for dtype in dtypes})
    given_sources = [
        Source(
            site=f"s{place}", number=1, folder=write_weights(tmp_path / str(place), model), weight=weight, steps=place
        )
        for (place, model), weight in zip(
            enumerate(models[1:], start=1), (0.2, 0.1, 0.15, 0.05, 0.1, 0.3, 0.1), strict=True
        )
    ]
    made: list[list[tuple[FileEntry, ...]]] = []
    for place, (threads, chunk) in enumerate([(1, 1000), (2, 10), (3, 64)]):
        arrived = given_sources[place:] + given_sources[:place]
        draft, then = tmp_path / f"draft-{place}", tmp_path / f"then-{place}"
        recipe = Recipe(rule=rule, master=True)
        first = merge(base, arrived, draft, recipe=recipe, threads=threads, chunk=chunk)
        second = merge(draft, arrived, then, recipe=recipe, state=first.state, threads=threads, chunk=chunk)
        made.append([state.files for state in (first.state, second.state) if state] + [first.files, second.files])
    assert made[0] == made[1] == made[2]


def random_small(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 0.02, shape)
    return to_bf16(values.astype(np.float32)) if dtype == "BF16" else values.astype(NUMPY[dtype])


def test_runs_of_one_site_are_added_by_their_number(tmp_path: Path) -> None:
    models = [{"w": ("F32", random_values("F32", (500,), np.random.default_rng(seed)))} for seed in (1, 2, 4)]
    numbers, weights = (10, 9, 2), (3, 5, 11)
    folders = [write_weights(tmp_path / str(number), model) for number, model in zip(numbers, models, strict=True)]
    given_sources = [
        Source(site="brno", number=number, folder=folder, weight=weight)
        for number, folder, weight in zip(numbers, folders, weights, strict=True)
    ]
    merge(folders[0], given_sources, tmp_path / "draft")
    expected = reference_fedavg(models[0], list(zip(weights, models, strict=True))[::-1])
    assert same_bits(read_weights(tmp_path / "draft"), expected)


def test_a_library_that_switched_subnormals_off_does_not_change_a_bit(tmp_path: Path) -> None:
    models = [{"w": ("F32", np.full(100_000, 2.0**-140, np.float32))}] * 2
    torch.set_flush_denormal(True)
    try:
        merge(write_weights(tmp_path / "base", models[0]), sources(tmp_path, models, [1, 1]), tmp_path / "draft")
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(read_weights(tmp_path / "draft"), models[0])


def test_torch_has_its_threads_back_after_a_merge(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        merge(write_weights(tmp_path / "base", small(0)), sources(tmp_path, [small(1)], [1]), tmp_path / "draft")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_files_headers_and_what_is_no_float_come_from_the_base(tmp_path: Path) -> None:
    base = write_weights(tmp_path / "base", small(0), {"embed": "2", "norm": "1", "steps": "2"})
    others = {
        "config.json": "{}",
        "tokenizer.json": "[]",
        "LICENSE": "free",
        "chat/template.jinja": "x",
        "tokenizer.model": "spm",
    }
    left_out = (
        "flctl.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "x.GGUF",
        "old.safetensors",
        ".hidden",
    )
    for name in (*others, *left_out):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(others.get(name, "x"))
    given_sources = sources(tmp_path, [small(1), small(2)], [1, 1])
    (given_sources[0].folder / "config.json").write_text('{"from": "a site"}')
    entries = merge(base, given_sources, tmp_path / "draft").files
    shards = ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    assert [entry.path for entry in entries] == sorted([*others, *shards])
    for name, text in others.items():
        assert (tmp_path / "draft" / name).read_text() == text
    for before, after in zip(open_shards(base).files, open_shards(tmp_path / "draft").files, strict=True):
        contents = [(folder / before.name).read_bytes()[: before.data] for folder in (base, tmp_path / "draft")]
        assert contents[0] == contents[1]
        assert before.size == after.size
    assert read_weights(tmp_path / "draft")["steps"][1].tolist() == [0]
    assert load_file(tmp_path / "draft" / "model-2.safetensors")["embed"].shape == (50, 8)


def test_the_manifest_holds_sizes_and_hashes_of_what_was_written(tmp_path: Path) -> None:
    base = write_weights(tmp_path / "base", small(0))
    (base / "config.json").write_text("{}")
    entries = merge(base, sources(tmp_path, [small(1)], [1]), tmp_path / "draft").files
    for entry in entries:
        content = (tmp_path / "draft" / entry.path).read_bytes()
        assert entry == FileEntry(path=entry.path, size=len(content), sha256=sha256(content).hexdigest())
    assert len(entries) == 2


def test_progress_rises_to_the_size_of_the_weights(tmp_path: Path) -> None:
    base = write_weights(tmp_path / "base", small(0), {"embed": "2", "norm": "1", "steps": "2"})
    seen: list[int] = []
    merge(base, sources(tmp_path, [small(1)], [1]), tmp_path / "draft", progress=seen.append, chunk=64)
    assert seen == sorted(seen)
    assert len(seen) > 5
    assert seen[-1] == open_shards(base).size


# Whole or not at all


def test_a_contribution_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = write_weights(tmp_path / "base", small(0))
    other = {**small(2), "more": ("F32", np.zeros(1, np.float32))}
    with pytest.raises(AggregationRefused, match=r"leonardo.*'more' is not in the base"):
        merge(base, sources(tmp_path, [small(1), other], [1, 1]), tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def test_stop_ends_the_merge_and_removes_the_draft(tmp_path: Path) -> None:
    base = write_weights(tmp_path / "base", small(0))
    asked: list[bool] = []

    def stop() -> bool:
        asked.append((tmp_path / "draft").is_dir())
        return len(asked) == 4

    with pytest.raises(Interrupted):
        merge(base, sources(tmp_path, [small(1)], [1]), tmp_path / "draft", stop=stop, chunk=10)
    assert asked == [True] * 4
    assert not (tmp_path / "draft").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    base = write_weights(tmp_path / "base", small(0))
    before = hash_folder(base)
    with pytest.raises(ConfigurationError, match="File exists"):
        merge(base, sources(tmp_path, [small(1)], [1]), base)
    assert hash_folder(base) == before


def test_no_contribution_and_one_given_twice_are_refused(tmp_path: Path) -> None:
    base = write_weights(tmp_path / "base", small(0))
    with pytest.raises(AggregationRefused, match="nothing to merge"):
        merge(base, [], tmp_path / "draft")
    with pytest.raises(AggregationRefused, match="run 1 is given 2 times"):
        merge(base, sources(tmp_path, [small(1)], [1]) * 2, tmp_path / "draft")


def test_a_weight_that_is_not_positive_is_refused(tmp_path: Path) -> None:
    base = write_weights(tmp_path / "base", small(0))
    with pytest.raises(AggregationRefused, match="must be positive"):
        merge(base, sources(tmp_path, [small(1), small(2)], [1, 0]), tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


# Memory

MEASURE = """
import json, re, sys, torch
from pathlib import Path
from flctl.model.merge import Recipe, Source, merge
from flctl.model.verify import check
def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
root = Path(sys.argv[1])
torch.ones(10).add_(1).sum()
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: loading torch is not the merge
before = peak()
sources = [Source(site=f"s{n:02}", number=1, folder=root / "model", weight=1) for n in range(int(sys.argv[2]))]
check(root / "model", root / "model", site="s00")
merge(root / "model", sources, root / "draft", recipe=Recipe(**json.loads(sys.argv[3])), threads=int(sys.argv[4]))
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("megabytes", "contributions", "recipe", "threads", "limit"),
    [
        (200, 3, {}, 1, 60e6),
        (50, 16, {}, 1, 60e6),
        (50, 16, {}, 4, 80e6),
        (50, 16, {"rule": "fedadam", "master": True}, 4, 120e6),
        (50, 16, {"rule": "median"}, 4, 130e6),
        (50, 16, {"rule": "krum"}, 4, 100e6),
    ],
)
def test_memory_over_torch_is_bounded(
    megabytes: int, contributions: int, recipe: dict[str, object], threads: int, limit: float, tmp_path: Path
) -> None:
    """Whatever the model (the file is a hole, so that it costs no disk) and the number of contributions."""
    elements = megabytes * 500_000
    header = {"w": {"dtype": "BF16", "shape": [elements], "data_offsets": [0, elements * 2]}}
    text = json.dumps(header).encode()
    (tmp_path / "model").mkdir()
    with (tmp_path / "model" / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + elements * 2)
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(contributions)]
    command += [json.dumps(recipe), str(threads)]
    growth = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    shutil.rmtree(tmp_path / "draft")
    assert growth < limit


# transformers opens what we wrote


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_the_merged_model(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )
    folders = []
    for place, shard_size in enumerate(["10KB", "5GB", "20KB"]):
        torch.manual_seed(place)
        folder = tmp_path / str(place)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_size)
        folders.append(folder)
    assert len(list(folders[0].glob("*.safetensors"))) > 2
    given_sources = [
        Source(site=site, number=1, folder=folder, weight=weight)
        for site, folder, weight in zip(("brno", "karolina"), folders[1:], (3, 1), strict=True)
    ]
    merge(folders[0], given_sources, tmp_path / "draft")
    models = [read_weights(folder) for folder in folders]
    expected = reference_fedavg(models[0], [(3, models[1]), (1, models[2])])
    assert same_bits(read_weights(tmp_path / "draft"), expected)
    assert ("lm_head.weight" in expected) is not tied

    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    state = opened.state_dict()
    for name, (_, bits) in expected.items():
        assert state[name].dtype == torch.bfloat16
        assert state[name].view(torch.int16).numpy().tobytes() == bits.tobytes()
    assert (opened.lm_head.weight.data_ptr() == opened.model.embed_tokens.weight.data_ptr()) is tied
    assert opened(torch.arange(8).unsqueeze(0)).logits.isfinite().all()


# Many tensors, many contributions


def test_master_weights_of_a_sharded_model_that_needs_none_do_not_stand_in_the_way(tmp_path: Path) -> None:
    """float32 weights are their own master: nothing is kept, and the next merge goes on."""
    rng = np.random.default_rng(2)
    models = [{f"w{i}": ("F32", rng.normal(size=20).astype(np.float32)) for i in range(3)} for _ in range(2)]
    split = {"w0": "1", "w1": "2", "w2": "2"}
    base = write_weights(tmp_path / "base", models[0], split)
    given_sources = [Source(site="brno", number=1, folder=write_weights(tmp_path / "a", models[1], split), weight=1)]
    for rule in ("fedavg", "fedavgm"):
        recipe, state, current = Recipe(rule=rule, master=True), None, base
        for turn in (1, 2):
            made = merge(current, given_sources, tmp_path / f"{rule}-{turn}", recipe=recipe, state=state)
            current, state = tmp_path / f"{rule}-{turn}", made.state
            assert not (current / "state" / "master").exists()
        assert (state is not None and state.step == 2) is (rule == "fedavgm")


def test_a_model_without_a_tensor_is_refused(tmp_path: Path) -> None:
    base = write_weights(tmp_path / "base", {})
    with pytest.raises(AggregationRefused, match="no tensor"):
        merge(base, sources(tmp_path, [{}], [1]), tmp_path / "draft")


FEW_FILES = """
import resource, sys
from pathlib import Path
hard = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (min(64, hard), hard))
from flctl.errors import FlctlError
from flctl.model.merge import Recipe, Source, merge
root = Path(sys.argv[1])
sources = [Source(site=f"s{n:03}", number=1, folder=root / "model", weight=1) for n in range(100)]
try:
    made = merge(root / "model", sources, root / "draft", threads=4, recipe=Recipe(rule=sys.argv[2]))
except FlctlError as error:
    sys.exit(f"{error.code} {error}")
"""


@pytest.mark.parametrize("rule", ["fedavg", "krum"])
def test_the_limit_of_open_files_is_raised_or_fewer_are_held_or_it_is_said(rule: str, tmp_path: Path) -> None:
    """Six workers would hold 600 files of 100 contributions: 2000 are enough, 256 for one or two workers."""
    write_weights(tmp_path / "model", small(1))
    for hard, fits in ((2000, True), (256, True), (120, False)):
        command = [sys.executable, "-c", FEW_FILES, str(tmp_path), rule, str(hard)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if fits:
            assert done.returncode == 0, done.stderr
            shutil.rmtree(tmp_path / "draft")
        else:
            assert "configuration" in done.stderr
            assert "files must be open at once, and this system allows 120" in done.stderr
            assert not (tmp_path / "draft").exists()


def test_many_tensors_of_many_contributions_take_little_memory(tmp_path: Path) -> None:
    """20,000 tensors of 16 contributions; each a full record of its own took 490 bytes more."""
    value = np.ones(4, np.float16)
    write_weights(tmp_path / "model", {f"model.layers.{i}.experts.weight": ("F16", value) for i in range(20_000)})
    command = [sys.executable, "-c", MEASURE, str(tmp_path), "16", "{}", "1"]
    growth = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert growth < 110e6
