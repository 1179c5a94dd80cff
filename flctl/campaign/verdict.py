"""The verdict on one attempt: a pure function of what the three witnesses say.

The completion record done.json is the only proof of success; the owner says whether the attempt ever started; the
scheduler says what is still under way, and explains failures (causes.py). A query that failed changes nothing, absence
is not completion, and an end without a record of success counts only when seen twice, at least `absence` seconds apart;
so does the scheduler's word that a job can never run, or that one waits which had started.

A job's `elapsed` is the scheduler's count. Where it forgot the job before it told, the completion record's start and
end (the site's clock) are counted instead, and with neither the time from its start to the first look without it.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from flctl.campaign.causes import cause_of, cause_with_record, is_over, remedy, unexplained
from flctl.campaign.testimony import numbers_only
from flctl.facility.scheduler import UNNAMED, Activity, Seen
from flctl.records import Cause, Contribution, Failure, FileEntry, Held, Job, Run, Stage, Work

RECORD_SCHEMA = 1
SKEW = 300.0
"""Seconds by which the clocks of a scheduler and a login host may differ: munge, which lets them talk, allows no more
(its credentials live for so long)."""
LAUNCHING = 2.0
"""Seconds by which a job's first line may seem to come before its start, by clocks that differ a little."""
NOT_LAUNCHED = re.compile(
    r"launch failed requeued held|user ?env retrieval failed,? requeued held|JobLaunchFailure|JobHoldMaxRequeue", re.I
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One look at an attempt. `seen` is None when the scheduler's query failed; `owner` and `done` are the parsed
    records or None; `job_id` what the submission left, with the `cluster` if it names one; `base_sha256` is that of
    the model the run was ordered to start from; `claim_age` is in seconds of the site's clock; `progress`: optimizer
    steps in the program's own checkpoint."""

    seen: tuple[Seen, ...] | None
    job_id: str | None = None
    cluster: str = ""
    refusal: str | None = None
    base_sha256: str = ""
    claim_age: float | None = None
    claimed_at: float | None = None
    owner: dict[str, Any] | None = None
    done: dict[str, Any] | None = None
    progress: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the evidence says. `revoke`: before anything is concluded, take the attempt's `owner`; nothing else may
    start it then. `refusal`: the words with which the scheduler did not take the job. `held`: the run stays open, and
    waits for a person because of the `failure`."""

    stage: Stage
    job: Job
    contribution: Contribution | None = None
    failure: Failure | None = None
    revoke: bool = False
    refusal: str = ""
    held: Held | None = None


def judge(run: Run, evidence: Evidence, *, now: float, absence: float, window: float) -> Verdict:
    """`now`: Unix seconds of the orchestrator's clock; `absence` and `window` in seconds."""
    seen = _of_this_attempt(run, evidence)
    job = _known(run.job, evidence, seen)
    if job.ending:
        return Verdict(stage=run.stage, job=job, revoke=True)
    if evidence.done is not None and _is_ours(run, evidence.done) and not _doubted(evidence.done):
        ended = seen if seen is not None and seen.activity == Activity.ENDED else None
        return _sealed(run, job, evidence.done, evidence.base_sha256, ended=ended)
    if _revoked(evidence.owner) or job.revoked:
        return Verdict(stage=run.stage, job=job, revoke=True)
    if _refused(evidence, seen):
        return Verdict(stage=run.stage, job=job, revoke=True, refusal=evidence.refusal or "")
    if evidence.seen is None:
        return Verdict(stage=_owned_stage(run, evidence), job=job)
    if seen is not None and seen.activity != Activity.ENDED:
        return _alive(evidence, job, seen, now=now, absence=absence)
    return _gone(run, evidence, job, seen, now=now, absence=absence, window=window)


def _doubted(done: dict[str, Any]) -> bool:
    """Whether the record speaks of an end that only the scheduler can explain."""
    return done.get("outcome") != "done" and unexplained(done)


def _refused(evidence: Evidence, seen: Seen | None) -> bool:
    """Whether the scheduler definitely did not take the job. Slurm may list a job that it refused as FAILED."""
    unseen = seen is None or seen.activity == Activity.ENDED
    return evidence.refusal is not None and evidence.job_id is None and evidence.owner is None and unseen


def _alive(evidence: Evidence, job: Job, seen: Seen, *, now: float, absence: float) -> Verdict:
    """The job waits or runs, or waits for what will never be: a job that started once finds the attempt taken, should
    the scheduler start it again (a requeue), and one that could not be launched may be half there."""
    waits, started = seen.activity == Activity.WAITING, evidence.owner is not None
    again_since = _first(job.again_at, now) if waits and (started or NOT_LAUNCHED.search(seen.reason)) else None
    never = seen.never if waits and not started else ""
    never_since = _first(job.never_at, now) if never else None
    job = replace(job, absent_at=None, never=never, never_at=never_since, again_at=again_since)
    hopeless = any(since is not None and now - since >= absence for since in (again_since, never_since))
    return Verdict(stage=Stage.QUEUED if waits and not started else Stage.RUNNING, job=job, revoke=hopeless)


def _first(noted: float | None, now: float) -> float:
    """When something was seen first; now, where what was noted is in the future: the clock was set back since."""
    return now if noted is None or noted > now else noted


def _gone(
    run: Run, evidence: Evidence, job: Job, seen: Seen | None, *, now: float, absence: float, window: float
) -> Verdict:
    """The listing succeeded and no live job of this attempt is in it."""
    stage = _owned_stage(run, evidence)
    if job.absent_at is None or job.absent_at > now:
        if seen is None and job.started_at is not None:
            job = replace(job, elapsed=max(job.elapsed or 0.0, now - job.started_at))
        return Verdict(stage=stage, job=replace(job, absent_at=now, never="", never_at=None, again_at=None))
    if now - job.absent_at < absence:
        return Verdict(stage=stage, job=job)
    never_seen = seen is None and evidence.owner is None
    if never_seen and (evidence.claim_age is None or abs(evidence.claim_age) < window):  # clocks may be set back
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
    fenced: bool = False,
    purged: bool = False,
    full: bool = False,
) -> Verdict:
    """What stands once `owner` can no longer change hands: a record after all, a job that died, or one that can
    never start. `said`: what the submission left on stderr; `fenced`: a second copy of the job found the attempt
    taken, so the scheduler's word may be of that one; `purged`: its order is not there any more;
    `full`: `said` is that the queue has no room."""
    site = run.site
    if job.ending:
        told = replace(job, ending="")
        return _failed(run, told, Cause.CANCELLED_BY_US, job.ending, hint=f"flctl retry {site} tries again")
    again = job.again_at is not None
    if done is not None and _is_ours(run, done) and not (again and _doubted(done)):
        return _sealed(run, job, done, base_sha256, final=True, fenced=fenced)
    words = f"; the scheduler said {_words(job.state, job.reason)}" if job.state else ""
    if again:
        what = "waited again after it had started" if not _revoked(owner) else "could not be launched"
        return _failed(run, job, Cause.INFRASTRUCTURE, f"job {job.id} {what}{words}", hint=f"flctl retry {site}")
    cause = cause_of(job.state, job.reason, over=is_over(job, None), started=job.started_at is not None)
    if not _revoked(owner):
        message = f"job {job.id} ended without a record (killed, time limit or node loss){words}"
        if (fenced or _launched_twice(job)) and cause == Cause.PROGRAM:
            cause, message = Cause.INFRASTRUCTURE, f"{message}, of a second launch"
        hint = f"see flctl log {site}, then flctl retry {site}"
        return _ended(run, job, cause or Cause.LOST, message, hint=hint, fenced=fenced)
    if purged and cause == Cause.PROGRAM:
        cause, words = Cause.INFRASTRUCTURE, f"{words}; its order is gone from the site (purged?)"
    if full and (refusal or job.id is None):
        message = f"{site} takes no more jobs just now: {refusal or said}"
        return _failed(run, job, Cause.FULL, message, hint=f"it is tried again; flctl release {site}: now")
    return _never_started(run, job, cause, refusal, said, words)


