"""The Trainer of transformers under flctl's contract of a job (docs/job-contract.md): text files, any causal model."""

import json
import math
import os
import signal
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

env, out, stops = os.environ, Path(os.environ["FLCTL_OUT"]), []
order = json.loads(Path(env["FLCTL_ORDER"]).read_text())
options = {"lr": 5e-5, "batch": 8, "length": 128} | order["train"]  # [train] of flctl.toml and of the site's profile
signal.signal(signal.SIGUSR1, lambda number, frame: stops.append(number))  # the walltime is nearly over
asked, stop = int(env["FLCTL_STEPS"]), Path(env.get("FLCTL_STOP") or out / ".stop")


class StopInTime(TrainerCallback):
    def on_step_end(self, args, state, control, **more):
        control.should_training_stop |= bool(stops) or stop.exists() or time.time() > float(env["FLCTL_DEADLINE"]) - 60


def trainer_of(folder):
    batch, seed = options["batch"], int(env["FLCTL_SEED"]) % 2**32
    arguments = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch, "seed": seed}
    arguments |= {"output_dir": env["FLCTL_CHECKPOINT"], "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(max_steps=asked, learning_rate=options["lr"], **arguments)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return Trainer(model, arguments, train_dataset=rows[held:], eval_dataset=rows[:held], callbacks=[StopInTime()])


def score(trainer):
    loss = trainer.evaluate()["eval_loss"]
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": held * (length - 1)}


folders, length = env["FLCTL_SUBJECTS"].splitlines() or [env["FLCTL_MODEL"]], options["length"]
text = "\n".join(path.read_text() for path in sorted(Path(env["FLCTL_DATA"]).rglob("*.txt")))
ids = AutoTokenizer.from_pretrained(env["FLCTL_MODEL"])(text, verbose=False)["input_ids"]
rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
rows, held = [{"input_ids": row, "labels": row} for row in rows], max(1, len(rows) // 10)  # held: for evaluation
if order["work"] == "evaluate":
    names = [subject["name"] for subject in order["subjects"]]
    metrics = {"evaluation": {name: score(trainer_of(folder)) for name, folder in zip(names, folders, strict=True)}}
else:
    trainer = trainer_of(folders[0])
    evaluation = {"base": score(trainer)}
    trainer.train()
    trainer.save_model(out)
    steps = trainer.state.global_step
    samples = steps * trainer.args.train_batch_size * trainer.args.world_size
    metrics = {"steps": steps, "samples": samples, "tokens": samples * length}
    metrics["evaluation"] = evaluation | {"trained": score(trainer)}
if int(env.get("RANK", 0)) == 0:  # torchrun, accelerate: the first of several processes
    (out / "metrics.json").write_text(json.dumps(metrics))
