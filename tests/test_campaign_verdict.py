"""The verdict: done.json alone is success, a failed query changes nothing, absence counts only when seen twice."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from flctl.campaign.report import notices, run_row
from flctl.campaign.verdict import Evidence, after_revoking, judge
from flctl.codec import from_data, to_data
from flctl.facility.scheduler import Activity, Seen, is_known, qstat, slurm
from flctl.records import Cause, Contact, Job, Order, Run, Stage, Work

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


def concluded(listed: Seen | None, record: dict[str, Any] | None, *, owner: Any = OWNER, **job: Any) -> Any:
    """The failure (and the hold) that stands after two looks far enough apart and the revocation."""
    run = a_run(Stage.RUNNING, **job)
    given = evidence(seen=(listed,) if listed else (), owner=owner, done=record, claimed_at=800.0, claim_age=1e6)
    for moment in (NOW, NOW + ABSENCE):
        told = verdict(run, given, moment)
        if told.failure is not None or told.contribution is not None:
            return told.failure
        run = replace(run, stage=told.stage, job=told.job)
    assert told.revoke
    end = after_revoking(run, told.job, owner or OURS, record, "base")
    assert (end.held is not None) == (end.failure.cause == Cause.CANCELLED_BY_OTHER)
    assert end.stage == (run.stage if end.held else Stage.FAILED)
    return end.failure


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
    """A job that was ended from outside says so at once; why is the scheduler's to tell."""
    record = done(outcome="failed", reason="ended by SIGTERM", exit_status=143, cause="signal")
    for still in (seen("RUNNING", Activity.ACTIVE), seen("COMPLETING", Activity.ACTIVE)):
        told = verdict(a_run(Stage.RUNNING, absent_at=NOW - 1000), evidence(seen=(still,), owner=OWNER, done=record))
        assert (told.stage, told.revoke, told.failure) == (Stage.RUNNING, False, None)
    killed = seen("F", Activity.ENDED, reason="exit status -29, over its walltime")
    assert concluded(killed, record).message == "ended by SIGTERM (scheduler: F: exit status -29, over its walltime)"
    assert concluded(TIMEOUT, record).message == "ended by SIGTERM (scheduler: TIMEOUT)"


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


def test_memory_has_one_advice_whoever_saw_it() -> None:
    """The trainer, Slurm, or the exit status of a process that the kernel killed."""
    ended = {"outcome": "failed", "cause": "program", "exit_status": 1, "reason": "the program exited with status 1"}
    ours = done(**ended | {"failure": "memory", "reason": "out of GPU memory"})
    said = [concluded(seen("FAILED", Activity.ENDED, reason="1:0"), ours)]
    killed = seen("OUT_OF_MEMORY", Activity.ENDED, reason="0:125")
    said += [concluded(killed, record) for record in (done(**ended), None)]
    said += [concluded(seen("FAILED", Activity.ENDED, reason="137:0"), done(**ended | {"exit_status": 137}))]
    assert {(failure.cause, failure.hint) for failure in said} == {(MEMORY, said[0].hint)}
    assert said[0].message.startswith("out of GPU memory") and "micro_batch" in said[0].hint
    assert all("memory" in failure.message for failure in said)


@pytest.mark.parametrize(
    ("failure", "cause"),
    [(kind, Cause(kind)) for kind in ("memory", "diverged", "data", "tokenizer", "model", "options", "time")]
    + [(kind, Cause.PROGRAM) for kind in ("", "lost", "queue full", "strange", 7, None, ["memory"])],
)
def test_a_class_that_the_program_named_is_the_cause(failure: Any, cause: Cause) -> None:
    """Only those that a program may name; what a site writes there is data."""
    record = done(outcome="failed", cause="program", exit_status=1, reason="words", failure=failure)
    said = verdict(a_run(), evidence(owner=OWNER, done=record)).failure
    assert said.cause == cause
    assert ("then flctl retry brno" in said.hint) and (cause == PROGRAM) == said.hint.startswith("see flctl log")
    told = verdict(a_run(), evidence(seen=(TIMEOUT,), owner=OWNER, done=record)).failure
    assert told.cause == TIME, "what the scheduler says is stronger"


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


