"""A trainer that is not PyTorch: a small user of the job contract, for tests of everything around it.

`train.behave` of the order says what it does: good | fail (`train.says` is its last line) | nan | shape | missing |
hang | silent | die (with every process of its job) | blind (only its evaluations fail); `train.losses`: the loss of
each version, the last one for all that follow; `train.scale` how far it goes at random, `train.shift` how far all
values go in one direction; `train.step_seconds`: how long a step takes, each saved in its checkpoint."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy
from safetensors.numpy import load_file, save_file

order = json.loads(Path(os.environ["FLCTL_ORDER"]).read_text())
behave = order["train"].get("behave", "good")
out = Path(os.environ["FLCTL_OUT"])
print("trainer: begins", flush=True)
time.sleep(order["train"].get("seconds", 0))
losses = order["train"].get("losses", [])


def loss_of(version, otherwise):
    return losses[min(int(version), len(losses) - 1)] if losses and str(version).isdigit() else otherwise


if order["work"] == "evaluate":
    if behave == "blind":
        print("flctl: error: nothing can be seen", flush=True)
        sys.exit(3)
    scores = {s["name"]: {"loss": loss_of(s["name"], 1.0), "perplexity": 2.7, "tokens": 10} for s in order["subjects"]}
    (out / "metrics.json").write_text(json.dumps({"evaluation": scores, "seconds": 0.1, "device": "cpu"}))
    sys.exit(0)
if behave == "fail":
    print(order["train"].get("says", "flctl: error: the data is spoilt"), flush=True)
    sys.exit(3)
if behave == "hang":
    time.sleep(3600)
if behave == "die":
    os.killpg(os.getpgrp(), signal.SIGKILL)
if "step_seconds" in order["train"]:
    progress = Path(os.environ["FLCTL_CHECKPOINT"]) / "progress"
    saved = int(progress.read_text()) if progress.exists() else 0
    print("trainer: goes on from step", saved, flush=True)
    for step in range(saved, int(os.environ["FLCTL_STEPS"])):
        time.sleep(order["train"]["step_seconds"])
        progress.with_suffix(".part").write_text(str(step + 1))
        progress.with_suffix(".part").rename(progress)
if behave == "silent":
    sys.exit(0)
frozen = os.environ["FLCTL_FROZEN"]
weights = "adapter_model.safetensors" if frozen else "model.safetensors"
if frozen:
    print("trainer: the frozen base has", len(load_file(Path(frozen) / "model.safetensors")), "tensors", flush=True)
    (out / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 99}')  # nobody is to believe it
tensors = load_file(Path(os.environ["FLCTL_MODEL"]) / weights)
dice = numpy.random.default_rng(int(os.environ["FLCTL_SEED"]))
for name, tensor in tensors.items():
    step = order["train"].get("scale", 0.01) * dice.standard_normal(tensor.shape) + order["train"].get("shift", 0.0)
    tensors[name] = (tensor + step).astype(tensor.dtype)
first = sorted(tensors)[0]
if behave == "nan":
    tensors[first].flat[0] = numpy.nan
if behave == "shape":
    tensors[first] = tensors[first][:-1]
if behave == "missing":
    del tensors[first]
save_file(tensors, out / weights, metadata={"format": "pt"})
samples = order["train"].get("samples", 10)
scores = {
    "base": {"loss": loss_of(order["base"]["version"], 2.0), "perplexity": 7.4, "tokens": 9},
    "trained": {"loss": 1.0, "perplexity": 2.7, "tokens": 9},
}
metrics = {"steps": int(os.environ["FLCTL_STEPS"]), "samples": samples, "tokens": 5 * samples, "evaluation": scores}
(out / "metrics.json").write_text(json.dumps(metrics))
