"""The Trainer of transformers on the same rows, in order, with the same optimizer. BENCH holds the task."""

import json
import os

import numpy
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

task = json.loads(os.environ["BENCH"])
rows = torch.from_numpy(numpy.load(task["rows"]))
# The labels are shifted already, so that the model sees as many tokens as the others'.
items = [{"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in rows]
model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
model.config.use_cache = False
arguments = TrainingArguments(
    output_dir=task["out"],
    max_steps=len(rows) // task["batch"],
    per_device_train_batch_size=task["micro_batch"],
    gradient_accumulation_steps=task["batch"] // task["micro_batch"],
    train_sampling_strategy="sequential",
    remove_unused_columns=False,
    learning_rate=task["lr"],
    lr_scheduler_type="constant",
    weight_decay=task["weight_decay"],
    adam_beta2=0.95,
    max_grad_norm=task["clip"],
    bf16=task["dtype"] == "bfloat16",
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
trainer = Trainer(model, arguments, train_dataset=items)
trainer.train()
trainer.save_model(task["out"])
