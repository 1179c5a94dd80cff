"""The verdict on one attempt: a pure function of what the three witnesses say.

The completion record done.json is the only proof of success; the owner says whether the attempt ever started; the
scheduler says what is still under way, and explains failures. A query that failed changes nothing, absence is not
completion, and an end without a record counts only when seen twice, at least `absence` seconds apart; so does the
scheduler's word that a job can never run.

A job's `elapsed` is the scheduler's count. Where it forgot the job before it told, the completion record's start and
end (the site's clock) are counted instead, and with neither the time from its start to the first look without it.
"""

from dataclasses import dataclass, replace
from typing import Any

from flctl.facility.scheduler import Activity, Seen
from flctl.records import Contribution, Failure, FileEntry, Job, Run, Stage, Work

RECORD_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One look at an attempt. `seen` is None when the scheduler's query failed; `owner` and `done` are the parsed
    records or None; `job_id` what the submission left; `base_sha256` is that of
    the model the run was ordered to start from; `claim_age` is in seconds of the site's clock."""

    seen: tuple[Seen, ...] | None
    job_id: str | None = None
    refusal: str | None = None
    base_sha256: str = ""
    claim_age: float | None = None
    claimed_at: float | None = None
    owner: dict[str, Any] | None = None
    done: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the evidence says. `revoke`: before anything is concluded, take the attempt's `owner`; nothing else may
    start it then. `refusal`: the words with which the scheduler did not take the job."""

    stage: Stage
    job: Job
    contribution: Contribution | None = None
    failure: Failure | None = None
    revoke: bool = False
    refusal: str = ""


def judge(run: Run, evidence: Evidence, *, now: float, absence: float, window: float) -> Verdict:
    """`now`: Unix seconds of the orchestrator's clock; `absence` and `window` in seconds."""
    seen = _of_this_attempt(run, evidence)
    job = _known(run.job, evidence, seen)
    if evidence.done is not None and _is_ours(run, evidence.done):
        ended = seen if seen is not None and seen.activity == Activity.ENDED else None
        return _sealed(run, job, evidence.done, evidence.base_sha256, ended=ended)
    if _revoked(evidence.owner):
        return Verdict(stage=run.stage, job=job, revoke=True)
    if _refused(evidence, seen):
        return Verdict(stage=run.stage, job=job, revoke=True, refusal=evidence.refusal or "")
    if evidence.seen is None:
        return Verdict(stage=_owned_stage(run, evidence), job=job)
    if seen is not None and seen.activity != Activity.ENDED:
        return _alive(evidence, job, seen, now=now, absence=absence)
    return _gone(run, evidence, job, seen, now=now, absence=absence, window=window)


def _refused(evidence: Evidence, seen: Seen | None) -> bool:
    """Whether the scheduler definitely did not take the job. Slurm may list a job that it refused as FAILED."""
    unseen = seen is None or seen.activity == Activity.ENDED
    return evidence.refusal is not None and evidence.job_id is None and evidence.owner is None and unseen


def _alive(evidence: Evidence, job: Job, seen: Seen, *, now: float, absence: float) -> Verdict:
    """The job waits or runs, or waits for what will never be."""
    waits = seen.activity == Activity.WAITING and evidence.owner is None
    hopeless_since = (job.never_at or now) if waits and seen.never else None
    job = replace(job, absent_at=None, never=seen.never if waits else "", never_at=hopeless_since)
    stage = Stage.QUEUED if waits else Stage.RUNNING
    return Verdict(stage=stage, job=job, revoke=hopeless_since is not None and now - hopeless_since >= absence)


def _gone(
    run: Run, evidence: Evidence, job: Job, seen: Seen | None, *, now: float, absence: float, window: float
) -> Verdict:
    """The listing succeeded and no live job of this attempt is in it."""
    stage = _owned_stage(run, evidence)
    if job.absent_at is None:
        if seen is None and job.started_at is not None:
            job = replace(job, elapsed=max(job.elapsed or 0.0, now - job.started_at))
        return Verdict(stage=stage, job=replace(job, absent_at=now, never="", never_at=None))
    if now - job.absent_at < absence:
        return Verdict(stage=stage, job=job)
    never_seen = seen is None and evidence.owner is None
    if never_seen and (evidence.claim_age is None or evidence.claim_age < window):
        return Verdict(stage=stage, job=job)
    return Verdict(stage=stage, job=job, revoke=True)


def after_revoking(
    run: Run,
    job: Job,
    owner: dict[str, Any],
    done: dict[str, Any] | None,
    base_sha256: str,
    refusal: str = "",
    said: str = "",
) -> Verdict:
    """What stands once `owner` can no longer change hands: a record after all, a job that died, or one that can
    never start. `said`: what the submission left on stderr."""
    if done is not None and _is_ours(run, done):
        return _sealed(run, job, done, base_sha256)
    words = f"; the scheduler said {_words(job.state, job.reason)}" if job.state else ""
    if not _revoked(owner):
        message = f"job {job.id} ended without a record (killed, time limit or node loss){words}"
        return _failed(run, job, message, hint=f"see flctl log {run.site}, then flctl retry {run.site}")
    if refusal:
        hint = f"correct sites/{run.site}.toml, then flctl retry {run.site}"
        return _failed(run, job, f"the scheduler refused the job: {refusal}", hint=hint)
    if job.never:
        hint = f"correct sites/{run.site}.toml, then flctl retry {run.site}"
        return _failed(run, job, f"the scheduler says that job {job.id} can never run: {job.never}", hint=hint)
    if job.id is None:
        message = f"the job was never accepted by the scheduler{f': {said}' if said else ''}"
        return _failed(run, job, message, hint=f"flctl retry {run.site}")
    return _failed(run, job, f"job {job.id} ended before it started{words}", hint=f"flctl retry {run.site}")


