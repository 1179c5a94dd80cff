"""The checker of the chaos harness: a campaign that went well passes; each planted bug is found by what it leaves."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.campaigns import Campaign
from tests.chaos import checker, planted
from tests.chaos.beds import federation, keys_only
from tests.testbed import Testbed
from tests.testbed.python import PYTHON

ROOT = Path(__file__).resolve().parents[1]


class Planted(Campaign):
    """A campaign of local sites, driven by a flctl with a bug once `bug` is set."""

    bug = ""

    def words(self, *arguments: str) -> list[str]:
        return (
            [sys.executable, "-m", "tests.chaos.planted", self.bug, *arguments]
            if self.bug
            else super().words(*arguments)
        )

    def until(self, point: str) -> None:
        """A round, killed where it passes this fault point first."""
        ran = self.flctl("round", "--rounds", "1", FLCTL_FAULT=point, PYTHONPATH=str(ROOT))
        assert ran.returncode == -9, ran.stdout + ran.stderr

    def on(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.flctl("round", "--rounds", "1", "--wait", "20s", PYTHONPATH=str(ROOT), **environment)

    def evidence(self) -> checker.Evidence:
        remotes = {site: self.remote(site) for site in self.sites}
        return checker.collect(self.place, remotes, dict.fromkeys(self.sites))

    def violations(self, **options: Any) -> list[str]:
        return checker.violations(self.evidence(), versions=1, sites=self.sites, **options)

    def out(self, site: str) -> Path:
        return self.remote(site) / "runs" / "0001-1" / "out"


def flipped(content: bytes) -> bytes:
    """With the lowest bit of its last number changed."""
    return content[:-4] + bytes([content[-4] ^ 1]) + content[-3:]


@pytest.fixture
def campaign(tmp_path: Path) -> Planted:
    return Planted(tmp_path)


def test_a_campaign_that_went_well_passes_and_each_piece_of_evidence_counts(campaign: Planted) -> None:
    assert campaign.on().returncode == 0
    evidence = campaign.evidence()
    final = checker.folder_sha256(campaign.place / "models" / "0001")
    assert campaign.violations(final=final) == []
    assert len(evidence.attempts) == 2
    assert all(attempt.starts == 1 and attempt.done for attempt in evidence.attempts)
    assert "another than" in campaign.violations(final="0" * 64)[0]
    twice = [checker.JobRecord(id=str(n), name=evidence.attempts[0].order["token"], state="COMPLETED") for n in (1, 2)]
    jobs = {"brno": twice, "pisa": [checker.JobRecord(id="3", name="ghost", state="RUNNING")]}
    found = checker.violations(
        checker.collect(campaign.place, {s: campaign.remote(s) for s in campaign.sites}, jobs),
        versions=2,
        sites=campaign.sites,
    )
    for words in (
        "2 jobs were submitted",
        "ghost belongs to no attempt",
        "not in the scheduler's",
        "model 2 is missing",
    ):
        assert any(words in line for line in found), words
    with (campaign.remote("pisa") / "runs" / "0001-1" / "log").open("a") as log:
        log.write(f"{checker.BEGINS}\n")
    assert any("2 trainers began" in line for line in campaign.violations())
    (campaign.remote("brno") / "runs" / "0001-1" / "owner").unlink()
    assert any("no job owns" in line for line in campaign.violations())
    weights = campaign.place / "models" / "0001" / "model.safetensors"
    weights.write_bytes(flipped(weights.read_bytes()))
    assert any("not what its record says" in line for line in campaign.violations())


def test_lost_acknowledgements_leaks_and_strangers_are_found(campaign: Planted, tmp_path: Path) -> None:
    assert campaign.on().returncode == 0
    place = campaign.place
    known = checker.acknowledged(place)
    assert checker.lost(known, known) == []
    journal = place / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    run = place / "runs" / "brno" / "0001" / "run.json"
    run.write_text(run.read_text().replace('"fetched"', '"queued"'))
    shutil.rmtree(place / "models" / "0001")
    found = " ".join(checker.lost(known, checker.acknowledged(place)))
    assert "journal" in found
    assert "model 0001 is gone" in found
    assert "run brno/0001 was fetched" in found
    (place / "note").write_bytes(b"xx the-canary xx")
    assert len(checker.leaks([place], {"a secret": b"the-canary"})) == 1
    before = checker.tree(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (place / "inside").touch()
    assert checker.strangers(before, checker.tree(tmp_path), [place]) == [
        f"{tmp_path}/elsewhere is outside of the campaign"
    ]
    os.chown(tmp_path / "elsewhere", 4321, -1)
    assert checker.owned(tmp_path, [4321]) == {tmp_path / "elsewhere"}


def test_every_bug_is_planted_here() -> None:
    text = Path(__file__).read_text()
    assert [name for name in planted.BUGS if f'"{name}"' not in text] == []


@pytest.mark.parametrize("bug", ["", "trust-exit-status"])
def test_content_that_a_transfer_brought_and_nobody_looked_at_is_found(campaign: Planted, bug: str) -> None:
    """A byte of the weights differs from what the record says. Without the bug no model is made of it."""
    campaign.until("pull")
    weights = campaign.out("pisa") / "model.safetensors"
    weights.write_bytes(flipped(weights.read_bytes()))
    campaign.bug = bug
    ran = campaign.on()
    made = (campaign.place / "models" / "0001").exists()
    assert made == bool(bug), ran.stdout + ran.stderr
    if bug:
        assert any("is not what the site's record names" in line for line in campaign.violations())


def test_a_job_that_vanished_and_was_taken_for_done_is_found(campaign: Planted) -> None:
    campaign.profile("pisa", behave="hang")
    campaign.flctl("campaign", "start", "--rounds", "1")
    campaign.flctl("campaign", "tick")
    campaign.wait(lambda: (campaign.remote("pisa") / "runs" / "0001-1" / "out").exists())
    shutil.copy(campaign.place / "models" / "0000" / "model.safetensors", campaign.out("pisa"))
    campaign.kill_job("pisa")
    campaign.bug = "absent-is-done"
    ran = campaign.on(PLANTED_OUT=str(campaign.out("pisa")))
    assert (campaign.place / "models" / "0001").exists(), ran.stdout + ran.stderr
    assert any("merged without a record of completion" in line for line in campaign.violations())


def test_files_that_nobody_asked_for_are_found(campaign: Planted) -> None:
    campaign.until("pull")
    for site in campaign.sites:
        (campaign.out(site) / "stray.txt").write_text("canary-of-" + site)
    campaign.bug = "recursive-pull"
    ran = campaign.on()
    found = campaign.violations() + checker.leaks([campaign.place], {"data": b"canary-of-pisa"})
    assert any("stray.txt" in line and "not what" in line for line in found), ran.stdout + ran.stderr
    assert any("holds data" in line for line in found)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A file system in a file, as a disk whose power can be cut: `cut()` gives what a restart would find on it. Nothing
    is written to it by itself for five minutes."""
    image, mounted, found = tmp_path / "disk.img", tmp_path / "disk", tmp_path / "found"

    def call(*argv: str | Path) -> None:
        subprocess.run([str(word) for word in argv], check=True, capture_output=True)

    def cut() -> Path:
        call("cp", image, tmp_path / "copy.img")
        found.mkdir()
        call("mount", "-o", "loop", tmp_path / "copy.img", found)
        return found

    with image.open("wb") as file:
        file.truncate(64 << 20)
    call("mkfs.ext4", "-q", image)
    mounted.mkdir()
    call("mount", "-o", "loop,commit=300", image, mounted)
    yield SimpleNamespace(place=mounted, cut=cut)
    for place in (mounted, found):
        subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


