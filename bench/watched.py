"""Runs a training program as it is, and writes down when each optimizer step ended, in a process that knows no more.

    python watched.py LOG PROGRAM [ROWS]

LOG gets a line per step: seconds of a monotonic clock, and the largest number of bytes the GPU has held. With ROWS, the
token rows that the model was trained on go there too, as an array [rows, length + 1]; that costs time."""

import runpy
import sys
import time
from typing import Any

import numpy
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

log = open(sys.argv[1], "w", buffering=1)  # noqa: PTH123, SIM115  a program may end without closing it
seen: list[torch.Tensor] = []
targets: list[torch.Tensor] = []


def stepped(*_: Any) -> None:
    held = 0
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        held = torch.cuda.max_memory_allocated()
    print(time.monotonic(), held, file=log)
    if len(sys.argv) > 3:
        rows = torch.cat(seen)
        last = torch.cat(targets)
        # The target of a row's last token is no token of the row; where the loss is computed in pieces, it is unknown.
        ends = last.reshape(len(rows), -1)[:, -1:] if last.numel() == rows.numel() else torch.full((len(rows), 1), -100)
        numpy.save(sys.argv[3], torch.cat([rows, ends], 1).numpy())


def embedded(ids: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
    if torch.is_grad_enabled():
        seen.append(ids.detach().cpu().clone())
    return embedding(ids, *arguments, **more)


def compared(logits: torch.Tensor, target: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
    if torch.is_grad_enabled():
        targets.append(target.detach().cpu().flatten())
    return cross_entropy(logits, target, *arguments, **more)


embedding, cross_entropy = torch.nn.functional.embedding, torch.nn.functional.cross_entropy
if len(sys.argv) > 3:
    torch.nn.functional.embedding, torch.nn.functional.cross_entropy = embedded, compared
register_optimizer_step_post_hook(stepped)
runpy.run_path(sys.argv[2], run_name="__main__")
