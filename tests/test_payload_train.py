"""The reference trainer, run as a job runs it: environment in, weights and metrics.json out."""

import importlib.util
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from flctl.campaign.corpora import write_corpus
from flctl.model.tiny import write_tiny_model

TRAINER = Path(__file__).parents[1] / "flctl" / "payload" / "train.py"
TRAIN = {"lr": 5e-3, "batch": 8, "sequence_length": 64, "threads": 1}
TOTAL = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    status: int
    log: str
    error: str
    out: Path

    @property
    def metrics(self) -> dict[str, Any]:
        return json.loads((self.out / "metrics.json").read_text())

    @property
    def rates(self) -> list[float]:
        return [line["lr"] for line in self.lines]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]

    @property
    def weights(self) -> bytes:
        return (self.out / "model.safetensors").read_bytes()


def begin(folder: Path, model: Path, data: Path, train: dict[str, Any], also: dict[str, Any], **env: object):
    """Start a run whose files lie in `folder`; its order holds `also`, FLCTL_<NAME> is `env`'s <name>."""
    (folder / "out").mkdir(parents=True)
    orderly = folder / "order.json"
    orderly.write_text(json.dumps({"schema": 1, "work": "train", "train": TRAIN | train} | also))
    given = {"model": model, "data": data, "out": folder / "out", "order": orderly, "seed": 1, "steps": 10} | env
    environment = {f"FLCTL_{name.upper()}": str(value) for name, value in given.items()}
    return subprocess.Popen(
        [sys.executable, TRAINER],
        env={"PATH": os.environ["PATH"], "HOME": str(folder)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str], folder: Path, seen: str = "") -> Ended:
    log, error = process.communicate(timeout=120)
    return Ended(status=process.returncode, log=seen + log, error=error, out=folder / "out")


