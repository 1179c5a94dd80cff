"""The reference trainer as several processes: torchrun, mpiexec, FSDP2, and what must not depend on their number."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.numpy import load_file

from flctl.campaign.corpora import write_corpus
from flctl.model.tiny import write_tiny_model
from tests.test_payload_train import TRAINER, Ended

TRAIN = {"lr": 5e-3, "batch": 8, "sequence_length": 64, "threads": 1, "log_every": 1}
MPIEXEC = ("mpiexec", "--allow-run-as-root", "--oversubscribe", "-n")
TORCHRUN = (str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node")
EXACT = 1e-5


class Site:
    """A data folder, a state folder, and the runs that go on from each other there."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root, self.data = root, data
        for name in ("state", "checkpoint"):
            (root / name).mkdir(parents=True)

    def begin(
        self, model: Path, launch: tuple[str, ...] = (), train: dict[str, Any] | None = None, **asked: Any
    ) -> subprocess.Popen[str]:
        """`asked`: keys of the order (number, attempt, continues, base), others are FLCTL_<NAME>."""
        out = self.root / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        order: dict[str, Any] = {"schema": 1, "work": "train", "number": 1, "attempt": 1, "base": {"version": 0}}
        order |= {key: asked.pop(key) for key in ("number", "attempt", "continues", "base") if key in asked}
        (self.root / "order.json").write_text(json.dumps(order | {"train": TRAIN | (train or {})}))
        given = {"model": model, "data": self.data, "out": out, "order": self.root / "order.json", "seed": 1}
        given |= {"steps": 6, "total_steps": 30, "state": self.root / "state", "checkpoint": self.root / "checkpoint"}
        given |= asked
        program = [TRAINER] if launch[:1] == TORCHRUN[:1] else [sys.executable, TRAINER]
        return subprocess.Popen(
            [*launch, *program],
            env={"PATH": os.environ["PATH"], "HOME": str(self.root)}
            | {f"FLCTL_{name.upper()}": str(value) for name, value in given.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: Any, **more: Any) -> Ended:
        return self.end(self.begin(*words, **more))

    def end(self, process: subprocess.Popen[str], seen: str = "") -> Ended:
        log, error = process.communicate(timeout=300)
        return Ended(status=process.returncode, log=seen + log, error=error, out=self.root / "out")


def losses(ended: Ended) -> list[float]:
    return [line["loss"] for line in ended.lines]


def apart(one: Path, other: Path) -> float:
    """The largest difference of any two weights; the names must be the same."""
    first, second = load_all(one), load_all(other)
    assert first.keys() == second.keys()
    return max(float(abs(first[name].astype("f8") - second[name].astype("f8")).max()) for name in first)


def load_all(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "model"
    write_tiny_model(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_corpus("italian", folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def alone(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """One process."""
    ended = Site(tmp_path_factory.mktemp("alone"), data).run(model)
    assert ended.status == 0, ended.error
    return ended


@pytest.mark.parametrize(
    ("launch", "train"),
    [
        ((*TORCHRUN, "2"), {}),
        ((*MPIEXEC, "2"), {}),
        ((*MPIEXEC, "2"), {"sharding": "none", "micro_batch": 2}),
        ((*MPIEXEC, "2"), {"micro_batch": 1, "activation_checkpointing": True}),
    ],
    ids=["torchrun-full", "mpiexec-full", "mpiexec-none", "accumulated-checkpointed"],
)
def test_losses_do_not_depend_on_the_number_of_processes(launch, train, alone, model, data, tmp_path):
    ended = Site(tmp_path, data).run(model, launch, train)
    assert ended.status == 0, ended.error
    assert ended.metrics["processes"] == 2
    assert losses(ended) == pytest.approx(losses(alone), abs=2e-4)  # the log rounds
    for key in ("train_loss", "gradient_norm"):
        assert ended.metrics[key] == pytest.approx(alone.metrics[key], rel=EXACT)
    for name in ("base", "trained"):
        of_both = [run.metrics["evaluation"][name] for run in (ended, alone)]
        assert of_both[0]["loss"] == pytest.approx(of_both[1]["loss"], rel=EXACT)
        assert of_both[0]["tokens"] == of_both[1]["tokens"]
    assert ended.metrics["sources"].keys() == alone.metrics["sources"].keys()
    assert ended.metrics["samples"] == alone.metrics["samples"] == 48
    assert apart(ended.out, alone.out) < 1e-4


def test_hybrid_sharding_over_two_nodes_of_two_processes_is_the_same_too(alone, model, data, tmp_path):
    """Two torchruns stand for two nodes: shards within each, copies across. Each does its part in two passes."""
    port = free_port()
    site = Site(tmp_path, data)
    words = ("--nnodes", "2", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port))
    nodes = [(TORCHRUN[0], "--node-rank", str(node), *words) for node in (1, 0)]
    processes = [site.begin(model, node, {"sharding": "hybrid", "micro_batch": 1}) for node in nodes]
    ended = [site.end(process) for process in processes]
    assert [each.status for each in ended] == [0, 0], ended[0].error + ended[1].error
    assert ended[1].metrics["processes"] == 4
    assert ended[1].metrics["train_loss"] == pytest.approx(alone.metrics["train_loss"], rel=EXACT)
    assert apart(ended[1].out, alone.out) < 1e-4


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_the_sharded_save_opens_with_from_pretrained_and_each_file_is_of_bounded_size(data, tmp_path, monkeypatch):
    """In files as small as they come here, of a bfloat16 base whose pair is not tied."""
    base = tmp_path / "base"
    write_tiny_model(base, seed=1, dtype="bfloat16", tied=False)
    small = tmp_path / "train.py"
    small.write_text(TRAINER.read_text().replace("FILE_MOST = 4 << 30", "FILE_MOST = 100_000"))
    site = Site(tmp_path / "site", data)
    monkeypatch.setattr("tests.test_payload_train_ranks.TRAINER", small)
    ended = site.run(base, (*MPIEXEC, "2"), {}, steps=2)
    assert ended.status == 0, ended.error
    files = sorted(ended.out.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((ended.out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    whole = Site(tmp_path / "whole", data).run(base, (), {}, steps=2)
    opened, seen = transformers.AutoModelForCausalLM.from_pretrained(ended.out, output_loading_info=True)
    assert not seen["missing_keys"]
    assert not seen["unexpected_keys"]
    full = transformers.AutoModelForCausalLM.from_pretrained(whole.out).state_dict()
    for name, tensor in opened.state_dict().items():
        assert tensor.dtype == full[name].dtype
        assert float((tensor.double() - full[name].double()).abs().max()) < 2**-7 * max(1.0, float(tensor.abs().max()))


def test_a_model_whose_tensor_is_missing_is_refused_by_every_process(data, tmp_path):
    from safetensors.numpy import save_file

    write_tiny_model(tmp_path / "base", seed=1)
    tensors = load_file(tmp_path / "base/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    ended = Site(tmp_path / "site", data).run(tmp_path / "base", (*MPIEXEC, "2"))
    assert ended.status != 0
    assert "train.py: error [model]: " in ended.error
    assert "model.norm.weight is missing" in ended.error


def test_a_batch_that_the_processes_cannot_share_is_refused(model, data, tmp_path):
    ended = Site(tmp_path, data).run(model, (*MPIEXEC, "2"), {"batch": 7})
    assert ended.status != 0
    assert "train.py: error [options]: train.batch is 7: no multiple of the 2 processes" in ended.error


# What goes on


def until_step(process: subprocess.Popen[str], step: int) -> str:
    seen = ""
    for line in process.stdout or ():
        seen += line
        if line.startswith(f'{{"step": {step},'):
            return seen
    raise AssertionError(f"it ended: {process.stderr and process.stderr.read()}")


@pytest.mark.parametrize("launch", [(), (*MPIEXEC, "2")], ids=["one", "two"])
def test_a_run_killed_and_continued_equals_an_uninterrupted_one(launch, model, data, tmp_path):
    often = {"checkpoint_minutes": 1e-9}
    whole = Site(tmp_path / "whole", data).run(model, launch, often, steps=12)
    assert whole.status == 0, whole.error
    site = Site(tmp_path / "cut", data)
    process = site.begin(model, launch, often, steps=12)
    until_step(process, 7)
    process.send_signal(signal.SIGKILL if not launch else signal.SIGTERM)  # mpiexec ends its processes
    site.end(process)
    done = int((site.root / "checkpoint" / "progress").read_text())
    assert 0 < done < 12
    # The next attempt may have another number of processes.
    again = site.run(model, (), often, steps=12, attempt=2)
    assert again.status == 0, again.error
    assert f"goes on after {done} steps" in again.log
    assert [line["step"] for line in again.lines] == list(range(done + 1, 13))
    assert losses(again) == pytest.approx(losses(whole)[done:], abs=2e-4)
    for key in ("steps", "samples", "tokens"):
        assert again.metrics[key] == whole.metrics[key]
    assert again.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], rel=EXACT)
    assert apart(again.out, whole.out) < 1e-4
    assert again.metrics["sources"].keys() == whole.metrics["sources"].keys()
    for name, source in whole.metrics["sources"].items():
        assert again.metrics["sources"][name]["tokens"] == source["tokens"]
        assert again.metrics["sources"][name]["loss"] == pytest.approx(source["loss"], rel=EXACT)


def test_a_checkpoint_that_cannot_be_written_does_not_cost_the_run(model, data, tmp_path):
    (tmp_path / "file").touch()
    site = Site(tmp_path, data)
    ended = site.run(
        model, (*MPIEXEC, "2"), {"checkpoint_minutes": 1e-9}, steps=3, checkpoint=tmp_path / "file" / "below"
    )
    assert ended.status == 0, ended.error
    assert "goes on without" in ended.log
    assert ended.metrics["steps"] == 3


def test_a_file_that_one_process_cannot_write_is_refused_by_all(data, tmp_path, monkeypatch):
    """The second of two files is the second process's; the first one does not wait for it."""
    base = tmp_path / "base"
    write_tiny_model(base, seed=1)
    small = tmp_path / "train.py"
    blocked = 'path.with_name(f".{path.name}.part")\n    path.name.startswith("model-00002") and part.mkdir()'
    text = TRAINER.read_text().replace("FILE_MOST = 4 << 30", "FILE_MOST = 100_000")
    head, pieces, rest = text.partition("def write_pieces")
    small.write_text(head + pieces + rest.replace('path.with_name(f".{path.name}.part")', blocked, 1))
    monkeypatch.setattr("tests.test_payload_train_ranks.TRAINER", small)
    ended = Site(tmp_path / "site", data).run(base, (*MPIEXEC, "2"), {"keep_state": False}, steps=1)
    assert ended.status != 0
    assert "train.py: error [model]: cannot write the model" in ended.error
    assert "Traceback" not in ended.error


def test_sigterm_leaves_a_checkpoint_and_says_so(model, data, tmp_path):
    site = Site(tmp_path, data)
    process = site.begin(model, steps=1_000_000)
    until_step(process, 3)
    process.send_signal(signal.SIGTERM)
    ended = site.end(process)
    assert ended.status == 1
    done = int((site.root / "checkpoint" / "progress").read_text())
    assert f"train.py: error [time]: SIGTERM ended the job: {done} steps are in its checkpoint" in ended.error
    again = site.run(model, steps=done + 2, attempt=2)
    assert (again.status, again.metrics["steps"], len(again.lines)) == (0, done + 2, 2), again.error


def test_moments_and_the_place_in_the_data_go_on_from_the_run_that_the_order_names(model, data, tmp_path):
    """Two runs of three steps, the second on the first one's model, are one run of six."""
    whole = Site(tmp_path / "whole", data).run(model, steps=6)
    site = Site(tmp_path / "site", data)
    first = site.run(model, steps=3)
    assert first.status == 0, first.error
    shutil.copytree(model, tmp_path / "next")
    shutil.copyfile(first.out / "model.safetensors", tmp_path / "next/model.safetensors")
    second = site.run(tmp_path / "next", steps=3, global_step=3, number=2, continues=1, seed=2)
    assert second.status == 0, second.error
    assert losses(first) + losses(second) == pytest.approx(losses(whole), abs=2e-4)
    assert apart(second.out, whole.out) < 1e-4
    assert sorted(path.name for path in (site.root / "state").glob("run-*")) == ["run-0001-1", "run-0002-1"]
    # Not from a run that the order does not name, and not where it is not wanted.
    for asked in ({}, {"continues": 1, "train": {"keep_state": False}}):
        fresh = site.run(
            tmp_path / "next", train=asked.pop("train", {}), steps=3, global_step=3, number=3, seed=2, **asked
        )
        assert fresh.status == 0, fresh.error
        assert "goes on" not in fresh.log
        assert losses(fresh) != losses(second)


def test_the_state_of_one_process_is_taken_up_by_two(model, data, tmp_path):
    site = Site(tmp_path, data)
    assert site.run(model, steps=3).status == 0
    shutil.copytree(site.root / "state", tmp_path / "kept")
    one = site.run(model, steps=3, number=2, continues=1)
    together = losses(one)
    shutil.rmtree(site.root / "state")
    (tmp_path / "kept").rename(site.root / "state")
    two = site.run(model, (*MPIEXEC, "2"), steps=3, number=2, continues=1)
    assert two.status == 0, two.error
    assert losses(two) == pytest.approx(together, abs=2e-4)


def test_the_tokens_are_made_once_and_again_only_when_the_data_changes(model, tmp_path):
    write_corpus("czech", tmp_path / "data", seed=1)
    site = Site(tmp_path / "site", tmp_path / "data")
    assert site.run(model, steps=1).status == 0
    (store,) = (site.root / "state").glob("data-*")
    made = (store / "tokens.bin").stat().st_ino
    assert site.run(model, steps=1, number=2).status == 0
    assert (store / "tokens.bin").stat().st_ino == made
    (tmp_path / "data" / "more.txt").write_text("Další text. " * 500)
    assert site.run(model, steps=1, number=3).status == 0
    (other,) = (site.root / "state").glob("data-*")
    assert other != store


def test_the_stop_file_ends_every_process_after_the_same_step(model, data, tmp_path):
    site = Site(tmp_path, data)
    process = site.begin(model, (*MPIEXEC, "2"), steps=1_000_000, stop=tmp_path / "stop")
    seen = until_step(process, 2)
    (tmp_path / "stop").touch()
    ended = site.end(process, seen)
    assert ended.status == 0, ended.error
    assert "the scheduler's warning ends the training after" in ended.log
    assert ended.metrics["steps"] == len(ended.lines) >= 2
    assert math.isfinite(ended.metrics["evaluation"]["trained"]["loss"])


def test_a_signal_to_one_process_ends_all_with_a_whole_model(model, data, tmp_path):
    site = Site(tmp_path, data)
    process = site.begin(model, (*MPIEXEC, "2"), steps=1_000_000)
    until_step(process, 2)
    ranks = [pid for pid in children(process.pid) if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGUSR1)
    ended = site.end(process)
    assert ended.status == 0, ended.error
    assert ended.metrics["steps"] >= 2


def children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found += [int(child), *children(int(child))]
    return found


def test_a_deadline_is_kept_by_all(model, data, tmp_path):
    deadline = time.time() + 45
    ended = Site(tmp_path, data).run(model, (*MPIEXEC, "2"), steps=1_000_000, deadline=deadline)
    assert ended.status == 0, ended.error
    assert "the deadline ends the training" in ended.log
    assert time.time() < deadline + 5