@pytest.mark.parametrize("bug", ["", "no-folder-fsync"])
def test_a_model_that_a_power_cut_takes_back_is_found(disk: SimpleNamespace, bug: str) -> None:
    """The power fails right after a model was acknowledged."""
    campaign = Planted(disk.place)
    subprocess.run(["sync", "-f", str(disk.place)], check=True)
    campaign.bug = bug
    campaign.until("model-durable")
    place = campaign.place.relative_to(disk.place)
    known = checker.acknowledged(campaign.place)
    assert "0001" in known.models
    lost = checker.lost(known, checker.acknowledged(disk.cut() / place))
    assert [line for line in lost if "model" in line] == (["model 0001 is gone or another"] if bug else [])


# On real Slurm


@pytest.fixture
def bed(testbed: Testbed) -> Iterator[Testbed]:
    testbed.reset()
    yield testbed
    testbed.user.end_processes()


def test_the_records_of_a_controller_that_counts_from_the_beginning_again_are_all_there(tmp_path: Path) -> None:
    records = tmp_path / "jobs.txt"
    lines = (
        "JobId=1001 UserId=a(1) Name=before JobState=COMPLETED\n",
        "JobId=1001 UserId=a(1) Name=again JobState=FAILED\n",
    )
    records.write_text(lines[0])
    before = len(checker.slurm_jobs(records))
    records.write_text("".join(lines))
    (job,) = checker.slurm_jobs(records)[before:]
    assert (job.id, job.name, job.state) == ("1001", "again", "FAILED")


