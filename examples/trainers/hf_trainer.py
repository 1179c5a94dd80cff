"""The Trainer of transformers under flctl's contract of a job (docs/job-contract.md): text files, any causal model."""

import json
import math
import os
import signal
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

env, order, warned = os.environ, json.loads(Path(os.environ["FLCTL_ORDER"]).read_text()), []
assert order["work"] == "train"  # numpy_trainer.py also evaluates
options = {"lr": 5e-5, "batch": 8, "length": 128} | order["train"]
signal.signal(signal.SIGUSR1, lambda *_: warned.append(True))  # the walltime is nearly over


class StopInTime(TrainerCallback):
    def on_step_end(self, args, state, control, **more):
        control.should_training_stop |= bool(warned) or Path(env["FLCTL_STOP"]).exists()


def score():
    loss = trainer.evaluate()["eval_loss"]
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": held * (n - 1)}


n, text = options["length"], "\n".join(path.read_text() for path in sorted(Path(env["FLCTL_DATA"]).rglob("*.txt")))
ids = AutoTokenizer.from_pretrained(env["FLCTL_MODEL"])(text, verbose=False)["input_ids"]
rows = [{"input_ids": ids[at : at + n], "labels": ids[at : at + n]} for at in range(0, len(ids) - n + 1, n)]
held, sizes = max(1, len(rows) // 10), {"per_device_train_batch_size": options["batch"], "seed": int(env["FLCTL_SEED"])}
asked = {"max_steps": int(env["FLCTL_STEPS"]), "learning_rate": options["lr"], "save_strategy": "no", "report_to": []}
model = AutoModelForCausalLM.from_pretrained(env["FLCTL_MODEL"], dtype="auto")
arguments = TrainingArguments(env["FLCTL_CHECKPOINT"], **asked, **sizes)
trainer = Trainer(model, arguments, train_dataset=rows[held:], eval_dataset=rows[:held], callbacks=[StopInTime()])
base = score()
trainer.train()
trainer.save_model(env["FLCTL_OUT"])
samples = (steps := trainer.state.global_step) * options["batch"]
metrics = {"steps": steps, "samples": samples, "tokens": samples * n, "evaluation": {"base": base, "trained": score()}}
Path(env["FLCTL_OUT"], "metrics.json").write_text(json.dumps(metrics))
