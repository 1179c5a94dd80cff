"""Several ranks under real Slurm: srun, mpiexec, torchrun start them; the warning reaches each and kills none."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.federation import Federation
from tests.testbed import Testbed
from tests.testbed.python import PYTHON
from tests.testbed.slurm import Slurm

RANK = Path(__file__).parent / "data" / "rank.py"
TORCHRUN = f'#!/bin/sh\nexec {PYTHON} -m torch.distributed.run "$@"\n'
SEVERAL_NODES = (
    "srun --ntasks=$FLCTL_NODES --ntasks-per-node=1 {torchrun} --no-python --nnodes=$FLCTL_NODES"
    " --nproc-per-node=$FLCTL_RANKS_PER_NODE --rdzv-backend=c10d --rdzv-endpoint=localhost:$MASTER_PORT"
)
LAUNCHERS = {
    "srun": "srun",
    "mpiexec": "mpiexec -n $FLCTL_RANKS",
    "torchrun": "{torchrun} --no-python --nproc-per-node=$FLCTL_RANKS_PER_NODE",
    "srun torchrun": SEVERAL_NODES,
}


class Ranks(Federation):
    """karolina's jobs are two ranks of two cpus each."""

    def __init__(self, bed: Testbed) -> None:
        super().__init__(bed, "ranks")
        account, home = bed.facilities["karolina"].account, bed.facilities["karolina"].home
        self.torchrun = account.file(home / "torchrun", TORCHRUN)
        self.torchrun.chmod(0o700)
        self.lay("karolina", train={"command": str(account.file(home / "rank.py", RANK.read_text()))})
        self.number = 0

    def start(self, launch: str, **train: Any) -> Any:
        """A round of one site, with both its ranks up."""
        self.number += 1
        self.lay(
            "karolina",
            shapes={"prod": {"ranks": 2, "cpus": 4, "walltime": "00:05:00"}},
            environment={"launch": launch.format(torchrun=self.torchrun)},
            train={"deaf": False, "fails": "", **train},
        )
        return self.popen("round", "--sites", "karolina")

    @property
    def folder(self) -> Path:
        return self.remote("karolina") / "runs" / f"{self.number:04d}-1"

    def up(self) -> str:
        """The job's id, once both ranks are up."""
        self.wait(lambda: all((self.folder / f"up.{rank}").exists() for rank in (0, 1)), what="two ranks")
        return str(json.loads((self.folder / "owner").read_text())["job_id"])

    def saw(self) -> list[dict[str, Any]]:
        return [json.loads((self.folder / f"rank.{rank}").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def ranks(testbed: Testbed) -> Iterator[Ranks]:
    testbed.reset()
    yield Ranks(testbed)
    testbed.user.end_processes()


@pytest.fixture
def cluster(ranks: Ranks) -> Slurm:
    return ranks.bed.facilities["karolina"].slurm


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_warning_to_the_batch_shell_reaches_every_rank_and_kills_none(
    ranks: Ranks, cluster: Slurm, name: str
) -> None:
    """By the signal where the launcher passes it on, by FLCTL_STOP in any case; each rank knows one of them only."""
    deaf = name == "torchrun"  # srun signals every process of its step
    process = ranks.start(LAUNCHERS[name], deaf=deaf)
    job = ranks.up()
    step = cluster.command("scontrol", "-o", "show", "step", f"{job}.0") if "srun" in name else ""
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text + (ranks.folder / "log").read_text()
    first, second = ranks.saw()
    assert first["ignored"] and second["ignored"], "until they ask for it"
    assert (first["signals"] > 0) == (not deaf) and second["signals"] == 0 and second["file"]
    told = first["environment"]
    counts = ("FLCTL_NODES", "FLCTL_RANKS", "FLCTL_RANKS_PER_NODE", "OMP_NUM_THREADS")
    assert [told[count] for count in counts] == ["1", "2", "2", "2"]
    assert told["MASTER_ADDR"] and 1024 < int(told["MASTER_PORT"]) < 65536
    if step:
        assert f" CPUs=4 Tasks={1 if 'torchrun' in name else 2} " in step, "torchrun has the cpus of the whole node"
    assert json.loads((ranks.folder / "done.json").read_text())["outcome"] == "done"


@pytest.mark.parametrize("name", ["srun", "mpiexec"])
def test_a_rank_that_fails_ends_the_others_and_its_words_are_the_reason(ranks: Ranks, name: str) -> None:
    process = ranks.start(LAUNCHERS[name], fails="memory")
    text, _ = process.communicate(timeout=120)
    done = json.loads((ranks.folder / "done.json").read_text())
    assert (done["failure"], done["reason"]) == ("memory", "said by rank 1"), text
    assert done["ended_at"] - done["started_at"] < 40, "the other rank would wait for a minute"
    assert process.returncode == 6 and "micro_batch" in text
    assert ranks.flctl("cancel").returncode == 0


@pytest.mark.parametrize("name", ["srun", "mpiexec"])
def test_train_py_as_two_ranks_shards_the_model_and_ends_with_the_warning(
    testbed: Testbed, cluster: Slurm, name: str
) -> None:
    """The real trainer on real text: both ranks save one model after the same step; the next round begins with it."""
    federation = Federation(testbed, f"train-{name}", real=True)
    shape = {"prod": {"ranks": 2, "cpus": 4, "walltime": "00:05:00"}}
    federation.lay("karolina", shapes=shape, environment={"launch": LAUNCHERS[name]})
    options = "lr = 0.005\nbatch = 4\nsequence_length = 64\nlog_every = 1"
    federation.set("steps = 4\nlr = 5e-05\nbatch = 8\nsequence_length = 1024", f"steps = 100000\n{options}")
    process = federation.popen("round", "--sites", "karolina", "--rounds", "1")
    folder = federation.remote("karolina") / "runs" / "0001-1"
    federation.wait(lambda: (folder / "log").exists() and '{"step": 3,' in (folder / "log").read_text(), what="steps")
    cluster.command("scancel", "--batch", "--signal=USR1", json.loads((folder / "owner").read_text())["job_id"])
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text + (folder / "log").read_text()
    metrics = json.loads((folder / "done.json").read_text())["metrics"]
    assert metrics["processes"] == 2
    assert 3 <= metrics["steps"] < 100000
    assert "ends the training after" in (folder / "log").read_text()
    assert metrics["evaluation"]["trained"]["loss"] < metrics["evaluation"]["base"]["loss"]
    federation.set("steps = 100000", "steps = 2")
    second = federation.json("round", "--sites", "karolina", "--rounds", "1")
    assert second["data"]["model"]["version"] == 2
    log = (folder.with_name("0002-1") / "log").read_text()
    assert "goes on with the state that run 1 left here" in log
