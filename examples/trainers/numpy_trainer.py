"""A trainer without PyTorch under flctl's contract of a job (docs/job-contract.md): which byte follows which.

The model is one matrix `table` [256, 256] of float32, the logits of the next byte after each byte; it is trained by
gradient descent on the text files of the site. An argument is the folder in which to make the first model."""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy
from safetensors.numpy import load_file, save_file

if len(sys.argv) == 2:  # python numpy_trainer.py FOLDER, then: flctl init ... --model FOLDER --trainer numpy_trainer.py
    Path(sys.argv[1]).mkdir(parents=True)
    sys.exit(save_file({"table": numpy.zeros((256, 256), numpy.float32)}, Path(sys.argv[1], "model.safetensors")))

env, out, stops = os.environ, Path(os.environ["FLCTL_OUT"]), []
order = json.loads(Path(env["FLCTL_ORDER"]).read_text())
options = {"lr": 10.0, "batch": 4096} | order["train"]  # [train] of flctl.toml and of the site's profile
signal.signal(signal.SIGUSR1, lambda number, frame: stops.append(number))  # the walltime is nearly over
stop, deadline = Path(env.get("FLCTL_STOP") or out / ".stop"), float(env["FLCTL_DEADLINE"]) - 5

files = sorted(Path(env["FLCTL_DATA"]).rglob("*.txt"))
text = numpy.frombuffer(b"\n".join(path.read_bytes() for path in files), numpy.uint8)
if len(text) < 100:
    sys.exit("flctl: error: fewer than 100 bytes of text")  # the last line of the log is the reason that flctl tells
held = len(text) // 10  # the first tenth is for evaluation, in every round


def log_probabilities(table):
    shifted = table - table.max(axis=1, keepdims=True)
    return shifted - numpy.log(numpy.exp(shifted).sum(axis=1, keepdims=True))


def score(table):
    loss = -float(log_probabilities(table)[text[: held - 1], text[1:held]].mean())
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": held - 1}


def descend(table, places):
    """One step of gradient descent on the mean loss of the bytes that follow these places."""
    counts = numpy.zeros_like(table)
    numpy.add.at(counts, (text[places], text[places + 1]), 1.0)
    gradient = counts.sum(axis=1, keepdims=True) * numpy.exp(log_probabilities(table)) - counts
    return table - numpy.float32(options["lr"]) * gradient / len(places)


def load(folder):
    return load_file(Path(folder, "model.safetensors"))["table"]


if order["work"] == "evaluate":
    folders = env["FLCTL_SUBJECTS"].splitlines()
    metrics = {"evaluation": {s["name"]: score(load(f)) for s, f in zip(order["subjects"], folders, strict=True)}}
else:
    base = table = load(env["FLCTL_MODEL"])
    dice, steps = numpy.random.default_rng(int(env["FLCTL_SEED"])), 0
    while steps < int(env["FLCTL_STEPS"]) and not stops and not stop.exists() and time.time() < deadline:
        table, steps = descend(table, dice.integers(held, len(text) - 1, options["batch"])), steps + 1
    save_file({"table": table}, out / "model.safetensors")
    metrics = {"steps": steps, "samples": steps * options["batch"], "tokens": steps * options["batch"]}
    metrics["evaluation"] = {"base": score(base), "trained": score(table)}
(out / "metrics.json").write_text(json.dumps(metrics))
