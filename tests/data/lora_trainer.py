"""A trainer of a LoRA adapter with peft and transformers alone: what a user might write for the contract of a job."""

import json
import os
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
torch.manual_seed(int(os.environ["FLCTL_SEED"]))
frozen, out, steps = os.environ["FLCTL_FROZEN"], Path(os.environ["FLCTL_OUT"]), int(os.environ["FLCTL_STEPS"])
print("trainer: begins", flush=True)
base = AutoModelForCausalLM.from_pretrained(frozen)
model = PeftModel.from_pretrained(base, os.environ["FLCTL_MODEL"], is_trainable=True)
text = "".join(path.read_text() for path in sorted(Path(os.environ["FLCTL_DATA"]).glob("*.txt")))
tokens = AutoTokenizer.from_pretrained(frozen)(text, return_tensors="pt").input_ids[:, :64]


def loss() -> torch.Tensor:
    return model(tokens, labels=tokens).loss


before = loss().item()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
for _ in range(steps):
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
model.save_pretrained(out)
scores = {
    name: {"loss": value, "perplexity": 2.718281828**value, "tokens": tokens.numel()}
    for name, value in (("base", before), ("trained", loss().item()))
}
metrics = {"steps": steps, "samples": steps, "tokens": steps * tokens.numel(), "evaluation": scores}
(out / "metrics.json").write_text(json.dumps(metrics))
