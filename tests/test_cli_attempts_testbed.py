"""How jobs end on real Slurm, and what flctl makes of each end: tried again, gone on with, or held for a person."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.federation import Federation
from tests.testbed import Testbed

SITE = "karolina"


@pytest.fixture
def bed(testbed: Testbed) -> Iterator[Testbed]:
    testbed.reset()
    yield testbed
    testbed.user.end_processes()
    testbed.facilities[SITE].account.end_processes()


class Karolina:
    """A campaign of one round at karolina, whose job runs."""

    def __init__(self, bed: Testbed, **train: Any) -> None:
        self.federation = Federation(bed, "attempts", karolina={"train": {"behave": "hang", **train}})
        self.slurm, self.account = bed.facilities[SITE].slurm, bed.facilities[SITE].account
        started = self.federation.flctl("campaign", "start", "--rounds", "1", "--sites", SITE)
        assert started.returncode == 0, started.stderr
        self.federation.json("campaign", "tick")
        self.job = self.run["job"]["id"]

    def begin(self) -> str:
        """Wait until the job trains; from now on a next attempt succeeds."""
        self.slurm.wait_state(self.job, "RUNNING")
        self.federation.wait(lambda: self.federation.jobs_started(SITE), what="the trainer")
        self.tick()
        self.federation.lay(SITE, train={"behave": "good"})
        return self.job

    @property
    def run(self) -> dict[str, Any]:
        return self.federation.run(SITE)

    def tick(self) -> dict[str, Any]:
        answer = self.federation.json("campaign", "tick", code=None)
        time.sleep(1)
        return answer

    def until(self, condition: Callable[[dict[str, Any]], Any], what: str) -> None:
        self.federation.wait(lambda: self.tick() and condition(self.run), limit=180, what=what)

    def is_made_good(self, cause: str, attempts: int = 2) -> None:
        """The round completes without a person; the last attempt alone counts."""
        self.until(lambda run: run["stage"] == "fetched", "the round")
        assert self.federation.json("status")["data"]["model"]["version"] == 1
        run = self.run
        assert (run["attempt"], [past["cause"] for past in run["past"]]) == (attempts, [cause] * (attempts - 1))
        job = json.loads((self.federation.place / "runs" / SITE / "0001" / str(attempts) / "done.json").read_text())
        assert job["attempt"] == attempts

    def processes(self) -> list[str]:
        shown = subprocess.run(["pgrep", "-u", self.account.name, "-f", "trainer.py"], capture_output=True, text=True)
        return shown.stdout.split()


def test_a_node_that_fails_is_made_good_while_its_processes_still_live(bed: Testbed) -> None:
    """kill -9 of the node's daemon: Slurm gives the job up, its processes train on. Their record is nobody's."""
    site = Karolina(bed)
    job = site.begin()
    node = site.slurm.node.pid
    assert node is not None
    os.kill(node, 9)
    site.slurm.wait_state(job, "NODE_FAIL", timeout=120)
    assert site.processes(), "the zombie this test is about"
    site.until(lambda run: run["attempt"] == 2, "the next attempt")
    assert site.run["past"][0]["cause"] == "infrastructure"
    site.slurm.start(fresh=False)
    site.is_made_good("infrastructure")


def test_a_requeued_job_finds_its_attempt_taken_and_a_new_one_is_sent(bed: Testbed) -> None:
    """--no-requeue refuses it, unless the operators change the job."""
    site = Karolina(bed)
    job = site.begin()
    refused = subprocess.run(
        ["scontrol", "requeue", job], env={"PATH": "/usr/bin", **site.slurm.environment}, capture_output=True, text=True
    )
    assert (refused.returncode, "disabled" in refused.stderr) == (1, True)
    site.slurm.command("scontrol", "update", f"JobId={job}", "Requeue=1")
    site.slurm.command("scontrol", "requeue", job)
    site.until(lambda run: run["attempt"] == 2, "the next attempt")
    site.is_made_good("infrastructure")
    assert site.slurm.state(job) in ("CANCELLED", None), "the copy that waited is gone from the queue"


def test_a_job_cancelled_by_the_operators_is_held_and_says_who_did_it(bed: Testbed) -> None:
    site = Karolina(bed)
    site.slurm.command("scancel", site.begin())
    site.until(lambda run: run["held"], "the hold")
    run = site.run
    assert (run["attempt"], run["failure"]["cause"]) == (1, "cancelled at the site")
    assert "cancelled at the site by uid 0, not by flctl" in run["held"]["reason"]
    refused = site.federation.flctl("release", SITE)
    assert (refused.returncode, f"flctl retry {SITE}" in refused.stderr) == (2, True)
    before = set(site.slurm.jobs())
    assert site.tick()["status"] == "partial"
    assert set(site.slurm.jobs()) == before, "nothing is sent again unasked"
    assert site.federation.flctl("retry", SITE).returncode == 0
    assert site.federation.json("round")["data"]["model"]["version"] == 1


def test_a_job_cancelled_while_it_waits_is_held_too(bed: Testbed) -> None:
    site = Karolina.__new__(Karolina)
    bed.facilities[SITE].slurm.command("scontrol", "update", "PartitionName=qgpu", "State=DOWN")
    try:
        Karolina.__init__(site, bed)
        site.until(lambda run: "PartitionDown" in run["job"]["reason"], "why the job waits")
        shown = " ".join(site.federation.flctl("status").stdout.split())
        assert "PartitionDown" in shown and "its partition is down" in shown
        site.slurm.command("scontrol", "hold", site.job)
        site.until(lambda run: "JobHeldAdmin" in run["job"]["reason"], "the hold to be seen")
        assert "ask them" in " ".join(site.federation.flctl("status").stdout.split())
        site.slurm.command("scancel", site.job)
        site.until(lambda run: run["held"], "the hold")
    finally:
        bed.facilities[SITE].slurm.command("scontrol", "update", "PartitionName=qgpu", "State=UP")
    assert "ended before it started" in site.run["held"]["reason"]
    assert site.federation.flctl("cancel", SITE).returncode == 0


def test_a_time_limit_is_gone_on_from_its_checkpoint(bed: Testbed) -> None:
    site = Karolina(bed, behave="good", step_seconds=20)
    site.slurm.wait_state(site.job, "RUNNING")
    folder = site.federation.remote(SITE) / "runs" / "0001-1"
    site.federation.wait((folder / "checkpoint" / "progress").exists, what="a saved step")
    site.slurm.cut_short(site.job)
    site.slurm.wait_state(site.job, "TIMEOUT", timeout=150)  # Slurm looks every 30 s
    site.is_made_good("time")
    log = (site.federation.remote(SITE) / "runs" / "0001-2" / "log").read_text()
    assert "goes on from step" in log and "goes on from step 0" not in log


def test_out_of_memory_is_for_a_person(bed: Testbed) -> None:
    """No cgroups on this machine: the kernel's way, SIGKILL to the program alone."""
    site = Karolina(bed)
    site.begin()
    for pid in site.processes():
        os.kill(int(pid), 9)
    site.until(lambda run: run["stage"] == "failed", "its end")
    failure = site.run["failure"]
    assert (failure["cause"], "more memory" in failure["hint"]) == ("memory", True)
    assert site.run["attempt"] == 1


