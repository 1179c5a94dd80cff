#!/usr/bin/env python3
"""flctl's reference trainer: causal-LM training of a Hugging Face folder, or of a LoRA adapter of one, on the site's
private data, by one process or by many.

It takes no arguments; the job's environment says everything (FLCTL_MODEL, FLCTL_FROZEN, FLCTL_OUT, FLCTL_DATA,
FLCTL_STATE, FLCTL_CHECKPOINT, FLCTL_STOP, FLCTL_ORDER, FLCTL_STEPS, FLCTL_GLOBAL_STEP, FLCTL_TOTAL_STEPS, FLCTL_SEED,
FLCTL_DEADLINE, FLCTL_SUBJECTS). It writes safetensors weights and metrics.json into FLCTL_OUT and exits 0; any program
that does the same to the same environment may take its place. Needs torch, transformers 5, numpy and safetensors;
peft for adapters, pyarrow or datasets for such data, mpi4py under mpiexec, opacus for DP-SGD.

It reads top to bottom: what may be asked, the processes, the data, the model, the steps, the state that stays, and
what comes out. The same global batch gives the same losses whatever the number of processes."""

import contextlib
import copy
import difflib
import gc
import hashlib
import heapq
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()

# Before the imports below, which take seconds: a signal that comes early must end in a message too.
stopped_by: list[tuple[str, float]] = []  # (signal's name, when) of each SIGUSR1 and SIGTERM


def stop(number: int, frame: object) -> None:
    stopped_by.append((signal.Signals(number).name, time.time()))


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, stop)
    signal.signal(signal.SIGTERM, stop)
    # The site may have no way out, and a trainer has no business there: everything it needs was delivered.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.update(HF_DATASETS_OFFLINE="1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic cuBLAS asks for
    gc.disable()  # 0.4 s of 2.3 s: the imports make a million objects and no garbage

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402

gc.enable()

# What may be asked

Options = dict[str, Any]
# name: (default, (lowest, highest) or the words allowed, what it does)
OPTIONS: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "steps": (100, (1, math.inf), "optimizer steps, where FLCTL_STEPS does not say"),
    "lr": (3e-4, (0.0, math.inf), "highest learning rate"),
    "batch": (8, (1, math.inf), "sequences per step, of all processes together"),
    "micro_batch": (0, (0, math.inf), "sequences per process and pass; 0: its whole part of the batch"),
    "sequence_length": (512, (2, math.inf), "tokens per sequence"),
    "warmup_steps": (0, (0, math.inf), "steps over which the rate rises, counted from the start of the campaign"),
    "schedule": ("cosine", ("cosine", "linear", "constant"), "how the rate falls until FLCTL_TOTAL_STEPS"),
    "min_lr_ratio": (0.1, (0.0, 1.0), "the rate at the end, as a part of lr"),
    "lr_decay": (1.0, (0.0, 1.0), "the rate is multiplied by it once per version of the model"),
    "optimizer": ("adamw", ("adamw", "sgd"), "AdamW (betas 0.9, 0.95), or plain SGD"),
    "weight_decay": (0.01, (0.0, math.inf), "for matrices; vectors (norms, biases) have none"),
    "clip": (1.0, (0.0, math.inf), "highest norm of the gradient; 0: any"),
    "keep_state": (True, (False, True), "moments and place in the data go on from the site's last run"),
    "mu": (0.0, (0.0, math.inf), "FedProx: mu / 2 times the squared distance to the base is added to the loss"),
    "scaffold": (False, (False, True), "SCAFFOLD's control variates, kept at the site; for sgd"),
    "dp_noise_multiplier": (0.0, (0.0, math.inf), "DP-SGD: noise in units of dp_clip; 0: no DP-SGD"),
    "dp_clip": (1.0, (0.0, math.inf), "DP-SGD: highest norm of one sequence's gradient"),
    "dp_delta": (1e-5, (0.0, 1.0), "DP-SGD: the delta for which epsilon is told"),
    "dp_epsilon": (0.0, (0.0, math.inf), "DP-SGD: no step that would make the site's epsilon larger; 0: no limit"),
    "format": ("text", ("text", "alpaca"), "text, packed; or instruction, input, output with the loss on the output"),
    "text_field": ("text", (), "the field of a record that holds the text"),
    "validation": (0.1, (0.0, 0.9), "part of the data kept from training"),
    "validation_batches": (32, (0, math.inf), "batches an evaluation looks at; 0: all"),
    "sharding": ("auto", ("auto", "none", "full", "hybrid"), "of weights and moments over processes (FSDP2); hybrid: "
                 "within a node only; auto: full where there are several processes"),
    "activation_checkpointing": (False, (False, True), "layers are computed again in the backward pass: less memory"),
    "dtype": ("auto", ("auto", "float32", "bfloat16"), "what the model computes in; auto: bfloat16 on a GPU that can"),
    "quantize": ("none", ("none", "4bit"), "of an adapter's frozen base, by bitsandbytes"),
    "checkpoint_minutes": (10.0, (0.0, math.inf), "between checkpoints that the next attempt goes on from; 0: none"),
    "log_every": (0, (0, math.inf), "steps per line of the log; 0: a hundredth of them"),
    "peak_tflops": (0.0, (0.0, math.inf), "of one device, for model FLOPs utilisation; 0: as the device is known"),
    "threads": (0, (0, 4096), "CPU threads of a process; 0: as torch finds"),
}  # fmt: skip
TEXT, LINES, PARQUET = (".txt", ".text", ".md"), (".jsonl",), (".parquet",)
PASSAGE = 500  # characters; what the validation split takes or leaves as a whole
GRACE = 5.0  # seconds that a final evaluation may still take after a signal
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: name for name, dtype in DTYPES.items()}
FILE_MOST = 4 << 30  # bytes of one written safetensors file, unless one tensor is larger
STORE = 3  # of the layout of the tokens kept at the site
# Dense bf16 (V100: fp16) FLOP/s of one device as torch counts them, from the vendors' data sheets.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "A40": 149.7e12,
         "L40S": 362e12, "V100": 125e12, "MI300X": 1307e12, "MI300A": 981e12, "MI250X": 191.5e12,
         "Max 1550": 419.5e12}  # fmt: skip
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:"
)
ALPACA_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class Refused(Exception):
    """The run cannot give a usable result; the message is the one line the user reads, `kind` its class: memory,
    diverged, data, tokenizer, model, options or time."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def asked(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise Refused("options", f"{name} is not set: train.py is started by a job of flctl")
    return value


def number(name: str, default: float, kind: type = int) -> Any:
    value = os.environ.get(name, "")
    try:
        return kind(value) if value else default
    except ValueError:
        raise Refused("options", f"{name} is {value!r}, not a number") from None


def folder_of(name: str) -> Path | None:
    value = os.environ.get(name, "")
    return Path(value) if value else None


def read_order() -> dict[str, Any]:
    path = asked("FLCTL_ORDER")
    try:
        order: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused("options", f"cannot read the order {path}: {error}") from None
    return order


def read_options(given: dict[str, Any]) -> Options:
    """The options in force: OPTIONS' defaults with [train] over them. An unknown or impossible one is refused."""
    options = {name: entry[0] for name, entry in OPTIONS.items()}
    for name, value in given.items():
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.0)[0]
            raise Refused("options", f"unknown option train.{name}; the nearest is train.{near}")
        default, allowed, _ = OPTIONS[name]
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise Refused("options", f"train.{name} is {value!r}, but should be like {default!r}")
        if isinstance(default, str) and allowed and value not in allowed:
            raise Refused("options", f"train.{name} is {value!r}, but should be one of: {', '.join(allowed)}")
        if not isinstance(default, str) and not allowed[0] <= value <= allowed[1]:
            raise Refused("options", f"train.{name} is {value!r}, but goes from {allowed[0]} to {allowed[1]}")
        options[name] = value
    if options["scaffold"] and options["optimizer"] != "sgd":
        raise Refused("options", 'train.scaffold corrects the steps of SGD: set train.optimizer = "sgd"')
    if options["dp_noise_multiplier"] and (options["scaffold"] or options["mu"]):
        raise Refused("options", "train.dp_noise_multiplier goes with neither train.mu nor train.scaffold")
    return options


# The processes


@dataclass
class World:
    """The processes of this job, and this one's place among them. `local`: on this node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: Any = None
    mpi: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def say(self, words: str) -> None:
        if self.first:
            print(f"train.py: {words}", flush=True)

    def sum(self, *values: float) -> list[float]:
        """Over all processes, in float64."""
        if self.size == 1:
            return list(values)
        both = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(both)
        return both.tolist()

    def most(self, value: float) -> float:
        """The largest of all processes."""
        both = torch.tensor([value], dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return both.item()

    def wait(self) -> None:
        if self.size > 1:
            self.sum(0.0)  # a barrier of the CPU's backend

    def agree(self, problem: OSError | None) -> None:
        """What went wrong in one process is raised in all of them: none goes on alone, none waits for it."""
        if self.sum(float(problem is not None))[0]:
            raise problem or OSError("another process could not write")

    def tell(self, value: Any) -> Any:
        """What the first process says, to all."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
        if self.mpi is not None:
            self.mpi.Finalize()


