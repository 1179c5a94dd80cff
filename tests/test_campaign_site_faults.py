"""What a site's own parts do to a campaign: a scheduler that hangs, folders out of reach, disks that fill up."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from flctl.campaign.engine import Engine
from flctl.campaign.workspace import Workspace
from flctl.errors import LoginNeeded
from flctl.facility import patience
from flctl.records import FileEntry
from tests.campaigns import Campaign
from tests.lossy import Lossy
from tests.ssh_campaigns import SshCampaign
from tests.ssh_sites import Network, agent, connected, keygen, road_to, site_of
from tests.testbed.sshd import Sshd


@pytest.fixture(scope="module")
def server() -> Iterator[Sshd]:
    with Sshd(name="sitefaults", address="127.0.95.1", port=24500, user="flctl-sitefaults") as started:
        yield started


@pytest.fixture
def single(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path, sites=("pisa",))


@pytest.fixture
def engine(single: Campaign) -> Iterator[Engine]:
    """The engine in this process, as `flctl round` has it: it keeps its connections."""
    made = Engine(workspace=Workspace(single.place), runtime=single.root / "runtime")
    made.runtime.mkdir()
    yield made
    made.close()
    assert single.flctl("cancel").returncode == 0


def advance(engine: Engine, site: str) -> None:
    """A contact at once, whatever pause there should be."""
    engine.workspace.save_contact(site, replace(engine.workspace.contact(site), due=0.0, paced=0.0))
    assert engine.advance(site)


# Schedulers that do not answer


def test_a_scheduler_that_does_not_answer_hides_no_record(
    single: Campaign, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """slurmdbd stopped by SIGSTOP: sacct waits for eight times MessageTimeout (seen with 22.05), which may be minutes.
    The record that the job is done is read all the same, and the site is not called unreachable."""
    monkeypatch.setattr(patience, "QUERY", 1)
    python = single.root / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *"batch.py list"*) exec sleep 300 ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    path = single.place / "sites" / "pisa.toml"
    path.write_text(path.read_text().replace(f'seal_python = "{sys.executable}"', f'seal_python = "{python}"'))
    assert single.flctl("campaign", "start", "--rounds", "1").returncode == 0
    engine.decide()
    advance(engine, "pisa")
    single.wait(lambda: (single.remote("pisa") / "runs" / "0001-1" / "done.json").exists(), limit=60)
    advance(engine, "pisa")
    assert single.run("pisa")["stage"] == "fetched"
    assert engine.errors == []
    (failed,) = [entry for entry in single.journal() if entry["event"] == "query failed"]
    assert failed["reason"] == "no answer within 1 s"


# Folders out of reach


def test_a_permission_lost_while_the_job_trains_loses_and_doubles_nothing(server: Sshd, tmp_path: Path) -> None:
    """Nothing is concluded from what cannot be seen: it is no purge, and nothing is sent again."""
    campaign = SshCampaign(tmp_path, server, train={"seconds": 3})
    process = campaign.popen("round")
    try:
        campaign.wait(lambda: campaign.run("sitefaults").get("stage") == "running" or process.poll() is not None)
        folder = campaign.remote("sitefaults")
        folder.chmod(0o000)
        contact = Workspace(campaign.place).contact
        campaign.wait(lambda: contact("sitefaults").trouble is not None or process.poll() is not None)
        assert "cannot be read" in contact("sitefaults").trouble.message
        folder.chmod(0o700)
        process.kill()
        assert campaign.json("round")["data"]["model"]["version"] == 1
        started = [log.read_text().count("trainer: begins") for log in (folder / "runs").glob("*/log")]
        assert sum(started) == len(started)
        assert campaign.run("sitefaults")["past"] == [] or "could not be used there" in str(campaign.run("sitefaults"))
    finally:
        process.kill()
        process.communicate()
        campaign.clear()


# Disks that fill up


@pytest.fixture
def disk(single: Campaign) -> Iterator[Path]:
    """The site's work folder is a file system of 4 MB."""
    work = single.root / "pisa" / "work"
    work.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(work)], check=True)
    try:
        yield work
    finally:
        single.flctl("cancel")
        subprocess.run(["umount", "-l", str(work)], check=True)


