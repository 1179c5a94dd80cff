"""Exactly one training per run on real Slurm: a controller or a file system that is away at the wrong moment."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.federation import Federation
from tests.test_cli_attempts_testbed import wipe
from tests.testbed import Testbed


@pytest.fixture
def bed(testbed: Testbed) -> Iterator[Testbed]:
    testbed.reset()
    yield testbed
    testbed.user.end_processes()
    for facility in testbed.facilities.values():
        facility.account.end_processes()


def tick(federation: Federation, site: str) -> dict[str, Any]:
    federation.json("campaign", "tick", code=None)
    time.sleep(0.5)
    return federation.run(site)


def training(federation: Federation, site: str, attempts: int = 1) -> str:
    """The id of the job of the latest attempt, once it trains."""
    slurm = federation.bed.facilities[site].slurm
    federation.wait(lambda: federation.jobs_started(site) == attempts, what="the trainer")
    federation.wait(lambda: federation.run(site)["stage"] == "running", what="the job to be seen")
    job = str(federation.run(site)["job"]["id"])
    slurm.wait_state(job, "RUNNING")
    return job


def test_a_cancellation_that_a_kill_interrupted_is_not_over_before_the_job_is_cancelled(bed: Testbed) -> None:
    """flctl cancel was killed before it told the site; now the controller is away, so nobody can be told."""
    federation = Federation(bed, "ending", karolina={"train": {"behave": "hang"}})
    slurm = bed.facilities["karolina"].slurm
    assert federation.flctl("campaign", "start", "--rounds", "1", "--sites", "karolina").returncode == 0
    federation.wait(lambda: tick(federation, "karolina").get("stage") == "running")
    job = training(federation, "karolina")
    killed = federation.flctl("cancel", "karolina", env={"FLCTL_FAULT": "ending-recorded"})
    assert killed.returncode != 0 and federation.run("karolina")["job"]["ending"]
    controller = slurm.controller.pid
    assert controller is not None
    os.kill(controller, signal.SIGSTOP)
    try:
        assert tick(federation, "karolina")["stage"] == "running", "it still trains"
    finally:
        os.kill(controller, signal.SIGCONT)
    federation.wait(
        lambda: federation.flctl("release", "karolina") and tick(federation, "karolina")["stage"] == "failed"
    )
    assert federation.run("karolina")["failure"]["cause"] == "cancelled by flctl"
    slurm.wait_state(job, "CANCELLED")


def test_a_file_system_that_is_away_does_not_make_a_training_that_is_done_be_done_again(bed: Testbed) -> None:
    """The login host loses it while a kept connection looks; the job's record is there when it comes back."""
    federation = Federation(bed, "away", karolina={"train": {"seconds": 6}})
    root = bed.facilities["karolina"].workdir
    process = federation.popen("round", "--sites", "karolina")
    training(federation, "karolina")
    os.killpg(process.pid, signal.SIGSTOP)
    record = federation.remote("karolina") / "runs" / "0001-1" / "done.json"
    federation.wait(record.exists, what="the record")
    away = root.rename(root.with_name("away"))
    root.write_text("no folder: as when nothing is mounted there")
    os.killpg(process.pid, signal.SIGCONT)
    federation.wait(lambda: "trouble" in [line["event"] for line in federation.journal()] or process.poll())
    root.unlink()
    away.rename(root)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    run = federation.run("karolina")
    assert (run["stage"], run["attempt"], federation.jobs_started("karolina")) == ("fetched", 1, 1)


def test_a_site_without_accounting_requeues_a_job_and_then_loses_its_controllers_state(bed: Testbed) -> None:
    """Absence from the queue is all that is known there. Each attempt trains once, the last one counts."""
    bed.reset_codes(period=10)
    federation = Federation(bed, "forgotten", leonardo={"train": {"behave": "hang"}})
    slurm = bed.facilities["leonardo"].slurm
    process = federation.popen("round", "--sites", "leonardo")
    job = training(federation, "leonardo")
    slurm.command("scontrol", "update", f"JobId={job}", "Requeue=1")
    slurm.command("scontrol", "requeue", job)
    federation.wait(lambda: federation.run("leonardo")["attempt"] == 2, what="the second attempt")
    training(federation, "leonardo", attempts=2)
    federation.lay("leonardo", train={"behave": "good"})
    wipe(slurm)
    text, _ = process.communicate(timeout=180)
    assert process.returncode == 0, text
    run = federation.run("leonardo")
    assert [past["cause"] for past in run["past"]] == ["infrastructure", "lost"]
    for folder in (federation.remote("leonardo") / "runs").iterdir():
        assert (folder / "log").read_text().count("trainer: begins") == 1, folder