SIGNALLED = done(outcome="failed", reason="ended by SIGTERM", exit_status=143, cause="signal", ended_at=950.0)
BROKEN = done(outcome="failed", reason="the program exited with status 3", exit_status=3, cause="program")
KILLED = done(outcome="failed", reason="the program exited with status 137", exit_status=137, cause="program")
NO_BASE = done(outcome="failed", reason="the model folder is missing", exit_status=76, cause="base")
INFRASTRUCTURE, LOST, TIME, MEMORY = Cause.INFRASTRUCTURE, Cause.LOST, Cause.TIME, Cause.MEMORY
PROGRAM, CONFIGURATION, OTHER = Cause.PROGRAM, Cause.CONFIGURATION, Cause.CANCELLED_BY_OTHER

TABLE = {
    # the scheduler's last word, its reason: without a record, with one that says that a signal ended it
    ("COMPLETED", ""): (PROGRAM, OTHER),
    ("FAILED", "1:0"): (PROGRAM, OTHER),
    ("FAILED", "0:53"): (CONFIGURATION, OTHER),
    ("FAILED", "RaisedSignal:53(Real-time_signal_19)"): (CONFIGURATION, OTHER),
    ("FAILED", "JobLaunchFailure; 0:9"): (PROGRAM, OTHER),
    ("FAILED", "NodeDown"): (INFRASTRUCTURE, INFRASTRUCTURE),
    ("FAILED", "0:125"): (MEMORY, MEMORY),
    ("TIMEOUT", "TimeLimit"): (TIME, TIME),
    ("DEADLINE", ""): (TIME, TIME),
    ("OUT_OF_MEMORY", ""): (MEMORY, MEMORY),
    ("NODE_FAIL", ""): (INFRASTRUCTURE, INFRASTRUCTURE),
    ("BOOT_FAIL", ""): (INFRASTRUCTURE, INFRASTRUCTURE),
    ("LAUNCH_FAILED", ""): (INFRASTRUCTURE, INFRASTRUCTURE),
    ("RECONFIG_FAIL", ""): (INFRASTRUCTURE, INFRASTRUCTURE),
    ("PREEMPTED", ""): (INFRASTRUCTURE, INFRASTRUCTURE),
    ("CANCELLED", "CANCELLED by 0"): (OTHER, OTHER),
    ("CANCELLED", "0:0; nobody cancelled it"): (LOST, LOST),
    ("LOST", ""): (LOST, LOST),
    ("F", "exit status 0"): (PROGRAM, OTHER),
    ("F", "exit status 3"): (PROGRAM, OTHER),
    ("F", "exit status 265, SIGKILL"): (PROGRAM, OTHER),
    ("F", "exit status 271, SIGTERM"): (OTHER, OTHER),
    ("F", "exit status 271, SIGTERM; Job run at noon on (n1) and terminated by ada@n1"): (OTHER, OTHER),
    ("F", "exit status 271, SIGTERM; Job run at noon on (n1) and exceeded resource walltime"): (TIME, TIME),
    ("F", "exit status -29, over its walltime"): (TIME, TIME),
    ("F", "exit status -28, over its cput"): (TIME, TIME),
    ("F", "exit status -27, over its mem"): (MEMORY, MEMORY),
    ("F", "exit status -4, PBS on its node began anew"): (INFRASTRUCTURE, INFRASTRUCTURE),
    ("F", "exit status -11"): (INFRASTRUCTURE, INFRASTRUCTURE),
    ("F", "exit status -10, no such account on its node"): (CONFIGURATION, OTHER),
    ("F", "exit status -17"): (OTHER, OTHER),
    ("X", "exit status -2, could not be started"): (INFRASTRUCTURE, INFRASTRUCTURE),
    ("F", "never started"): (OTHER, OTHER),
    (None, ""): (LOST, OTHER),
}


