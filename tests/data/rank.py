"""One rank of a trainer that several processes are: for tests of launchers and of the warning. Standard library only.

Rank 0 knows only SIGUSR1, the others only the file FLCTL_STOP; with `train.deaf` (a launcher that passes no signal on)
rank 0 knows the file, too. Each writes down what it saw as `rank.N` in the run's folder; rank 0 waits for the others
and saves what it was given. With `train.fails` the last rank says so and ends badly, and the others wait for ever."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

NAMES = ("OMPI_COMM_WORLD_RANK", "RANK", "SLURM_PROCID")  # Slurm gives a batch script a SLURM_PROCID of 0, too
rank = int(next(os.environ[name] for name in NAMES if name in os.environ))
size = int(os.environ["FLCTL_RANKS"])
train = json.loads(Path(os.environ["FLCTL_ORDER"]).read_text()).get("train", {})
saw = {"ignored": signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN, "signals": 0}
saw["environment"] = {
    name: value for name, value in os.environ.items() if name.startswith(("FLCTL_", "MASTER", "SLURM", "OMP_"))
}


def count(number: int, frame: object) -> None:
    saw["signals"] += 1


def write(name: str, value: object) -> None:
    draft = Path(f".{name}.{rank}")
    draft.write_text(json.dumps(value))
    draft.rename(name)


def warned() -> bool:
    by_file = os.path.exists(os.environ["FLCTL_STOP"])
    return by_file if rank or train.get("deaf") else saw["signals"] > 0


def wait(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + train.get("patience", 60)
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"rank {rank} waited for nothing")
        time.sleep(0.02)


if rank == 0:
    signal.signal(signal.SIGUSR1, count)
write(f"up.{rank}", saw)
wait(lambda: all(os.path.exists(f"up.{other}") for other in range(size)))
if train.get("fails"):
    if rank == size - 1:
        sys.exit(f"train.py: error [{train['fails']}]: said by rank {rank}")
    time.sleep(60)
wait(warned)
saw["file"] = os.path.exists(os.environ["FLCTL_STOP"])
write(f"rank.{rank}", saw)
if rank == 0:
    wait(lambda: all(os.path.exists(f"rank.{other}") for other in range(size)))
    out = Path(os.environ["FLCTL_OUT"])
    for weights in Path(os.environ["FLCTL_MODEL"]).glob("*.safetensors"):
        shutil.copy(weights, out)
    (out / "metrics.json").write_text(json.dumps({"steps": 1, "samples": 2, "tokens": 3}))
