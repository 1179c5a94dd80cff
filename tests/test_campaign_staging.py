"""`flctl site stage`: what is in place at a site before a round needs it."""

import hashlib
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flctl.campaign import staging
from flctl.campaign.workspace import Workspace, lock
from flctl.errors import UsageError
from tests.campaigns import Campaign
from tests.ssh_sites import Network
from tests.testbed.sshd import Sshd


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path, ("brno",))


def staged(campaign: Campaign) -> Path:
    return campaign.root / "brno" / "work" / "staged"


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def journal(campaign: Campaign) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (campaign.place / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "file"]


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_and_a_folder_are_in_place_and_not_sent_again(campaign: Campaign, tmp_path: Path) -> None:
    image = write(tmp_path / "own" / "train.sif", os.urandom(300_000))
    folder = tmp_path / "own" / "extra"
    write(folder / "a", b"a")
    write(folder / "deep" / "NAMES", b"a heredoc's end")
    write(folder / "NAMES", b"")
    write(folder / "-rf *", b"odd")
    answer = campaign.json("site", "stage", "brno", str(image), str(folder))
    assert answer["data"] == {
        "site": "brno",
        "staged": [
            {
                "name": "train.sif",
                "path": str(staged(campaign) / "train.sif"),
                "files": 1,
                "size": 300_000,
                "sent": True,
            },
            {"name": "extra", "path": str(staged(campaign) / "extra"), "files": 4, "size": 19, "sent": True},
        ],
    }
    assert (staged(campaign) / "train.sif").read_bytes() == image.read_bytes()
    assert content_of(staged(campaign) / "extra") == content_of(folder)
    assert sorted(os.listdir(staged(campaign))) == ["extra", "train.sif"]
    first = journal(campaign)
    assert {(line["direction"], line["path"]) for line in first} >= {
        ("out", str(staged(campaign) / ".train.sif.staged" / "train.sif")),
        ("out", str(staged(campaign) / "extra" / "deep" / "NAMES")),
    }
    assert {line["sha256"] for line in first} >= {hashlib.sha256(image.read_bytes()).hexdigest()}
    again = campaign.json("site", "stage", "brno", str(image), str(folder))
    assert [item["sent"] for item in again["data"]["staged"]] == [False, False]
    assert journal(campaign) == first
    plain = campaign.flctl("site", "stage", "brno", str(image))
    assert plain.stdout == f"{staged(campaign) / 'train.sif'}  (300,000 bytes, was there)\n"


def test_the_model_is_where_the_first_round_looks_for_it(campaign: Campaign) -> None:
    answer = campaign.json("site", "stage", "brno", "--model")
    (item,) = answer["data"]["staged"]
    home = campaign.root / "brno" / "work"
    (place,) = home.glob("*/models/0000")
    assert (item["path"], item["sent"]) == (str(place), True)
    assert (place / "model.safetensors").read_bytes() == (
        campaign.place / "models" / "0000" / "model.safetensors"
    ).read_bytes()
    inode = (place / "model.safetensors").stat().st_ino
    assert campaign.flctl("round", "--sites", "brno").returncode == 0
    assert (place / "model.safetensors").stat().st_ino == inode
    sent = [line["path"] for line in journal(campaign) if line["direction"] == "out"]
    assert sent.count("models/0000/model.safetensors") == 1


def test_what_is_there_with_another_content_stays_unless_it_is_to_be_replaced(
    campaign: Campaign, tmp_path: Path
) -> None:
    """A job may be using it."""
    for name in ("train.sif", "extra/a"):
        write(tmp_path / "own" / name, b"first")
    paths = (str(tmp_path / "own" / "train.sif"), str(tmp_path / "own" / "extra"))
    campaign.json("site", "stage", "brno", *paths)
    for name in ("train.sif", "extra/a", "extra/b"):
        write(tmp_path / "own" / name, b"second")
    before = journal(campaign)
    refused = campaign.json("site", "stage", "brno", *paths, code=3)
    assert "is there already, with another content" in refused["errors"][0]["message"]
    assert "--replace" in refused["errors"][0]["hint"]
    assert content_of(staged(campaign)) == {"train.sif": b"first", "extra/a": b"first"}
    assert journal(campaign) == before
    campaign.json("site", "stage", "brno", *paths, "--replace")
    assert content_of(staged(campaign)) == {"train.sif": b"second", "extra/a": b"second", "extra/b": b"second"}
    assert sorted(os.listdir(staged(campaign))) == ["extra", "train.sif"]


@pytest.mark.parametrize("spoil", ["cut short", "changed", "a link", "a folder", "one more"])
def test_what_is_there_is_believed_by_its_content_only(campaign: Campaign, tmp_path: Path, spoil: str) -> None:
    own = write(tmp_path / "own" / "extra" / "a", b"content").parent
    campaign.json("site", "stage", "brno", str(own))
    there = staged(campaign) / "extra" / "a"
    if spoil == "one more":
        write(there.with_name("b"), b"x")
    else:
        there.unlink()
        if spoil == "a folder":
            there.mkdir()
        elif spoil == "a link":
            there.symlink_to(own / "a")
        else:
            there.write_bytes(b"cont" if spoil == "cut short" else b"CONTENT")
    campaign.json("site", "stage", "brno", str(own), code=3)
    campaign.json("site", "stage", "brno", str(own), "--replace")
    assert content_of(staged(campaign)) == {"extra/a": b"content"}
    assert not there.is_symlink()


def test_a_staging_that_was_cut_before_the_name_was_given_goes_on(campaign: Campaign, tmp_path: Path) -> None:
    image = write(tmp_path / "own" / "train.sif", b"image")
    write(staged(campaign) / ".train.sif.staged" / "train.sif", b"image")
    (item,) = campaign.json("site", "stage", "brno", str(image))["data"]["staged"]
    assert item["sent"] and os.listdir(staged(campaign)) == ["train.sif"]
    assert journal(campaign) == []


