"""The verdict: done.json alone is success, a failed query changes nothing, absence counts only when seen twice."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from flctl.campaign.report import run_row
from flctl.campaign.verdict import Evidence, after_revoking, judge
from flctl.facility.scheduler import Activity, Seen
from flctl.records import Contact, Job, Order, Run, Stage, Work, from_data, to_data

NOW, ABSENCE, WINDOW = 1000.0, 60.0, 300.0
OWNER = {"by": "job", "job_id": "17", "nonce": "n", "time": 900.0, "base": "0000"}
OURS = {"by": "flctl", "job_id": None, "nonce": "r", "time": 950.0}


def a_run(stage: Stage = Stage.QUEUED, **job: Any) -> Run:
    order = Order(site="brno", work=Work.TRAIN, base=0, round=1, steps=10)
    return Run(
        number=1,
        order=order,
        stage=stage,
        job=Job(token="ftoken", **({"id": "17"} | job)),
        created_at=0.0,
        changed_at=0.0,
    )


def seen(state: str, activity: Activity, name: str = "ftoken", job_id: str = "17", **facts: Any) -> Seen:
    values = {"submitted_at": 800.0, "started_at": None, "expected_start": None, "expected_end": None, "reason": ""}
    return Seen(id=job_id, name=name, state=state, activity=activity, **(values | facts))


def done(**changes: Any) -> dict[str, Any]:
    record = {
        "schema": 1, "token": "ftoken", "campaign": "c", "site": "brno", "number": 1, "attempt": 1, "work": "train",
        "outcome": "done", "reason": "", "exit_status": 0, "base": {"version": 0, "sha256": "base"}, "steps": 10,
        "samples": 80, "tokens": 800, "claimed_at": 800.0, "started_at": 900.0, "ended_at": 990.0, "job_id": "17",
        "host": "h", "files": [{"path": "model.safetensors", "size": 3, "sha256": "aa"}], "metrics": {},
    }  # fmt: skip
    return record | changes


def evidence(**facts: Any) -> Evidence:
    return Evidence(**({"seen": (), "job_id": "17", "base_sha256": "base", "claim_age": 100.0} | facts))


def verdict(run: Run, given: Evidence, now: float = NOW) -> Any:
    return judge(run, given, now=now, absence=ABSENCE, window=WINDOW)


PENDING = seen("PENDING", Activity.WAITING, reason="Priority")
RUNNING = seen("RUNNING", Activity.ACTIVE)
COMPLETED = seen("COMPLETED", Activity.ENDED)
TIMEOUT = seen("TIMEOUT", Activity.ENDED)


@pytest.mark.parametrize("listing", [None, (), (RUNNING,), (COMPLETED,), (TIMEOUT,), (PENDING,)])
def test_a_record_of_success_is_success_whatever_the_scheduler_says(listing: Any) -> None:
    told = verdict(a_run(), evidence(seen=listing, owner=OWNER, done=done()))
    assert told.stage == Stage.ENDED
    assert (told.contribution.samples, told.job.started_at, told.job.ended_at) == (80, 900.0, 990.0)


def test_completed_without_a_record_is_never_success() -> None:
    first = verdict(a_run(Stage.RUNNING), evidence(seen=(COMPLETED,), owner=OWNER))
    assert (first.stage, first.revoke) == (Stage.RUNNING, False)
    later = verdict(replace(a_run(Stage.RUNNING), job=first.job), evidence(seen=(COMPLETED,), owner=OWNER), NOW + 60)
    assert later.revoke
    end = after_revoking(a_run(), later.job, OWNER, None, "base")
    assert end.stage == Stage.FAILED
    assert "ended without a record" in end.failure.message
    assert "COMPLETED" in end.failure.message


@pytest.mark.parametrize("stage", [Stage.CLAIMED, Stage.QUEUED, Stage.RUNNING])
def test_a_failed_query_changes_nothing_however_often(stage: Stage) -> None:
    run = a_run(stage)
    for moment in (NOW, NOW + 1e6):
        told = verdict(run, evidence(seen=None, job_id=None), moment)
        assert (told.stage, told.revoke, told.job.absent_at) == (stage, False, None)


def test_absence_counts_only_when_seen_twice_far_enough_apart() -> None:
    run = a_run(Stage.RUNNING)
    first = verdict(run, evidence(owner=OWNER))
    assert (first.revoke, first.job.absent_at) == (False, NOW)
    run = replace(run, job=first.job)
    assert not verdict(run, evidence(owner=OWNER), NOW + 59).revoke
    assert verdict(run, evidence(owner=OWNER), NOW + 60).revoke
    back = verdict(run, evidence(owner=OWNER, seen=(RUNNING,)), NOW + 61)
    assert (back.revoke, back.job.absent_at) == (False, None)


def test_waiting_and_running_are_told_apart_and_times_are_kept() -> None:
    told = verdict(a_run(Stage.CLAIMED, id=None), evidence(seen=(PENDING,), claimed_at=800.0))
    assert (told.stage, told.job.id, told.job.state, told.job.reason) == (Stage.QUEUED, "17", "PENDING", "Priority")
    told = verdict(a_run(), evidence(seen=(RUNNING,), owner=OWNER))
    assert (told.stage, told.job.started_at) == (Stage.RUNNING, 900.0)


def test_a_claim_without_an_id_is_found_by_its_name() -> None:
    told = verdict(a_run(Stage.CLAIMED, id=None), evidence(seen=(RUNNING,), job_id=None))
    assert (told.stage, told.job.id) == (Stage.RUNNING, "17")


def test_a_claim_without_an_id_is_found_by_its_owner() -> None:
    told = verdict(a_run(Stage.CLAIMED, id=None), evidence(seen=None, job_id=None, owner=OWNER))
    assert (told.stage, told.job.id) == (Stage.RUNNING, "17")


def test_a_claim_nobody_saw_waits_for_its_window_on_the_sites_clock() -> None:
    run = a_run(Stage.CLAIMED, id=None, absent_at=NOW - 1000)
    assert not verdict(run, evidence(job_id=None, claim_age=299.0)).revoke
    late = verdict(run, evidence(job_id=None, claim_age=300.0))
    assert late.revoke
    end = after_revoking(run, late.job, OURS, None, "base")
    assert (end.stage, "never accepted" in end.failure.message) == (Stage.FAILED, True)
    said = after_revoking(run, late.job, OURS, None, "base", said="qsub: cannot connect").failure
    assert said and said.message.endswith("never accepted by the scheduler: qsub: cannot connect")


def test_a_failure_comes_with_the_schedulers_words_once_it_said_that_the_job_ended() -> None:
    record = done(outcome="failed", reason="ended by SIGTERM", exit_status=143)
    killed = seen("F", Activity.ENDED, reason="exit status 271, SIGTERM")
    told = {
        job.state: verdict(a_run(), evidence(seen=(job,), owner=OWNER, done=record)).failure.message
        for job in (seen("R", Activity.ACTIVE), killed, TIMEOUT)
    }
    assert told == {
        "R": "ended by SIGTERM",
        "F": "ended by SIGTERM (scheduler: F: exit status 271, SIGTERM)",
        "TIMEOUT": "ended by SIGTERM (scheduler: TIMEOUT)",
    }


def test_a_definite_refusal_fails_at_once_with_the_schedulers_words() -> None:
    told = verdict(a_run(Stage.CLAIMED, id=None), evidence(job_id=None, refusal="Invalid account", claim_age=1.0))
    assert told.revoke
    end = after_revoking(a_run(Stage.CLAIMED, id=None), told.job, OURS, None, "base", told.refusal)
    assert "Invalid account" in end.failure.message
    assert "sites/brno.toml" in end.failure.hint


def test_a_refused_job_that_slurm_lists_as_failed_is_refused_all_the_same() -> None:
    listed = seen("FAILED", Activity.ENDED, reason="BadConstraints")
    told = verdict(a_run(Stage.CLAIMED, id=None), evidence(job_id=None, refusal="Invalid", seen=(listed,)))
    assert told.revoke
    assert told.refusal == "Invalid"


def test_a_refusal_is_not_believed_when_the_job_is_there() -> None:
    told = verdict(a_run(Stage.CLAIMED, id=None), evidence(job_id=None, refusal="Invalid", seen=(RUNNING,)))
    assert (told.stage, told.revoke) == (Stage.RUNNING, False)


def test_what_we_revoked_before_a_crash_is_finished_after_it() -> None:
    told = verdict(a_run(), evidence(seen=(RUNNING,), owner=OURS))
    assert told.revoke
    assert after_revoking(a_run(), told.job, OURS, None, "base").stage == Stage.FAILED


def test_a_record_that_appears_while_revoking_still_counts() -> None:
    assert after_revoking(a_run(), a_run().job, OWNER, done(), "base").stage == Stage.ENDED


def test_a_failed_record_gives_its_reason() -> None:
    told = verdict(a_run(), evidence(seen=(TIMEOUT,), owner=OWNER, done=done(outcome="failed", reason="SIGTERM")))
    assert told.stage == Stage.FAILED
    assert "SIGTERM" in told.failure.message
    assert "TIMEOUT" in told.failure.message


@pytest.mark.parametrize(
    "change",
    [{"token": "fother"}, {"attempt": 2}, {"number": 2}, {"site": "praha"}, {"work": "evaluate"}, {"schema": 2}],
)
def test_a_record_of_something_else_is_no_record(change: dict[str, Any]) -> None:
    told = verdict(a_run(), evidence(seen=(RUNNING,), owner=OWNER, done=done(**change)))
    assert (told.stage, told.contribution) == (Stage.RUNNING, None)


@pytest.mark.parametrize(
    "change",
    [
        {"base": {"version": 1, "sha256": "base"}},
        {"base": {"version": 0, "sha256": "other"}},
        {"steps": 0},
        {"samples": -1},
        {"samples": 1.5},
        {"tokens": True},
        {"metrics": None},
        {"files": [{"path": "x"}]},
        {"started_at": "soon"},
        {"ended_at": float("nan")},
        {"ended_at": float("inf")},
        {"ended_at": 10**400},
    ],
)
def test_a_record_that_is_not_valid_fails_the_run(change: dict[str, Any]) -> None:
    told = verdict(a_run(), evidence(seen=(), owner=OWNER, done=done(**change)))
    assert told.stage == Stage.FAILED
    assert told.contribution is None


@pytest.mark.parametrize("time_", ["soon", None, [], float("nan"), -1, 10**400])
def test_an_owner_that_is_no_owner_does_not_spoil_our_record(time_: Any) -> None:
    told = verdict(a_run(), evidence(owner=OWNER | {"time": time_, "job_id": 17}))
    assert (told.job.id, told.job.started_at) == ("17", None)
    assert from_data(Job, json.loads(json.dumps(to_data(told.job)))) == told.job


def test_jobs_of_other_names_are_nobodys_business() -> None:
    stranger = seen("RUNNING", Activity.ACTIVE, name="other", job_id="17")
    told = verdict(a_run(), evidence(seen=(stranger,)))
    assert told.job.absent_at == NOW


def test_of_two_jobs_of_one_name_the_owner_counts() -> None:
    ghost = seen("RUNNING", Activity.ACTIVE, job_id="18")
    told = verdict(a_run(), evidence(seen=(TIMEOUT, ghost), owner=OWNER))
    assert told.job.state == "TIMEOUT"


NEVER = seen("PENDING", Activity.WAITING, reason="BadConstraints", never="BadConstraints")


def test_a_job_that_can_never_run_fails_when_seen_twice_far_enough_apart() -> None:
    first = verdict(a_run(), evidence(seen=(NEVER,)))
    assert (first.stage, first.revoke, first.job.never_at) == (Stage.QUEUED, False, NOW)
    run = replace(a_run(), job=first.job)
    assert not verdict(run, evidence(seen=(NEVER,)), NOW + 59).revoke
    second = verdict(run, evidence(seen=(NEVER,)), NOW + 60)
    assert second.revoke
    end = after_revoking(run, second.job, OURS, None, "base")
    assert end.stage == Stage.FAILED
    assert end.failure.message == "the scheduler says that job 17 can never run: BadConstraints"
    assert end.failure.hint == "correct sites/brno.toml, then flctl retry brno"


def test_a_job_that_waits_for_something_else_meanwhile_may_still_run() -> None:
    run = replace(a_run(), job=verdict(a_run(), evidence(seen=(NEVER,))).job)
    other = verdict(run, evidence(seen=(PENDING,)), NOW + 60)
    assert (other.revoke, other.job.never, other.job.never_at) == (False, "", None)
    assert not verdict(replace(run, job=other.job), evidence(seen=(NEVER,)), NOW + 61).revoke


def test_a_query_that_failed_is_no_second_look() -> None:
    run = replace(a_run(), job=verdict(a_run(), evidence(seen=(NEVER,))).job)
    assert not verdict(run, evidence(seen=None), NOW + 1000).revoke


def test_a_job_that_started_is_not_one_that_can_never_run() -> None:
    run = a_run(never="BadConstraints", never_at=NOW - 1000)
    told = verdict(run, evidence(seen=(NEVER,), owner=OWNER))
    assert (told.stage, told.revoke, told.job.never) == (Stage.RUNNING, False, "")


def test_why_it_was_revoked_is_known_after_a_crash_in_between() -> None:
    cancelled = seen("CANCELLED", Activity.ENDED)
    run = a_run(never="BadConstraints", never_at=NOW - 100)
    told = verdict(run, evidence(seen=(cancelled,), owner=OURS))
    assert "can never run" in after_revoking(run, told.job, OURS, None, "base").failure.message


def test_one_that_somebody_cancelled_meanwhile_is_not_called_so() -> None:
    run = a_run(never="BadConstraints", never_at=NOW - 10)
    told = verdict(run, evidence(seen=()))
    assert "ended before it started" in after_revoking(run, told.job, OURS, None, "base").failure.message


def test_the_schedulers_count_is_kept_once_it_is_told() -> None:
    running = seen("RUNNING", Activity.ACTIVE, elapsed=50.0)
    first = verdict(a_run(), evidence(seen=(running,), owner=OWNER))
    assert first.job.elapsed == 50
    run = replace(a_run(), job=first.job)
    assert verdict(run, evidence(seen=None, owner=OWNER)).job.elapsed == 50
    timed_out = seen("TIMEOUT", Activity.ENDED, elapsed=70.0)
    assert verdict(run, evidence(seen=(timed_out,), owner=OWNER)).job.elapsed == 70


def test_the_schedulers_count_of_an_ended_job_wins_over_the_record() -> None:
    """It knows what the record does not: what came before the job's first line, and suspensions."""
    ended = seen("COMPLETED", Activity.ENDED, elapsed=80.0)
    assert verdict(a_run(), evidence(seen=(ended,), owner=OWNER, done=done())).job.elapsed == 80


