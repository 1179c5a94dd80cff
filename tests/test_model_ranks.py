"""Several processes make one model: the bits of one, and one error for all."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from flctl.model.merge import Recipe, Source, merge
from flctl.model.ranks import ALONE, world
from tests.checkpoints import read_weights, write_weights

SCRIPT = """
import json, os, sys
from pathlib import Path
from flctl.errors import FlctlError
from flctl.model.merge import Recipe, Source, merge
from flctl.model.ranks import world
root, out, recipe = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
sources = [Source(site=name, number=1, folder=root / name, weight=weight) for name, weight in (("a", 5), ("b", 3))]
ranks = world()
def say(*words):  # in one piece, or the lines of two ranks mix
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
try:
    made = merge(root / "base", sources, out, recipe=Recipe(**recipe), chunk=1000, ranks=ranks)
    say(ranks.rank, ranks.size, json.dumps([entry.sha256 for entry in made.files]))
except FlctlError as error:
    say(ranks.rank, type(error).__name__, error)
    sys.exit(error.exit_code)
"""
MPIEXEC = ["mpiexec", "--allow-run-as-root", "--oversubscribe", "-n"]


def together(size: int, root: Path, out: Path, recipe: dict[str, object]) -> subprocess.CompletedProcess[str]:
    command = [*MPIEXEC, str(size), sys.executable, "-c", SCRIPT, str(root), str(out), json.dumps(recipe)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def models(root: Path, sharded: bool) -> Path:
    rng = np.random.default_rng(5)
    for place, name in enumerate(("base", "a", "b")):
        tensors = {f"layer.{i}.w": ("F32", rng.normal(size=(40 + i, 61)).astype(np.float32)) for i in range(4)} | {
            "count": ("I64", np.arange(9, dtype=np.int64))
        }
        files = {key: str(1 + (i + place) % 3) for i, key in enumerate(tensors)} if sharded else None
        folder = write_weights(root / name, tensors, files)
        (folder / "config.json").write_text("{}")
    return root


def contents(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("recipe", [{}, {"rule": "fedadam", "master": True}])
@pytest.mark.parametrize("sharded", [False, True])
def test_two_and_three_ranks_give_the_bytes_of_one_process(
    sharded: bool, recipe: dict[str, object], tmp_path: Path
) -> None:
    root = models(tmp_path, sharded)
    sources = [Source(site=name, number=1, folder=root / name, weight=weight) for name, weight in (("a", 5), ("b", 3))]
    made = merge(root / "base", sources, root / "alone", recipe=Recipe(**recipe))
    expected = contents(root / "alone")
    assert len(expected) > (3 if sharded else 1)
    for size in (2, 3):
        done = together(size, root, root / f"by-{size}", recipe)
        assert done.returncode == 0, done.stderr
        assert contents(root / f"by-{size}") == expected
        told = sorted(line.split(" ", 2) for line in done.stdout.splitlines())
        hashes = json.dumps([entry.sha256 for entry in made.files])
        assert told == [[str(rank), str(size), hashes] for rank in range(size)]


def test_what_one_rank_finds_ends_all_with_one_error_and_no_draft(tmp_path: Path) -> None:
    """The last tensor is the last rank's."""
    root = models(tmp_path, sharded=False)
    tensors = read_weights(root / "b")
    broken = tensors["layer.3.w"][1].copy()
    broken[-1, -1] = np.nan
    write_weights(root / "b", {**tensors, "layer.3.w": ("F32", broken)})
    done = together(3, root, root / "draft", {})
    assert done.returncode == 8, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert len({line.split(" ", 1)[1] for line in lines}) == 1
    assert len(lines) == 3
    assert "layer.3.w" in lines[0]
    assert "NaN" in lines[0]
    assert not (root / "draft").exists()


def test_a_full_disk_is_the_same_error_for_all(tmp_path: Path) -> None:
    root = models(tmp_path, sharded=False)
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=36k", "flctl-test", str(disk)], check=True)
    try:
        done = together(2, root, disk / "draft", {})
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert done.returncode == 9, done.stderr
    assert all("BudgetRefused" in line for line in done.stdout.splitlines())


def test_a_process_that_mpiexec_did_not_start_is_alone_and_loads_no_mpi() -> None:
    assert world() is ALONE
    code = "import sys; from flctl.model.ranks import world; world(); print('mpi4py' in sys.modules)"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=plain)
    assert done.stdout == "False\n"


def aggregate(root: Path, *words: str, size: int) -> subprocess.CompletedProcess[str]:
    flctl = [
        sys.executable,
        "-m",
        "flctl.cli.main",
        "aggregate",
        "a",
        "b",
        "--weights",
        "5,3",
        "--base",
        "base",
        *words,
    ]
    command = [*MPIEXEC, str(size), *flctl] if size > 1 else flctl
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)


def test_flctl_aggregate_gives_the_same_sha256_from_threads_and_from_ranks(tmp_path: Path) -> None:
    root = models(tmp_path, sharded=True)
    hashes = set()
    for size, threads in ((1, 1), (1, 2), (2, 1), (3, 2)):
        words = ("--rule", "fedavgm", "--out", f"by-{size}-{threads}", "--threads", str(threads), "--json")
        done = aggregate(root, *words, size=size)
        assert done.returncode == 0, done.stderr
        hashes.add(json.loads(done.stdout)["data"]["sha256"])
    assert len(hashes) == 1


def test_flctl_aggregate_says_what_is_wrong_once_whatever_the_number_of_ranks(tmp_path: Path) -> None:
    root = models(tmp_path, sharded=True)
    (root / "b" / "model-1.safetensors").write_bytes(b"short")
    done = aggregate(root, "--out", "merged", size=3)
    assert done.returncode == 8
    assert sum("truncated" in line for line in done.stderr.splitlines()) == 1
    assert not (root / "merged").exists()
    assert "Traceback" not in done.stderr
