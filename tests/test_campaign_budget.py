"""Node-hours: what a job costs, what counts as used and reserved, and what happens when a budget has no room."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flctl.campaign import budget
from flctl.campaign.rounds import LONGEST_PAUSE, _until_due
from flctl.campaign.workspace import Workspace
from flctl.facility.profile import Budget, Queue, Scheduler, Shape, Site
from flctl.records import Job, Order, Run, Stage, Work
from tests.campaigns import Campaign

HOUR = 3600.0


def a_site(shape: Shape | None = None, queues: dict[str, Queue] | None = None, **limits: Any) -> Site:
    return Site(
        schema=1,
        name="pisa",
        scheduler=Scheduler(kind="slurm", shape="s"),
        shapes={"s": shape or Shape(walltime=7200)},
        queues=queues or {},
        budget=Budget(**limits),
    )


def a_run(stage: Stage = Stage.RUNNING, spent: float = 0.0, changed_at: float = 0.0, **job: Any) -> Run:
    order = Order(site="pisa", work=Work.TRAIN, base=0, round=1, steps=1)
    facts = {"rate": 2.0, "walltime": 2 * HOUR} | job
    return Run(
        number=1,
        order=order,
        stage=stage,
        job=Job(token="f", **facts),
        spent=spent,
        created_at=0,
        changed_at=changed_at,
    )


@pytest.mark.parametrize(
    ("shape", "whole", "rate"),
    [
        (Shape(nodes=3), 0, 3.0),
        (Shape(nodes=3, gpus=2), 0, 3.0),  # whole nodes count
        (Shape(nodes=1, gpus=2), 8, 0.25),
        (Shape(nodes=2, gpus=8), 8, 2.0),
        (Shape(nodes=2, gpus=16), 8, 2.0),  # as the scheduler counts them there, halves of GPUs
        (Shape(nodes=2, gpus=0), 8, 2.0),
    ],
)
def test_an_hour_of_a_job_costs_its_nodes_or_the_part_of_them_that_it_gets(
    shape: Shape, whole: int, rate: float
) -> None:
    site = a_site(shape, gpus_per_node=whole)
    assert budget.rate(site) == rate
    assert budget.node_hours(site, 1800) == rate / 2
    assert budget.node_hours(site) == rate * shape.walltime / 3600


def test_partition_and_qos_each_charge_what_they_charge() -> None:
    queues = {"gpu": Queue(charge=2), "premium": Queue(charge=1.5), "other": Queue(charge=100)}
    assert budget.rate(a_site(Shape(nodes=2, partition="gpu", qos="premium"), queues)) == 6
    assert budget.rate(a_site(Shape(nodes=2, queue="gpu"), queues)) == 4
    assert budget.rate(a_site(Shape(nodes=2, partition="unknown"), queues)) == 2
    assert budget.rate(a_site(Shape(nodes=2, partition="gpu", qos="gpu"), queues)) == 4, "one table, one charge"
    assert budget.rate(a_site(Shape(nodes=2, partition="gpu,premium"), queues)) == 4, "the dearest that it may get"
    assert budget.rate(a_site(Shape(nodes=2, partition="cheap,unknown"), {"cheap": Queue(charge=0.5)})) == 2


def test_what_a_job_ran_is_used_and_what_it_may_still_run_is_reserved() -> None:
    run = a_run(elapsed=HOUR / 2, started_at=0.0)
    assert (budget.used_by(run), budget.reserved_by(run)) == (1.0, 3.0)
    assert budget.reserved_by(a_run(elapsed=5 * HOUR)) == 0, "a job past its walltime"
    assert (budget.used_by(a_run(Stage.QUEUED)), budget.reserved_by(a_run(Stage.QUEUED))) == (0.0, 4.0)
    assert budget.reserved_by(a_run(Stage.ORDERED, rate=None, walltime=None)) == 0, "not admitted yet"


@pytest.mark.parametrize("stage", [Stage.FAILED, Stage.FETCHED])
def test_of_a_closed_run_nothing_is_reserved(stage: Stage) -> None:
    run = a_run(stage, elapsed=HOUR, started_at=0.0, ended_at=HOUR)
    assert (budget.used_by(run), budget.reserved_by(run)) == (2.0, 0.0)
    assert budget.reserved_by(replace(run, stage=Stage.ENDED)) == 0, "its job is over, its files are still to come"


def test_earlier_attempts_count() -> None:
    assert budget.used_by(a_run(elapsed=HOUR, spent=5.0)) == 7.0


def test_a_cancelled_job_whose_end_nobody_told_ran_until_then() -> None:
    run = a_run(Stage.FAILED, started_at=1000.0, changed_at=1000 + HOUR, elapsed=10.0)
    assert budget.elapsed(run) == HOUR
    assert budget.elapsed(replace(run, job=replace(run.job, started_at=None, elapsed=None))) == 0
    assert budget.elapsed(replace(run, job=replace(run.job, absent_at=1e6))) == 10


def test_a_record_without_a_rate_is_charged_as_the_profile_says_now() -> None:
    run = a_run(Stage.FETCHED, rate=None, walltime=None, started_at=0.0, ended_at=HOUR)
    assert budget.used_by(run, 3.0) == 3.0


# ---- whole campaigns ----


def limit(campaign: Campaign, site: str, most: float) -> None:
    path = campaign.place / "sites" / f"{site}.toml"
    text = path.read_text().split("\n[budget]")[0]
    path.write_text(text + f"\n[budget]\nmax_node_hours = {most}\n")


def limit_all(campaign: Campaign, most: float) -> None:
    path = campaign.place / "flctl.toml"
    path.write_text(path.read_text().split("\n[budget]")[0] + f"\n[budget]\nmax_node_hours = {most}\n")


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    """Each job may run 10 minutes: a sixth of a node-hour."""
    return Campaign(tmp_path)


def test_a_plan_whose_first_round_has_no_room_is_refused_with_exit_9(campaign: Campaign) -> None:
    limit(campaign, "pisa", 0.1)
    answer = campaign.json("round", code=9)
    (error,) = answer["errors"]
    assert (error["code"], error["site"]) == ("budget_refused", "pisa")
    assert "0 of 0.1 node-hours are used" in error["message"]
    assert "sites/pisa.toml" in error["hint"]
    assert not (campaign.place / "plan.json").exists()
    assert campaign.json("round", "--dry-run", code=9)["errors"]
    limit(campaign, "pisa", 0.2)
    limit_all(campaign, 0.3)
    (error,) = campaign.json("round", code=9)["errors"]
    assert "flctl.toml" in error["message"]
    assert not (campaign.place / "runs").exists() or not any((campaign.place / "runs").iterdir())


def test_a_run_without_room_is_held_until_the_budget_is_raised_and_the_site_released(campaign: Campaign) -> None:
    """There is room for one job at its walltime, and never for two."""
    limit(campaign, "pisa", 0.1667)
    answer = campaign.json("round", "--rounds", "2", code=9)
    assert answer["data"]["model"]["version"] == 1
    (error,) = answer["errors"]
    assert (error["code"], error["site"]) == ("budget_refused", "pisa")
    assert "HELD: budget: " in error["message"] and "0.1667 node-hours" in error["message"]
    assert "flctl release pisa" in error["hint"]
    assert campaign.attempts("pisa") == ["0001-1"], "nothing was delivered or submitted"
    run = campaign.run("pisa", 2)
    assert (run["stage"], run["job"]["rate"]) == ("ordered", None)
    told = campaign.flctl("status").stdout
    assert "pisa: run 0002 is HELD: budget:" in told
    assert "node-hours, pisa: " in told and "of 0.1667" in told
    rows = {row["site"]: row for row in campaign.json("status")["data"]["node_hours"]}
    assert 0 < rows["pisa"]["used"] < 0.1 and rows["pisa"]["max"] == 0.1667
    assert rows[None]["used"] == pytest.approx(rows["pisa"]["used"] + rows["brno"]["used"], abs=1e-5)

    assert campaign.json("round", code=9)["errors"] == [error], "released only by a person"
    assert campaign.json("campaign", "tick")["status"] == "partial", "told, but no new trouble"
    assert campaign.flctl("release", "pisa").returncode == 0
    assert campaign.json("round", code=9)["errors"][0]["code"] == "budget_refused", "and only once there is room"
    limit(campaign, "pisa", 1)
    assert campaign.flctl("release", "pisa").returncode == 0
    assert campaign.json("round")["data"]["model"]["version"] == 2


def test_two_sites_do_not_share_the_last_room_of_the_campaign(campaign: Campaign) -> None:
    """Both are admitted at the same moment, each by a thread of its own; the plan was made while there was more."""
    limit_all(campaign, 0.34)
    assert campaign.flctl("campaign", "start", "--rounds", "1").returncode == 0
    limit_all(campaign, 0.25)
    answer = campaign.json("round", code=9)
    assert [error["code"] for error in answer["errors"]] == ["budget_refused"]
    submitted = {entry["site"] for entry in campaign.journal() if entry["event"] == "run" and entry["job_id"]}
    held = {entry["site"] for entry in campaign.journal() if entry["event"] == "held"}
    assert len(submitted) == len(held) == 1 and submitted | held == {"brno", "pisa"}


def test_failed_attempts_count_and_so_do_evaluations(campaign: Campaign) -> None:
    campaign.set("cross = false", "cross = true")
    campaign.profile("pisa", behave="fail", seconds=1)
    campaign.json("round", code=6)
    failed = campaign.run("pisa")
    assert failed["job"]["elapsed"] >= 1
    campaign.profile("pisa", seconds=1)
    assert campaign.flctl("retry", "pisa").returncode == 0
    retried = campaign.run("pisa")
    assert retried["spent"] == pytest.approx(failed["job"]["elapsed"] / 3600)
    assert retried["job"]["rate"] is None
    campaign.json("round")
    rows = {row["site"]: row for row in campaign.json("status")["data"]["node_hours"]}
    evaluation = campaign.run("pisa", 2)
    assert evaluation["order"]["work"] == "evaluate"
    attempts = [failed["job"], campaign.run("pisa")["job"], evaluation["job"]]
    assert all(job["elapsed"] > 0.5 for job in attempts)
    assert rows["pisa"]["used"] == pytest.approx(sum(job["elapsed"] for job in attempts) / 3600, abs=1e-5)


def test_a_changed_shape_does_not_change_what_was_used(campaign: Campaign) -> None:
    campaign.json("round")
    before = campaign.json("status")["data"]["node_hours"]
    path = campaign.place / "sites" / "pisa.toml"
    path.write_text(path.read_text().replace("[shapes.small]", "[shapes.small]\nnodes = 50"))
    assert campaign.json("status")["data"]["node_hours"] == before


def test_a_held_run_may_be_skipped_and_is_held_no_more(campaign: Campaign) -> None:
    """Until then it makes nobody look at its site, however long that was due."""
    limit(campaign, "pisa", 0.1667)
    campaign.json("round", "--rounds", "2", code=9)
    workspace = Workspace(campaign.place)
    workspace.save_contact("pisa", replace(workspace.contact("pisa"), due=0.0))
    assert _until_due(workspace, [workspace.run("pisa", 2)], None) == pytest.approx(LONGEST_PAUSE, abs=0.1)
    assert campaign.flctl("skip", "pisa").returncode == 0
    assert campaign.run("pisa", 2)["held"] is None
    assert campaign.json("round")["data"]["model"]["version"] == 2


def test_status_tells_what_it_can_of_a_campaign_with_a_broken_profile(campaign: Campaign) -> None:
    campaign.json("round")
    (campaign.place / "sites" / "pisa.toml").write_text("budget = 3 =\n")
    assert campaign.json("status")["data"]["node_hours"][0]["site"] == "brno"


def test_a_running_job_is_counted_while_it_runs(campaign: Campaign) -> None:
    campaign.profile("pisa", behave="hang")
    process = campaign.popen("round")
    campaign.wait(lambda: (campaign.run("pisa").get("job") or {}).get("elapsed"))
    rows = {row["site"]: row for row in campaign.json("status")["data"]["node_hours"]}
    assert rows["pisa"]["used"] > 0
    assert rows["pisa"]["used"] + rows["pisa"]["reserved"] == pytest.approx(1 / 6, abs=1e-5)
    began = time.time()
    assert campaign.flctl("cancel").returncode == 0
    process.wait(timeout=60)
    rows = {row["site"]: row for row in campaign.json("status")["data"]["node_hours"]}
    assert rows["pisa"]["reserved"] == 0
    assert rows["pisa"]["used"] >= (began - campaign.run("pisa")["job"]["started_at"] - 1) / 3600
