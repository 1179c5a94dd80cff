"""`make bench-train`: train.py beside the Trainer of transformers and a plain PyTorch loop, on one model, one set of
token rows in one order and one optimizer. On a GPU if there is one: about 1.1 billion parameters, bf16, sequence 2048.

Every run is a process of its own, in turn; train.py runs as a job starts it. What it trains on is written down once, in
a run that is not measured, and given to the others. Linux only."""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.measure import run
from bench.report import table
from bench.workplace import GB, fresh, machine, require, workplace

HERE = Path(__file__).parent
TRAIN = HERE.parent / "flctl" / "payload" / "train.py"
PROGRAMS = {
    "flctl train.py": TRAIN,
    "transformers Trainer": HERE / "rivals" / "train_transformers.py",
    "plain loop": HERE / "rivals" / "train_plain.py",
}
WARM_UP = 2
"""Steps at the beginning that are left out: what is allocated, compiled and chosen in them is so once."""

PEAKS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "MI250": 191.5e12, "MI300": 1307e12}
"""bf16 FLOP/s without sparsity, by what the device's name holds (vendors' data sheets)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What each program does. `micro_batch`: sequences of one pass; `peak`: FLOP/s of the device, 0: unknown."""

    device: str
    shape: dict[str, int]
    steps: int
    batch: int
    micro_batch: int
    length: int
    dtype: str
    peak: float
    lr: float = 3e-4
    weight_decay: float = 0.01
    clip: float = 1.0

    @property
    def per_token(self) -> float:
        """FLOPs of forward and backward for one token: 6 for each weight that multiplies (not the embedding, a table),
        and 12 * layers * width * length for attention (PaLM, arXiv:2204.02311, appendix B)."""
        width, layers = self.shape["hidden_size"], self.shape["num_hidden_layers"]
        values = width * self.shape["num_key_value_heads"] // self.shape["num_attention_heads"]
        layer = 2 * width * (width + values) + 3 * width * self.shape["intermediate_size"]
        return 6.0 * (layers * layer + width * self.shape["vocab_size"]) + 12.0 * layers * width * self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """One run: `rate` in tokens per second after the warm-up, `wall` seconds of the whole process, `memory` its peak in
    bytes (`held`: the GPU's), `loss` of what it saved on the rows that it trained on."""

    rate: float
    wall: float
    memory: int
    held: int
    loss: float
    trouble: str = ""