def _words(state: str, reason: str) -> str:
    return f"{state}: {reason}" if reason else state


def _failed(run: Run, job: Job, message: str, *, hint: str) -> Verdict:
    failure = Failure(code="job_failed", exit_code=6, message=message, hint=hint)
    return Verdict(stage=Stage.FAILED, job=job, failure=failure)


def _of_this_attempt(run: Run, evidence: Evidence) -> Seen | None:
    """The job among those of this name that matters: the owner's, else one that lives, else the last."""
    jobs = [seen for seen in evidence.seen or () if seen.name == run.job.token]
    owner_id = (evidence.owner or {}).get("job_id")
    jobs.sort(key=lambda seen: (seen.id == owner_id, seen.activity != Activity.ENDED, seen.submitted_at or 0.0))
    return jobs[-1] if jobs else None


def _known(job: Job, evidence: Evidence, seen: Seen | None) -> Job:
    """The job's record with what this look added; what is no longer told stays as it was."""
    owner = (evidence.owner or {}) if not _revoked(evidence.owner) else {}
    owner_id = str(owner.get("job_id") or "")
    job = replace(
        job,
        id=owner_id or evidence.job_id or (seen and seen.id) or job.id,
        claimed_at=evidence.claimed_at or job.claimed_at,
        started_at=_moment(owner.get("time")) or job.started_at,
    )
    if seen is None:
        return job
    return replace(
        job,
        state=seen.state,
        reason=seen.reason,
        expected_start=seen.expected_start,
        expected_end=seen.expected_end,
        elapsed=job.elapsed if seen.elapsed is None else seen.elapsed,
    )


def _moment(value: Any) -> float | None:
    """Unix seconds that a site wrote into a record; None if they are none."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e12 else None


def _owned_stage(run: Run, evidence: Evidence) -> Stage:
    """The stage without the scheduler's help: an owner means it runs, an id that it is queued."""
    if evidence.owner is not None:
        return Stage.RUNNING
    if evidence.job_id is not None and run.stage == Stage.CLAIMED:
        return Stage.QUEUED
    return run.stage


def _revoked(owner: dict[str, Any] | None) -> bool:
    return owner is not None and owner.get("by") == "flctl"


def _is_ours(run: Run, done: dict[str, Any]) -> bool:
    """Whether the record speaks of this attempt of this run (an older one, or another campaign's, does not)."""
    return (
        done.get("schema") == RECORD_SCHEMA
        and done.get("token") == run.job.token
        and done.get("site") == run.site
        and done.get("number") == run.number
        and done.get("attempt") == run.attempt
        and done.get("work") == run.order.work
    )


def _sealed(run: Run, job: Job, done: dict[str, Any], base_sha256: str, *, ended: Seen | None = None) -> Verdict:
    """The record speaks: done, or failed with its reason. `ended`: the job's end as the scheduler shows it."""
    try:
        began, finished = _moment(done["started_at"]), _moment(done["ended_at"])
        if began is None or finished is None:
            raise ValueError("its times are no times")
        job = replace(job, id=str(done["job_id"] or job.id or ""), started_at=began, ended_at=finished)
        if ended is None or ended.elapsed is None:
            known = (job.absent_at is None and job.elapsed) or 0.0
            job = replace(job, elapsed=max(known, finished - began))
        if done["outcome"] != "done":
            told = ended is not None and ended.state != "COMPLETED"
            words = f" (scheduler: {_words(job.state, job.reason)})" if told else ""
            hint = f"see flctl log {run.site}, then flctl retry {run.site}"
            return _failed(run, job, f"{done['reason'] or 'the job failed'}{words}", hint=hint)
        return Verdict(stage=Stage.ENDED, job=job, contribution=_contribution(run, done, base_sha256))
    except (KeyError, TypeError, ValueError) as error:
        return _failed(run, job, f"the completion record is not valid: {error!r}", hint=f"flctl retry {run.site}")


def _contribution(run: Run, done: dict[str, Any], base_sha256: str) -> Contribution:
    """The part of a valid record that matters at home. ValueError says what is wrong with it."""
    base = done["base"]
    if base["version"] != run.order.base or base["sha256"] != base_sha256:
        raise ValueError(f"it started from another model than {run.order.base:04d}")
    counts = {name: done[name] for name in ("steps", "samples", "tokens")}
    least = 1 if run.order.work == Work.TRAIN else 0
    for name, count in counts.items():
        if type(count) is not int or count < least:
            raise ValueError(f"{name} is {count!r}")
    files = tuple(
        FileEntry(path=str(item["path"]), size=int(item["size"]), sha256=str(item["sha256"])) for item in done["files"]
    )
    metrics = done["metrics"]
    if not isinstance(metrics, dict):
        raise ValueError("metrics is no table")
    return Contribution(sha256="", files=files, metrics=metrics, **counts)