def test_a_log_that_cannot_be_opened_is_told_as_such(bed: Testbed) -> None:
    """Slurm's 0:53; the attempt's folder went away while the job waited."""
    slurm = bed.facilities[SITE].slurm
    slurm.command("scontrol", "update", "PartitionName=qgpu", "State=DOWN")
    try:
        site = Karolina(bed, behave="good")
        shutil.rmtree(site.federation.remote(SITE) / "runs" / "0001-1")
    finally:
        slurm.command("scontrol", "update", "PartitionName=qgpu", "State=UP")
    slurm.wait_state(site.job, "FAILED")
    site.until(lambda run: run["stage"] == "failed", "its end")
    assert site.run["failure"]["cause"] == "configuration"
    assert "quota" in site.run["failure"]["message"]


def wipe(slurm: Any) -> None:
    """The controller loses its state: ids begin again."""
    slurm.controller.stop()
    shutil.rmtree(slurm.folder / "state")
    slurm.start(fresh=False)


def test_a_controller_that_lost_its_state_gives_our_id_to_somebody_else(bed: Testbed) -> None:
    site = Karolina(bed)
    job = site.begin()
    wipe(site.slurm)
    words = ["sbatch", "--parsable", "-J", "fsomebodyelse", "-p", "qgpu_exp", "-t", "5", "--wrap", "sleep 600"]
    environment = ["env", *(f"{name}={value}" for name, value in site.slurm.environment.items())]
    ids: list[str] = []
    while job not in ids:
        done = subprocess.run(
            ["runuser", "-u", site.account.name, "--", *environment, *words],
            cwd=site.account.home,
            capture_output=True,
            text=True,
            check=True,
        )
        ids.append(done.stdout.strip())
        assert int(ids[-1]) <= int(job), "ids begin again"
        if ids[-1] != job:
            site.slurm.command("scancel", ids[-1])
    site.is_made_good("lost")
    # FAILED: the node may not start it, as the old job of that id still lives there.
    assert site.slurm.state(job) in ("RUNNING", "PENDING", "FAILED"), "another's job of our old id is not cancelled"
    site.slurm.cancel_all()