def _launched_twice(job: Job) -> bool:
    """Whether the scheduler's last start came after the job's first line: a controller that crashed while it launched a
    job kills that copy with SIGKILL, launches the job again, and calls it FAILED (seen with 22.05)."""
    first, last = job.started_at, job.launched_at
    return first is not None and last is not None and last > first + LAUNCHING


def _never_started(run: Run, job: Job, cause: Cause | None, refusal: str, said: str, words: str) -> Verdict:
    """Of an attempt whose owner flctl is, so that no job can be it any more."""
    site = run.site
    hint = f"correct sites/{site}.toml, then flctl retry {site}"
    if refusal:
        return _failed(run, job, Cause.REFUSED, f"the scheduler refused the job: {refusal}", hint=hint)
    if job.never:
        message = f"the scheduler says that job {job.id} can never run: {job.never}"
        return _failed(run, job, Cause.REFUSED, message, hint=hint)
    if job.id is None:
        message = f"the job was never accepted by the scheduler{f': {said}' if said else ''}"
        return _failed(run, job, Cause.LOST, message, hint=f"flctl retry {site}")
    message = f"job {job.id} ended before it started{words}"
    return _ended(run, job, cause or Cause.LOST, message, hint=f"flctl retry {site}")


def _ended(run: Run, job: Job, cause: Cause, message: str, *, hint: str, fenced: bool = False) -> Verdict:
    """How an ended attempt is taken. Where somebody else cancelled the job, the run stays open: it was meant, so no new
    one is sent without a person's word. A job that was launched twice Slurm itself cancels as root: its node has it
    already ("Duplicate jobid"), and it may not be requeued."""
    if cause == Cause.CONFIGURATION:
        message += (
            f": its folder or log could not be used there (quota, permissions?), or sites/{run.site}.toml is wrong"
        )
    if cause == Cause.MEMORY and "out of" not in message.lower():
        message += "; most likely out of memory"
    if run.order.work != Work.MERGE:
        hint = remedy(cause, run.site) or hint
    elif cause == Cause.MEMORY:
        hint = f"more memory in the shape of sites/{run.site}.toml, then flctl retry {run.site}"
    if cause == Cause.CANCELLED_BY_OTHER and job.cancelled_by in (None, 0) and (fenced or _launched_twice(job)):
        cause, message = Cause.INFRASTRUCTURE, f"{message}, of a second launch"
    if cause == Cause.CANCELLED_BY_OTHER and job.revoked:
        cause = Cause.LOST  # that was our own scancel: a kill came between it and its record
    if cause != Cause.CANCELLED_BY_OTHER:
        return _failed(run, job, cause, message, hint=hint)
    who = "" if job.cancelled_by is None else f" by uid {job.cancelled_by}"
    reason = f"job {job.id} was cancelled at the site{who}, not by flctl ({message})"
    hint = f"ask why, then flctl retry {run.site} or flctl skip {run.site}"
    failure = Failure(code="job_failed", exit_code=6, message=reason, hint=hint, cause=cause)
    moment = job.ended_at or job.absent_at or run.changed_at
    job = replace(job, ended_at=moment)
    return Verdict(stage=run.stage, job=job, failure=failure, held=Held(reason=reason, since=moment))