def with_bug(bed: Testbed, bug: str, *arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    program = bed.user.file(bed.user.home / "planted.py", (ROOT / "tests/chaos/planted.py").read_text())
    return bed.run(str(PYTHON), str(program), bug, *arguments, cwd=cwd, env=env, timeout=120)


def test_a_second_submission_of_one_attempt_is_found_in_slurms_own_records(bed: Testbed) -> None:
    """The start fence lets only one of the two jobs train, but two were submitted."""
    with keys_only(bed):
        campaign = federation(bed, "no-claim")
        slurm = bed.facilities["karolina"].slurm
        before = len(checker.slurm_jobs(slurm.job_records))
        words = ("round", "--sites", "karolina", "--rounds", "1")
        killed = with_bug(bed, "no-claim", *words, cwd=campaign.place, FLCTL_FAULT="submitted")
        assert killed.returncode == -9, killed.stdout + killed.stderr
        slurm.wait_empty()
        ran = with_bug(bed, "no-claim", *words, cwd=campaign.place)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        slurm.wait_empty()
    jobs = {"karolina": checker.slurm_jobs(slurm.job_records)[before:]}
    evidence = checker.collect(campaign.place, {"karolina": campaign.remote("karolina")}, jobs)
    found = checker.violations(evidence, versions=1, sites=["karolina"])
    assert [line for line in found if "2 jobs were submitted" in line], found


def test_a_code_sent_twice_is_found_in_the_log_of_sshd(bed: Testbed) -> None:
    """Both logins lie in one time step of a minute; a machine too slow for that gets another."""
    bed.reset_codes(period=60)
    campaign = federation(bed, "reuse")
    sshd = bed.facilities["leonardo"].sshd
    for _ in range(5):
        if time.time() % 60 > 30:
            time.sleep(60 - time.time() % 60)
        bed.reset_codes()
        campaign.flctl("release", "leonardo")
        mark, step = sshd.mark(), time.time() // 60
        ran = [with_bug(bed, "reuse-codes", "auth", "test", "leonardo", cwd=campaign.place) for _ in range(2)]
        if time.time() // 60 == step:
            break
    attempts = sshd.attempts(mark)
    assert (attempts.logins, attempts.failed_codes) == (1, 1), [answer.stdout + answer.stderr for answer in ran]
    contact = json.loads((campaign.place / "runs" / "leonardo" / "contact.json").read_text())
    assert contact["held"], "and one refusal holds the site"