def test_a_controller_killed_while_it_launches_a_job_makes_no_second_training(bed: Testbed) -> None:
    """Whatever is left of it: the job runs on, or `launch failed requeued held` beside a copy that lives."""
    site = Karolina(bed, behave="good", seconds=5)
    controller = site.slurm.controller.pid
    assert controller is not None
    os.kill(controller, 9)
    site.slurm.start(fresh=False)
    site.until(lambda run: run["stage"] == "fetched", "the round")
    runs = [path for path in (site.federation.remote(SITE) / "runs").iterdir() if path.name.startswith("0001-")]
    for folder in runs:
        log = folder / "log"
        assert not log.exists() or log.read_text().count("trainer: begins") <= 1, folder
    assert len(runs) == site.run["attempt"]


def test_a_job_that_slurm_requeued_and_holds_after_a_failed_launch_is_given_up(bed: Testbed) -> None:
    """As after a controller's crash: the node says that it has the job already, the first copy trains on."""
    site = Karolina(bed)
    job = site.begin()
    site.slurm.command("scontrol", "update", f"JobId={job}", "Requeue=1")
    site.slurm.command("scontrol", "requeuehold", job)
    site.until(lambda run: run["attempt"] == 2, "the next attempt")
    site.is_made_good("infrastructure")


def test_the_operators_may_change_a_waiting_or_running_job(bed: Testbed) -> None:
    site = Karolina(bed, behave="good", seconds=4)
    site.slurm.command("scontrol", "update", f"JobId={site.job}", "TimeLimit=5")
    site.until(lambda run: run["stage"] == "fetched", "the round")
    assert site.run["attempt"] == 1
    assert Path(site.federation.place / "models" / "0001").is_dir()


def submitted(bed: Testbed) -> Federation:
    federation = Federation(bed, "full", karolina={"poll": {"claim_window": 600}})
    started = federation.flctl("campaign", "start", "--rounds", "1", "--sites", SITE, timeout=300)
    assert started.returncode == 0, started.stderr
    return federation


def is_waited_for(federation: Federation, words: str, *, times: int) -> None:
    """The run is tried again so many times, and no person is asked."""
    federation.wait(
        lambda: federation.flctl("campaign", "tick", timeout=300) and federation.run(SITE)["attempt"] > times,
        limit=600,
        what="the next attempts",
    )
    run = federation.run(SITE)
    assert {past["cause"] for past in run["past"]} == {"queue full"}
    assert words in run["past"][0]["reason"]
    shown = " ".join(federation.flctl("status").stdout.split())
    assert ("HELD" not in shown, "takes no more jobs" in shown) == (True, True)


def test_a_controller_that_takes_no_more_jobs_is_waited_for(bed: Testbed) -> None:
    """MaxJobCount: sbatch itself tries for two minutes; then the claim is revoked, and another attempt comes later."""
    slurm = bed.facilities[SITE].slurm
    other = slurm.command("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true").strip()
    before = set(slurm.jobs())
    with slurm.limited("MaxJobCount=1"):
        federation = submitted(bed)
        is_waited_for(federation, "Resource temporarily unavailable", times=1)
        assert set(slurm.jobs()) <= before
    slurm.command("scancel", other)
    assert federation.json("round")["data"]["model"]["version"] == 1
    assert federation.jobs_started(SITE) == 1


def test_a_limit_on_submitted_jobs_is_waited_for_and_costs_no_try(bed: Testbed) -> None:
    facility = bed.facilities[SITE]
    slurm, name = facility.slurm, facility.account_name
    limit = ("sacctmgr", "-i", "modify", "user", name, "set")
    with slurm.limited("AccountingStorageEnforce=associations,limits"):
        slurm.command(*limit, "MaxSubmitJobs=0")
        try:
            federation = submitted(bed)
            federation.set("[campaign]", "[retry]\nattempts = 2\n\n[campaign]")
            is_waited_for(federation, "AssocMaxSubmitJobLimit", times=3)
        finally:
            slurm.command(*limit, "MaxSubmitJobs=-1")
        assert federation.json("round")["data"]["model"]["version"] == 1
    assert federation.jobs_started(SITE) == 1
