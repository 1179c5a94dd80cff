"""Attempts: what flctl tries again by itself and what waits for a person; on local sites, with real jobs."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flctl.campaign.attempts import may_follow, pause, tries
from flctl.facility.profile import Scheduler, Shape, Site
from flctl.records import Attempt, Cause, Failure, Job, Order, Run, Stage, Work
from tests.campaigns import Campaign


@pytest.fixture
def single(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path, sites=("pisa",))


def ended(campaign: Campaign) -> list[tuple[int, str]]:
    """The attempts that the journal says ended without success, with their causes."""
    lines = [entry for entry in campaign.journal() if entry.get("stage") == "failed" and "cause" in entry]
    return [(entry["attempt"], entry["cause"]) for entry in lines]


def cancel_by_hand(campaign: Campaign) -> None:
    """As somebody at the site would: by the queue's own means, past flctl."""
    root = campaign.remote("pisa")
    (payload,) = (root / "payload").iterdir()
    token = campaign.run("pisa")["job"]["token"]
    words = [sys.executable, str(payload / "batch.py"), "cancel", str(root / "runs"), "--name", token]
    subprocess.run(words, check=True, timeout=30)


def held_after_a_foreign_cancellation(campaign: Campaign) -> None:
    campaign.profile("pisa", behave="hang")
    process = campaign.popen("round")
    campaign.wait(lambda: campaign.run("pisa").get("stage") == "running", what="a job")
    cancel_by_hand(campaign)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 6, text
    assert "cancelled at the site" in " ".join(text.split())
    run = campaign.run("pisa")
    assert (run["stage"] not in ("failed", "fetched"), run["attempt"]) == (True, 1)
    assert "not by flctl" in run["held"]["reason"]


def test_a_job_lost_with_its_machine_is_tried_again_and_its_late_record_is_never_taken(single: Campaign) -> None:
    single.profile("pisa", behave="hang")
    process = single.popen("round")
    single.wait(lambda: single.run("pisa").get("stage") == "running")
    single.profile("pisa", seconds=2)
    single.kill_job("pisa")
    single.wait(lambda: (single.remote("pisa") / "runs" / "0001-2" / "owner").exists(), limit=120, what="attempt 2")
    first = single.remote("pisa") / "runs" / "0001-1"
    order = json.loads((first / "order.json").read_text())
    late = {key: order[key] for key in ("token", "campaign", "site", "number", "attempt", "work", "base")}
    late |= {"schema": 1, "outcome": "done", "reason": "", "steps": 4, "samples": 999, "tokens": 9, "files": []}
    late |= {"started_at": 1.0, "ended_at": 2.0, "job_id": "1.1", "metrics": {}}
    (first / "done.json").write_text(json.dumps(late))
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    run = single.run("pisa")
    assert (run["attempt"], run["contribution"]["samples"]) == (2, 10)
    assert ended(single) == [(1, "lost")]
    assert [(past["number"], past["cause"], past["automatic"]) for past in run["past"]] == [(1, "lost", True)]
    row = single.json("status")["data"]["runs"][0]
    assert row["attempts"][0]["job_id"] == run["past"][0]["job_id"]


def test_automatic_attempts_are_capped_and_a_person_may_allow_more(single: Campaign) -> None:
    single.set("[campaign]", "[retry]\nattempts = 2\n\n[campaign]")
    single.profile("pisa", behave="die")
    answer = single.json("round", code=6)
    assert "ended without a record" in answer["errors"][0]["message"]
    assert single.attempts("pisa") == ["0001-1", "0001-2"]
    assert single.json("round", code=6)["errors"][0]["hint"].endswith("flctl retry pisa")
    assert single.attempts("pisa") == ["0001-1", "0001-2"], "asking again opens none"
    assert single.flctl("retry", "pisa").returncode == 0
    single.json("round", code=6)
    assert single.attempts("pisa") == ["0001-1", "0001-2", "0001-3", "0001-4"]
    assert [past["automatic"] for past in single.run("pisa")["past"]] == [True, False, True]
    single.profile("pisa")
    assert single.flctl("retry", "pisa").returncode == 0
    assert single.json("round")["data"]["done"]


def purge_at_the_start(campaign: Campaign, path: str, *, once: bool) -> None:
    """As a site's purge would while the job waits: what it is to start from is gone when it starts."""
    template = campaign.place / "templates" / "local.sh"
    mark, begin = campaign.root / "purged", "# Take the attempt"
    words = f"[ -e {mark} ] || rm -f {path}\n" + (f"touch {mark}\n" if once else "")
    template.write_text(template.read_text().replace(begin, words + begin, 1))


@pytest.mark.parametrize("path", ["{{workdir}}/models/0000/*.safetensors", "{{run}}/order.json"])
def test_what_was_purged_while_the_job_waited_is_brought_again_without_a_person(single: Campaign, path: str) -> None:
    purge_at_the_start(single, path, once=True)
    assert single.json("round")["data"]["model"]["version"] == 1
    assert ended(single) == [(1, "infrastructure")]
    assert (single.attempts("pisa"), single.submissions("pisa")) == (["0001-1", "0001-2"], 1)


