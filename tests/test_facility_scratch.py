"""Scratch folders of processes: private, short enough for sockets, and gone once their process is, however it ended."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flctl.facility import scratch
from tests.campaigns import Campaign

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys
from flctl.facility import scratch
with scratch.folder() as folder:
    (folder / "ssh1").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def state() -> Iterator[Path]:
    """A state folder of a usual length."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def there(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(state))


def holder() -> tuple[subprocess.Popen[str], Path]:
    """A process that has a scratch folder until its stdin ends."""
    words = [sys.executable, "-c", HOLD]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_has_is_not(state: Path) -> None:
    (killed, left), (living, kept) = holder(), holder()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert left.is_dir() and left.is_relative_to(state) and stat.S_IMODE(left.stat().st_mode) == 0o700
    with scratch.folder() as own:
        assert not left.exists()
        assert (kept / "ssh1").exists()
        with scratch.folder() as second:
            assert {own, second, kept} == {path for path in second.parent.iterdir() if path.is_dir()}
    living.communicate()
    assert [path.name for path in kept.parent.iterdir()] == ["lock"]


def test_a_folder_of_another_machine_that_shares_the_home_is_left_alone() -> None:
    with scratch.folder() as own:
        other = own.with_name("zzzz" + own.name[4:])
        other.mkdir()
    with scratch.folder():
        assert other.is_dir()


def test_a_long_home_still_has_short_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ("long" * 20)))
    with scratch.folder() as made:
        assert len(os.fsencode(made / "bridge")) + 17 <= 103
        assert made.parent.parent == Path("/tmp")
        with scratch.for_sockets(made) as same, scratch.for_sockets(made / ("x" * 60)) as other:
            assert same == made and other.parent == made.parent and other != made
    shutil.rmtree(made.parent)


def test_a_killed_round_leaves_nothing_behind_that_the_next_one_does_not_remove(tmp_path: Path, state: Path) -> None:
    campaign = Campaign(tmp_path, sites=("pisa",))
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    killed = campaign.flctl("round", "--rounds", "1", FLCTL_FAULT="submitted", TMPDIR=str(elsewhere))
    assert killed.returncode == -9, killed.stdout + killed.stderr
    run = state / "flctl" / "run"
    assert [path for path in run.iterdir() if path.is_dir()]
    ran = campaign.flctl("round", "--rounds", "1", TMPDIR=str(elsewhere))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [path.name for path in run.iterdir()] == ["lock"]
    assert list(elsewhere.iterdir()) == []
