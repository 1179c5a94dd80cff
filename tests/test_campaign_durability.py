"""What is written at home: damage is found and named, a disk that fails stops flctl before it has effects at a site,
older campaigns are read."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flctl import durable
from flctl.campaign.journal import Journal
from flctl.campaign.steps.fetch import carry
from flctl.campaign.workspace import Workspace, read_record, write_json
from flctl.errors import ConfigurationError
from tests.campaigns import TRAINER, Campaign, make_model

GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.fixture
def single(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path, sites=("pisa",))


def a_journal(path: Path, lines: int = 5) -> bytes:
    journal = Journal(path)
    for number in range(lines):
        journal.append("thing", text=f"é{number}", number=number)
    return path.read_bytes()


# The journal


def test_a_flipped_byte_anywhere_in_the_journal_is_found_in_its_line(tmp_path: Path) -> None:
    """Every byte, in five ways, among them the one that makes or unmakes a newline."""
    path = tmp_path / "journal.jsonl"
    raw = a_journal(path)
    starts = [0, *(place + 1 for place, byte in enumerate(raw[:-1]) if byte == 10)]
    for place, byte in enumerate(raw):
        line = sum(start <= place for start in starts)
        for flip in {1, 0x20, 0x80, 0x2A, byte ^ 10} - {0}:
            path.write_bytes(raw[:place] + bytes([byte ^ flip]) + raw[place + 1 :])
            found = Journal(path).damage()
            assert found, (place, flip)
            assert (found[0].line, found[0].offset) == (line, starts[line - 1]), (place, flip, found)
            if found[0].seq is not None and found[0].what.startswith("it is not as it was written"):
                assert str(line) in str(found[0].seq) or place - starts[line - 1] < 12
    path.write_bytes(raw)
    assert Journal(path).damage() == ()


def test_a_journal_cut_at_any_byte_loses_its_torn_line_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    raw = a_journal(path)
    for size in range(len(raw) + 1):
        path.write_bytes(raw[:size])
        whole = raw[:size].count(b"\n")
        assert Journal(path).damage() == ()
        Journal(path).append("next")
        assert [entry["seq"] for entry in Journal(path)] == list(range(1, whole + 2))
        assert Journal(path).damage() == ()


def test_a_last_line_whose_newline_was_flipped_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    raw = a_journal(path)
    path.write_bytes(raw[:-1] + b"\x0b")
    assert [damage.line for damage in Journal(path).damage()] == [5]
    Journal(path).append("next")
    assert [entry["seq"] for entry in Journal(path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("change", ["content", "prev", "lost line"])
def test_damage_to_a_journal_of_an_older_flctl_is_found_by_its_chain(tmp_path: Path, change: str) -> None:
    path = tmp_path / "journal.jsonl"
    lines = (GOLDEN / "0.1.0" / "finished" / "camp" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    if change == "content":
        lines[3] = lines[3].replace(b'"event": "', b'"event": "x', 1)
    elif change == "prev":
        lines[3] = lines[3].replace(b'"prev": "', b'"prev": "f', 1).replace(b'", "at"', b'"at"', 1)
    else:
        del lines[2]
    path.write_bytes(b"".join(lines))
    assert [damage.line for damage in Journal(path).damage()] == [4 if change != "lost line" else 3]


def test_a_damaged_journal_is_said_once_noted_once_and_stops_nobody(single: Campaign) -> None:
    single.json("round")
    path = single.place / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], lines[4].replace(b"seq", b"sep", 1), *lines[5:]]))
    first = single.flctl("round")
    assert first.returncode == 0
    offset = sum(map(len, lines[:4]))
    assert first.stdout.count(f"is damaged at line 5, at byte {offset}") == 1
    second = single.flctl("round")
    assert "is damaged at line 5" in second.stdout
    noted = [entry for entry in Journal(path) if entry["event"] == "damage"]
    assert [(entry["line"], entry["offset"]) for entry in noted] == [(5, offset)]
    assert [damage.line for damage in Journal(path).damage()] == [5]


def test_a_line_that_could_not_be_flushed_is_not_there_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second flush of the same file would succeed and prove nothing."""
    path = tmp_path / "journal.jsonl"
    raw = a_journal(path, 2)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(ConfigurationError, match="Input/output error"):
            Journal(path).append("lost")
    assert path.read_bytes() == raw
    Journal(path).append("next")
    assert [entry["event"] for entry in Journal(path)] == ["thing", "thing", "next"]


# Records


def test_a_flipped_byte_anywhere_in_a_record_is_found_and_the_file_named(tmp_path: Path) -> None:
    path = tmp_path / "contact.json"
    data = {"due": 12.5, "workdir": "/scratch/é", "resolved": ["a", "b"], "held": None, "serial": 7}
    write_json(path, data)
    raw = path.read_bytes()
    assert read_record(path) == {**data, "schema": 1}
    for place, byte in enumerate(raw[:-1]):
        for flip in (1, 2, 0x20, 0x80):
            path.write_bytes(raw[:place] + bytes([byte ^ flip]) + raw[place + 1 :])
            with pytest.raises(ConfigurationError) as caught:
                read_record(path)
            assert str(path) in caught.value.message, (place, flip)