@pytest.mark.parametrize(("word", "causes"), TABLE.items(), ids=[f"{state}-{words}" for state, words in TABLE])
def test_every_end_has_its_cause(word: tuple[str | None, str], causes: tuple[Cause, Cause]) -> None:
    state, reason = word
    listed = seen(state, Activity.ENDED, reason=reason) if state else None
    assert (concluded(listed, None).cause, concluded(listed, SIGNALLED).cause) == causes
    explained = state is not None and causes[0] not in (PROGRAM, CONFIGURATION)
    assert concluded(listed, BROKEN).cause == (causes[0] if explained else PROGRAM), (
        "its own exit, unless more is known"
    )
    success = verdict(a_run(Stage.RUNNING), evidence(seen=(listed,) if listed else (), owner=OWNER, done=done()))
    assert success.stage == Stage.ENDED, "a record of success is one, whatever the scheduler says"
    assert concluded(listed, NO_BASE).cause in (causes[1], INFRASTRUCTURE)


def test_the_table_names_every_end_that_slurm_documents() -> None:
    assert set(slurm.STATES[Activity.ENDED]) <= {state for state, _ in TABLE}
    assert set(qstat.STATES[Activity.ENDED]) <= {state for state, _ in TABLE}


LIVING = [
    *((word, activity) for activity in (Activity.WAITING, Activity.ACTIVE) for word in slurm.STATES[activity]),
    *((word, activity) for activity in (Activity.WAITING, Activity.ACTIVE) for word in qstat.STATES[activity]),
    ("SOMETHING_NEW", slurm.activity_of("SOMETHING_NEW")),
    ("Z", qstat.activity_of("Z")),
]


@pytest.mark.parametrize(("word", "activity"), LIVING)
def test_no_other_word_is_ever_an_end(word: str, activity: Activity) -> None:
    """However often it is seen, a job that has not started waits, and one that runs runs; an unknown word is active."""
    run = a_run(Stage.RUNNING if activity == Activity.ACTIVE else Stage.QUEUED)
    owner = OWNER if activity == Activity.ACTIVE else None
    for moment in (NOW, NOW + 1e5, NOW + 1e6):
        told = verdict(run, evidence(seen=(seen(word, activity),), owner=owner), moment)
        assert (told.stage, told.revoke, told.failure) == (run.stage, False, None)
        run = replace(run, job=told.job)


def test_unknown_words_are_told_from_known_ones() -> None:
    assert is_known("slurm", "SUSPENDED") and is_known("pbs", "M") and is_known("local", "LOST")
    assert not any(is_known(kind, "SOMETHING_NEW") for kind in ("slurm", "pbs", "local"))


def test_sigterm_at_the_end_of_its_time_is_its_time() -> None:
    """Where the scheduler has forgotten the job, or says 271 for either."""
    late = SIGNALLED | {"ended_at": 1497.0}
    assert concluded(None, late, walltime=600.0).cause == TIME
    assert concluded(None, SIGNALLED, walltime=600.0).cause == OTHER
    ended = seen("F", Activity.ENDED, reason="exit status 271, SIGTERM", elapsed=601.0)
    assert concluded(ended, late, walltime=600.0).cause == TIME
    assert concluded(ended, None, walltime=600.0).cause == TIME
    deleted = replace(ended, reason="exit status 271, SIGTERM; Job run at noon and terminated by ada@n1")
    assert concluded(deleted, late, walltime=600.0).cause == OTHER, "PBS tells whose qdel it was"
    shortened = a_run(Stage.RUNNING, walltime=600.0)
    running = seen("RUNNING", Activity.ACTIVE, expected_end=951.0)
    shortened = replace(shortened, job=verdict(shortened, evidence(seen=(running,), owner=OWNER)).job)
    assert concluded(None, SIGNALLED, walltime=600.0, expected_end=shortened.job.expected_end).cause == TIME


def test_a_program_killed_outright_is_taken_for_one_without_memory() -> None:
    assert concluded(seen("FAILED", Activity.ENDED, reason="137:0"), KILLED).cause == MEMORY