def test_what_is_purged_again_and_again_is_brought_as_often_as_retry_says(single: Campaign) -> None:
    single.set("[campaign]", "[retry]\nattempts = 2\n\n[campaign]")
    purge_at_the_start(single, "{{workdir}}/models/0000/*.safetensors", once=False)
    assert "is not the one that was ordered" in single.json("round", code=6)["errors"][0]["message"]
    assert single.attempts("pisa") == ["0001-1", "0001-2"]


def test_a_program_that_fails_is_not_tried_again(single: Campaign) -> None:
    single.profile("pisa", behave="fail")
    single.json("round", code=6)
    assert single.attempts("pisa") == ["0001-1"]
    assert single.run("pisa")["failure"]["cause"] == "program"


def test_a_job_out_of_time_goes_on_from_its_checkpoint(single: Campaign) -> None:
    """Six steps of one second, in jobs of four: what one saved the next begins with, and nobody asks a person."""
    single.set("steps = 4", "steps = 6")
    single.profile("pisa", walltime="00:00:04", step_seconds=1)
    answer = single.json("round")
    run = single.run("pisa")
    assert answer["data"]["model"]["version"] == 1
    assert run["attempt"] >= 2
    assert {cause for _, cause in ended(single)} == {"time"}
    saved = [past["progress"] for past in run["past"]]
    assert saved == sorted(set(saved))
    logs = [(single.remote("pisa") / "runs" / name / "log").read_text() for name in single.attempts("pisa")]
    assert "goes on from step 0" in logs[0]
    assert "goes on from step 0" not in logs[-1]
    assert not list((single.remote("pisa") / "runs").glob("*/checkpoint")), "of no use once it is done"


def test_a_job_out_of_time_that_got_no_further_waits_for_a_person(single: Campaign) -> None:
    single.profile("pisa", walltime="00:00:02", behave="hang")
    answer = single.json("round", code=6)
    assert "TIMEOUT" in answer["errors"][0]["message"]
    assert single.run("pisa")["failure"]["cause"] == "time"
    assert single.attempts("pisa") == ["0001-1"]


def test_a_job_that_somebody_else_cancelled_is_not_sent_again_until_a_person_says_so(single: Campaign) -> None:
    held_after_a_foreign_cancellation(single)
    assert single.json("campaign", "tick")["status"] == "partial"
    assert single.json("round", code=6)["errors"][0]["hint"].endswith("flctl retry pisa or flctl skip pisa")
    assert single.attempts("pisa") == ["0001-1"]
    refused = single.flctl("release", "pisa")
    assert refused.returncode == 2
    assert "flctl retry pisa" in refused.stderr
    shown = " ".join(single.flctl("status").stdout.split())
    assert "HELD: job" in shown and "flctl skip pisa" in shown
    single.profile("pisa")
    assert single.flctl("retry", "pisa").returncode == 0
    assert single.json("round")["data"]["model"]["version"] == 1
    assert single.attempts("pisa") == ["0001-1", "0001-2"]


def test_a_run_whose_job_somebody_cancelled_can_be_cancelled(single: Campaign) -> None:
    held_after_a_foreign_cancellation(single)
    assert single.flctl("cancel", "pisa").returncode == 0
    run = single.run("pisa")
    assert (run["stage"], run["held"], run["failure"]["cause"]) == ("failed", None, "cancelled by flctl")