def test_a_record_without_a_checksum_is_read_and_one_of_a_newer_flctl_is_not(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"number": 1, "schema": 1}')
    assert read_record(path)["number"] == 1
    for schema in (99, 0, "2", None, [1]):
        path.write_text(json.dumps({"number": 1, "schema": schema}))
        with pytest.raises(ConfigurationError) as caught:
            read_record(path)
        assert "newer flctl" in caught.value.message
        assert "nothing was changed" in caught.value.hint


def test_planted_links_are_not_followed(single: Campaign) -> None:
    single.json("round")
    outside = single.root / "outside"
    outside.mkdir()
    (outside / "file").write_text("untouched")
    run = single.place / "runs" / "pisa" / "0001" / "run.json"
    shutil.move(run, outside / "run.json")
    run.symlink_to(outside / "run.json")
    refused = single.flctl("round")
    assert refused.returncode == 3
    assert "symbolic link" in refused.stderr
    run.unlink()
    shutil.move(outside / "run.json", run)
    (single.place / "models" / ".0002.draft").symlink_to(outside, target_is_directory=True)
    part = single.place / "runs" / "pisa" / "0002" / "1" / ".out.part"
    part.parent.mkdir(parents=True)
    part.symlink_to(outside, target_is_directory=True)
    assert single.json("round")["data"]["model"]["version"] == 2
    assert sorted(path.name for path in outside.iterdir()) == ["file"]
    assert (outside / "file").read_text() == "untouched"


def test_the_folder_is_private_and_one_that_others_may_change_is_refused(single: Campaign) -> None:
    single.json("round")
    for path in [single.place, *single.place.rglob("*")]:
        mode = stat.S_IMODE(path.lstat().st_mode)
        inside = path.relative_to(single.place).parts
        if inside and inside[0] in ("sites", "flctl.toml"):
            continue  # the test's own, or a person's
        assert mode & 0o077 == 0, path
    single.place.chmod(0o770)
    refused = single.flctl("status")
    assert refused.returncode == 3
    assert f"chmod go-w {single.place}" in refused.stderr


def test_a_new_folder_is_flushed_in_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(durable, "fsync_folder", flushed.append)
    durable.write_whole(tmp_path / "a" / "b" / "c.json", b"x")
    assert flushed == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]


# Disks


@contextmanager
def ext4(campaign: Campaign, *options: str, megabytes: int = 24) -> Iterator[Path]:
    """The campaign's folder, moved to a file system of its own."""
    image, mount = campaign.root / "image", campaign.root / "disk"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", *options, str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        shutil.copytree(campaign.place, mount / "camp")
        campaign.place = mount / "camp"
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def claims(campaign: Campaign, site: str = "pisa") -> list[Path]:
    return list((campaign.root / site).glob("work/*/runs/*/claim"))


