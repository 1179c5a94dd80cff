"""A plain PyTorch loop as one would write it by hand: rows in order, AdamW, clipped gradients. BENCH holds the task."""

import contextlib
import json
import os

import numpy
import torch
from transformers import AutoModelForCausalLM

task = json.loads(os.environ["BENCH"])
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
rows = torch.from_numpy(numpy.load(task["rows"]))
model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32).to(device).train()
groups = [
    {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": task["weight_decay"]},
    {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(groups, lr=task["lr"], betas=(0.9, 0.95), fused=True)
mixed = torch.autocast(device.type, torch.bfloat16) if task["dtype"] == "bfloat16" else contextlib.nullcontext()
for batch in rows.split(task["batch"]):
    parts = batch.to(device).split(task["micro_batch"])
    for part in parts:
        with mixed:
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten())
        (loss / len(parts)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), task["clip"])
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(task["out"])