def _words(state: str, reason: str) -> str:
    return f"{state}: {reason}" if reason else state


def _failed(run: Run, job: Job, cause: Cause, message: str, *, hint: str) -> Verdict:
    failure = Failure(code="job_failed", exit_code=6, message=message, hint=hint, cause=cause)
    return Verdict(stage=Stage.FAILED, job=job, failure=failure)


def _of_this_attempt(run: Run, evidence: Evidence) -> Seen | None:
    """The job among those of this name that matters: the owner's, else one that lives, else the last. One of another
    cluster, or submitted before the attempt was claimed, only has the name; ids begin again where a controller lost its
    state, so an id alone says nothing."""
    claimed, cluster = evidence.claimed_at or run.job.claimed_at, evidence.cluster or run.job.cluster
    jobs = [
        seen
        for seen in evidence.seen or ()
        if (seen.name == run.job.token or _is_unnamed(seen, run, evidence))
        and (not seen.cluster or not cluster or seen.cluster == cluster)
        and (seen.submitted_at is None or claimed is None or seen.submitted_at >= claimed - SKEW)
    ]
    owner_id = (evidence.owner or {}).get("job_id")

    def rank(seen: Seen) -> tuple[bool, bool, bool, float]:
        lives = seen.activity != Activity.ENDED
        return seen.name != UNNAMED, seen.id == owner_id, lives, seen.submitted_at or 0.0

    return max(reversed(jobs), key=rank, default=None)