def fill(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while True:
            os.write(descriptor, b"0" * 4096)
    except OSError as error:
        assert error.errno == errno.ENOSPC
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("what", ["bytes", "files"])
def test_a_full_disk_stops_flctl_before_it_asks_anything_of_a_site(single: Campaign, what: str) -> None:
    single.flctl("campaign", "start", "--rounds", "1")
    with ext4(single, *(("-N", "128") if what == "files" else ())) as disk:
        fillers = disk / "fillers"
        fillers.mkdir()
        if what == "bytes":
            fill(fillers / "0")
        else:
            with pytest.raises(OSError, match="No space left"):
                for number in range(1000):
                    (fillers / str(number)).touch()
        for command in ("round", "campaign tick"):
            stopped = single.flctl(*command.split())
            assert stopped.returncode == 9, stopped.stderr
            assert "make room" in stopped.stderr
            assert "Traceback" not in stopped.stderr
        assert not claims(single)
        assert single.flctl("status").returncode == 0
        shutil.rmtree(fillers)
        assert single.json("round")["data"]["model"]["version"] == 1
        assert single.submissions("pisa") == 1


def test_a_read_only_disk_stops_flctl_and_status_still_works(single: Campaign) -> None:
    single.flctl("campaign", "start", "--rounds", "1")
    with ext4(single) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        stopped = single.flctl("round")
        assert stopped.returncode == 3, stopped.stderr
        assert "read-only" in stopped.stderr.lower()
        assert not claims(single)
        assert single.flctl("status").returncode == 0
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert single.json("round")["data"]["model"]["version"] == 1


def injected(campaign: Campaign, fault: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """flctl with a fault in a system call: kernel's words, not ours."""
    call = fault.split(":")[0]
    words = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={fault}"]
    return subprocess.run(
        [*words, *campaign.words(*arguments)],
        cwd=campaign.place, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize("when", [1, 4, 9])
def test_a_disk_that_cannot_flush_is_an_error_and_what_it_lost_is_made_again(single: Campaign, when: int) -> None:
    single.flctl("campaign", "start", "--rounds", "1")
    failed = injected(single, f"fsync:error=EIO:when={when}", "campaign", "tick")
    # The sites are here, too: a push of ours may be what failed.
    assert failed.returncode in (3, 7), failed.stdout + failed.stderr
    assert "Input/output error" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert single.json("round")["data"]["model"]["version"] == 1
    assert single.submissions("pisa") == 1
    assert Journal(single.place / "journal.jsonl").damage() == ()


def test_a_reader_that_goes_away_does_not_end_the_round(single: Campaign) -> None:
    """flctl round | head -1"""
    words = " ".join(single.words("round"))
    done = subprocess.run(
        ["sh", "-c", f"({words}; echo $? >code) | head -1"],
        cwd=single.place,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert len(done.stdout.splitlines()) == 1
    assert (single.place / "models" / "0001" / "flctl.json").exists()
    assert (single.place / "code").read_text() == "0\n"


def test_a_full_log_does_not_end_the_round(single: Campaign) -> None:
    with open("/dev/full", "w") as full:
        ran = subprocess.run(single.words("round"), cwd=single.place, stdout=full, stderr=full, timeout=120)
    assert (single.place / "models" / "0001" / "flctl.json").exists()
    assert ran.returncode == 0


# Older versions


def planted(tmp_path: Path, name: str) -> Campaign:
    """A campaign as 0.1.0 left it, with its sites; `middle`: of its second round one site's job is known to run."""
    place = tmp_path / name
    shutil.copytree(GOLDEN / "0.1.0" / name, place)
    words = {"@ROOT@": str(place), "@PYTHON@": sys.executable, "@TRAINER@": str(TRAINER)}
    for path in place.rglob("*"):
        if path.is_file() and path.suffix in (".toml", ".json", ".sh", ".card"):
            text = path.read_text()
            for old, new in words.items():
                text = text.replace(old, new)
            path.write_text(text)
    campaign = object.__new__(Campaign)
    campaign.root, campaign.place, campaign.sites = place, place / "camp", ("brno", "pisa")
    return campaign


def records(campaign: Campaign) -> dict[str, Any]:
    paths = [path for path in campaign.place.rglob("*.json") if path.is_file()]
    return {str(path.relative_to(campaign.place)): path.read_bytes() for path in sorted(paths)}


@pytest.mark.parametrize(("name", "version"), [("finished", 2), ("middle", 2)])
def test_a_campaign_of_an_older_flctl_is_read_and_goes_on(tmp_path: Path, name: str, version: int) -> None:
    campaign = planted(tmp_path, name)
    workspace = Workspace(campaign.place)
    assert workspace.journal.damage() == ()
    assert [model.version for model in workspace.models()] == [0, 1]
    assert campaign.flctl("status").returncode == 0
    began = {site: campaign.submissions(site) for site in campaign.sites}
    code = None if name == "middle" else 0
    answer = campaign.json("round", *(("--rounds", "1") if name == "finished" else ()), code=code)
    assert answer["data"]["model"]["version"] >= version, answer
    for site, before in began.items():
        more = 1 if name == "finished" else answer["data"]["model"]["version"] - 2
        assert campaign.submissions(site) == before + more
    assert Workspace(campaign.place).journal.damage() == ()


@pytest.mark.parametrize("record", ["plan.json", "runs/pisa/0001/run.json", "models/0001/flctl.json"])
def test_a_campaign_of_a_newer_flctl_is_refused_and_left_as_it_is(tmp_path: Path, record: str) -> None:
    campaign = planted(tmp_path, "middle")
    path = campaign.place / record
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    before = records(campaign), (campaign.place / "journal.jsonl").read_bytes()
    for command in ("round", "campaign tick", "status", "adopt"):
        refused = campaign.flctl(*command.split())
        assert refused.returncode == 3, command
        assert "pip install --upgrade flctl" in refused.stderr
    after = {name: text for name, text in records(campaign).items() if name != "driver.json"}
    assert (after, (campaign.place / "journal.jsonl").read_bytes()) == before


def test_a_kill_while_config_files_are_copied_leaves_no_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is not copied again; found by the crash matrix."""
    base, folder = tmp_path / "base", tmp_path / ".out.part"
    make_model(base)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())

    def torn(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:10])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "copyfile", torn)
        carry(base, folder)
    carry(base, folder)
    names = {path.name for path in base.iterdir()} - {"flctl.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert all((folder / name).read_bytes() == (base / name).read_bytes() for name in names)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".carried")] == []