def test_what_flctl_cancelled_itself_is_no_foreign_cancellation() -> None:
    listed = seen("CANCELLED", Activity.ENDED)
    ours = concluded(listed, SIGNALLED, ending="cancelled with flctl cancel")
    assert (ours.cause, ours.message) == (Cause.CANCELLED_BY_US, "cancelled with flctl cancel")
    assert concluded(listed, done(), ending="cancelled with flctl cancel").cause == Cause.CANCELLED_BY_US
    assert concluded(listed, None, revoked=True).cause == LOST


def test_a_foreign_cancellation_names_who_did_it_and_keeps_the_run_open() -> None:
    listed = seen("CANCELLED", Activity.ENDED, cancelled_by=1007)
    told = concluded(listed, SIGNALLED)
    assert "job 17 was cancelled at the site by uid 1007, not by flctl" in told.message
    assert "flctl retry brno or flctl skip brno" in told.hint
    assert concluded(listed, None, owner=None).cause == OTHER, "in the queue as well"


def test_a_job_that_waits_again_after_it_started_is_given_up_when_seen_twice() -> None:
    again = seen("PENDING", Activity.WAITING, reason="BeginTime")
    first = verdict(a_run(Stage.RUNNING), evidence(seen=(again,), owner=OWNER))
    assert (first.stage, first.revoke, first.job.again_at) == (Stage.RUNNING, False, NOW)
    run = replace(a_run(Stage.RUNNING), job=first.job)
    assert not verdict(run, evidence(seen=(again,), owner=OWNER), NOW + 59).revoke
    second = verdict(run, evidence(seen=(again,), owner=OWNER), NOW + 60)
    assert second.revoke
    for record in (None, SIGNALLED):
        end = after_revoking(run, second.job, OWNER, record, "base")
        assert (end.stage, end.failure.cause) == (Stage.FAILED, INFRASTRUCTURE)
    assert after_revoking(run, second.job, OWNER, done(), "base").stage == Stage.ENDED
    back = verdict(run, evidence(seen=(RUNNING,), owner=OWNER), NOW + 60)
    assert (back.revoke, back.job.again_at) == (False, None), "the listing was older than its start"
    crashed = replace(run, job=replace(second.job, revoked=True))
    cancelled = seen("CANCELLED", Activity.ENDED)
    told = verdict(crashed, evidence(seen=(cancelled,), owner=OWNER), NOW + 61)
    assert told.revoke
    assert after_revoking(crashed, told.job, OWNER, None, "base").failure.cause == INFRASTRUCTURE


def test_a_launch_that_failed_is_given_up_and_tried_again() -> None:
    held = seen("PENDING", Activity.WAITING, reason="launch failed requeued held")
    run = replace(a_run(), job=verdict(a_run(), evidence(seen=(held,))).job)
    told = verdict(run, evidence(seen=(held,)), NOW + 60)
    assert told.revoke
    end = after_revoking(run, told.job, OURS, None, "base")
    assert (end.failure.cause, "could not be launched" in end.failure.message) == (INFRASTRUCTURE, True)


def test_a_job_is_who_it_is_by_name_submission_and_cluster() -> None:
    """A rebuilt campaign at a purged site has the tokens that it had; a controller that was wiped has its old ids."""
    run = a_run(claimed_at=5000.0)
    old = seen("COMPLETED", Activity.ENDED, submitted_at=4000.0)
    assert verdict(run, evidence(seen=(old,))).job.absent_at == NOW, "submitted before the claim"
    elsewhere = replace(RUNNING, submitted_at=5001.0, cluster="other")
    assert verdict(run, evidence(seen=(elsewhere,), cluster="ours")).job.absent_at == NOW
    ours = replace(RUNNING, submitted_at=4990.0, cluster="ours")
    told = verdict(run, evidence(seen=(old, elsewhere, ours), cluster="ours")).job
    assert (told.state, told.submitted_at, told.cluster) == ("RUNNING", 4990.0, "ours"), "clocks differ a little"
    reused = replace(RUNNING, name="fsomebodyelse", submitted_at=5001.0)
    assert verdict(run, evidence(seen=(reused,))).job.absent_at == NOW, "our id, another's name"


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("JobHeldUser", "scontrol release 17"),
        ("JobHeldAdmin", "ask them"),
        ("launch failed requeued held", "tries again by itself"),
        ("held (u)", "qrls 17"),
        ("held (so)", "ask them"),
        ("PartitionDown", "sites/brno.toml"),
    ],
)
def test_what_waits_for_long_is_shown_with_what_to_do(reason: str, words: str) -> None:
    run = replace(a_run(), job=verdict(a_run(), evidence(seen=(replace(PENDING, reason=reason),))).job)
    (notice,) = notices(run)
    assert reason in notice
    assert words in notice
    assert notices(replace(a_run(), job=verdict(a_run(), evidence(seen=(PENDING,))).job)) == []