def _is_unnamed(seen: Seen, run: Run, evidence: Evidence) -> bool:
    """Whether it is our job, of which accounting knows all but the name: by its id and a submission after the claim."""
    known = evidence.job_id or run.job.id
    return seen.name == UNNAMED and seen.id == known and seen.submitted_at is not None


def _known(job: Job, evidence: Evidence, seen: Seen | None) -> Job:
    """The job's record with what this look added; what is no longer told stays as it was."""
    owner = (evidence.owner or {}) if not _revoked(evidence.owner) else {}
    owner_id = str(owner.get("job_id") or "")
    job = replace(
        job,
        id=owner_id or evidence.job_id or (seen and seen.id) or job.id,
        cluster=evidence.cluster or job.cluster,
        claimed_at=evidence.claimed_at or job.claimed_at,
        started_at=_moment(owner.get("time")) or job.started_at,
        progress=job.progress if evidence.progress is None else evidence.progress,
    )
    if seen is None:
        return job
    ended = seen.activity == Activity.ENDED
    return replace(
        job,
        state=seen.state,
        reason=seen.reason,
        cluster=seen.cluster or job.cluster,
        submitted_at=seen.submitted_at or job.submitted_at,
        launched_at=seen.started_at or job.launched_at,
        expected_start=seen.expected_start,
        expected_end=job.expected_end if ended else seen.expected_end,
        elapsed=job.elapsed if seen.elapsed is None else seen.elapsed,
        cancelled_by=job.cancelled_by if seen.cancelled_by is None else seen.cancelled_by,
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


def times_of(done: dict[str, Any]) -> tuple[float, float]:
    """When the job of a record of completion began and ended (Unix seconds); ValueError, KeyError or TypeError if it
    does not say."""
    began, ended = _moment(done["started_at"]), _moment(done["ended_at"])
    if began is None or ended is None:
        raise ValueError("its times are no times")
    return began, ended


def _sealed(
    run: Run,
    job: Job,
    done: dict[str, Any],
    base_sha256: str,
    *,
    ended: Seen | None = None,
    final: bool = False,
    fenced: bool = False,
) -> Verdict:
    """The record speaks: done, or failed with its reason. `ended`: the job's end as the scheduler shows it; `final`:
    what the scheduler said before is its last word; `fenced`: as in `after_revoking`."""
    try:
        began, finished = times_of(done)
        elapsed, last = job.elapsed, ended is not None or (final and cause_of(job.state, job.reason) is not None)
        if not last or (ended is not None and ended.elapsed is None):
            known = (job.absent_at is None and job.elapsed) or 0.0
            elapsed = max(known, finished - began)
        job = replace(job, id=str(done["job_id"] or job.id or ""), started_at=began, ended_at=finished, elapsed=elapsed)
        if done["outcome"] == "done":
            return Verdict(stage=Stage.ENDED, job=job, contribution=contribution_of(run, done, base_sha256))
        over = is_over(job, finished)
        told = cause_of(job.state, job.reason, over=over, started=True) if last else None
        cause = cause_with_record(done, told, over=over)
        plain = job.state == "COMPLETED" or (done.get("failure") and told == Cause.PROGRAM)
        words = f" (scheduler: {_words(job.state, job.reason)})" if told and not plain else ""
        hint = f"see flctl log {run.site}, then flctl retry {run.site}"
        return _ended(run, job, cause, f"{done['reason'] or 'the job failed'}{words}", hint=hint, fenced=fenced)
    except (KeyError, TypeError, ValueError) as error:
        message = f"the completion record is not valid: {error!r}"
        return _failed(run, job, Cause.PROGRAM, message, hint=f"flctl retry {run.site}")


def contribution_of(run: Run, done: dict[str, Any], base_sha256: str) -> Contribution:
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
    return Contribution(sha256="", files=files, metrics=numbers_only(metrics), **counts)