def test_a_site_whose_job_somebody_cancelled_can_be_left_out(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    campaign.profile("pisa", behave="hang")
    process = campaign.popen("round")
    campaign.wait(lambda: campaign.run("pisa").get("stage") == "running", what="a job")
    cancel_by_hand(campaign)
    process.communicate(timeout=120)
    assert process.returncode == 6
    assert campaign.flctl("skip", "pisa").returncode == 0
    assert campaign.json("round")["data"]["model"]["version"] == 1


@pytest.mark.parametrize("point", ["ending-recorded", "cancelled"])
def test_a_cancellation_cut_off_by_a_kill_is_carried_out_and_is_ours(single: Campaign, point: str) -> None:
    """What flctl set out to cancel is marked before the site is told; nobody takes it for somebody else's doing."""
    single.profile("pisa", behave="hang")
    single.flctl("campaign", "start", "--rounds", "1")
    single.flctl("campaign", "tick")
    single.wait(lambda: single.submissions("pisa") == 1, what="the job")
    assert single.flctl("cancel", "pisa", FLCTL_FAULT=point).returncode == -9
    assert single.run("pisa")["stage"] != "failed"
    single.wait(lambda: single.json("campaign", "tick", code=None) and single.run("pisa")["stage"] == "failed")
    assert single.run("pisa")["failure"]["message"] == "cancelled with flctl cancel"
    card = single.remote("pisa") / "runs" / "0001-1" / "job.card"
    single.wait(lambda: json.loads(card.read_text())["state"] == "CANCELLED")


def test_a_kill_while_an_attempt_is_given_up_leaves_one_successor(single: Campaign) -> None:
    single.profile("pisa", behave="die")
    single.flctl("campaign", "start", "--rounds", "1")
    for point in ("revocation-recorded", "revoked", "run-record", "run-recorded"):
        single.wait(
            lambda point=point: (
                single.flctl("campaign", "tick", FLCTL_FAULT=point).returncode == -9
                or single.run("pisa")["attempt"] > 1
            ),
            limit=120,
            what=point,
        )
    single.profile("pisa")
    assert single.json("round")["data"]["model"]["version"] == 1
    run = single.run("pisa")
    assert [past["cause"] for past in run["past"]] == ["lost"] * (run["attempt"] - 1)
    assert single.attempts("pisa") == [f"0001-{number}" for number in range(1, run["attempt"] + 1)]


def test_a_state_that_nobody_knows_is_no_end_and_is_journaled_once(single: Campaign) -> None:
    single.profile("pisa", behave="hang")
    single.flctl("campaign", "start", "--rounds", "1")
    single.flctl("campaign", "tick")
    single.wait(lambda: single.submissions("pisa") == 1, what="the job")
    single.profile("pisa")
    single.kill_job("pisa")
    card = single.remote("pisa") / "runs" / "0001-1" / "job.card"
    known = card.read_text()
    card.write_text(json.dumps(json.loads(known) | {"state": "ASTRAY"}))

    def looks() -> int:
        single.json("campaign", "tick")
        return len([entry for entry in single.journal() if entry["event"] == "unknown state"])

    single.wait(looks, what="a look")
    for _ in range(3):
        time.sleep(1)
        assert looks() == 1
    assert single.run("pisa")["stage"] == "running"
    card.write_text(known)
    assert single.json("round")["data"]["model"]["version"] == 1
    assert ended(single) == [(1, "lost")]


def a_run(cause: Cause | None, *past: Attempt, progress: int | None = None) -> Run:
    failure = Failure(code="job_failed", exit_code=6, message="", cause=cause)
    order = Order(site="brno", work=Work.TRAIN, base=0, round=1, steps=10)
    return Run(
        number=1,
        order=order,
        stage=Stage.FAILED,
        attempt=len(past) + 1,
        job=Job(token="t", progress=progress),
        failure=failure,
        past=past,
        created_at=0.0,
        changed_at=0.0,
    )


def an_attempt(cause: Cause = Cause.LOST, *, automatic: bool = True, progress: int | None = None) -> Attempt:
    return Attempt(number=1, job_id=None, cause=cause, reason="", automatic=automatic, progress=progress)


@pytest.mark.parametrize("cause", [*Cause, None])
def test_what_is_tried_again_without_a_person(cause: Cause | None) -> None:
    assert may_follow(a_run(cause), 3) == (cause in (Cause.INFRASTRUCTURE, Cause.LOST, Cause.FULL))


def test_at_most_so_many_tries_in_a_row() -> None:
    two = (an_attempt(), an_attempt())
    assert may_follow(a_run(Cause.LOST, *two[:1]), 3)
    assert not may_follow(a_run(Cause.LOST, *two), 3)
    assert not may_follow(a_run(Cause.LOST), 1)
    asked = (*two, an_attempt(automatic=False))
    assert (tries(a_run(Cause.LOST, *asked)), may_follow(a_run(Cause.LOST, *asked), 3)) == (1, True)


def test_time_is_given_only_to_what_gets_further() -> None:
    before = an_attempt(Cause.TIME, progress=40)
    further: list[Any] = [(a_run(Cause.TIME, progress=1), True), (a_run(Cause.TIME, progress=0), False)]
    further += [(a_run(Cause.TIME, before, progress=progress), progress > 40) for progress in (39, 40, 41)]
    assert all(may_follow(run, 9) == expected for run, expected in further)
    assert not may_follow(replace(further[0][0], skipped=True), 9)


def test_a_full_queue_is_waited_for_as_long_as_it_takes_and_costs_no_try() -> None:
    """Ever more seldom, up to an hour; where each contact is a login, not more often than these."""
    full = an_attempt(Cause.FULL)
    assert may_follow(a_run(Cause.FULL, *[full] * 50), 1)
    assert (tries(a_run(Cause.LOST, *[full] * 50)), may_follow(a_run(Cause.LOST, *[full] * 50), 3)) == (1, True)
    assert not may_follow(a_run(Cause.LOST, full, *[an_attempt()] * 2), 3)
    site = Site(
        schema=1, name="brno", connection="ssh", scheduler=Scheduler(kind="slurm"), shapes={"x": Shape(walltime=60)}
    )
    waits = [pause(a_run(Cause.FULL, *[full] * times), site, stays=True) for times in (0, 1, 2, 6, 200)]
    assert waits == [60, 120, 240, 3600, 3600]
    assert pause(a_run(Cause.FULL, full, an_attempt()), site, stays=True) == 60, "anew after another end"
    assert pause(a_run(Cause.FULL), site, stays=False) == 86400 / site.login.per_day