def run(folder: Path, model: Path, data: Path, train: dict[str, Any] | None = None, **env: object) -> Ended:
    return end(begin(folder, model, data, train or {}, {}, **env), folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "model"
    write_tiny_model(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_corpus("italian", folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def first(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return run(tmp_path_factory.mktemp("first"), model, data, {"warmup_steps": 4}, total_steps=TOTAL)


@pytest.fixture(scope="module")
def trainer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train", TRAINER)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_lowers_the_loss_and_says_what_it_did(first):
    assert first.status == 0, first.error
    assert sorted(path.name for path in first.out.iterdir()) == ["config.json", "metrics.json", "model.safetensors"]
    metrics = first.metrics
    assert (metrics["steps"], metrics["samples"], metrics["tokens"]) == (10, 80, 80 * 64)
    base, trained = metrics["evaluation"]["base"], metrics["evaluation"]["trained"]
    assert trained["loss"] < base["loss"] - 1
    assert trained["perplexity"] == pytest.approx(math.exp(trained["loss"]))
    assert base["tokens"] == trained["tokens"] > 0
    assert trained["loss"] < metrics["train_loss"] < base["loss"]
    assert metrics["seconds"] > 0
    assert metrics["device"]


def test_the_schedule_continues_where_the_run_before_ended(first, model, data, tmp_path):
    second = run(tmp_path, model, data, {"warmup_steps": 4}, total_steps=TOTAL, global_step=10)
    assert second.status == 0, second.error
    expected = [
        5e-3 * (step + 1) / 4
        if step < 4
        else 5e-3 * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * (step - 4) / (TOTAL - 4))))
        for step in range(20)
    ]
    assert first.rates + second.rates == pytest.approx(expected, rel=1e-4)
    assert second.metrics["lr"] == pytest.approx(expected[-1])


def test_the_same_seed_gives_the_same_bits(first, model, data, tmp_path):
    again = run(tmp_path, model, data, {"warmup_steps": 4}, total_steps=TOTAL)
    assert again.weights == first.weights
    assert again.metrics["evaluation"] == first.metrics["evaluation"]


def test_another_seed_trains_otherwise_but_looks_at_the_same_validation_text(first, model, data, tmp_path):
    other = run(tmp_path, model, data, {"warmup_steps": 4}, total_steps=TOTAL, seed=2)
    assert other.weights != first.weights
    assert other.metrics["evaluation"]["base"] == first.metrics["evaluation"]["base"]


def test_names_and_dtypes_are_those_of_a_sharded_bfloat16_base_with_one_float32_tensor(data, tmp_path):
    base = tmp_path / "base"
    write_tiny_model(base, seed=1, dtype="bfloat16", tied=False, shard_size=100_000)
    shard = min(base.glob("*.safetensors"))
    tensors = safetensors.torch.load_file(shard)
    odd = min(tensors)
    safetensors.torch.save_file(tensors | {odd: tensors[odd].float()}, shard, metadata={"format": "pt"})
    ended = run(tmp_path / "run", base, data, steps=3)
    assert ended.status == 0, ended.error
    expected = dtypes(base)
    assert set(expected.values()) == {"BF16", "F32"}
    assert dtypes(ended.out) == expected


def dtypes(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            found.update({name: file.get_slice(name).get_dtype() for name in file.keys()})  # noqa: SIM118
    return found


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_whole_model_and_the_true_number_of_steps(signum, model, data, tmp_path):
    process = begin(tmp_path, model, data, {}, {}, steps=1_000_000)
    seen = until_first_step(process)
    process.send_signal(signum)
    ended = end(process, tmp_path, seen)
    assert ended.status == 0, ended.error
    assert signum.name in ended.log
    done = int(re.search(r"after (\d+) of 1000000 steps", ended.log)[1])
    assert ended.metrics["steps"] == done >= 1
    assert ended.metrics["samples"] == 8 * done
    assert dtypes(ended.out) == dtypes(model)
    assert ended.metrics["evaluation"]["trained"]["tokens"] > 0


def until_first_step(process: subprocess.Popen[str]) -> str:
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith('{"step": 1,'):
            return seen
    raise AssertionError(f"it ended: {process.stderr.read()}")


def test_a_signal_before_the_first_step_is_a_failure_in_one_line(model, data, tmp_path):
    process, write_order = begin_waiting(tmp_path, model, data)
    process.send_signal(signal.SIGTERM)
    write_order()
    ended = end(process, tmp_path)
    assert_refused(ended, "SIGTERM came before the first step was done")


def begin_waiting(folder: Path, model: Path, data: Path, train: dict[str, Any] | None = None):
    """A trainer that has done its imports and now waits for its order, and the function that gives it."""
    fifo = folder / "order.fifo"
    os.mkfifo(fifo)
    process = begin(folder, model, data, train or {}, {}, order=fifo)
    writer = fifo.open("w")  # returns when the trainer opens its end

    def write_order() -> None:
        with writer:
            writer.write((folder / "order.json").read_text())

    return process, write_order


def test_the_deadline_is_kept(first, model, data, tmp_path):
    deadline = time.time() + 4 + 2 * first.metrics["seconds"]
    ended = run(tmp_path, model, data, steps=1_000_000, deadline=deadline)
    assert ended.status == 0, ended.error
    assert time.time() < deadline
    assert 1 <= ended.metrics["steps"] < 1_000_000
    assert "the deadline ends the training" in ended.log
    assert "trained" in ended.metrics["evaluation"]


def test_the_energy_of_all_steps_is_told_where_slurm_counts_it(trainer, tmp_path, monkeypatch):
    """No plugin here measures any: a stand-in prints what sstat does."""
    program = tmp_path / "sstat"
    program.write_text('#!/bin/sh\n[ "$5" = --jobs=77 ] && printf "1200\\n34\\n\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert trainer.energy() == {}
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert trainer.energy() == {"energy": 1234}
    program.write_text("#!/bin/sh\nprintf '0\\n'\n")
    assert trainer.energy() == {}
    program.write_text("#!/bin/sh\nexit 1\n")
    assert trainer.energy() == {}


def test_a_deadline_already_past_is_a_failure_in_one_line(model, data, tmp_path):
    ended = run(tmp_path, model, data, deadline=int(time.time()) - 1)
    assert_refused(ended, "the deadline came before the first step")


def assert_refused(ended: Ended, words: str) -> None:
    assert ended.status not in (0, -signal.SIGTERM, -signal.SIGUSR1)
    assert re.match(r"train\.py: error \[[a-z]+\]: ", ended.error), ended.error
    assert ended.error.count("\n") == 1, ended.error
    assert words in ended.error
    assert not (ended.out / "metrics.json").exists()


def test_evaluate_gives_each_subject_the_perplexity_its_training_saw(first, model, data, tmp_path):
    subjects = {"work": "evaluate", "subjects": [{"name": "0000", "sha256": ""}, {"name": "here-0001-1", "sha256": ""}]}
    process = begin(tmp_path, model, data, {}, subjects, subjects=f"{model}\n{first.out}")
    ended = end(process, tmp_path)
    assert ended.status == 0, ended.error
    evaluation = first.metrics["evaluation"]
    assert ended.metrics["evaluation"] == {"0000": evaluation["base"], "here-0001-1": evaluation["trained"]}
    assert [path.name for path in ended.out.iterdir()] == ["metrics.json"]


def test_a_learning_rate_that_breaks_the_loss_is_refused(model, data, tmp_path):
    assert_refused(run(tmp_path, model, data, {"lr": 1e30}), "is not finite at step")


def test_a_base_with_a_nan_is_refused(data, tmp_path):
    base = tmp_path / "base"
    write_tiny_model(base, seed=1)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert_refused(run(tmp_path / "run", base, data), "not finite: its weights are broken")


def test_a_base_without_one_of_its_tensors_is_refused(trainer, tmp_path):
    write_tiny_model(tmp_path, seed=1)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(trainer.Refused, match=re.escape("model.norm.weight is missing or misshapen (1 in all)")):
        trainer.load(str(tmp_path), trainer.read_options({}), trainer.World())


def test_a_torn_shard_is_refused(trainer, tmp_path):
    write_tiny_model(tmp_path, seed=1)
    os.truncate(tmp_path / "model.safetensors", 100_000)
    with pytest.raises(trainer.Refused, match="cannot load the model"):
        trainer.load(str(tmp_path), trainer.read_options({}), trainer.World())


def test_too_little_memory_is_refused_with_what_to_lower(model, data, tmp_path):
    process, write_order = begin_waiting(tmp_path, model, data, {"batch": 1024, "sequence_length": 1024})
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**29
    resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
    write_order()
    assert_refused(
        end(process, tmp_path),
        "[memory]: out of memory with 1024 sequences of 1024 tokens a pass: lower train.micro_batch",
    )


def test_an_unknown_option_is_refused_with_the_nearest_name(model, data, tmp_path):
    ended = run(tmp_path, model, data, {"sequence_lenght": 64})
    assert_refused(ended, "unknown option train.sequence_lenght; the nearest is train.sequence_length")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr": "1e-3"}, "train.lr is '1e-3', but should be like"),
        ({"batch": True}, "train.batch is True"),
        ({"scaffold": True}, 'set train.optimizer = "sgd"'),
        ({"dp_noise_multiplier": 1.0, "mu": 0.1}, "goes with neither"),
        ({"batch": 0}, "train.batch is 0, but goes from 1"),
        ({"validation": 1.0}, "train.validation is 1.0, but goes from 0.0 to 0.9"),
        ({"schedule": "cosin"}, "should be one of: cosine, linear, constant"),
    ],
)
def test_an_impossible_option_is_refused(trainer, given, words):
    with pytest.raises(trainer.Refused, match=re.escape(words)):
        trainer.read_options(given)


def test_no_data_is_refused(trainer, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(
        trainer.Refused, match=re.escape("no data: there is no .txt, .text, .md, .jsonl, .parquet file")
    ):
        trainer.find_files(tmp_path)
    with pytest.raises(trainer.Refused, match=r"no data: .* is neither a folder nor a file"):
        trainer.find_files(tmp_path / "absent")
    with pytest.raises(trainer.Refused, match=r"unreadable data: .*File name too long"):
        trainer.find_files(tmp_path / ("a" * 300))


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What a store holds, as text: the training stream and the validation stream, and the tables of rows."""

    training: str
    validation: str
    rows: list[list[int]]
    held: list[list[int]]


def split(trainer: ModuleType, folder: Path, model: Path, documents: list[str], **options: Any) -> Split:
    """Documents as text files of a data folder, made into a store."""
    data = folder / "data"
    data.mkdir(parents=True)
    for place, document in enumerate(documents):
        (data / f"{place:04}.txt").write_text(document)
    return split_of(trainer, folder, model, data, **options)


def split_of(trainer: ModuleType, folder: Path, model: Path, data: Path, **options: Any) -> Split:
    tokenizer = trainer.load_tokenizer(str(model))
    given = trainer.read_options(TRAIN | options)
    trainer.build_store(folder / "store", "digest", trainer.find_files(data), tokenizer, given)
    store = trainer.Store.open(folder / "store")
    start = int(store.validation[0][0])
    return Split(
        training=tokenizer.decode(store.tokens[:start].tolist()).replace("<|end|>", ""),
        validation=tokenizer.decode(store.tokens[start:].tolist()).replace("<|end|>", "\x00"),
        rows=[store.tokens[first : first + count].tolist() for first, count, _, _ in store.training],
        held=[store.tokens[first : first + count].tolist() for first, count, _, _ in store.validation],
    )


def test_a_text_shorter_than_a_sequence_for_each_side_is_refused(trainer, model, tmp_path):
    with pytest.raises(trainer.Refused, match="too short: it does not make one sequence of 64 tokens"):
        split(trainer, tmp_path, model, ["Poche parole."])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_unreadable_data_is_refused_without_quoting_it(trainer, tmp_path):
    cases = {
        "latin.txt": (b"perch\xe9 segreto", "not UTF-8 (byte 5)"),
        "torn.jsonl": (b'{"text": "uno"}\n{"text": "segreto', "line 2 is not JSON"),
        "bare.jsonl": (b'{"testo": "segreto"}\n', "line 1 has no text in 'text'"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(trainer.Refused, match=re.escape(words)) as refused:
            list(trainer.read_documents(tmp_path / name, trainer.read_options({})))
        assert "segreto" not in str(refused.value)


def test_jsonl_lines_are_documents_and_the_field_may_be_chosen(model, tmp_path):
    write_corpus("czech", tmp_path / "text", seed=1)
    lines = [json.dumps({"obsah": path.read_text()}) for path in sorted((tmp_path / "text").iterdir())]
    (tmp_path / "corpus.jsonl").write_text("\n\n".join(lines))
    ended = run(tmp_path / "run", model, tmp_path / "corpus.jsonl", {"text_field": "obsah"}, steps=2)
    assert ended.status == 0, ended.error


def test_hidden_files_and_other_kinds_are_no_data(trainer, tmp_path):
    for name in ("b.txt", "a/c.md", "a/d.jsonl", "A.TEXT", ".hidden.txt", ".git/e.txt", "f.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in trainer.find_files(tmp_path)]
    assert found == ["A.TEXT", "a/c.md", "a/d.jsonl", "b.txt"]


def test_validation_and_training_share_no_passage_and_lose_none(trainer, model, data, tmp_path):
    documents = [path.read_text() for path in sorted(data.iterdir())]
    documents.append(documents[0])  # what stands twice must not stand on both sides
    made = split(trainer, tmp_path, model, documents, validation=0.2, validation_batches=0)
    held, trained = made.validation.split("\x00")[:-1], made.training
    passages = [passage for document in documents for passage in trainer.cut_passages(document)]
    assert set(held) == {passage for passage in passages if trainer.Sample(passage).place < 0.2}
    assert {passage for passage in passages if passage in trained} == set(passages) - set(held)
    assert sum(map(len, held)) + len(trained) == sum(map(len, documents))
    assert 0.1 < sum(map(len, held)) / sum(map(len, documents)) < 0.3


def test_the_end_token_stands_where_a_text_ends_or_validation_took_a_passage_and_nowhere_else(
    trainer, model, data, tmp_path
):
    (tmp_path / "data").mkdir()
    documents = [path.read_text() * 3 for path in sorted(data.iterdir())]
    for place, document in enumerate(documents):
        (tmp_path / f"data/{place:04}.txt").write_text(document)
    tokenizer, options = trainer.load_tokenizer(str(model)), trainer.read_options(TRAIN)
    trainer.build_store(tmp_path / "store", "d", trainer.find_files(tmp_path / "data"), tokenizer, options)
    store = trainer.Store.open(tmp_path / "store")
    text = tokenizer.decode(store.tokens[: int(store.validation[0][0])].tolist())
    pieces = text.split("<|end|>")[:-1]
    expected = []
    for document in documents:
        piece = ""
        for passage in trainer.cut_passages(document):
            if trainer.Sample(passage).place < options["validation"]:
                expected += [piece] if piece else []
                piece = ""
            else:
                piece += passage
        expected += [piece] if piece else []
    assert pieces == expected


def test_the_split_does_not_depend_on_the_order_of_the_documents(trainer, model, data, tmp_path):
    documents = [path.read_text() for path in sorted(data.iterdir())]
    one, other = (split(trainer, tmp_path / name, model, of) for name, of in (("a", documents), ("b", documents[::-1])))
    assert one.validation == other.validation


def test_a_small_corpus_still_gives_a_sequence_to_each_side(trainer, model, tmp_path):
    made = split(trainer, tmp_path, model, ["parole " * 300], validation=0.0)
    assert made.held
    assert made.rows
    assert len(made.training) + len(made.validation.replace("\x00", "")) == 7 * 300


def test_only_as_much_validation_is_kept_as_evaluations_look_at(trainer, model, data, tmp_path):
    documents = [path.read_text() for path in sorted(data.iterdir())] * 3
    every = split(trainer, tmp_path / "all", model, documents, validation=0.5, validation_batches=0)
    some = split(trainer, tmp_path / "some", model, documents, validation=0.5, validation_batches=1, batch=2)
    assert 2 <= len(some.held) < len(every.held) / 4
    assert every.validation.startswith(some.validation.rsplit("\x00", 2)[0])
    assert some.training == every.training


def test_rows_overlap_by_the_one_token_that_is_predicted_last(trainer, model, tmp_path):
    made = split(trainer, tmp_path, model, ["parole " * 300])
    for row, following in zip(made.rows, made.rows[1:], strict=False):
        assert len(row) == 65
        assert row[-1] == following[0]


def test_no_row_comes_twice_before_the_epoch_ends_and_a_cursor_goes_on_where_it_was(trainer):
    cursor = trainer.Cursor(10, seed=3)
    taken = [cursor.take(4) for _ in range(5)]
    every = [place for some in taken for place in some]
    first, second = every[:10], every[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    other = trainer.Cursor(10, seed=3)
    assert [other.take(4), other.take(4)] == taken[:2]
    again = trainer.Cursor(10, **json.loads(json.dumps(other.card())))
    assert [again.take(4) for _ in range(3)] == taken[2:]


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_each_schedule_starts_at_lr_and_ends_at_its_least(trainer, schedule, last):
    options = trainer.read_options({"lr": 1.0, "schedule": schedule})
    rates = [trainer.learning_rate(step, 50, options) for step in range(60)]
    assert rates[0] == 1.0
    assert rates[50:] == pytest.approx([last] * 10)
    assert rates == sorted(rates, reverse=True)