def test_a_job_noticed_late_has_not_used_the_time_since() -> None:
    """Ended after 50 s of 600, looked at a day later: neither its time limit nor a day of node-hours."""
    run = a_run(Stage.RUNNING, started_at=900.0, walltime=600.0)
    given = evidence(seen=(), owner=OWNER, done=SIGNALLED, claimed_at=800.0, claim_age=1e6)
    first = verdict(run, given, NOW + 86400)
    told = verdict(replace(run, job=first.job), given, NOW + 86400 + ABSENCE)
    end = after_revoking(run, told.job, OWNER, SIGNALLED, "base")
    assert (end.failure.cause, end.job.elapsed) == (OTHER, 50.0)
    assert after_revoking(run, told.job, OWNER, None, "base").failure.cause == LOST
    listed = evidence(seen=(seen("TIMEOUT", Activity.ENDED, elapsed=607.0),), owner=OWNER, done=SIGNALLED)
    first = verdict(run, listed)
    end = after_revoking(run, first.job, OWNER, SIGNALLED, "base")
    assert (end.failure.cause, end.job.elapsed) == (TIME, 607.0), "the scheduler's count"


def test_a_second_launch_is_not_the_programs_failure() -> None:
    """A controller that crashed while it launched the job kills that copy, or launches a second one, which finds the
    attempt taken and ends with status 75."""
    listed = seen("FAILED", Activity.ENDED, reason="NonZeroExitCode")
    run = a_run(Stage.RUNNING)
    job = verdict(run, evidence(seen=(listed,), owner=OWNER)).job
    assert after_revoking(run, job, OWNER, None, "base", fenced=True).failure.cause == INFRASTRUCTURE
    assert after_revoking(run, job, OWNER, None, "base").failure.cause == PROGRAM
    for start, cause in ((899.0, PROGRAM), (901.0, PROGRAM), (905.0, INFRASTRUCTURE)):
        again = replace(listed, started_at=start)
        later = verdict(run, evidence(seen=(again,), owner=OWNER)).job
        assert after_revoking(run, later, OWNER, None, "base").failure.cause == cause
    assert after_revoking(run, job, OWNER, BROKEN, "base", fenced=True).failure.cause == PROGRAM


def test_what_slurm_cancels_itself_after_a_second_launch_is_no_persons_word() -> None:
    """A controller that was killed just after a job's start launches it again; its node has it already, and the
    controller cancels the job as root."""
    run = a_run(Stage.RUNNING)
    for record in (None, SIGNALLED):
        for start, uid, fenced, cause in (
            (899.0, 0, False, OTHER),
            (905.0, 0, False, INFRASTRUCTURE),
            (905.0, None, False, INFRASTRUCTURE),
            (899.0, 0, True, INFRASTRUCTURE),
            (905.0, 1007, True, OTHER),
        ):
            listed = seen("CANCELLED", Activity.ENDED, started_at=start, cancelled_by=uid)
            job = verdict(run, evidence(seen=(listed,), owner=OWNER)).job
            end = after_revoking(run, job, OWNER, record, "base", fenced=fenced)
            assert (end.failure.cause, end.held is not None) == (cause, cause == OTHER), (start, uid, fenced)


