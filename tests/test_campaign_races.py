"""Exactly one training per run, where a site cannot be told, forgets a claim, or its files cannot be read."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from flctl.campaign.workspace import Workspace
from flctl.records import Job, Order, Run, Work, token_of
from tests.campaigns import Campaign


@pytest.fixture
def single(tmp_path: Path) -> Iterator[Campaign]:
    campaign = Campaign(tmp_path, sites=("pisa",))
    yield campaign
    with suppress(ProcessLookupError):
        campaign.kill_job("pisa")


def state(campaign: Campaign, attempt: str) -> str:
    card = campaign.remote("pisa") / "runs" / attempt / "job.card"
    return str(json.loads(card.read_text())["state"]) if card.exists() else ""


def hanging(campaign: Campaign) -> None:
    """A job at pisa that would never end by itself, and nobody who looks at it."""
    campaign.profile("pisa", behave="hang")
    assert campaign.flctl("campaign", "start", "--rounds", "1").returncode == 0
    campaign.wait(lambda: campaign.flctl("campaign", "tick") and campaign.run("pisa")["stage"] == "running")


@pytest.mark.parametrize("goes_on", ["retry", "round"])
def test_a_job_that_could_not_be_cancelled_is_cancelled_before_its_site_trains_again(
    single: Campaign, goes_on: str
) -> None:
    """flctl gave the run up while nobody there could be told; once that is possible it comes first."""
    hanging(single)
    path = single.place / "sites" / "pisa.toml"
    path.write_text(path.read_text().replace('seal_python = "', 'seal_python = "/nowhere'))
    answer = single.flctl("cancel")
    assert (answer.returncode, "may still run at pisa" in answer.stderr) == (6, True)
    assert (single.run("pisa")["stage"], state(single, "0001-1")) == ("failed", "RUNNING")
    single.profile("pisa")
    if goes_on == "retry":
        assert single.flctl("retry", "pisa").returncode == 0
        single.json("round", code=None)
        assert single.run("pisa")["stage"] == "fetched"
        assert single.attempts("pisa") == ["0001-1", "0001-2"]
    else:
        assert single.json("round", "--rounds", "1")["data"]["done"]
        assert single.attempts("pisa") == ["0001-1", "0002-1"]
    assert state(single, "0001-1") == "CANCELLED"
    assert single.run("pisa")["job"]["ending"] == "", "nobody is told twice"


def test_a_claim_that_a_purge_took_is_no_claim_for_ever(single: Campaign) -> None:
    """No folder, no job, nobody who remembers either: after the claim's window it is lost, and tried again."""
    hanging(single)
    single.profile("pisa")
    single.kill_job("pisa")
    shutil.rmtree(single.remote("pisa") / "runs" / "0001-1")
    assert single.json("round", "--wait", "60")["data"]["done"]
    assert [past["cause"] for past in single.run("pisa")["past"]] == ["lost"]


def test_a_record_that_cannot_be_read_is_not_one_that_is_missing(single: Campaign) -> None:
    """As with a file server that is away: nothing is concluded, and the training that was done still counts."""
    hanging(single)
    folder = single.remote("pisa") / "runs" / "0001-1"
    single.kill_job("pisa")
    (folder / "done.json").mkdir()
    answer = single.json("round", "--wait", "5", code=None)
    assert "cannot be read" in json.dumps(answer["errors"])
    assert (single.run("pisa")["stage"], single.run("pisa")["attempt"]) == ("running", 1)


def test_what_a_tick_orders_while_everything_is_being_cancelled_is_cancelled_too(tmp_path: Path) -> None:
    """flctl cancel looked which runs there are, then waited for the tick to decide, then ended the plan."""
    campaign = Campaign(tmp_path, sites=("pisa",))
    assert campaign.flctl("campaign", "start", "--rounds", "1").returncode == 0
    workspace, now = Workspace(campaign.place), time.time()
    order = Order(site="pisa", work=Work.TRAIN, base=0, round=1, plan=1, steps=4, total_steps=4)
    with workspace.lock_campaign():
        process = campaign.popen("cancel")
        time.sleep(2)  # it waits for us by now; if it does not yet, this test sees less
        token = token_of(workspace.id, "pisa", 9, 1)
        workspace.save_run(Run(number=9, order=order, job=Job(token=token), created_at=now, changed_at=now))
    text, _ = process.communicate(timeout=60)
    assert (process.returncode, "run 0009 is cancelled" in text) == (0, True), text