def task_of(options: argparse.Namespace) -> Task:
    import torch

    if torch.cuda.is_available() and not (options.cpu or options.small):
        name = torch.cuda.get_device_name(0)
        shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000}
        shape |= {"num_attention_heads": 32, "num_key_value_heads": 4}
        peak = options.peak_tflops * 1e12 or next((value for key, value in PEAKS.items() if key in name), 0.0)
        work = {"steps": options.steps or 20, "batch": 8, "micro_batch": options.micro_batch or 8, "length": 2048}
        return Task(device=name, shape=shape, dtype="bfloat16", peak=peak, **work)
    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 8192}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 6}
    if options.small:
        shape |= {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
    work = {"steps": options.steps or 12, "batch": 4, "micro_batch": options.micro_batch or 4, "length": 128}
    return Task(device="CPU", shape=shape, dtype="float32", peak=options.peak_tflops * 1e12, **work)


def prepare(root: Path, task: Task) -> int:
    """The model and the text; how many parameters it has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from flctl.campaign.corpora import write_corpus
    from flctl.model.tiny import _byte_tokenizer

    logging.disable_progress_bar()
    tokenizer = _byte_tokenizer()
    tokenizer.save_pretrained(root / "model")
    torch.manual_seed(1)
    config = LlamaConfig(**task.shape, max_position_embeddings=2 * task.length, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    model.save_pretrained(root / "model")
    letters = 2 * task.steps * task.batch * task.length  # a token each
    for seed in range(1 + letters // 150_000):
        for language in ("italian", "czech"):
            write_corpus(language, root / "data" / f"{language}-{seed}", seed=seed)
    return sum(parameter.numel() for parameter in model.parameters())


def measured(name: str, root: Path, task: Task, more: dict[str, Any], rows: Path | None = None) -> Done:
    """One run of a program. `rows`: where to write down what it trains on, if that is wanted."""
    out, log, steps = root / "out", root / "log", root / "steps"
    with fresh(out), fresh(root / "state"), fresh(root / "checkpoint"):
        for folder in (out, root / "state", root / "checkpoint"):
            folder.mkdir()
        os.environ.update(environment(root, task, more))
        words = [
            sys.executable,
            str(HERE / "watched.py"),
            str(steps),
            str(PROGRAMS[name]),
            *([str(rows)] if rows else []),
        ]
        done = run(words, log)
        if done.trouble:
            return Done(rate=0, wall=done.wall, memory=done.peak, held=0, loss=0, trouble=done.trouble)
        lines = [line.split() for line in steps.read_text().splitlines()]
        seconds = float(lines[-1][0]) - float(lines[WARM_UP - 1][0])
        rate = (len(lines) - WARM_UP) * task.batch * task.length / seconds
        held = max(int(line[1]) for line in lines)
        loss = 0.0 if rows else loss_of(out, root / "rows.npy", task)
        return Done(rate=rate, wall=done.wall, memory=done.peak, held=held, loss=loss)


def environment(root: Path, task: Task, more: dict[str, Any]) -> dict[str, str]:
    """What a job of flctl gives to train.py, and in BENCH the same for the others."""
    train = {"steps": task.steps, "batch": task.batch, "sequence_length": task.length, "lr": task.lr}
    train |= {"schedule": "constant", "weight_decay": task.weight_decay, "clip": task.clip, "dtype": task.dtype}
    order = {"work": "train", "site": "bench", "number": 1, "attempt": 1, "token": "bench", "campaign_id": "0" * 8}
    (root / "order.json").write_text(json.dumps(order | {"train": train | {"validation_batches": 1} | more}))
    told = {"MODEL": "model", "OUT": "out", "DATA": "data", "STATE": "state", "CHECKPOINT": "checkpoint"}
    told = {key: str(root / name) for key, name in told.items()} | {"ORDER": str(root / "order.json"), "FROZEN": ""}
    counts = {"STEPS": task.steps, "GLOBAL_STEP": 0, "TOTAL_STEPS": task.steps, "SEED": 1, "SUBJECTS": ""}
    told |= {key: str(value) for key, value in counts.items()} | {"DEADLINE": str(int(time.time()) + 86400)}
    places = {"model": str(root / "model"), "out": str(root / "out"), "rows": str(root / "rows.npy")}
    return {f"FLCTL_{key}": value for key, value in told.items()} | {"BENCH": json.dumps(asdict(task) | places)}


def loss_of(folder: Path, rows: Path, task: Task) -> float:
    """The mean loss per token of a saved model on up to 16 of the rows."""
    import numpy
    import torch
    from transformers import AutoModelForCausalLM

    device = "cpu" if task.device == "CPU" else "cuda"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in torch.from_numpy(numpy.load(rows)[:16]).to(device):
            logits = model(input_ids=row[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
            count += int((row[1:] >= 0).sum())
    return total / count


def show(task: Task, parameters: int, runs: dict[str, list[Done]], before: dict[str, Any]) -> None:
    head = ("", "tokens/s", "/ plain", "MFU", "peak GB", "GPU GB", "wall s", "loss", "tokens/s of all runs")
    good = {name: [one for one in some if not one.trouble] for name, some in runs.items()}
    plain = statistics.median(one.rate for one in good["plain loop"]) if good["plain loop"] else 0.0
    rows = []
    for name, some in good.items():
        if not some:
            rows.append((name, runs[name][0].trouble))
            continue
        rate = statistics.median(one.rate for one in some)
        rows.append(
            (
                name,
                f"{rate:.0f}",
                f"{rate / plain:.2f}" if plain else "",
                f"{rate * task.per_token / task.peak:.1%}" if task.peak else "",
                f"{max(one.memory for one in some) / GB:.2f}",
                f"{max(one.held for one in some) / GB:.2f}" if some[0].held else "",
                f"{statistics.median(one.wall for one in some):.1f}",
                f"{some[0].loss:.6f}",
                " ".join(f"{one.rate:.0f}" for one in some),
            )
        )
    title = f"{parameters / 1e6:.1f} million parameters, {task.steps} steps of {task.batch} x {task.length} tokens"
    load = ", ".join(f"{part:.1f}" for part in os.getloadavg())
    notes = [
        f"tokens/s: after the first {WARM_UP} steps; the median. wall: of the whole process, with imports and saving; "
        "train.py's also evaluates twice.",
        "loss: of the saved model on rows that it trained on; the same work gives the same loss.",
        f"MFU: {task.per_token:.3g} FLOPs per token; peak {task.peak / 1e12:g} TFLOP/s." if task.peak else "",
        f"{before['cores']} cores, load before {before['load before'][0]:.1f}, now {load}.",
    ]
    table(f"{task.device}, {task.dtype}: {title}", head, rows, [note for note in notes if note])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to work; it is kept")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--repetitions", type=int, default=3, help="of each program, in turn (%(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="12 on a CPU, 20 on a GPU")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences of one pass (the whole batch)")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, though there is a GPU")
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU, to try the benchmark itself")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device, where it is not known by name")
    parser.add_argument("--train", action="append", default=[], metavar="KEY=VALUE", help="an option of train.py more")
    return parser.parse_args()


def main() -> None:
    options, before = arguments(), machine()
    task = task_of(options)
    more = {key: _value(value) for key, _, value in (word.partition("=") for word in options.train)}
    if task.micro_batch != task.batch:
        more.setdefault("micro_batch", task.micro_batch)
    with workplace(options.folder) as root:
        require(root, 20 * int(GB) if task.device != "CPU" else int(GB))
        parameters = prepare(root, task)
        first = measured("flctl train.py", root, task, more, rows=root / "rows.npy")
        if first.trouble:
            sys.exit(f"train.py: {first.trouble}\n{(root / 'log').read_text()[-2000:]}")
        runs: dict[str, list[Done]] = {name: [] for name in PROGRAMS}
        for repetition in range(options.repetitions):
            names = list(PROGRAMS)
            for name in names if repetition % 2 == 0 else reversed(names):
                runs[name].append(measured(name, root, task, more))
                print(f"{name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    if options.json:
        began = datetime.now(UTC).isoformat(timespec="seconds")
        figures = {name: [asdict(one) for one in some] for name, some in runs.items()}
        options.json.write_text(json.dumps({"ended": began, "machine": before, "task": asdict(task), "runs": figures}))
    show(task, parameters, runs, before)
    sys.exit(any(one.trouble for one in runs["flctl train.py"]))


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