def test_a_queue_without_room_is_no_refusal() -> None:
    run = a_run(Stage.CLAIMED, id=None)
    words = "sbatch: error: Batch job submission failed: Resource temporarily unavailable"
    told = verdict(run, evidence(job_id=None, refusal=words))
    assert (told.revoke, told.refusal) == (True, words)
    for refusal in (words, ""):
        end = after_revoking(run, told.job, OURS, None, "base", refusal=refusal, said=words, full=True)
        assert (end.stage, end.failure.cause) == (Stage.FAILED, Cause.FULL)
        assert end.failure.message == f"brno takes no more jobs just now: {words}"
    taken = replace(told.job, id="17")
    assert after_revoking(run, taken, OURS, None, "base", said=words, full=True).failure.cause == LOST
    assert after_revoking(run, taken, OWNER, done(), "base", said=words, full=True).stage == Stage.ENDED


def test_a_launch_that_failed_is_one_only_of_a_job_that_never_began() -> None:
    """Slurm 22.05 says the same of every script that a signal killed."""
    listed = seen("FAILED", Activity.ENDED, reason="JobLaunchFailure")
    assert concluded(listed, None, owner=None).cause == INFRASTRUCTURE
    assert concluded(listed, None).cause == PROGRAM


def test_a_clock_that_was_set_back_makes_nobody_wait_for_it() -> None:
    """What was first seen in the future is seen now; a claim of the future is as old as one of the past."""
    run = a_run(Stage.RUNNING, absent_at=NOW + 86400, never_at=NOW + 86400, again_at=NOW + 86400)
    told = verdict(run, evidence(owner=OWNER))
    assert (told.revoke, told.job.absent_at) == (False, NOW)
    assert verdict(replace(run, job=told.job), evidence(owner=OWNER), NOW + 60).revoke
    assert verdict(run, evidence(seen=(NEVER,))).job.never_at == NOW
    again = seen("PENDING", Activity.WAITING, reason="BeginTime")
    assert verdict(run, evidence(seen=(again,), owner=OWNER)).job.again_at == NOW
    lost = a_run(Stage.CLAIMED, id=None, absent_at=NOW - 1000)
    assert not verdict(lost, evidence(job_id=None, claim_age=-299.0)).revoke
    assert verdict(lost, evidence(job_id=None, claim_age=-86400.0)).revoke


@pytest.mark.parametrize(
    "reason",
    [
        "launch failed requeued held",
        "user env retrieval failed requeued held",
        "UserEnv retrieval failed, requeued held",
        "JobHoldMaxRequeue",
    ],
)
def test_every_word_for_a_launch_that_failed_is_known(reason: str) -> None:
    held = seen("PENDING", Activity.WAITING, reason=reason)
    run = replace(a_run(), job=verdict(a_run(), evidence(seen=(held,))).job)
    assert "tries again by itself" in notices(run)[0]
    told = verdict(run, evidence(seen=(held,)), NOW + 60)
    assert told.revoke
    assert after_revoking(run, told.job, OURS, None, "base").failure.cause == INFRASTRUCTURE


def test_a_job_whose_name_accounting_never_heard_is_known_by_its_id() -> None:
    """It ended before slurmdbd was told of its start; by the time of the look the queue has forgotten it."""
    run = a_run(claimed_at=800.0)
    unnamed = seen("CANCELLED", Activity.ENDED, name="allocation", submitted_at=801.0, cancelled_by=1007)
    told = verdict(run, evidence(seen=(unnamed,)))
    assert (told.job.state, told.job.cancelled_by) == ("CANCELLED", 1007)
    for stranger in (
        replace(unnamed, id="18"),
        replace(unnamed, submitted_at=100.0),
        replace(unnamed, submitted_at=None),
    ):
        assert verdict(run, evidence(seen=(stranger,))).job.state == ""
    assert verdict(run, evidence(seen=(PENDING, unnamed))).job.state == "PENDING", "a name says more"
    words = slurm.Slurm(accounted_for=True)
    assert "--name=fa,fb,allocation " in (words.accounting(["fa", "fb"], ["17", "18"]) or "")
    assert "allocation" not in (words.accounting(["fa", "fb"], ["17", None]) or "")
