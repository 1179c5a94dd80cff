"""`flctl aggregate` as typed: the reference's bits on any folders; one clear error for what cannot be, and no rest."""

import json
import os
import pickle
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from flctl.cli.main import expand
from flctl.errors import Interrupted, Locked, UsageError
from flctl.model.place import alone
from flctl.model.request import WITHOUT_BASE, Request
from flctl.model.rules import RULES
from flctl.model.standalone import aggregate
from flctl.records import folder_sha256
from tests.checkpoints import (
    Tensors,
    data_of,
    header_of,
    raw_file,
    read_weights,
    reference_fedavg,
    same_bits,
    to_bf16,
    write_weights,
)

MPIEXEC = ["mpiexec", "--allow-run-as-root", "--oversubscribe", "-n"]


class Place:
    """A folder with checkpoints, and the program run in it."""

    def __init__(self, root: Path, **environment: str) -> None:
        self.root, self.environment = root, {**os.environ, **environment}

    def words(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "flctl.cli.main", "aggregate", *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = self.words(*arguments)
        return subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=120)

    def json(self, *arguments: str) -> dict[str, Any]:
        ran = self.run(*arguments, "--json")
        answer = json.loads(ran.stdout)
        assert (ran.returncode, answer["exit_code"], answer["status"]) == (0, 0, "ok"), ran.stderr
        return answer["data"]

    def refused(self, code: int, *arguments: str) -> str:
        """The message of an error, which leaves nothing behind."""
        before = self.listing()
        ran = self.run(*arguments)
        assert ran.returncode == code, ran.stdout + ran.stderr
        assert ran.stdout == ""
        assert "Traceback" not in ran.stderr
        assert "internal error" not in ran.stderr
        assert self.listing() == before
        return ran.stderr

    def listing(self) -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_size if path.is_file() else 0) for path in self.root.rglob("*"))

    def write(self, name: str, tensors: Tensors, files: Mapping[str, str] | None = None) -> Tensors:
        write_weights(self.root / name, tensors, files)
        return tensors