def join() -> World:
    """Find the other processes, whoever started them: torchrun, mpiexec (with mpi4py), srun, or nobody."""
    env = os.environ
    counts = [env[name] for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE") if name in env]
    step = env.get("SLURM_STEP_NUM_TASKS", "1") if "SLURM_PROCID" in env else "1"
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        world = World(*(int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        world.local_size = int(env.get("LOCAL_WORLD_SIZE", world.size))
        meet = by_torchrun
    elif (counts and counts[0] != "1" and ("OMPI_COMM_WORLD_SIZE" in env or counts[0] != step)) or "PALS_RANKID" in env:
        world, meet = placed_by_mpi(), by_mpi
    elif step != "1":
        local = slurm_counts(env.get("SLURM_STEP_TASKS_PER_NODE", step))[int(env.get("SLURM_NODEID", 0))]
        world, meet = World(int(env["SLURM_PROCID"]), int(step), int(env["SLURM_LOCALID"]), local), by_file
    else:
        world, meet = World(), None
    world.device = device_of(world)
    if world.size > 1 and meet is not None:
        if world.local_size == world.size:
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever this machine's name resolves to
        world.store = meet(world)
        backend = {"cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}.get(world.device.type, "gloo")
        dist.init_process_group(
            backend, store=world.store, rank=world.rank, world_size=world.size, timeout=timedelta(minutes=30)
        )
    return world


def device_of(world: World) -> torch.device:
    """NVIDIA's and AMD's GPUs are both `cuda` to torch, Intel's are `xpu`."""
    for kind in (torch.cuda, torch.xpu):
        if kind.is_available():
            place = world.local_rank % kind.device_count()
            kind.set_device(place)
            return torch.device("cuda" if kind is torch.cuda else "xpu", place)
    return torch.device("cpu")


def slurm_counts(words: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]: tasks per node as Slurm writes them."""
    counts: list[int] = []
    for word in words.split(","):
        count, _, times = word.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def host_name(world: World) -> str:
    return "127.0.0.1" if world.local_size == world.size else socket.gethostname()


def by_torchrun(world: World) -> Any:
    store, _, _ = next(dist.rendezvous("env://"))
    return store


def placed_by_mpi() -> World:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise Refused("options", f"mpiexec started this, but mpi4py cannot be loaded: {one_line(error)}") from None
    every = MPI.COMM_WORLD
    local = every.Split_type(MPI.COMM_TYPE_SHARED)
    return World(every.rank, every.size, local.rank, local.size, mpi=MPI)


def by_mpi(world: World) -> Any:
    store = dist.TCPStore(host_name(world), 0, is_master=True, wait_for_workers=False) if world.first else None
    place = world.mpi.COMM_WORLD.bcast((host_name(world), store.port) if store else None)
    return store or dist.TCPStore(*place, is_master=False)


def by_file(world: World) -> Any:
    """The first process writes into the run's folder where it listens; the others look there for five minutes."""
    env = os.environ
    path = Path(asked("FLCTL_OUT")).parent / f"rendezvous-{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}"
    if world.first:
        store = dist.TCPStore(host_name(world), 0, is_master=True, wait_for_workers=False)
        write_whole(path, f"{host_name(world)} {store.port}")
        return store
    until = time.monotonic() + 300
    while not path.exists():
        if time.monotonic() > until:
            raise Refused("options", f"process {world.rank} of {world.size} did not find the first one")
        time.sleep(0.1)
    host, port = path.read_text().split()
    return dist.TCPStore(host, int(port), is_master=False)


def write_whole(path: Path, text: str) -> None:
    """By a rename: whoever reads it reads all of it."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def stopping(world: World) -> float | None:
    """When (Unix seconds) this process was asked to end, by a signal or (the first one) by the file FLCTL_STOP."""
    name = os.environ.get("FLCTL_STOP", "") if world.first else ""
    if not stopped_by and name and Path(name).exists():
        stopped_by.append(("the scheduler's warning", time.time()))
    return stopped_by[0][1] if stopped_by else None


def what_stops() -> str:
    return stopped_by[0][0] if stopped_by else "the deadline"


# The data


@dataclass
class Sample:
    """A passage of text, or an instruction with its answer. `prompt`: what the loss leaves out; `ends`: whether the end
    token follows."""

    text: str
    prompt: str = ""
    ends: bool = True

    @property
    def place(self) -> float:
        """Between 0 and 1, from the characters alone."""
        return int.from_bytes(hashlib.sha256((self.prompt + self.text).encode()).digest()[:8], "big") / 2**64


def find_files(place: Path) -> list[Path]:
    """The data files at or below `place`, and the folders that `datasets` saved, hidden ones left out, in an order that
    is the same everywhere."""
    try:
        if place.is_file():
            return [place]
        if not place.is_dir():
            raise Refused("data", f"no data: {place} is neither a folder nor a file")
        return files_below(place)
    except OSError as error:
        raise Refused("data", f"unreadable data: {error.filename or place}: {error.strerror}") from None


def files_below(place: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for folder, folders, names in os.walk(place, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if {"dataset_info.json", "state.json"} <= set(names) or "dataset_dict.json" in names:
            found.append(Path(folder))
            folders.clear()
            continue
        kinds = TEXT + LINES + PARQUET
        found += [Path(folder, name) for name in names if name[0] != "." and name.lower().endswith(kinds)]
    found = [path for path in found if path.is_dir() or path.is_file()]
    if not found:
        kinds = ", ".join(TEXT + LINES + PARQUET)
        raise Refused("data", f"no data: there is no {kinds} file and no folder of `datasets` below {place}")
    return sorted(found)


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of a file of records, one at a time. Errors never quote the data."""
    if path.is_dir():
        datasets = needed("datasets", path)
        found = datasets.load_from_disk(str(path))
        found = found["train"] if hasattr(found, "keys") and "train" in found else found
        for place, record in enumerate(found):
            if not isinstance(record, dict):
                raise Refused("data", f"unreadable data: {path} has several parts and none is called `train`")
            yield f"{path}, record {place + 1}", record
    elif path.suffix.lower() in PARQUET:
        place = 0
        for some in needed("pyarrow.parquet", path).ParquetFile(path).iter_batches(batch_size=1024):
            for record in some.to_pylist():
                place += 1
                yield f"{path}, record {place}", record
    else:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for place, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except ValueError:
                        raise Refused("data", f"unreadable data: {path}, line {place} is not JSON") from None
                    if not isinstance(record, dict):
                        raise Refused("data", f"unreadable data: {path}, line {place} is not a JSON object")
                    yield f"{path}, line {place}", record


def needed(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Refused("data", f"reading {path} needs {name.partition('.')[0]}, which this Python lacks") from None


def read_documents(path: Path, options: Options) -> Iterator[Sample]:
    """The documents of a file: a text file itself, each record of the others."""
    try:
        if path.suffix.lower() in TEXT:
            yield Sample(path.read_text(encoding="utf-8-sig"))
            return
        for where, record in read_records(path):
            if options["format"] == "alpaca":
                yield instruction(where, record)
            else:
                yield Sample(text_of(where, record, options["text_field"], "train.text_field"))
    except UnicodeDecodeError as error:
        raise Refused("data", f"unreadable data: {path} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise Refused("data", f"unreadable data: {path}: {error.strerror or type(error).__name__}") from None
    except (ValueError, LookupError, TypeError, RuntimeError) as error:  # json's, pyarrow's and datasets' own, whose
        # words could quote the data
        raise Refused("data", f"unreadable data: {path} cannot be read ({type(error).__name__})") from None


def text_of(where: str, record: dict[str, Any], name: str, option: str) -> str:
    if not isinstance(record.get(name), str):
        raise Refused("data", f"unreadable data: {where} has no text in {name!r} ({option})")
    # JSON may hold half of a surrogate pair, which no tokenizer takes.
    return record[name].encode("utf-8", "replace").decode()


def instruction(where: str, record: dict[str, Any]) -> Sample:
    """A record of the Alpaca form with the prompts of Stanford Alpaca (Taori et al. 2023)."""
    asked_for = text_of(where, record, "instruction", "train.format")
    given = record.get("input") or ""
    words = ALPACA.format(instruction=asked_for, input=given) if given else ALPACA_ALONE.format(instruction=asked_for)
    return Sample(text_of(where, record, "output", "train.format"), words.encode("utf-8", "replace").decode())


def cut_passages(document: str) -> list[str]:
    """The document as passages of whole lines (a long line is cut), each of PASSAGE characters and up to twice that;
    only a whole document may be shorter."""
    passages, passage = [], ""
    for line in document.splitlines(keepends=True):
        for start in range(0, len(line), PASSAGE):
            passage += line[start : start + PASSAGE]
            if len(passage) >= PASSAGE:
                passages.append(passage)
                passage = ""
    if passages:
        passages[-1] += passage
    elif passage.strip():
        passages.append(passage)
    return passages


class Validation:
    """Which passages are kept from training: those whose place is below `bound`. The split depends on the data and on
    train.validation, never on the seed or the round, so that no run trains on what another one validates with; equal
    passages share a side. Those of the lowest places are remembered, as many as evaluations need: a fair sample."""

    def __init__(self, bound: float, most: float, least: float) -> None:
        self.bound, self.most, self.least, self.size, self._seen = bound, most, least, 0, 0
        self._lowest: list[tuple[float, int, Sample]] = []  # a heap whose first is the one with the highest place

    def takes(self, sample: Sample) -> bool:
        """Whether it is kept from training. Up to `most` characters of those are remembered, and of all `least`."""
        place = sample.place
        self._seen += 1
        heapq.heappush(self._lowest, (-place, self._seen, sample))
        self.size += len(sample.text)
        while self.size - len(top := self._lowest[0][2].text) >= (
            self.most if -self._lowest[0][0] < self.bound else self.least
        ):
            heapq.heappop(self._lowest)
            self.size -= len(top)
        return place < self.bound

    def samples(self) -> list[tuple[float, Sample]]:
        """(place, sample) of those remembered, the lowest place first."""
        return sorted(((-place, sample) for place, _, sample in self._lowest), key=lambda item: (item[0], item[1].text))


def stretches(document: Sample, split: Validation, length: int) -> Iterator[Sample]:
    """What the validation leaves of a text, in pieces of up to about a sequence; passages that lie together stay so,
    and only their last piece ends with the end token."""
    text, begun = "", False
    for passage in cut_passages(document.text):
        kept = split.takes(Sample(passage))
        text += "" if kept else passage
        if kept and (text or begun):
            yield Sample(text)
            text, begun = "", False
        elif len(text) >= 4 * length:
            yield Sample(text, ends=False)
            text, begun = "", True
    if text or begun:
        yield Sample(text)


class Packed:
    """Tokens on their way into the store, and the rows made of them."""

    def __init__(self, file: Any, tokenizer: Any, options: Options, start: int = 0) -> None:
        self.file, self.tokenizer, self.length, self.start = file, tokenizer, options["sequence_length"], start
        self.packs = options["format"] == "text"
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.count = self.highest = self.skipped = 0
        self.rows: list[tuple[int, int, int, int]] = []  # of instructions: as in `table`
        self.sources: list[tuple[int, int]] = []  # of text: (first token, source), where the source changes

    def add(self, samples: list[Sample], source: int) -> None:
        texts = self._ids([sample.text for sample in samples])
        prompts = [[]] * len(samples) if self.packs else self._ids([sample.prompt for sample in samples])
        if self.packs and (not self.sources or self.sources[-1][1] != source):
            self.sources.append((self.count, source))
        for sample, prompt, ids in zip(samples, prompts, texts, strict=True):
            tokens = prompt + ids + (self.end if sample.ends else [])
            if not self.packs:
                tokens = tokens[: self.length + 1]
                if len(prompt) >= len(tokens):
                    self.skipped += 1
                    continue
                self.rows.append((self.start + self.count, len(tokens), len(prompt), source))
            if tokens:
                self.highest = max(self.highest, *tokens)
                self.file.write(np.array(tokens, dtype="<u4").tobytes())
                self.count += len(tokens)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return (
            self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []
        )

    @property
    def has_row(self) -> bool:
        return self.count > self.length if self.packs else bool(self.rows)

    def table(self) -> Any:
        """Rows as (first token, tokens, tokens of the prompt, source), int64; a packed row's last token is the next
        one's first."""
        if not self.packs:
            return np.array(self.rows, dtype="<i8").reshape(-1, 4)
        starts = np.arange(max(0, self.count - 1) // self.length, dtype="<i8") * self.length
        edges = np.array([edge for edge, _ in self.sources] or [0])
        source = np.array([source for _, source in self.sources] or [0])[np.searchsorted(edges, starts, "right") - 1]
        return np.stack([starts + self.start, np.full_like(starts, self.length + 1), np.ones_like(starts), source], 1)


@dataclass
class Store:
    """The site's data as tokens, in files that every process maps: `training` and `validation` are tables of rows."""

    digest: str
    tokens: Any
    training: Any
    validation: Any
    highest: int
    sources: list[str]

    @classmethod
    def open(cls, folder: Path) -> "Store":
        card = json.loads((folder / "card.json").read_text())
        tokens = np.memmap(folder / "tokens.bin", dtype="<u4", mode="r")
        training, validation = (
            np.memmap(folder / f"{name}.bin", dtype="<i8", mode="r").reshape(-1, 4)
            for name in ("training", "validation")
        )
        return cls(card["digest"], tokens, training, validation, card["highest"], card["sources"])

    def rows(self, table: Any, places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(input ids, labels), both [rows, longest]; -100 where the loss does not look."""
        chosen = [table[place] for place in places]
        longest = max(int(row[1]) for row in chosen) - 1
        ids, labels = torch.zeros(len(chosen), longest, dtype=torch.long), torch.full((len(chosen), longest), -100)
        for at, (start, count, prompt, _) in enumerate(chosen):
            tokens = torch.from_numpy(self.tokens[start : start + count].astype(np.int64))
            ids[at, : count - 1] = tokens[:-1]
            first = max(0, int(prompt) - 1)
            labels[at, first : count - 1] = tokens[1 + first :]
        return ids, labels

    def counted(self, table: Any, places: list[int]) -> int:
        """Tokens of these rows that the loss looks at."""
        return sum(int(table[place][1]) - max(1, int(table[place][2])) for place in places)


def build_store(folder: Path, digest: str, files: list[Path], tokenizer: Any, options: Options) -> None:
    """Read all data once, a document at a time, and leave its tokens in `folder` (which appears whole)."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    part.mkdir(parents=True)
    try:
        least = 16.0 * (options["sequence_length"] + 1)  # characters: more of them make no token
        most = options["validation_batches"] * options["batch"] * least or math.inf
        split = Validation(options["validation"], most, least)
        counts = fill_store(part, split, files, tokenizer, options)
        if counts is None:  # a small corpus gives more, until its validation has a sequence
            split = Validation(math.nextafter(least_bound(split, tokenizer, options), 1.0), most, least)
            counts = fill_store(part, split, files, tokenizer, options)
        if (counts is None or not counts["training"]) and options["format"] == "alpaca":
            raise Refused(
                "data",
                "too few records: no two, one for training and one for validation, begin their answer within "
                f"{options['sequence_length']} tokens; raise train.sequence_length or give more",
            )
        if counts is None or not counts["training"]:
            raise Refused(
                "data",
                f"the data is too short: it does not make one sequence of {options['sequence_length']} tokens for "
                "training and one for validation; lower train.sequence_length or give more text",
            )
        names = [path.name for path in files]
        write_whole(part / "card.json", json.dumps({"digest": digest, "sources": names, **counts}))
        with contextlib.suppress(OSError):
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fill_store(
    part: Path, split: Validation, files: list[Path], tokenizer: Any, options: Options
) -> dict[str, int] | None:
    """Tokens and tables; None if the validation has no sequence yet."""
    with (part / "tokens.bin").open("wb") as file:
        training = Packed(file, tokenizer, options)
        for source, path in enumerate(files):
            waiting: list[Sample] = []
            for document in read_documents(path, options):
                waiting += left_over(document, split, options)
                while len(waiting) >= 64:
                    training.add(waiting[:64], source)
                    del waiting[:64]
            training.add(waiting, source)
        validation = Packed(file, tokenizer, options, start=training.count)
        held = [sample for place, sample in split.samples() if place < split.bound]
        for start in range(0, len(held), 64):
            validation.add(held[start : start + 64], 0)
    if not validation.has_row:
        return None
    for name, packed in (("training", training), ("validation", validation)):
        (part / f"{name}.bin").write_bytes(packed.table().astype("<i8").tobytes())
    return {
        "highest": max(training.highest, validation.highest),
        "training": int(training.has_row),
        "skipped": training.skipped + validation.skipped,
    }


def left_over(document: Sample, split: Validation, options: Options) -> list[Sample]:
    if options["format"] == "alpaca":
        return [] if split.takes(document) else [document]
    return list(stretches(document, split, options["sequence_length"]))


def least_bound(split: Validation, tokenizer: Any, options: Options) -> float:
    """The lowest place up to which samples fill a sequence; that of the last, if none does."""
    samples = split.samples()
    with Path(os.devnull).open("wb") as nowhere:
        packed = Packed(nowhere, tokenizer, options)
        for place, sample in samples:
            packed.add([sample], 0)
            if packed.has_row:
                return place
    return samples[-1][0] if samples else 0.0


def data_digest(files: list[Path], place: Path, tokenizer: str, options: Options) -> str:
    """What the store depends on: the files' names, sizes and times, the tokenizer's files, and options."""
    facts: list[Any] = [STORE, [options[name] for name in ("sequence_length", "validation", "text_field", "format")]]
    facts.append(options["validation_batches"] * options["batch"])
    for path in files:
        inside = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
        stats = [(entry, entry.stat()) for entry in inside]
        facts += [(str(entry.relative_to(place.parent)), stat.st_size, stat.st_mtime_ns) for entry, stat in stats]
    for path in sorted(Path(tokenizer).iterdir()):
        if path.name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece")):
            facts.append((path.name, hashlib.sha256(path.read_bytes()).hexdigest()))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_data(model: str, options: Options, world: World) -> Store:
    """The store of the site's data, made by the first process if the data is new. It is kept in FLCTL_STATE."""
    folder = ""
    if world.first:
        place = Path(asked("FLCTL_DATA"))
        tokenizer, files = load_tokenizer(model), find_files(place)
        digest = data_digest(files, place, model, options)
        kept = folder_of("FLCTL_STATE") or temporary()
        target = kept / f"data-{digest[:16]}"
        if not (target / "card.json").exists():
            for other in kept.glob("data-*"):
                shutil.rmtree(other, ignore_errors=True)
            build_store(target, digest, files, tokenizer, options)
        skipped = json.loads((target / "card.json").read_text())["skipped"]
        if skipped:
            world.say(f"{skipped} records are left out: their instruction alone is as long as a sequence")
        folder = str(target)
    if world.store is not None:  # the first one may take long
        if world.first:
            world.store.set("data", folder)
        else:
            left = number("FLCTL_DEADLINE", time.time() + 86400, float) - time.time()
            world.store.wait(["data"], timedelta(seconds=max(60.0, left)))
            folder = world.store.get("data").decode()
    store = Store.open(Path(folder))
    count, rows, held = len(store.sources), len(store.training), len(store.validation)
    world.say(f"{count} files, {rows} sequences to train on, {held} to validate with")
    return store


def temporary() -> Path:
    """A folder for this process alone; it goes away at the end."""
    made = tempfile.TemporaryDirectory(prefix="flctl-train-")
    kept_folders.append(made)
    return Path(made.name)


kept_folders: list[Any] = []


class Cursor:
    """Where in the data the site is: rows in an order of their own for each epoch, none twice before all were seen."""

    def __init__(self, rows: int, seed: int, epoch: int = 0, position: int = 0) -> None:
        self.rows, self.seed, self.epoch, self.position = rows, seed, epoch, position
        self._order = self._shuffled()

    def _shuffled(self) -> Any:
        return np.random.Generator(np.random.PCG64([self.seed, self.epoch])).permutation(self.rows)

    def take(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            if self.position == self.rows:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled()
            some = self._order[self.position : self.position + count - len(taken)]
            self.position += len(some)
            taken += [int(place) for place in some]
        return taken

    def card(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}


# The model


@dataclass
class Loaded:
    """A model ready to run. `stored`: the tensors its folder holds, by their names there, with their dtypes; `whole`:
    this process holds all of it; `run`: what is called to compute with it; `names`: stored name -> the model's own,
    where they differ."""

    model: Any
    stored: dict[str, torch.dtype | None]
    whole: bool
    run: Any = None
    adapter: bool = False
    names: dict[str, str] = field(default_factory=dict)

    def weights(self) -> dict[str, torch.nn.Parameter]:
        """All parameters by name, each name of a tied one; of a sharded model the shards."""
        if not self.whole:
            self.model.reshard()  # a forward pass leaves the outermost unit whole
        return dict(self.model.named_parameters(remove_duplicate=False))

    def trained(self) -> dict[str, torch.nn.Parameter]:
        found = {
            id(weight): (name, weight) for name, weight in reversed(self.weights().items()) if weight.requires_grad
        }
        return dict(reversed(found.values()))


def load_tokenizer(folder: str) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise Refused("tokenizer", f"cannot load the tokenizer of {folder}: {one_line(error)}") from None


def load(folder: str, options: Options, world: World) -> Loaded:
    """A model's folder, or with FLCTL_FROZEN that of an adapter of the frozen base."""
    frozen = os.environ.get("FLCTL_FROZEN", "")
    stored = stored_dtypes(folder)
    if not any(stored.values()):
        raise Refused("model", f"the model {folder} has no safetensors weights")
    shards = sharding(options, world)
    if shards:
        model, names = load_shards(frozen or folder, folder if frozen else "", options, world)
        loaded = Loaded(model, stored, False, names=names)
    else:
        model = load_whole(frozen or folder, options, world.device, frozen=bool(frozen))
        loaded = Loaded(adapted(model, folder) if frozen else model, stored, True)
    loaded.adapter = bool(frozen)
    loaded.run = loaded.model
    return loaded


def sharding(options: Options, world: World) -> str:
    """`full`, `hybrid`, or empty: every process holds the whole model."""
    kind = options["sharding"]
    if world.size == 1 or kind == "none":
        return ""
    if options["quantize"] != "none":
        raise Refused("options", 'a base in 4 bits is not sharded: set train.sharding = "none"')
    if kind == "hybrid" and world.size % world.local_size:
        raise Refused("options", "train.sharding is hybrid, but the nodes run different numbers of processes")
    return "full" if kind == "auto" or (kind == "hybrid" and world.local_size == world.size) else kind


def load_whole(folder: str, options: Options, device: torch.device, *, frozen: bool = False) -> Any:
    """The model in float32, whatever its checkpoint holds: small updates vanish in 16-bit weights. A frozen base has
    none, so it is kept in what it is computed in, or in 4 bits."""
    given: dict[str, Any] = {"dtype": (frozen and bfloat16(options, device) and torch.bfloat16) or torch.float32}
    if options["quantize"] == "4bit":
        given |= quantized(frozen, device)
    try:
        model, seen = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **given
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if lacks_memory(error):
            raise
        raise Refused("model", f"cannot load the model {folder}: {one_line(error)}") from None
    amiss = sorted(map(str, {*seen["missing_keys"], *seen["mismatched_keys"]}))
    if amiss:
        words = f"{amiss[0]} is missing or misshapen ({len(amiss)} in all)"
        raise Refused("model", f"the model {folder} is not whole: {words}")
    return model if options["quantize"] == "4bit" else model.to(device)


def quantized(frozen: bool, device: torch.device) -> dict[str, Any]:
    if not frozen:
        raise Refused("options", "train.quantize is for the frozen base of an adapter; this run trains a whole model")
    if device.type != "cuda":
        raise Refused("options", 'train.quantize = "4bit" needs a GPU')
    try:
        importlib.import_module("bitsandbytes")
    except ImportError:
        raise Refused("options", 'train.quantize = "4bit" needs bitsandbytes, which this Python lacks') from None
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return {"quantization_config": settings, "device_map": {"": device.index or 0}}


def peft_library() -> Any:
    try:
        import peft
    except ImportError:
        raise Refused("model", "this campaign trains an adapter, which needs peft; this Python lacks it") from None
    return peft


def adapted(model: Any, folder: str) -> Any:
    peft = peft_library()
    try:
        made = peft.PeftModel.from_pretrained(model, folder, is_trainable=True, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if lacks_memory(error):
            raise
        raise Refused("model", f"cannot put the adapter {folder} on its base: {one_line(error)}") from None
    for weight in made.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return made


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Modules made inside have parameters without storage, but real buffers (which no file holds)."""
    register = torch.nn.Module.register_parameter

    def bare(module: torch.nn.Module, name: str, weight: torch.nn.Parameter | None) -> None:
        register(module, name, weight)
        if weight is not None and not weight.is_meta:  # a tied one stays the same object
            module._parameters[name] = torch.nn.Parameter(weight.to("meta"), requires_grad=weight.requires_grad)

    torch.nn.Module.register_parameter = bare  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_shards(folder: str, adapter: str, options: Options, world: World) -> tuple[Any, dict[str, str]]:
    """The model sharded over the processes (FSDP2), each layer a unit, and how the folder's names differ from the
    model's: of every tensor each process reads its own rows from the safetensors files and nothing else."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with without_weights(), torch.device("cpu"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.tie_weights()
            names = renamed(model, stored_dtypes(folder))
            if adapter:
                peft = peft_library()
                settings = peft.PeftConfig.from_pretrained(adapter)
                settings.inference_mode = False
                model = peft.get_peft_model(model, settings)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise Refused("model", f"cannot load the model {folder}: {one_line(error)}") from None
    kind = world.device.type
    if sharding(options, world) == "hybrid":
        nodes = world.size // world.local_size
        mesh = init_device_mesh(kind, (nodes, world.local_size), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (world.size,))
    half = bfloat16(options, world.device)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    plain = model.get_base_model() if adapter else model
    layers = set(plain._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    try:
        fill_shards(model, Tensors(folder, names), Tensors(adapter) if adapter else None)
    except (OSError, SafetensorError) as error:
        raise Refused("model", f"cannot load the model {folder}: {one_line(error)}") from None
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(world.device) if buffer is not None else None
    return model, names


def renamed(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Stored name -> the model's own, of tensors that transformers renames when it loads (`embed_out` of GPT-NeoX is
    its lm_head)."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    odd = [name for name in stored if name not in weights]
    if not odd:
        return {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # an older 5.x, which renames nothing
        return {}
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    names = {name: rename_source_key(name, renamings, [], model.base_model_prefix, weights)[0] for name in odd}
    return {name: own for name, own in names.items() if own in weights}


class Tensors:
    """The tensors of a folder's safetensors files, read where they are asked for. `names`: stored name -> that by which
    one is asked for, where they differ."""

    def __init__(self, folder: str | Path, names: dict[str, str] | None = None) -> None:
        self.folder, self.files = str(folder), {}
        self.stored = {own: name for name, own in (names or {}).items()}
        for path in sorted(Path(folder).glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self.files.update(dict.fromkeys(file.keys(), file))

    def __contains__(self, name: str) -> bool:
        return self.stored.get(name, name) in self.files

    def like(self, name: str, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The tensor, placed over the processes as `weight` is: of a sharded one, only this process's rows are read."""
        name = self.stored.get(name, name)
        piece = self.files[name].get_slice(name)
        if list(piece.get_shape()) != list(weight.shape):
            raise Refused(
                "model", f"{name} of {self.folder} is {piece.get_shape()}, and should be {list(weight.shape)}"
            )
        if not hasattr(weight, "placements"):
            return piece[:].to(dtype).to(weight.device) if weight.ndim else self.files[name].get_tensor(name).to(dtype)
        first, last = rows_here(weight)
        local = piece[first:last].to(dtype).to(weight.device_mesh.device_type)
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )


def rows_here(weight: Any) -> tuple[int, int]:
    """The rows of a tensor sharded along its first axis that lie here, as torch.chunk cuts them."""
    for axis, placement in enumerate(weight.placements):
        if placement.is_shard():
            pieces = weight.device_mesh.size(axis)
            rows = math.ceil(weight.shape[0] / pieces)
            first = min(weight.shape[0], rows * weight.device_mesh.get_local_rank(axis))
            return first, min(weight.shape[0], first + rows)
    return 0, weight.shape[0]


def fill_shards(model: Any, base: Tensors, adapter: Tensors | None) -> None:
    """Give every parameter its storage and values."""
    filled = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        source, stored = (base, name) if adapter is None else source_of(name, base, adapter)
        if stored not in source:
            stored = next((other for other in tied_names(model, name, adapter) if other in source), "")
        if not stored:
            words = 'or transformers puts it together when it loads, which goes with train.sharding = "none"'
            raise Refused("model", f"the model {source.folder} is not whole: {name} is missing; {words}")
        filled[name] = torch.nn.Parameter(source.like(stored, weight), requires_grad=weight.requires_grad)
    groups: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(weight), []).append(name)
    for names in groups.values():
        for name in names:  # tied ones stay one
            owner, _, own = name.rpartition(".")
            module = model.get_submodule(owner)
            module._parameters[own] = filled[names[0]]


def source_of(name: str, base: Tensors, adapter: Tensors) -> tuple[Tensors, str]:
    """Where a parameter of a peft model is kept: an adapter's (factors, modules_to_save, biases) without its own
    name, the base's without what peft puts around it."""
    own = name.replace(".modules_to_save.default", "").replace(".default", "")
    return (adapter, own) if own in adapter or ".lora_" in name else (base, of_base(name))


def of_base(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")


def tied_names(model: Any, name: str, adapter: Tensors | None) -> list[str]:
    weights = dict(model.named_parameters(remove_duplicate=False))
    names = [other for other, weight in weights.items() if weight is weights[name] and other != name]
    return [of_base(other) for other in names] if adapter else names


def stored_dtypes(folder: str | Path) -> dict[str, torch.dtype | None]:
    """Tensor name -> dtype (None: not a floating-point one), as the safetensors headers of the folder say."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            found.update({name: DTYPES.get(entry["dtype"]) for name, entry in header.items() if name != "__metadata__"})
        except (OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
            raise Refused("model", f"cannot load the model {folder}: {path.name}: {one_line(error)}") from None
    return found


def save(loaded: Loaded, out: Path, world: World) -> None:
    """Write what was trained under the names and in the dtypes of the base, each file by a rename; round the weights
    to that, so that what was saved is what is looked at afterwards."""
    try:
        if loaded.whole and not loaded.adapter:
            if world.first:
                save_whole(loaded, out)
        else:
            save_shards(loaded, out, world)
        world.wait()
    except (OSError, SafetensorError) as error:
        raise Refused("model", f"cannot write the model to {out}: {one_line(error)}") from None


def usual(stored: dict[str, torch.dtype | None]) -> torch.dtype:
    floating = [dtype for dtype in stored.values() if dtype]
    return max(floating, key=floating.count)


def save_whole(loaded: Loaded, out: Path) -> None:
    model, stored = loaded.model, loaded.stored
    for name, tensor in model.named_parameters():
        tensor.data = tensor.data.to(stored.get(name) or usual(stored))
    for name, tensor in model.named_buffers():
        tensor.data = tensor.data.to(stored.get(name) or tensor.dtype)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=out) as folder:
        model.save_pretrained(folder)
        # A tied tensor is one, whichever of its names a writer uses: all of them lie in one place.
        places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        written = {places.get(name, name): name for name in stored_dtypes(folder)}
        held = {places.get(name, name): name for name in stored}
        odd = [{**written, **held}[place] for place in written.keys() ^ held.keys()]
        if odd:
            raise odd_tensor(min(odd))
        for path in [*Path(folder).glob("*.safetensors*"), Path(folder, "config.json")]:
            path.replace(out / path.name)
    model.float()


def odd_tensor(name: str) -> Refused:
    return Refused(
        "model",
        f"transformers writes other tensors than the base holds ({name}): open the base with "
        "AutoModelForCausalLM.from_pretrained and write it again with save_pretrained before a campaign",
    )


def save_shards(loaded: Loaded, out: Path, world: World) -> None:
    """Tensor by tensor: no process holds more than one of them whole."""
    stored, weights = loaded.stored, loaded.weights()
    if loaded.adapter:
        named = peft_library().get_peft_model_state_dict(loaded.model, weights, save_embedding_layers=False)
        odd = sorted(named.keys() ^ stored.keys())
    else:
        named = {name: weights[own] for name in stored if (own := loaded.names.get(name, name)) in weights}
        held = {id(weight) for weight in named.values()}
        odd = sorted(stored.keys() - named.keys()) + sorted(
            name for name, weight in weights.items() if id(weight) not in held
        )
    if odd:
        raise odd_tensor(odd[0])
    tensors = {name: (named[name], stored[name] or usual(stored)) for name in stored}
    stem = "adapter_model" if loaded.adapter else "model"
    write_tensors(out, stem, tensors, world)
    with torch.no_grad():
        for weight, dtype in tensors.values():
            weight.copy_(weight.to(dtype))
    if world.first:
        if loaded.adapter:
            shutil.copyfile(Path(asked("FLCTL_MODEL"), "adapter_config.json"), out / "adapter_config.json")
        else:
            config = copy.deepcopy(loaded.model.config)
            config.dtype = usual(stored)
            config.save_pretrained(out)


def write_tensors(folder: Path, stem: str, tensors: dict[str, tuple[torch.Tensor, torch.dtype]], world: World) -> None:
    """Write tensors (name -> value, dtype to write) as safetensors, in files of up to FILE_MOST bytes, each written by
    one process as the tensors are put together one after another; an index beside several."""
    sizes = {name: value.numel() * dtype.itemsize for name, (value, dtype) in tensors.items()}
    files: list[list[str]] = [[]]
    for name in tensors:
        if files[-1] and sum(sizes[other] for other in files[-1]) + sizes[name] > FILE_MOST:
            files.append([])
        files[-1].append(name)
    count = len(files)
    titles = [
        f"{stem}-{at + 1:05}-of-{count:05}.safetensors" if count > 1 else f"{stem}.safetensors" for at in range(count)
    ]
    problem: OSError | None = None
    for at, (title, names) in enumerate(zip(titles, files, strict=True)):
        pieces = pieces_of({name: tensors[name] for name in names})
        try:
            if at % world.size == world.rank:
                write_pieces(folder / title, pieces)
        except OSError as error:
            problem = error
        for _ in pieces:  # of the other processes' files, and after an error: to put a tensor together takes all
            pass
    if count > 1 and world.first and not problem:
        places = {name: title for title, names in zip(titles, files, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        try:
            write_whole(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=1))
        except OSError as error:
            problem = error
    world.agree(problem)


def pieces_of(tensors: dict[str, tuple[torch.Tensor, torch.dtype]]) -> Iterator[tuple[torch.Tensor, torch.dtype]]:
    """What a file of these tensors holds: its header, and each of them whole, with the dtype to write."""
    header = header_of({name: (value.shape, dtype) for name, (value, dtype) in tensors.items()})
    yield torch.frombuffer(bytearray(header), dtype=torch.uint8), torch.uint8
    for value, dtype in tensors.values():
        value = value.detach()
        yield (value.full_tensor() if hasattr(value, "full_tensor") else value), dtype


def write_pieces(path: Path, pieces: Iterator[tuple[torch.Tensor, torch.dtype]]) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        for value, dtype in pieces:
            file.write(memoryview(value.to(dtype).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def header_of(tensors: dict[str, tuple[Any, torch.dtype]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# The steps


def bfloat16(options: Options, device: torch.device) -> bool:
    dtype = options["dtype"]
    if dtype == "auto":
        able = (device.type == "cuda" and torch.cuda.is_bf16_supported()) or device.type == "xpu"
        return bool(able)
    return bool(dtype == "bfloat16")


def computing(loaded: Loaded, options: Options, world: World) -> Any:
    """The context in which a whole model runs: mixed precision (weights stay float32) or plain float32; a sharded one
    knows its precision itself."""
    if loaded.whole and bfloat16(options, world.device):
        return torch.autocast(world.device.type, torch.bfloat16)
    return contextlib.nullcontext()


def losses_of(loaded: Loaded, rows: tuple[torch.Tensor, torch.Tensor], options: Options, world: World) -> torch.Tensor:
    """For each row the sum of the losses of its labels, each label predicted from the tokens before it: [rows]."""
    ids, labels = (part.to(world.device) for part in rows)
    with computing(loaded, options, world):
        logits = loaded.run(input_ids=ids, use_cache=False).logits
    flat = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    )
    return flat.view(labels.shape).sum(1)


def check_tokens(loaded: Loaded, store: Store) -> None:
    known = loaded.model.get_input_embeddings().weight.shape[0]
    if store.highest >= known:
        raise Refused("tokenizer", f"the tokenizer gives token {store.highest}, but the model knows {known} tokens")


def mine_of(places: list[int], world: World) -> list[int]:
    share = len(places) // world.size
    return places[world.rank * share : (world.rank + 1) * share]


def passes(places: list[int], options: Options) -> Iterator[list[int]]:
    size = options["micro_batch"] or max(1, len(places))
    for start in range(0, len(places), size):
        yield places[start : start + size]


def evaluate(loaded: Loaded, store: Store, options: Options, until: float, world: World) -> dict[str, float] | None:
    """Mean loss per token of the validation rows, or of as many as fit before `until` and GRACE after a signal (None:
    of none)."""
    loaded.model.eval()
    total = tokens = 0.0
    most = options["validation_batches"] * options["batch"] or len(store.validation)
    places = list(range(min(most, len(store.validation))))
    size = world.size * (options["micro_batch"] or max(1, options["batch"] // world.size))
    with torch.no_grad():
        for start in range(0, len(places), size):
            asked_at = stopping(world)
            ends = until if asked_at is None else min(until, asked_at + GRACE)
            some = places[start : start + size]
            mine = some[world.rank :: world.size]
            if world.sum(float(time.time() >= ends))[0]:
                break
            # Every process takes part in every pass, with a row that does not count if it has none of its own.
            lost = losses_of(loaded, store.rows(store.validation, mine or some[:1]), options, world).double().sum()
            total += lost.item() if mine else 0.0
            tokens += store.counted(store.validation, mine) if mine else 0
    total, tokens = world.sum(total, tokens)
    if not tokens:
        return None
    if not math.isfinite(total):
        raise Refused("diverged", "the model's loss on the validation data is not finite: its weights are broken")
    loss = total / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(tokens)}


def learning_rate(step: int, total: int, options: Options, version: int = 0) -> float:
    """The rate of a step counted from 0 at the start of the campaign, of `total` planned, from that version."""
    warmup, least = options["warmup_steps"], options["min_lr_ratio"]
    highest = options["lr"] * options["lr_decay"] ** version
    if step < warmup:
        return float(highest * (step + 1) / warmup)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    part = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[options["schedule"]]
    return float(highest * (least + (1.0 - least) * part))


def make_optimizer(trained: list[torch.nn.Parameter], options: Options) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options["weight_decay"]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if options["optimizer"] == "sgd":
        return torch.optim.SGD(groups, lr=options["lr"])
    return torch.optim.AdamW(groups, lr=options["lr"], betas=(0.9, 0.95), fused=not hasattr(trained[0], "placements"))


@dataclass
class Ask:
    """What the order asks for: `steps`, those behind the base, those of the plan, the base's version, Unix seconds by
    which all must be written, seconds that writing takes, the seed."""

    steps: int
    behind: int
    total: int
    version: int
    deadline: float
    spare: float
    seed: int


@dataclass
class Done:
    """What the run has done; all that a checkpoint must hold besides tensors. `seconds`: spent in steps."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    loss: float = 0.0  # sums over steps
    norm: float = 0.0
    rates: float = 0.0
    rate: float = 0.0
    last: float = 0.0
    seconds: float = 0.0
    sources: dict[str, list[float]] = field(default_factory=dict)  # source -> [sum of losses, tokens]


class Training:
    """One run's model, optimizer and place in the data, and the local objective."""

    def __init__(self, loaded: Loaded, store: Store, options: Options, ask: Ask, world: World) -> None:
        self.loaded, self.store, self.options, self.ask, self.world = loaded, store, options, ask, world
        self.trained = loaded.trained()
        self.weights = list(self.trained.values())
        self.done, self.cursor = Done(), Cursor(len(store.training), ask.seed)
        self.base: list[torch.Tensor] = []  # the weights that the run began from, where the objective needs them
        self.ours: list[torch.Tensor] = []  # SCAFFOLD's c_k and c
        self.all: list[torch.Tensor] = []
        if options["activation_checkpointing"]:
            loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if options["dp_noise_multiplier"]:
            self._privately()
        elif loaded.whole and world.size > 1:
            ids = [world.device.index] if world.device.type != "cpu" else None
            loaded.run = torch.nn.parallel.DistributedDataParallel(loaded.model, device_ids=ids)
        self.optimizer = make_optimizer(self.weights, options)
        if options["dp_noise_multiplier"]:
            self.optimizer = self._private_optimizer()
        if options["mu"] or options["scaffold"]:
            self.base = [weight.detach().clone() for weight in self.weights]
        if options["scaffold"]:
            self.ours = [torch.zeros_like(weight) for weight in self.weights]
            self.all = [torch.zeros_like(weight) for weight in self.weights]

    def _privately(self) -> None:
        """Per-sequence gradients for DP-SGD (Abadi et al. 2016), by opacus."""
        try:
            import opacus
        except ImportError:
            raise Refused("options", "train.dp_noise_multiplier needs opacus, which this Python lacks") from None
        if self.world.size > 1:
            raise Refused("options", "train.dp_noise_multiplier is for one process; this job has several")
        self.loaded.run = opacus.GradSampleModule(self.loaded.model, loss_reduction="sum", strict=False)

    def _private_optimizer(self) -> Any:
        from opacus.optimizers import DPOptimizer

        return DPOptimizer(
            self.optimizer,
            noise_multiplier=self.options["dp_noise_multiplier"],
            max_grad_norm=self.options["dp_clip"],
            expected_batch_size=self.options["batch"],
            loss_reduction="mean",
            generator=torch.Generator(self.world.device).manual_seed(int.from_bytes(os.urandom(7), "big")),
        )

    def places(self) -> list[int]:
        """The rows of the next step. DP-SGD takes each with the same probability, as its accounting supposes."""
        if not self.options["dp_noise_multiplier"]:
            return self.cursor.take(self.options["batch"])
        rows = len(self.store.training)
        dice = random.SystemRandom()
        rate = self.sampling_rate
        return [place for place in range(rows) if dice.random() < rate]

    @property
    def sampling_rate(self) -> float:
        return min(1.0, self.options["batch"] / len(self.store.training))

    def step(self) -> tuple[float, float]:
        """One optimizer step: (mean loss per token, norm of the gradient), the same on every process."""
        done, options, world = self.done, self.options, self.world
        torch.manual_seed((self.ask.seed + 1000003 * done.steps) % 2**63)  # dropout goes on as if never interrupted
        done.rate = learning_rate(self.ask.behind + done.steps, self.ask.total, options, self.ask.version)
        for group in self.optimizer.param_groups:
            group["lr"] = done.rate
        places = self.places()
        tokens = self.store.counted(self.store.training, places)
        mine, sources, lost = mine_of(places, world), {}, 0.0
        rounds = list(passes(mine, options))
        for at, some in enumerate(rounds):
            losses = self._backward(some, tokens, len(places), last=at + 1 == len(rounds))
            lost += losses.sum().item()
            for place, loss in zip(some, losses.tolist(), strict=True):
                entry = sources.setdefault(str(int(self.store.training[place][3])), [0.0, 0.0])
                entry[0] += loss
                entry[1] += self.store.counted(self.store.training, [place])
        if options["dp_noise_multiplier"] and not places:  # a draw may be empty: then the step is noise alone
            for weight in self.weights:
                weight.grad_sample = weight.new_zeros((0, *weight.shape))
        norm = self._update()
        (total,) = world.sum(lost)
        loss = total / max(1, tokens)
        if not math.isfinite(loss) or not math.isfinite(norm):
            words = f"the loss or its gradient is not finite at step {done.steps + 1} (learning rate {done.rate:g})"
            raise Refused("diverged", f"{words}: lower train.lr")
        done.steps += 1
        done.samples, done.tokens = done.samples + len(places), done.tokens + tokens
        done.loss, done.norm, done.rates, done.last = done.loss + loss, done.norm + norm, done.rates + done.rate, loss
        for name, (sum_, count) in sources.items():
            entry = done.sources.setdefault(name, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + sum_, entry[1] + count
        return loss, norm

    def _backward(self, some: list[int], tokens: int, samples: int, *, last: bool) -> torch.Tensor:
        """Add the gradient of these rows to what is there, as part of the mean over the whole batch's tokens; what the
        processes' averaging divides by, it is multiplied by. Returns each row's sum of losses, [rows]."""
        rows = self.store.rows(self.store.training, some)
        private = bool(self.options["dp_noise_multiplier"])
        run = self.loaded.run
        if not self.loaded.whole:  # gradients are sharded after each pass: whole ones would be 4 bytes a parameter
            self.loaded.model.set_requires_all_reduce(last)  # between nodes (hybrid) once a step
        quiet = run.no_sync() if hasattr(run, "no_sync") and not last and not private else contextlib.nullcontext()
        with quiet:
            losses = losses_of(self.loaded, rows, self.options, self.world)
            if private:
                counts = torch.tensor([self.store.counted(self.store.training, [place]) for place in some])
                (losses / counts.to(losses.device)).sum().backward()
                if not last:
                    self.optimizer.signal_skip_step(True)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            else:
                (losses.sum() * (self.world.size / tokens)).backward()
        return losses.detach().double().cpu()

    def _update(self) -> float:
        """Clip, correct and step; the gradient's norm before clipping."""
        options = self.options
        for weight, before in zip(self.weights, self.base, strict=True) if options["mu"] else ():
            if weight.grad is not None:  # of mu / 2 |w - w0|^2 (Li et al. 2020)
                weight.grad.add_(weight.detach() - before, alpha=options["mu"])
        limit = options["clip"] if options["clip"] and not options["dp_noise_multiplier"] else math.inf
        given = [weight for weight in self.weights if weight.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(given, limit) if given else torch.zeros(())
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        for weight, ours, every in zip(self.weights, self.ours, self.all, strict=True) if self.ours else ():
            if weight.grad is not None:
                weight.grad.add_(every).sub_(ours)  # g - c_k + c (Karimireddy et al. 2020)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def controls(self) -> None:
        """SCAFFOLD, option II: c_k <- c_k - c + (w - w_k) / sum of the steps' rates."""
        for weight, before, ours, every in zip(self.weights, self.base, self.ours, self.all, strict=True):
            ours.sub_(every).add_((before - weight.detach()) / max(self.done.rates, 1e-30))

    def sources(self) -> dict[str, list[float]]:
        """Source -> [sum of losses, tokens], of all processes."""
        names = [str(at) for at in range(len(self.store.sources))]
        flat = self.world.sum(*(value for name in names for value in self.done.sources.get(name, (0.0, 0.0))))
        pairs = zip(names, flat[::2], flat[1::2], strict=True)
        return {name: [sum_, count] for name, sum_, count in pairs if count}

    def run(self, saved: "Kept | None") -> None:
        """Up to ask.steps steps, fewer after a signal or when the next one would not leave ask.spare seconds before the
        deadline."""
        done, ask, world = self.done, self.ask, self.world
        self.loaded.model.train()
        longest, minutes = 0.0, self.options["checkpoint_minutes"]
        written = time.monotonic()
        while done.steps < ask.steps:
            begun = time.monotonic()
            asked_at = stopping(world)
            late = time.time() + longest + ask.spare > ask.deadline
            due = saved is not None and minutes > 0 and begun - written > 60 * minutes
            signals, lates, dues = world.sum(asked_at is not None, late, due)
            if signals or lates:
                reason = what_stops() if asked_at is not None or not signals else "a signal to another process"
                world.say(f"{reason} ends the training after {done.steps} of {ask.steps} steps")
                if saved is not None and done.steps and "SIGTERM" in reason_of(world, reason):
                    if not saved.checkpoint(self):
                        raise Refused("time", f"SIGTERM ended the job, and its {done.steps} steps could not be kept")
                    raise Refused("time", f"SIGTERM ended the job: {done.steps} steps are in its checkpoint")
                break
            if dues and saved is not None and done.steps:
                saved.checkpoint(self)
                written = time.monotonic()
            loss, norm = self.step()
            spent = time.monotonic() - begun
            done.seconds, longest = done.seconds + spent, max(longest, spent)
            self._tell(loss, norm, spent)

    def _tell(self, loss: float, norm: float, seconds: float) -> None:
        """One JSON line per `log_every` steps, for whoever follows the log."""
        done, ask = self.done, self.ask
        every = self.options["log_every"] or max(1, ask.steps // 100)
        if self.world.first and ((done.steps - 1) % every == 0 or done.steps == ask.steps):
            line = {
                "step": ask.behind + done.steps,
                "of": ask.total,
                "loss": round(loss, 4),
                "lr": float(f"{done.rate:.6g}"),
                "norm": round(norm, 3),
                "tokens_per_second": round(done.tokens / max(done.seconds, 1e-9)),
                "seconds": round(seconds, 3),
            }
            print(json.dumps(line), flush=True)


def reason_of(world: World, reason: str) -> str:
    return str(world.tell(reason))


# The state that stays


class Kept:
    """What the run leaves beside its result: checkpoints for the next attempt (FLCTL_CHECKPOINT), and moments, place in
    the data and control variates for the site's next run (FLCTL_STATE), which goes on from the run that its order names
    under `continues`. Tensors are kept whole in float32, so that another number of processes can go on with them."""

    def __init__(self, order: dict[str, Any], world: World) -> None:
        self.world, self.checkpoints, self.state = world, folder_of("FLCTL_CHECKPOINT"), folder_of("FLCTL_STATE")
        self.number, self.attempt = int(order.get("number", 1)), int(order.get("attempt", 1))
        self.continues = order.get("continues")
        self.saved = 0  # steps in the newest checkpoint

    def checkpoint(self, training: Training) -> bool:
        """Whether it was written: a full disk is no reason to lose the run itself."""
        if self.checkpoints is None:
            return False
        steps = training.done.steps
        if steps == self.saved:
            return True
        if not self._write(self.checkpoints / f"step-{steps:08}", training, weights=True):
            return False
        self.saved = steps
        if self.world.first:
            for other in sorted(self.checkpoints.glob("step-*"))[:-1]:
                shutil.rmtree(other, ignore_errors=True)
        self.world.say(f"checkpoint after {steps} steps")
        return True

    def resume(self, training: Training) -> None:
        """Go on from what an earlier attempt at this run left."""
        found = sorted(self.checkpoints.glob("step-*")) if self.checkpoints else []
        folder = self.world.tell(str(found[-1]) if found else "")
        if not folder:
            return
        card, tensors = self._read(Path(folder))
        training.done = Done(**card["done"])
        if not self.world.first:
            training.done.sources = {}  # the first one has the sums of all
        if card["data"] == training.store.digest:
            training.cursor = Cursor(training.cursor.rows, **card["cursor"])
        with torch.no_grad():
            for name, weight in training.trained.items():
                weight.copy_(tensors.like(f"weights/{name}", weight))
        self._moments(training, card, tensors)
        for kind, values in (("ours", training.ours), ("all", training.all)):
            self._fill(kind, values, training, tensors)
        self.saved = training.done.steps
        self.world.say(f"goes on after {training.done.steps} steps of an earlier attempt")

    def inherit(self, training: Training) -> None:
        """Go on from what the site's last run left."""
        if self.continues is None or self.state is None or not training.options["keep_state"]:
            return
        found = sorted(self.state.glob(f"run-{int(self.continues):04}-*"), key=lambda path: int(path.name[9:]))
        folder = self.world.tell(str(found[-1]) if found else "")
        if not folder:
            return
        card, tensors = self._read(Path(folder))
        if training.options["dp_noise_multiplier"] and not card["private"]:
            self.world.say(f"run {self.continues} was without DP-SGD: nothing of its state is taken up")
            return
        if card["data"] == training.store.digest:
            training.cursor = Cursor(training.cursor.rows, **card["cursor"])
        self._moments(training, card, tensors)
        if training.ours and f"base/{next(iter(training.trained))}" in tensors:
            self._controls(training, card, tensors)
        self.world.say(f"goes on with the state that run {self.continues} left here")

    def _controls(self, training: Training, card: dict[str, Any], tensors: Tensors) -> None:
        """c_k as kept, and c <- c + mean(c_k+ - c_k), which with every site in every round, equal weights and equal
        steps is (w_before - w_now) / (K lr): what the two models say."""
        if card["version"] + 1 != training.ask.version:
            self.world.say("a round passed without this site: SCAFFOLD's control variates begin anew")
            return
        self._fill("ours", training.ours, training, tensors)
        before = [torch.zeros_like(weight) for weight in training.weights]
        self._fill("base", before, training, tensors)
        for every, old, weight in zip(training.all, before, training.weights, strict=True):
            every.copy_((old - weight.detach()) / max(card["done"]["rates"], 1e-30))

    def leave(self, training: Training) -> None:
        """For the site's next run; what runs before the one that this went on from had left goes away."""
        if self.state is None or not training.options["keep_state"]:
            return
        self._write(self.state / f"run-{self.number:04}-{self.attempt}", training, weights=False)
        least = self.number if self.continues is None else int(self.continues)
        for other in self.state.glob("*run-*") if self.world.first else ():  # .run-*.part: killed while it wrote
            if int(other.name.lstrip(".")[4:8]) < least:
                shutil.rmtree(other, ignore_errors=True)

    def _write(self, folder: Path, training: Training, *, weights: bool) -> bool:
        """Whether it could be written; the log says why not."""
        part = folder.with_name(f".{folder.name}.part")
        try:
            self._by_first(lambda: fresh(part))
            tensors = self._tensors(training, weights=weights)
            if tensors:
                write_tensors(part, "state", tensors, self.world)
            card = json.dumps(self._card(training))
            self._by_first(lambda: into_place(part, folder, card, training.done.steps if weights else None))
        except OSError as error:
            self.world.say(f"cannot write {folder}, and goes on without: {one_line(error)}")
            if self.world.first:
                shutil.rmtree(part, ignore_errors=True)
            return False
        return True

    def _by_first(self, action: Callable[[], None]) -> None:
        problem: OSError | None = None
        try:
            if self.world.first:
                action()
        except OSError as error:
            problem = error
        self.world.agree(problem)

    def _tensors(self, training: Training, *, weights: bool) -> dict[str, tuple[torch.Tensor, torch.dtype]]:
        kinds: dict[str, list[Any]] = {"ours": training.ours, "all": training.all}
        kinds |= {"weights": training.weights} if weights else {"base": training.base if training.ours else []}
        state = training.optimizer.state
        for kind in ("exp_avg", "exp_avg_sq"):  # a weight that the loss does not reach has none
            kinds[kind] = [state.get(weight, {}).get(kind) for weight in training.weights]
        return {
            f"{kind}/{name}": (value, torch.float32)
            for kind, values in kinds.items()
            for name, value in (zip(training.trained, values, strict=True) if values else ())
            if value is not None
        }

    def _card(self, training: Training) -> dict[str, Any]:
        steps = [int(entry["step"]) for entry in training.optimizer.state.values() if "step" in entry]
        return {
            "done": training.done.__dict__ | {"sources": training.sources()},
            "cursor": training.cursor.card(),
            "data": training.store.digest,
            "version": training.ask.version,
            "private": bool(training.options["dp_noise_multiplier"]),
            "moments": max(steps, default=0),
        }

    def _read(self, folder: Path) -> tuple[dict[str, Any], Tensors]:
        try:
            return json.loads((folder / "card.json").read_text()), Tensors(folder)
        except (OSError, ValueError, SafetensorError) as error:
            raise Refused("model", f"cannot read what an earlier run left in {folder}: {one_line(error)}") from None

    def _moments(self, training: Training, card: dict[str, Any], tensors: Tensors) -> None:
        adam = training.options["optimizer"] == "adamw"
        for name, weight in training.trained.items() if adam and card["moments"] else ():
            if f"exp_avg/{name}" not in tensors or list(weight.shape) != list(
                tensors.files[f"exp_avg/{name}"].get_slice(f"exp_avg/{name}").get_shape()
            ):
                continue
            fused = training.optimizer.param_groups[0].get("fused")
            step = torch.tensor(float(card["moments"]), device=weight.device if fused else None)
            kinds = ("exp_avg", "exp_avg_sq")
            moments = {kind: tensors.like(f"{kind}/{name}", weight) for kind in kinds}
            training.optimizer.state[weight] = {"step": step, **moments}

    def _fill(self, kind: str, values: list[torch.Tensor], training: Training, tensors: Tensors) -> None:
        for (name, weight), value in zip(training.trained.items(), values, strict=True) if values else ():
            value.copy_(tensors.like(f"{kind}/{name}", weight))


def fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def into_place(part: Path, folder: Path, card: str, steps: int | None) -> None:
    """Give what was written its name, and of a checkpoint say how far it got."""
    write_whole(part / "card.json", card)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    if steps is not None:
        write_whole(folder.parent / "progress", str(steps))


class Privacy:
    """What this site's runs of DP-SGD have let out, in privacy.json beside its state: [run, attempt, noise multiplier,
    sampling rate, steps] of each. Epsilon by Renyi accounting (Mironov 2017, opacus); it covers the weights alone, not
    the metrics."""

    def __init__(self, training: Training, kept: Kept) -> None:
        self.path = (kept.state or Path(asked("FLCTL_OUT")).parent) / "privacy.json"
        self.delta, self.limit = training.options["dp_delta"], training.options["dp_epsilon"]
        self.noise, self.clip = training.options["dp_noise_multiplier"], training.options["dp_clip"]
        self.rate, self.run = training.sampling_rate, [kept.number, kept.attempt]
        history = json.loads(self.path.read_text()) if self.path.exists() else []
        self.before = [entry for entry in history if entry[:2] != self.run]

    def epsilon(self, steps: int) -> float:
        """After so many steps of this run too."""
        from opacus.accountants import RDPAccountant

        accountant = RDPAccountant()
        accountant.history = [tuple(entry[2:]) for entry in self.before]
        accountant.history += [(self.noise, self.rate, steps)] if steps else []
        return float(accountant.get_epsilon(delta=self.delta)) if accountant.history else 0.0

    def allowed(self, steps: int) -> int:
        """As many of the steps as the limit leaves."""
        if not self.limit or self.epsilon(steps) <= self.limit:
            return steps
        low, high = 0, steps  # epsilon(high) is too much
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.epsilon(middle) <= self.limit else (low, middle)
        if not low or self.epsilon(0) > self.limit:
            words = f"the data's privacy is spent: one more step makes epsilon larger than {self.limit:g}"
            raise Refused("options", f"{words} (train.dp_epsilon)")
        return low

    def spend(self, steps: int) -> dict[str, float]:
        """Written down before anything leaves."""
        write_whole(self.path, json.dumps([*self.before, [*self.run, self.noise, self.rate, steps]]))
        told = {"delta": self.delta, "noise_multiplier": self.noise, "clip": self.clip, "sampling_rate": self.rate}
        return {"epsilon": self.epsilon(steps), **told, "steps": steps}


# What comes out


def train(order: dict[str, Any], options: Options, world: World) -> dict[str, Any]:
    base, out = asked("FLCTL_MODEL"), Path(asked("FLCTL_OUT"))
    steps, behind = number("FLCTL_STEPS", options["steps"]), number("FLCTL_GLOBAL_STEP", 0)
    if steps < 1:
        raise Refused("options", f"FLCTL_STEPS is {steps}: there is nothing to do")
    if options["batch"] % world.size:
        raise Refused("options", f"train.batch is {options['batch']}: no multiple of the {world.size} processes")
    deadline = number("FLCTL_DEADLINE", math.inf, float)
    store = read_data(os.environ.get("FLCTL_FROZEN") or base, options, world)
    begun = time.monotonic()
    loaded = load(base, options, world)
    check_tokens(loaded, store)
    longest = getattr(loaded.model.config, "max_position_embeddings", None) or math.inf
    if options["sequence_length"] > longest:
        words = f"train.sequence_length is {options['sequence_length']}, but the model ends at {longest} tokens"
        raise Refused("options", words)
    saving = 1.0 + time.monotonic() - begun  # writing the model takes about as long as reading it
    saving *= 3 if options["keep_state"] and folder_of("FLCTL_STATE") else 1  # and its moments twice that
    begun = time.monotonic()
    before = evaluate(loaded, store, options, time.time() + (deadline - time.time()) / 4, world)
    spare = world.most(saving + time.monotonic() - begun)
    total = number("FLCTL_TOTAL_STEPS", 0) or behind + steps
    version = order.get("base", {}).get("version", 0)
    version = version if isinstance(version, int) else 0
    ask = Ask(steps, behind, total, version, deadline, spare, number("FLCTL_SEED", 0))
    training, kept = Training(loaded, store, options, ask, world), Kept(order, world)
    kept.inherit(training)
    kept.resume(training)
    if options["dp_noise_multiplier"]:
        ask.steps = Privacy(training, kept).allowed(ask.steps)
    training.run(kept if kept.checkpoints else None)
    return finish(training, kept, before, out)


def finish(training: Training, kept: Kept, before: dict[str, float] | None, out: Path) -> dict[str, Any]:
    done, options, world, loaded = training.done, training.options, training.world, training.loaded
    if not done.steps:
        raise Refused("time", f"{what_stops()} came before the first step was done: there is nothing to save")
    if options["scaffold"]:
        training.controls()
    kept.leave(training)
    metrics: dict[str, Any] = {"samples": done.samples, "tokens": done.tokens, "steps": done.steps}
    if options["dp_noise_multiplier"]:
        metrics["privacy"] = Privacy(training, kept).spend(done.steps)
        loaded.run.to_standard_module()
    loaded.run = loaded.model
    save(loaded, out, world)
    after = evaluate(loaded, training.store, options, training.ask.deadline, world)
    metrics |= {"train_loss": done.loss / done.steps, "lr": done.rate, "gradient_norm": done.norm / done.steps}
    metrics |= speed(training)
    metrics["sources"] = of_sources(training)
    metrics["evaluation"] = {
        **({"base": before} if before else {}),
        **({"trained": after} if after else {}),
    }
    return metrics


def of_sources(training: Training) -> dict[str, Any]:
    """Mean training loss of each file, by its number in the log: names stay at the site."""
    names = training.store.sources[:64]
    training.world.say("sources: " + ", ".join(f"{at} is {name}" for at, name in enumerate(names)))
    found = list(training.sources().items())
    return {name: {"loss": sum_ / count, "tokens": int(count)} for name, (sum_, count) in found if int(name) < 64}


def speed(training: Training) -> dict[str, Any]:
    """Tokens per second of all processes, the largest peak of memory of one in bytes, and model FLOPs utilisation where
    the device's peak is known: (6 N + 12 layers x width x length) FLOPs a token (PaLM, Chowdhery et al. 2022, appendix
    B), with 4 N + 2 n in place of 6 N where only n of N parameters are trained."""
    done, world, model = training.done, training.world, training.loaded.model
    rate = done.tokens / max(done.seconds, 1e-9)
    figures: dict[str, Any] = {"tokens_per_second": rate, "processes": world.size}
    kind = {"cuda": torch.cuda, "xpu": torch.xpu}.get(world.device.type)
    used = kind.max_memory_allocated() if kind else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures["peak_memory"] = int(world.most(float(used)))
    every = sum(weight.numel() for weight in model.parameters())
    some = sum(weight.numel() for weight in training.weights)
    config = model.config
    layers, width = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
    flops = (6 * every if some == every else 4 * every + 2 * some) + (
        12 * layers * width * training.options["sequence_length"]
    )
    name = device_name(world)
    peak = training.options["peak_tflops"] * 1e12 or next((PEAKS[key] for key in PEAKS if key in name), 0.0)
    if peak:
        figures["mfu"] = rate * flops / (peak * world.size)
    return figures


def energy() -> dict[str, int]:
    """Joules of the job so far, of all its steps, where Slurm counts them (AcctGatherEnergyType)."""
    job = os.environ.get("SLURM_JOB_ID", "")
    words = ["sstat", "--noheader", "--parsable2", "--allsteps", "--format=ConsumedEnergyRaw", f"--jobs={job}"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout if job else ""
    except (OSError, subprocess.SubprocessError):
        return {}
    joules = sum(int(line) for line in told.split() if line.isdecimal())
    return {"energy": joules} if joules else {}


def device_name(world: World) -> str:
    kind = {"cuda": torch.cuda, "xpu": torch.xpu}.get(world.device.type)
    return str(kind.get_device_name(world.device)) if kind else "cpu"


def evaluate_subjects(order: dict[str, Any], options: Options, world: World) -> dict[str, Any]:
    """The perplexity of each subject on this site's validation split, all with the same tokenizer."""
    folders = asked("FLCTL_SUBJECTS").splitlines()
    names = [subject["name"] for subject in order["subjects"]]
    if len(names) != len(folders):
        raise Refused("options", f"the order names {len(names)} subjects, FLCTL_SUBJECTS {len(folders)} folders")
    deadline = number("FLCTL_DEADLINE", math.inf, float)
    tokenizer = os.environ.get("FLCTL_FROZEN") or os.environ.get("FLCTL_MODEL") or folders[0]
    store = read_data(tokenizer, options, world)
    found: dict[str, Any] = {}
    for name, folder in zip(names, folders, strict=True):
        share = (deadline - time.time()) / (len(names) - len(found))
        loaded = load(folder, options, world)
        check_tokens(loaded, store)
        found[name] = evaluate(loaded, store, options, time.time() + share, world)
        if not found[name]:
            raise Refused("time", f"{what_stops()} came before {name} was evaluated")
        world.say(f"{name} perplexity {found[name]['perplexity']:.3f}")
        del loaded  # one at a time: before the next is there
        gc.collect()
    return {"evaluation": found}


def one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def lacks_memory(error: Exception) -> bool:
    words = ("allocate memory", "bad_alloc", "ALLOC_FAILED", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def out_of_memory(error: Exception, options: Options, world: World) -> Refused:
    rows = options["micro_batch"] or max(1, options["batch"] // world.size)
    what = "GPU memory" if world.device.type != "cpu" else "memory"
    more = "" if options["activation_checkpointing"] else ", set train.activation_checkpointing = true"
    return Refused(
        "memory",
        f"out of {what} with {rows} sequences of {options['sequence_length']} tokens a pass: lower train.micro_batch "
        f"or train.sequence_length{more}, or give the job more processes",
    )


def work(world: World) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(peft|opacus|torch|transformers)(\.|$)")  # none is for who reads the log
    order = read_order()
    options = read_options(order.get("train") or {})
    seed = number("FLCTL_SEED", 0)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    elif world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // world.local_size)))
    task = {"train": train, "evaluate": evaluate_subjects}.get(order.get("work", "train"))
    if task is None:
        raise Refused("options", f"the order asks for {order['work']!r}, which this trainer does not know")
    try:
        metrics = task(order, options, world)
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        raise out_of_memory(error, options, world) from error
    metrics |= energy() if world.first else {}
    metrics["device"] = device_name(world)
    metrics["seconds"] = round(time.monotonic() - BEGAN, 3)
    if world.first:
        write_whole(Path(asked("FLCTL_OUT")) / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False))
    world.say(f"done in {metrics['seconds']:.1f} s")


def main() -> int:
    world = World()
    try:
        world = join()
        work(world)
        world.wait()
        world.leave()
    except (Refused, OSError) as reason:  # OSError: a full disk and the like
        kind = f" [{reason.kind}]" if isinstance(reason, Refused) else ""
        print(f"train.py: error{kind}: {one_line(reason)}", file=sys.stderr, flush=True)
        if world.mpi is not None:
            world.mpi.COMM_WORLD.Abort(1)
        return 1
    finally:
        for folder in kept_folders:
            folder.cleanup()
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is written; the interpreter's own way out takes 0.6 s to free what the system frees at once