@pytest.mark.parametrize("listing", [None, (), (seen("RUNNING", Activity.ACTIVE, elapsed=20.0),), (COMPLETED,)])
def test_the_record_tells_how_long_a_job_ran_if_the_scheduler_did_not(listing: Any) -> None:
    assert verdict(a_run(), evidence(seen=listing, owner=OWNER, done=done())).job.elapsed == 90


def test_a_job_forgotten_without_a_record_ran_until_it_was_not_there() -> None:
    run = a_run(Stage.RUNNING, started_at=900.0, elapsed=20.0)
    gone = verdict(run, evidence(owner=OWNER))
    assert gone.job.elapsed == NOW - 900
    later = verdict(replace(run, job=gone.job), evidence(owner=OWNER), NOW + 500)
    assert later.job.elapsed == NOW - 900, "the first look without it counts"
    told = seen("FAILED", Activity.ENDED, elapsed=30.0)
    assert verdict(replace(run, job=gone.job), evidence(owner=OWNER, seen=(told,)), NOW + 500).job.elapsed == 30
    assert verdict(a_run(), evidence()).job.elapsed is None, "it never started"


def test_what_waits_is_told_with_its_reason_and_an_estimate_that_is_called_one() -> None:
    start = time.mktime((2031, 5, 6, 14, 5, 0, 0, 0, -1))
    waiting = replace(PENDING, expected_start=start)
    run = replace(a_run(), job=verdict(a_run(), evidence(seen=(waiting,))).job)
    row = run_row(run, Contact())
    assert (row["note"], row["estimated_start"]) == ("PENDING: Priority, estimated start 2031-05-06 14:05", start)
    held = replace(PENDING, reason="JobHeldUser")
    run = replace(run, job=verdict(run, evidence(seen=(held,))).job)
    assert run_row(run, Contact())["note"] == "PENDING: JobHeldUser"
    run = replace(run, job=verdict(run, evidence(seen=(NEVER,))).job)
    assert run_row(run, Contact())["note"] == "PENDING: BadConstraints, can never run"
