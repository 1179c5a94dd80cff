"""The campaign folder: found as documented, records whole or absent, locks that end with their holder, the journal."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from flctl.campaign.journal import Journal
from flctl.campaign.workspace import Workspace, lock, write_atomic
from flctl.errors import ConfigurationError, Locked


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    folder = tmp_path / "camp"
    folder.mkdir()
    (folder / "flctl.toml").write_text('[campaign]\nname = "camp"\nid = "00ff00ff"\n')
    return folder


def test_the_campaign_is_the_option_then_the_variable_then_the_nearest_folder_upwards(
    campaign: Path, tmp_path: Path
) -> None:
    deep = campaign / "runs" / "site"
    deep.mkdir(parents=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "flctl.toml").write_text('[campaign]\nname = "other"\nid = "1"\n')
    assert Workspace.find(None, {}, deep).root == campaign
    assert Workspace.find(None, {"FLCTL_CAMPAIGN": str(other)}, deep).root == other
    assert Workspace.find(campaign, {"FLCTL_CAMPAIGN": str(other)}, tmp_path).root == campaign


def test_no_campaign_is_an_error_that_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Workspace.find(None, {}, tmp_path)
    assert "flctl init" in caught.value.hint


def test_a_damaged_record_is_named(campaign: Path) -> None:
    path = campaign / "runs" / "a" / "0001" / "run.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"number": 1')
    with pytest.raises(ConfigurationError, match=r"run\.json is damaged"):
        Workspace(campaign).runs()


def test_a_lock_excludes_others_and_ends_with_its_holder(tmp_path: Path) -> None:
    """SIGKILL of the holder frees the lock at once: no stale lock, no pid file."""
    path = tmp_path / "lock"
    program = "import sys, time\nfrom pathlib import Path\nfrom flctl.campaign.workspace import lock\n"
    program += "with lock(Path(sys.argv[1]), 'x', 1): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Locked), lock(path, "thing", 0.1):
        pass
    holder.kill()
    holder.wait()
    with lock(path, "thing", 0.1):
        pass


def test_a_child_that_inherits_the_lock_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock(path, "thing", 0.1) as descriptor:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])
    with pytest.raises(Locked), lock(path, "thing", 0.1):
        pass
    child.kill()
    child.wait()
    with lock(path, "thing", 0.1):
        pass


def test_a_failed_write_leaves_the_old_record_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "record"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["record"]


def test_each_line_of_the_journal_carries_the_hash_of_the_one_before(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for number in range(5):
        journal.append("thing", number=number)
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines()
    previous = "0" * 64
    for sequence, line in enumerate(lines, 1):
        entry = json.loads(line)
        assert (entry["seq"], entry["prev"]) == (sequence, previous)
        previous = sha256(line).hexdigest()


@pytest.mark.parametrize("torn", [b'{"seq": 3', b"\x00" * 100, b"x" * 200_000], ids=["text", "zeros", "long"])
def test_a_torn_last_line_is_dropped_and_the_chain_goes_on(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("one")
    journal.append("two")
    with path.open("ab") as file:
        file.write(torn)
    assert [entry["event"] for entry in journal] == ["one", "two"]
    journal.append("three")
    assert [(entry["seq"], entry["event"]) for entry in journal] == [(1, "one"), (2, "two"), (3, "three")]


def test_many_processes_may_write_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    program = "import sys\nfrom pathlib import Path\nfrom flctl.campaign.journal import Journal\n"
    program += "for n in range(20): Journal(Path(sys.argv[1])).append('x', n=n)"
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path)]) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0, 0, 0, 0]
    assert [entry["seq"] for entry in Journal(path)] == list(range(1, 81))