def fill(disk: Path) -> Path:
    """To the last byte."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0" * 4096)
    return filler


def test_a_job_that_finds_no_room_for_its_files_says_so_and_can_be_tried_again(single: Campaign, disk: Path) -> None:
    single.profile("pisa", seconds=2)
    process = single.popen("round")
    single.wait(lambda: list(disk.glob("*/runs/0001-1/program.pid")) or process.poll() is not None)
    filler = fill(disk)
    text, _ = process.communicate(timeout=60)
    assert (process.returncode, single.run("pisa")["stage"]) == (6, "failed"), text
    assert "there is no room left for its files (disk full, or quota)" in text
    assert not list(disk.glob("*/runs/0001-1/reserve*"))
    filler.unlink()
    assert single.flctl("retry", "pisa").returncode == 0
    assert single.json("round")["data"]["model"]["version"] == 1


def test_a_disk_that_fills_up_before_the_claim_costs_nothing_but_time(single: Campaign, disk: Path) -> None:
    """Whatever could not be written, the round says why, and one job starts once there is room."""
    process = single.popen("round")
    single.wait(lambda: single.run("pisa").get("stage") == "delivered" or process.poll() is not None)
    filler = fill(disk)
    text, _ = process.communicate(timeout=60)
    if process.returncode:  # else the job had begun before
        assert process.returncode in (6, 9), text
        assert re.search("No space left|no room left", text)
    filler.unlink()
    single.flctl("retry", "pisa")
    assert single.json("round")["data"]["model"]["version"] >= 1


# Keys that go away


@pytest.mark.parametrize("passphrase", ["", "open sesame"], ids=["agent", "key with a passphrase"])
def test_an_agent_that_ended_between_two_logins_is_no_refused_key(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passphrase: str
) -> None:
    """The commands' connection stands; the files' one would be a login without a key, which counts as a failed try
    where accounts are locked for these."""
    monkeypatch.setenv("HOME", str(tmp_path))
    key = keygen(tmp_path / "key", passphrase=passphrase)
    server.authorize(key.with_suffix(".pub").read_text())
    mark = server.mark()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("a")
    site = site_of(server, key=str(key) if passphrase else "agent")
    with contextlib.ExitStack() as life:
        monkeypatch.setenv("SSH_AUTH_SOCK", life.enter_context(agent(key, passphrase=passphrase)))
        with connected(site, road_to(tmp_path, server)) as connection:
            life.close()
            with pytest.raises(LoginNeeded) as caught:
                connection.push(tmp_path / "out", ["a"], PurePosixPath("/tmp/flctl-sitefaults"))
            assert not caught.value.attempted
            assert "ssh-add" in caught.value.hint
            assert connection.run("echo still there").stdout == "still there\n"
    assert server.attempts(mark).connections == 1


# One name for several login nodes


class Alias(Network):
    """A name that leads to another login node with each connection."""

    def __init__(self, *nodes: Sshd) -> None:
        super().__init__(nodes[0])
        self.nodes, self.met = nodes, 0

    def target(self) -> Sshd:
        self.met += 1
        return self.nodes[self.met % len(self.nodes)]


def test_login_nodes_that_take_turns_under_one_name_are_one_site(server: Sshd, tmp_path: Path) -> None:
    """Commands meet one node and files the other, each with a host key of its own, both of them published."""
    with Sshd(name="sitefaults-b", address="127.0.95.2", port=24501, user=server.user) as other:
        other.authorize(server.client_key.with_suffix(".pub").read_text())
        with Alias(server, other) as alias:
            keys = [server.host_key_fingerprint, other.host_key_fingerprint]
            campaign = SshCampaign(tmp_path, server, host="127.0.0.1", port=alias.port, host_keys=keys)
            try:
                answer = campaign.json("round")
                assert (answer["data"]["model"]["version"], answer["errors"]) == (1, [])
                assert [entry for entry in campaign.journal() if entry["event"] == "trouble"] == []
                assert server.attempts().logins and other.attempts().logins
                assert campaign.run("sitefaults")["past"] == []
            finally:
                campaign.clear()


# A line that loses packets


def test_a_line_that_loses_every_twentieth_packet_is_slow_and_nothing_else(server: Sshd, tmp_path: Path) -> None:
    """Real packets, in both directions; commands and files are what they are without losses, of one login each."""
    content, out, back = os.urandom(1 << 20), tmp_path / "out", tmp_path / "back"
    out.mkdir()
    (out / "a").write_bytes(content)
    entry = FileEntry(path="a", size=len(content), sha256="")
    with Lossy(server, loss=0.05) as line:
        road = road_to(tmp_path, server)
        road.known_hosts.write_text(line.known_hosts_line)
        there = PurePosixPath(f"/tmp/{tmp_path.name}")
        with connected(site_of(server, host=line.host, port=line.port), road) as connection:
            for word in map(str, range(20)):
                assert connection.run(f"echo {word}").stdout == f"{word}\n"
            connection.push(out, ["a"], there)
            connection.pull(there, [entry], back)
            assert connection.run(f"rm -r {there}").status == 0
            assert connection.logins == 2
        assert (back / "a").read_bytes() == content
        assert line.lost > 20, line.passed