def odd(folder: Path, kind: str) -> Path:
    folder.mkdir()
    write(folder / "plain", b"x")
    path = folder / "odd"
    if kind == "link":
        path.symlink_to(folder / "plain")
    elif kind == "linked folder":
        path.symlink_to("/etc")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))
    return path


@pytest.mark.parametrize("kind", ["link", "linked folder", "pipe", "socket", "nothing"])
def test_links_and_special_files_are_refused_before_anything_is_sent(
    campaign: Campaign, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = odd(tmp_path / "own", kind)
    for named in [path] if kind == "nothing" else [path, path.parent]:
        answer = campaign.json("site", "stage", "brno", str(tmp_path / "own" / "plain"), str(named), code=2)
        assert str(path) in answer["errors"][0]["message"] and answer["errors"][0]["hint"]
    assert not staged(campaign).exists()


@pytest.mark.parametrize("name", ["-x", "a b", ".hidden", "a,b", "a:b", "ž", "a\nb"])
def test_a_name_that_could_not_stand_in_a_profile_is_refused(campaign: Campaign, tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "own" / name, b"x")
    assert "rename it" in campaign.json("site", "stage", "brno", str(path), code=2)["errors"][0]["hint"]


def test_nothing_to_stage_two_of_a_name_and_too_many_files_are_refused(
    campaign: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign.json("site", "stage", "brno", code=2)
    paths = [str(write(tmp_path / folder / "same", b"x")) for folder in ("one", "two")]
    assert "named twice" in campaign.json("site", "stage", "brno", *paths, code=2)["errors"][0]["message"]
    (tmp_path / "empty").mkdir()
    assert "no file" in campaign.json("site", "stage", "brno", str(tmp_path / "empty"), code=2)["errors"][0]["message"]
    monkeypatch.setattr(staging, "MOST_FILES", 3)
    many = [write(tmp_path / "many" / str(n), b"x") for n in range(4)]
    with pytest.raises(UsageError, match="4 files, more than 3"):
        staging._listed(many[0].parent)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "brno" / "work"
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=777", "none", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_what_does_not_fit_is_refused_with_figures_before_it_is_sent(tmp_path: Path, small_disk: Path) -> None:
    campaign = Campaign(tmp_path / "c", ("brno",))
    path = campaign.place / "sites" / "brno.toml"
    path.write_text(path.read_text().replace(f"{tmp_path}/c/brno/work", str(small_disk)))
    image = write(tmp_path / "own" / "train.sif", os.urandom(2_000_000))
    answer = campaign.json("site", "stage", "brno", str(image), code=9)
    assert "2,000,000 bytes are to be sent" in answer["errors"][0]["message"]
    assert "1,04" in answer["errors"][0]["message"]
    assert journal(campaign) == [] and os.listdir(small_disk) == []
    assert json.loads((campaign.place / "runs" / "brno" / "contact.json").read_text())["free"] == 1 << 20


def test_a_site_that_another_flctl_works_at_is_left_alone(campaign: Campaign, tmp_path: Path) -> None:
    image = write(tmp_path / "own" / "train.sif", b"image")
    held = Workspace(campaign.place).site_folder("brno") / "lock"
    with lock(held, "site brno", 5.0):
        campaign.json("site", "stage", "brno", str(image), code=10)
    assert not staged(campaign).exists()


# Over ssh, through a transfer host without a shell


@pytest.fixture(scope="module")
def login() -> Iterator[Sshd]:
    with Sshd(name="move-stage", address="127.0.0.87", port=2860, user="flctl-stage") as server:
        yield server


@pytest.fixture(scope="module")
def mover(login: Sshd) -> Iterator[Sshd]:
    only = ("ForceCommand /usr/bin/rrsync /",)
    with Sshd(name="move-stage-files", address="127.0.0.88", port=2861, user="flctl-stage", options=only) as server:
        server.authorize(login.client_key.with_suffix(".pub").read_text())
        yield server


def test_an_image_that_was_cut_goes_on_through_a_host_without_a_shell(
    login: Sshd, mover: Sshd, campaign: Campaign, tmp_path: Path
) -> None:
    size = 24_000_000
    image = write(tmp_path / "own" / "train.sif", os.urandom(size))
    login.account.empty_home()
    work = login.account.home / "work"
    profile = campaign.place / "sites" / "brno.toml"
    text = profile.read_text().replace('connection = "local"', "").replace(f"{campaign.root}/brno/work", str(work))
    with Network(mover) as network:
        network.cut_after = size * 2 // 3
        tables = f'[login]\nhost = "{login.address}"\nport = {login.port}\nuser = "{login.user}"\n'
        tables += f'key = "{login.client_key}"\n'
        tables += f'[transfer]\nhost = "127.0.0.1"\nport = {network.port}\nshell = false\n'
        profile.write_text(text + tables)
        (campaign.place / "known_hosts").write_text(login.known_hosts_line + network.known_hosts_line)
        answer = campaign.json("site", "stage", "brno", str(image), code=5)
        assert "goes on where it stopped" in answer["errors"][0]["hint"]
        network.sent = 0
        campaign.json("site", "stage", "brno", str(image))
        assert network.sent < size * 2 // 3
    assert (work / "staged" / "train.sif").read_bytes() == image.read_bytes()
    assert os.listdir(work / "staged") == ["train.sif"]
    record = json.loads((campaign.place / "runs" / "brno" / "contact.json").read_text())
    assert record["rsync"] == "3.4 or newer (protocol 32)" and record["logins"] == 4