def model(seed: int) -> dict[str, tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {
        "embed": ("BF16", to_bf16(rng.normal(size=(50, 8)).astype(np.float32))),
        "norm": ("F32", rng.normal(size=8).astype(np.float32)),
        "steps": ("I64", np.array([seed], np.int64)),
    }


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """X, and A, B and C trained from it."""
    place = Place(tmp_path)
    for seed, name in enumerate("XABC"):
        place.write(name, model(seed))
    return place


# What is made


def test_the_issue_s_example_gives_the_reference_s_bits(place: Place) -> None:
    ran = place.run("A", "B", "C", "--weights", "5,3,2", "--rule", "fedavg", "--base", "X", "--out", "Y")
    assert ran.returncode == 0, ran.stderr
    expected = reference_fedavg(model(0), [(5, model(1)), (3, model(2)), (2, model(3))])
    assert same_bits(read_weights(place.root / "Y"), expected)
    for word in ("A ", "0.5", "0.3", "0.2", str(place.root / "Y"), "1 thread"):
        assert word in ran.stdout
    assert sorted(path.name for path in place.root.iterdir()) == ["A", "B", "C", "X", "Y"]


@pytest.mark.parametrize(
    "words",
    [
        "C A B --weights 2 5 3 --out Y",
        "--weights 3,2,5 B C A --out Y",
        "--out=Y --weights=2,3,5 C B A --threads 2",
        "A --weights 5, 3, 2 --out Y -- B C",
    ],
)
def test_neither_order_nor_threads_nor_form_change_a_bit(place: Place, words: str) -> None:
    data = place.json(*words.split(), "--base", "X") if "--" not in words.split() else None
    if data is None:
        assert place.run("--base", "X", *words.split()).returncode == 0
    expected = reference_fedavg(model(0), [(5, model(1)), (3, model(2)), (2, model(3))])
    assert same_bits(read_weights(place.root / "Y"), expected)


def test_without_weights_all_are_equal_and_it_says_so(place: Place) -> None:
    data = place.json("B", "A", "--out", "Y")
    expected = reference_fedavg(model(1), [(1, model(1)), (1, model(2))])
    assert same_bits(read_weights(place.root / "Y"), expected), (
        "headers and what is no float are A's, the first by name"
    )
    assert data["weights"] == "equal"
    assert data["base"] == str(place.root / "A")
    assert [note.split(":")[0] for note in data["notes"]] == ["no --weights", "no --base"]


def test_json_and_flctl_json_say_what_was_made_of_what(place: Place) -> None:
    (place.root / "B" / "flctl.json").write_text('{"sha256": "abc", "version": 7, "more": 1}')
    data = place.json("B", "A", "--weights", "1,3", "--base", "X", "--out", "Y", "--threads", "1")
    record = json.loads((place.root / "Y" / "flctl.json").read_text())
    content = (place.root / "Y" / "model.safetensors").read_bytes()
    (entry,) = record["files"]
    assert (entry["path"], entry["size"]) == ("model.safetensors", len(content))
    assert data["sha256"] == record["sha256"]
    assert data["bytes"] == len(content)
    assert data["path"] == str(place.root / "Y")
    assert (data["rule"], data["threads"], data["ranks"], data["state"]) == ("fedavg", 1, 1, None)
    given = [(item["site"], item["weight"], item["coefficient"]) for item in data["contributions"]]
    assert given == [("A", 3, 0.75), ("B", 1, 0.25)]
    assert [item["folder"] for item in record["contributions"]] == [str(place.root / name) for name in "AB"]
    assert (record["contributions"][1]["sha256"], record["contributions"][1]["version"]) == ("abc", 7)
    assert record["parents"] == [{"folder": str(place.root / "X")}]
    assert (record["schema"], record["rule"], record["options"]) == (1, "fedavg", {})
    assert record["seconds"] >= 0


def test_shards_may_be_split_differently_everywhere(place: Place) -> None:
    place.write("P", model(1), {"embed": "2", "norm": "1", "steps": "1"})
    place.write("Q", model(2), {"embed": "1", "norm": "1", "steps": "2"})
    place.json("P", "Q", "--base", "X", "--out", "Y")
    expected = reference_fedavg(model(0), [(1, model(1)), (1, model(2))])
    assert same_bits(read_weights(place.root / "Y"), expected)
    assert [path.name for path in (place.root / "Y").glob("*.safetensors")] == ["model.safetensors"]


def test_folders_of_one_name_are_told_apart_by_more_of_their_paths(place: Place) -> None:
    for name in ("brno/1/out", "pisa/1/out", "pisa/2/out"):
        place.write(name, model(len(name)))
    data = place.json("pisa/2/out", "brno/1/out", "A", "pisa/1/out", "--out", "Y")
    assert [item["site"] for item in data["contributions"]] == ["2/out", "A", "brno/1/out", "pisa/1/out"]


def test_an_empty_folder_and_one_whose_parent_is_not_there_yet_are_filled(place: Place) -> None:
    (place.root / "Y").mkdir()
    first = place.json("A", "B", "--out", "Y")
    assert place.json("A", "B", "--out", "new/one")["sha256"] == first["sha256"]


@pytest.mark.parametrize("name", sorted(RULES))
def test_what_a_rule_needs_no_base_for_does_not_depend_on_it(name: str, tmp_path: Path) -> None:
    place = Place(tmp_path)
    for seed, folder in enumerate("XABCDE"):
        place.write(folder, {name: tensor for name, tensor in model(seed).items() if name != "steps"})
    folders = tuple(tmp_path / folder for folder in "ABCDE")
    request = Request(folders=folders, out=tmp_path / "Y", rule=name, weights=(0.1,) * 5, steps=(1,) * 5)
    if name not in WITHOUT_BASE:
        with pytest.raises(UsageError, match="needs that model"):
            aggregate(request)
        return
    aggregate(request)
    aggregate(replace(request, out=tmp_path / "Z", base=tmp_path / "X"))
    assert same_bits(read_weights(tmp_path / "Y"), read_weights(tmp_path / "Z"))


def test_the_documented_rule_of_one_s_own_works(tmp_path: Path) -> None:
    """The example of docs/aggregation.md, as a package that is installed."""
    page = (Path(__file__).parent.parent / "docs" / "aggregation.md").read_text()
    (module,) = re.findall(r"```python\n# halfway.py\n(.*?)```", page, re.DOTALL)
    (entry,) = re.findall(r'^halfway = "(.*)"$', page, re.MULTILINE)
    (tmp_path / "halfway.py").write_text(module)
    (tmp_path / "halfway-1.dist-info").mkdir()
    (tmp_path / "halfway-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: halfway\nVersion: 1\n")
    (tmp_path / "halfway-1.dist-info" / "entry_points.txt").write_text(f"[flctl.rules]\nhalfway = {entry}\n")
    place = Place(tmp_path, PYTHONPATH=str(tmp_path))
    place.write("X", {"w": ("F32", np.zeros(3, np.float32))})
    place.write("A", {"w": ("F32", np.ones(3, np.float32))})
    words = ("A", "--rule", "halfway", "--option", "share=0.25", "--base", "X", "--out", "Y")
    assert place.json(*words)["rule"] == "halfway"
    assert read_weights(tmp_path / "Y")["w"][1].tolist() == [0.25] * 3


def test_fedbuff_takes_each_contribution_from_its_own_base(tmp_path: Path) -> None:
    """The vector of the second version: a trained from model 0, b from model 1 (s = 1/sqrt(1 + staleness))."""
    place = Place(tmp_path)
    values = {"M0": [1, -2, 0.5], "M1": [0.8, -2.15, 0.5], "a2": [1.5, -1.9, 0.2], "b2": [0.8, -2.1, 0.6]}
    for name, numbers in values.items():
        place.write(name, {"w": ("F64", np.array(numbers))})
    weights = f"{2**-0.5 / 2!r},0.5"
    words = ("a2", "b2", "--rule", "fedbuff", "--weights", weights, "--base", "M1", "--bases", "M0", "M1", "--out", "Y")
    place.json(*words)
    expected = [0.9767766952966369, -2.0896446609406727, 0.44393398282201785]
    np.testing.assert_allclose(read_weights(tmp_path / "Y")["w"][1], expected, rtol=0, atol=1e-12)


def test_fednova_is_given_the_local_steps(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for name, numbers in {"X": [1, -2, 0.5], "a": [1.2, -1.7, 0.1], "b": [0.4, -2.6, 0.9]}.items():
        place.write(name, {"w": ("F64", np.array(numbers))})
    place.json("a", "b", "--rule", "fednova", "--weights", "3,1", "--steps", "10,30", "--base", "X", "--out", "Y")
    np.testing.assert_allclose(read_weights(tmp_path / "Y")["w"][1], [1.15, -1.7375, 0.1], rtol=0, atol=1e-12)


def test_transformers_opens_what_was_made(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flctl.model.tiny import write_tiny_model

    for seed, name in enumerate("XAB"):
        write_tiny_model(tmp_path / name, seed=seed)
    Place(tmp_path).json("A", "B", "--base", "X", "--out", "Y")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "Y")
    assert opened(torch.arange(8).unsqueeze(0)).logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(tmp_path / "Y").vocab_size > 0
    expected = reference_fedavg(read_weights(tmp_path / "X"), [(1, read_weights(tmp_path / name)) for name in "AB"])
    assert same_bits(read_weights(tmp_path / "Y"), expected)


# State

APPFL = ([1.0, -1.9124416056932199, 0.4048739483244112], [1.0969712883937608, -1.8806318927990617, 0.28373293191303395])
ADAM = ("--rule", "fedadam", "--option", "dialect=appfl", "lr=0.1", "--weights", "3,1")


@pytest.fixture
def rounds(tmp_path: Path) -> Place:
    """Two rounds of two sites in float64, as the reference vectors have them."""
    place = Place(tmp_path)
    values = {
        "X": [1, -2, 0.5],
        "a1": [1.2, -1.7, 0.1],
        "b1": [0.4, -2.6, 0.9],
        "a2": [1.5, -1.9, 0.2],
        "b2": [0.8, -2.1, 0.6],
    }
    for name, numbers in values.items():
        place.write(name, {"w": ("F64", np.array(numbers))})
    return place


def assert_is(folder: Path, expected: list[float]) -> None:
    np.testing.assert_allclose(read_weights(folder)["w"][1], expected, rtol=0, atol=1e-12)


def test_the_state_beside_the_base_is_found(rounds: Place) -> None:
    first = rounds.json("a1", "b1", *ADAM, "--base", "X", "--out", "Y1")
    assert first["state"] == str(rounds.root / "Y1" / "state")
    rounds.json("a2", "b2", *ADAM, "--base", "Y1", "--out", "Y2")
    assert_is(rounds.root / "Y1", APPFL[0])
    assert_is(rounds.root / "Y2", APPFL[1])


def test_a_state_kept_apart_goes_from_round_to_round(rounds: Place) -> None:
    for place, base in ((1, "X"), (2, "Y1")):
        words = (f"a{place}", f"b{place}", *ADAM, "--base", base, "--out", f"Y{place}", "--state", "S")
        assert rounds.json(*words)["state"] == str(rounds.root / "S")
        assert_is(rounds.root / f"Y{place}", APPFL[place - 1])
        assert not (rounds.root / f"Y{place}" / "state").exists()
    assert json.loads((rounds.root / "S" / "state.json").read_text())["step"] == 2
    assert [path.name for path in rounds.root.iterdir() if path.name.startswith(".")] == []


def test_a_base_without_record_is_known_by_its_files(rounds: Place) -> None:
    rounds.json("a1", "b1", *ADAM, "--base", "X", "--out", "Y1", "--state", "S")
    (rounds.root / "Y1" / "flctl.json").unlink()
    rounds.json("a2", "b2", *ADAM, "--base", "Y1", "--out", "Y2", "--state", "S")
    assert_is(rounds.root / "Y2", APPFL[1])


def test_a_state_of_another_model_is_refused(rounds: Place) -> None:
    rounds.json("a1", "b1", *ADAM, "--base", "X", "--out", "Y1", "--state", "S")
    words = ("a2", "b2", *ADAM, "--out", "Y2")
    error = rounds.refused(8, *words, "--base", "X", "--state", "S")
    assert "S is the state of another model" in error
    assert "give --state an empty folder" in error
    shutil.copytree(rounds.root / "S", rounds.root / "X" / "state")
    assert "give --state an empty folder" in rounds.refused(8, *words, "--base", "X")
    assert "is the state of the rule fedadam, not of fedyogi" in rounds.refused(
        2, "a2", "b2", "--rule", "fedyogi", "--base", "Y1", "--out", "Y2", "--state", "S"
    )


@pytest.mark.parametrize("kept", [[], ["--state", "S"]], ids=["beside", "apart"])
def test_a_state_that_is_gone_is_not_begun_anew_unless_asked_for(rounds: Place, kept: list[str]) -> None:
    first = Path(rounds.json("a1", "b1", *ADAM, "--base", "X", "--out", "Y1", *kept)["state"])
    first.rename(rounds.root / "elsewhere")
    words = ("a2", "b2", *ADAM, "--base", "Y1", "--out", "Y2")
    for more in ([], ["--state", "S"]):
        error = rounds.refused(3, *words, *more)
        assert f"{rounds.root / 'Y1'} was made by fedadam with a state" in error
        assert "--state DIR" in error
        assert "mkdir NEW" in error
    rounds.json(*words[:2], "--rule", "fedavgm", "--base", "Y1", "--out", "Y3")  # it would not go on from that
    (rounds.root / "new").mkdir()
    made = rounds.json(*words, "--state", "new")
    assert [note for note in made["notes"] if "new is empty: fedadam begins anew" in note]
    assert json.loads((rounds.root / "new" / "state.json").read_text())["step"] == 1


def test_an_empty_folder_for_the_state_begins_anew_though_one_lies_beside_the_base(rounds: Place) -> None:
    rounds.json("a1", "b1", *ADAM, "--base", "X", "--out", "Y1")
    (rounds.root / "new").mkdir()
    words = ("a2", "b2", *ADAM, "--base", "Y1")
    notes = rounds.json(*words, "--out", "Y2", "--state", "new")["notes"]
    assert [note for note in notes if f"{rounds.root / 'Y1' / 'state'} is not used" in note]
    assert json.loads((rounds.root / "new" / "state.json").read_text())["step"] == 1
    rounds.json(*words, "--out", "Y3", "--state", "other")
    assert json.loads((rounds.root / "other" / "state.json").read_text())["step"] == 2
    assert_is(rounds.root / "Y3", APPFL[1])


@pytest.mark.parametrize("kept", [[], ["--state", "S"]], ids=["beside", "apart"])
def test_master_weights_outlive_a_change_of_rule_and_are_missed_when_gone(tmp_path: Path, kept: list[str]) -> None:
    """Four steps of 1/512 each, one of them by another rule: without the master weights the model stays at 1."""
    place = Place(tmp_path)
    place.write("X", {"w": ("BF16", to_bf16(np.ones(4, np.float32)))})
    place.write("A", {"w": ("BF16", to_bf16(np.full(4, 1.0078125, np.float32)))})
    step = ("A", "--bases", "X", *kept)
    buffered = (*step, "--rule", "fedbuff", "--weights", "0.25", "--master")
    moved = (*step, "--rule", "fedavgm", "--option", "lr=0.25")
    place.json(*buffered, "--base", "X", "--out", "Y1")
    place.json(*buffered, "--base", "Y1", "--out", "Y2")
    if kept:
        assert "--master goes on" in place.refused(2, *moved, "--base", "Y2", "--out", "Y3")
    else:
        notes = place.json(*moved, "--base", "Y2", "--out", "Z")["notes"]
        assert any("holds master weights, which are not used without --master" in note for note in notes)
    notes = place.json(*moved, "--base", "Y2", "--master", "--out", "Y3")["notes"]
    assert any("is of fedbuff: fedavgm begins anew, from its master weights" in note for note in notes)
    state = tmp_path / (kept[1] if kept else "Y3/state")
    state.rename(tmp_path / "elsewhere")
    assert "was made by fedavgm with a state" in place.refused(3, *buffered, "--base", "Y3", "--out", "Y4")
    (tmp_path / "elsewhere").rename(state)
    place.json(*buffered, "--base", "Y3", "--out", "Y4")
    assert same_bits(read_weights(tmp_path / "Y4"), read_weights(tmp_path / "A"))


def test_a_damaged_state_is_refused(rounds: Place) -> None:
    rounds.json("a1", "b1", *ADAM, "--base", "X", "--out", "Y1")
    (path, *_) = sorted((rounds.root / "Y1" / "state").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path.name) in rounds.refused(3, "a2", "b2", *ADAM, "--base", "Y1", "--out", "Y2")
    path.unlink()
    assert "is missing" in rounds.refused(3, "a2", "b2", *ADAM, "--base", "Y1", "--out", "Y2")


def test_master_weights_keep_what_bf16_loses(tmp_path: Path) -> None:
    """A step of 1/512 is a quarter of the last place of 1.0 in bf16: alone it is lost each time."""
    place = Place(tmp_path)
    place.write("X", {"w": ("BF16", to_bf16(np.ones(4, np.float32)))})
    place.write("A", {"w": ("BF16", to_bf16(np.full(4, 1.0078125, np.float32)))})
    base = "X"
    for number in range(1, 5):
        words = ("A", "--rule", "fedbuff", "--weights", "0.25", "--base", base, "--bases", "X", "--master")
        base = Path(place.json(*words, "--out", f"Y{number}")["path"]).name
    assert same_bits(read_weights(tmp_path / base), read_weights(tmp_path / "A"))
    place.json("A", "--rule", "fedbuff", "--weights", "0.25", "--base", "X", "--out", "Z")
    assert same_bits(read_weights(tmp_path / "Z"), read_weights(tmp_path / "X"))


# Adapters


def adapter(root: Path, name: str, seed: int, rank: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    b, a = rng.normal(size=(6, rank)).astype(np.float32), rng.normal(size=(rank, 8)).astype(np.float32)
    tensors = {f"base_model.model.w.lora_{part}.weight": ("F32", array) for part, array in (("A", a), ("B", b))}
    (root / name).mkdir()
    (root / name / "adapter_model.safetensors").write_bytes(raw_file(header_of(tensors), data_of(tensors)))
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["w"]}
    (root / name / "adapter_config.json").write_text(json.dumps(settings))
    return b, a


def factors(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    found = load_file(folder / "adapter_model.safetensors")
    return found["base_model.model.w.lora_B.weight"], found["base_model.model.w.lora_A.weight"]


def test_adapters_are_averaged_by_their_factors_or_by_their_products(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (b1, a1), (b2, a2) = adapter(tmp_path, "P", 1), adapter(tmp_path, "Q", 2)
    exact = (3 * b1 @ a1 + b2 @ a2) / 4
    made = {
        method: place.json("P", "Q", "--weights", "3,1", "--adapters", method, *more, "--out", method)
        for method, more in {"mean": [], "stack": [], "svd": ["--rank", "4"]}.items()
    }
    b, a = factors(tmp_path / "mean")
    np.testing.assert_allclose(b, (3 * b1 + b2) / 4, rtol=1e-6)
    assert made["mean"]["adapters"] is None
    for method in ("stack", "svd"):
        b, a = factors(tmp_path / method)
        settings = json.loads((tmp_path / method / "adapter_config.json").read_text())
        np.testing.assert_allclose(settings["lora_alpha"] / settings["r"] * b @ a, exact, atol=1e-5)
        assert made[method]["adapters"]["ranks"] == [4]
        assert json.loads((tmp_path / method / "flctl.json").read_text())["adapters"] == made[method]["adapters"]
    assert made["svd"]["adapters"]["lost"] < 1e-9
    assert "squared norm that was lost" in place.run("P", "Q", "--adapters", "svd", "--rank", "2", "--out", "Y").stdout


def test_adapters_that_differ_are_refused(tmp_path: Path) -> None:
    place = Place(tmp_path)
    adapter(tmp_path, "P", 1)
    adapter(tmp_path, "Q", 2, rank=3)
    error = place.refused(8, "P", "Q", "--out", "Y")
    assert "Q" in error
    assert "stack and svd" in error
    assert "no rule but fedavg" in place.refused(
        2, "P", "Q", "--adapters", "svd", "--rule", "diloco", "--base", "P", "--out", "Y"
    )


def test_an_adapter_and_a_whole_model_are_told_apart(place: Place) -> None:
    adapter(place.root, "P", 1)
    error = place.refused(8, "A", "P", "--out", "Y")
    assert "P is an adapter, A is not" in error
    for method in ("mean", "svd"):
        assert "P is an adapter, X is not" in place.refused(8, "P", "--base", "X", "--adapters", method, "--out", "Y")


def test_the_exact_methods_keep_no_state(place: Place) -> None:
    adapter(place.root, "P", 1)
    (place.root / "S").mkdir()
    for method in ("svd", "stack"):
        words = ("P", "--base", "P", "--adapters", method, "--state", "S", "--out", "Y")
        assert "--state" in place.refused(2, *words)


# What is refused

BAD = {"embed": ("BF16", np.zeros((50, 9), np.uint16)), "norm": model(0)["norm"], "steps": model(0)["steps"]}


class Trap:
    """A pickle that tells when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, (str(self.mark),)  # type: ignore[return-value]


def truncated(root: Path) -> None:
    path = root / "B" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def lying(root: Path) -> None:
    header = header_of(model(2))
    header["norm"]["data_offsets"] = [796, 828]
    (root / "B" / "model.safetensors").write_bytes(raw_file(header, bytes(840)))


def huge(root: Path) -> None:
    (root / "B" / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + bytes(100))


def not_finite(root: Path) -> None:
    tensors = model(2)
    tensors["norm"][1][3] = np.nan
    write_weights(root / "B", tensors)


def pickled(root: Path) -> None:
    (root / "B" / "model.safetensors").write_bytes(pickle.dumps(Trap(root / "opened")))


def pickle_only(root: Path) -> None:
    (root / "B" / "model.safetensors").unlink()
    (root / "B" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(root / "opened")))
    (root / "B" / "config.json").write_text('{"model_type": "llama"}')


def other_shape(root: Path) -> None:
    write_weights(root / "B", BAD)


def no_model(root: Path) -> None:
    (root / "B" / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (truncated, 8, ["B/model.safetensors", "B: "]),
        (lying, 8, ["B/model.safetensors"]),
        (huge, 8, ["B/model.safetensors", "header"]),
        (not_finite, 8, ["B: ", "'norm' holds NaN"]),
        (pickled, 8, ["B/model.safetensors"]),
        (pickle_only, 3, ["PyTorch weights (pytorch_model.bin)", "save_pretrained"]),
        (other_shape, 8, ["B: ", "'embed' has shape [50, 9]"]),
        (no_model, 3, ["B: no model.safetensors"]),
    ],
)
def test_a_contribution_that_cannot_be_used_is_named(
    place: Place, spoil: Callable[[Path], None], code: int, words: list[str]
) -> None:
    spoil(place.root)
    error = place.refused(code, "A", "B", "C", "--base", "X", "--out", "Y")
    for word in words:
        assert word in error
    assert not (place.root / "opened").exists()


@pytest.mark.parametrize(
    ("typed", "code", "words"),
    [
        ("A N --out Y", 3, ["N: no such folder"]),
        ("A B/model.safetensors --out Y", 3, ["a file", "give the folder it is in"]),
        ("A B --base N --out Y", 3, ["N: no such folder"]),
        ("A A --out Y", 2, ["A is given twice"]),
        ("A ./B/../A --out Y", 2, ["A is given twice"]),
        ("--out Y", 2, ["FOLDER"]),
        ("A B", 2, ["--out"]),
        ("A B --weights 1 --out Y", 2, ["--weights names 1 for 2 contributions"]),
        ("A B --weights 1,2,3 --out Y", 2, ["--weights names 3 for 2"]),
        ("A B --weights one,two --out Y", 2, ["--weights"]),
        ("A B --weights --out Y", 2, ["--weights names nothing"]),
        ("A B --weights 1,0 --out Y", 8, ["must be positive"]),
        ("A B --weights=-1,1 --out Y", 8, ["must be positive"]),
        ("A B --weights -1,1 --out Y", 8, ["must be positive"]),
        ("A B --weights 1 -1 --out Y", 8, ["must be positive"]),
        ("A B --weights 1,nan --out Y", 8, ["must be positive"]),
        ("A B --steps 5 --out Y", 2, ["--steps names 1 for 2"]),
        ("A B --bases X --base X --out Y", 2, ["--bases names 1 for 2"]),
        ("A B --bases X X --out Y", 2, ["--bases", "--base FOLDER"]),
        ("A B --rule fedavgg --out Y", 2, ["did you mean fedavg?"]),
        ("A B --option lr=1 --out Y", 2, ["fedavg has no option 'lr'"]),
        ("A B --option lr --out Y", 2, ["--option lr sets nothing"]),
        ("A B --base X --rule fednova --steps 1,2 --option momentum=2 --out Y", 2, ["momentum must be"]),
        ("A B --base X --rule fednova --option momentum=much --steps 1,2 --out Y", 2, ["must be a number, not 'much'"]),
        ("A B --base X --rule fednova --out Y", 2, ["--steps 10,30"]),
        ("A B --rule median --out Y", 8, ["median of 2 contributions is their mean"]),
        ("A B C --rule krum --out Y", 8, ["n >= 2f + 3"]),
        ("A B --rule fedadam --out Y", 2, ["needs that model", "--base FOLDER"]),
        ("A B --rule fedbuff --base X --out Y", 2, ["takes the weights as they are"]),
        ("A B --rule fedasync --base X --weights 1,1 --out Y", 8, ["fedasync needs at most 1"]),
        ("A B --state S --out Y", 2, ["state belongs to a model", "--base FOLDER"]),
        ("A B --out C", 3, ["C exists", "never overwrites"]),
        ("A B --out C/model.safetensors", 3, ["never overwrites"]),
        ("A B --out A/Y", 2, ["lies in", "only read"]),
        ("A B --base X --state X/state --out Y", 2, ["lies in", "only read"]),
        ("A B --base X --state Y/state --out Y", 2, ["apart from --out"]),
        ("A B --base X --state C/model.safetensors --out Y", 3, ["C/model.safetensors is a file", "name a folder"]),
        ("A B --base X --state C/model.safetensors/S --out Y", 3, ["model.safetensors is a file", "name a folder"]),
        ("A B --out C/model.safetensors/Y", 3, ["C/model.safetensors is a file", "name a folder"]),
        ("A B --adapters svd --out Y", 2, ["LoRA adapters", "adapter_config.json"]),
        ("A B --rank 4 --out Y", 2, ["--adapters svd"]),
        ("A B --adapters meen --out Y", 2, ["meen"]),
        ("A B --threads 0 --out Y", 2, ["--threads"]),
        ("A B --threads 257 --out Y", 2, ["--threads", "256"]),
    ],
)
def test_what_cannot_be_meant_is_said_with_what_to_type(place: Place, typed: str, code: int, words: list[str]) -> None:
    error = place.refused(code, *typed.split())
    for word in words:
        assert word in error


def test_a_state_that_the_rule_would_not_use_is_left_as_it_is(place: Place) -> None:
    (place.root / "S").mkdir()
    (place.root / "S" / "state.json").write_text("{}")
    data = place.json("A", "B", "--base", "X", "--out", "Y", "--state", "S")
    assert any("keeps no state" in note for note in data["notes"])
    assert (place.root / "S" / "state.json").read_text() == "{}"


def test_with_json_an_error_is_one_object_under_the_command_s_name(place: Place) -> None:
    place.write("status", model(1))
    ran = place.run("status", "N", "--out", "Y", "--json")
    answer = json.loads(ran.stdout)
    assert (answer["command"], answer["exit_code"], ran.returncode) == ("aggregate", 3, 3)
    assert answer["errors"][0]["code"] == "configuration"


def test_folders_made_for_out_go_again_when_the_merge_is_refused(place: Place) -> None:
    not_finite(place.root)
    assert "NaN" in place.refused(8, "A", "B", "--out", "new/deep/Y")


def test_a_model_without_a_value_to_average_is_refused(place: Place) -> None:
    for name in "PQ":
        place.write(name, {"steps": ("I64", np.array([1], np.int64))})
    assert "nothing to average" in place.refused(8, "P", "Q", "--out", "Y")


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "flctl-test", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_9_and_leaves_nothing(tmp_path: Path, little_disk: Path) -> None:
    place = Place(tmp_path)
    for name in "AB":
        place.write(name, {"w": ("F32", np.ones(2 << 20, np.float32))})
    assert "the disk is too full" in place.refused(9, "A", "B", "--out", "disk/Y")
    assert list(little_disk.iterdir()) == []


def test_a_state_goes_to_another_file_system_too(rounds: Place, little_disk: Path) -> None:
    for number, base in ((1, "X"), (2, "Y1")):
        words = (f"a{number}", f"b{number}", *ADAM, "--base", base, "--out", f"Y{number}", "--state", "disk/S")
        rounds.json(*words)
    assert_is(rounds.root / "Y2", APPFL[1])
    assert [path.name for path in little_disk.iterdir()] == ["S"]


# Interruptions


def holes(folder: Path, gigabytes: float) -> None:
    """A model of zeros that takes no room on the disk."""
    elements = int(gigabytes * 5e8)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [elements], "data_offsets": [0, elements * 2]}}).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + elements * 2)


def begun(place: Place, *words: str) -> subprocess.Popen[str]:
    """The command, once it has written something of the model."""
    process = subprocess.Popen(
        place.words(*words), cwd=place.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    file = place.root / ".Y.draft" / "model.safetensors"
    deadline = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size > 10e6):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    place = Place(tmp_path)
    for name in "AB":
        holes(tmp_path / name, 2)
    process = begun(place, "A", "B", "--out", "Y", "--json")
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert json.loads(out)["exit_code"] == 130
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A", "B"]


def test_what_a_kill_leaves_is_removed_by_the_next_and_a_rival_waits(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for name in "AB":
        holes(tmp_path / name, 2)
    for name in "CD":
        place.write(name, model(1))
    process = begun(place, "A", "B", "--out", "Y")
    assert "another flctl is making" in place.run("C", "D", "--out", "Y").stderr
    assert process.poll() is None, "the rival took nothing away"
    process.kill()
    process.communicate()
    assert (tmp_path / ".Y.draft").exists()
    place.json("C", "D", "--out", "Y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A", "B", "C", "D", "Y"]


def test_a_stop_after_the_last_chunk_makes_nothing_either(place: Place) -> None:
    """The files are written and hashed, flctl.json is not: the model does not come to be, the state stays."""
    asked: list[bool] = []

    def stop() -> bool:
        asked.append((place.root / ".Y.draft" / "flctl.json").exists())
        return asked[-1]

    place.json("A", "--rule", "fedavgm", "--base", "X", "--out", "Z", "--state", "S")
    before = place.listing()
    folders, base, out, state = (place.root / "B",), place.root / "Z", place.root / "Y", place.root / "S"
    with pytest.raises(Interrupted, match="before"):
        aggregate(Request(folders=folders, base=base, rule="fedavgm", out=out, state=state), stop=stop)
    assert asked[-1]
    assert place.listing() == before


def test_a_lock_file_that_was_removed_meanwhile_locks_nothing(tmp_path: Path) -> None:
    """One who waits in open() while another ends gets a file that is no longer there: a third would not see it."""
    with alone(tmp_path / "new" / "Y"):
        (tmp_path / "new" / ".Y.lock").rename(tmp_path / "orphan")
        with alone(tmp_path / "new" / "Y"):
            held = os.stat(tmp_path / "new" / ".Y.lock")
            with pytest.raises(Locked), alone(tmp_path / "new" / "Y"):
                pass
            assert os.stat(tmp_path / "new" / ".Y.lock") == held
    assert [path.name for path in tmp_path.iterdir()] == ["orphan"]


def test_many_who_make_one_folder_never_do_so_at_once(tmp_path: Path) -> None:
    def work() -> None:
        for _ in range(200):
            with suppress(Locked), alone(tmp_path / "Y") as draft:
                draft.mkdir()
                draft.rmdir()

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work) for _ in range(8)]:
            done.result()
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_shows_bytes_rate_and_time_left(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for name in "AB":
        holes(tmp_path / name, 0.6)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        place.words("A", "B", "--out", "Y", "--json"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "140"},
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:
        pass
    assert process.stdout is not None
    answer = json.loads(process.stdout.read())
    assert process.wait() == 0
    assert answer["data"]["bytes"] > 6e8
    text = shown.decode(errors="replace")
    for word in ("merging", "/600.0 MB", "MB/s", "0:00:0"):
        assert word in text
    shutil.rmtree(tmp_path / "Y")


# Several processes


def apart(place: Place, other: Path, *words: str) -> str:
    """The error of two ranks, the second of which stands in another folder."""
    command = place.words(*words)
    ranks = [*MPIEXEC, "1", "-wdir", str(place.root), *command, ":", "-n", "1", "-wdir", str(other), *command]
    before = place.listing()
    ran = subprocess.run(ranks, env=place.environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 3, ran.stdout + ran.stderr
    assert ran.stderr.count("flctl: ") == 1, ran.stderr
    assert place.listing() == before
    return ran.stderr


def test_what_one_rank_does_not_see_ends_all(place: Place, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    assert "flctl: A: no such folder" in apart(place, empty, "A", "B", "--base", "X", "--out", "Y")


def test_ranks_that_mean_other_folders_are_refused(place: Place, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    for name in "AB":
        shutil.copytree(place.root / name, other / name)
    assert f"rank 1 stands in {other}" in apart(place, other, "A", "B", "--out", "Y")
    assert sorted(path.name for path in other.iterdir()) == ["A", "B"]


def test_an_error_that_one_rank_has_alone_ends_all(place: Place) -> None:
    """The second cannot even import what merges, while the first would go on."""
    (place.root / "broken").mkdir()
    (place.root / "broken" / "torch.py").write_text("raise ImportError('no torch here')")
    words = place.words("A", "B", "--out", "Y")
    spoilt = ["env", f"PYTHONPATH={place.root / 'broken'}", *words]
    ranks = [*MPIEXEC, "1", *words, ":", "-n", "1", *spoilt]
    ran = subprocess.run(ranks, cwd=place.root, env=place.environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1, ran.stderr
    assert "no torch here" in ran.stderr
    assert sorted(path.name for path in place.root.iterdir()) == ["A", "B", "C", "X", "broken"]


def test_an_option_that_sets_nothing_is_said_once_by_two_ranks(place: Place) -> None:
    ranks = [*MPIEXEC, "2", *place.words("A", "B", "--option", "lr", "--out", "Y")]
    ran = subprocess.run(ranks, cwd=place.root, env=place.environment, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr.count("flctl: ")) == (2, 1), ran.stderr


# The command line


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("A B --weights 5,3", "A B --weights 5 --weights 3"),
        ("A B --weights 5 3e-1 --out Y", "A B --weights 5 --weights 3e-1 --out Y"),
        ("--weights 5, .3 A B", "--weights 5 --weights .3 A B"),
        ("--steps 1,2 A 3", "--steps 1 --steps 2 A 3"),
        ("--weights -1,1 A B", "--weights -1 --weights 1 A B"),
        ("A --weights 5 -.3e2 --out Y", "A --weights 5 --weights -.3e2 --out Y"),
        ("A --bases x -1 --out Y", "A --bases x -1 --out Y"),
        ("A --bases x,y z --out Y", "A --bases x,y --bases z --out Y"),
        ("--option lr=0.1 beta1=0,9 A B", "--option lr=0.1 --option beta1=0,9 A B"),
        ("--option=lr=0.1 A", "--option lr=0.1 A"),
    ],
)
def test_lists_end_where_their_kind_of_word_ends(typed: str, meant: str) -> None:
    assert expand(["aggregate", *typed.split()]) == ["aggregate", *meant.split()]


def test_only_aggregate_has_lists_of_numbers() -> None:
    assert expand(["round", "--steps", "5", "6"]) == ["round", "--steps", "5", "6"]
    with pytest.raises(UsageError, match="--weights names nothing"):
        expand(["aggregate", "A", "--weights"])


def test_the_sha256_is_that_of_the_folder(place: Place) -> None:
    from flctl.model.manifest import hash_folder

    data = place.json("A", "B", "--out", "Y")
    assert data["sha256"] == folder_sha256(hash_folder(place.root / "Y"))
