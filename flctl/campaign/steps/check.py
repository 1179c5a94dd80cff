"""Owns the look at submitted runs: one program per site and contact, a verdict per run, and revocation."""

import json
import re
import time
from dataclasses import replace
from typing import Any

from flctl.campaign.session import Session, clean
from flctl.campaign.steps.attempt import attempt_name, remote_folder
from flctl.campaign.verdict import Evidence, Verdict, after_revoking, judge
from flctl.campaign.workspace import write_atomic
from flctl.errors import JobFailed
from flctl.facility.scheduler import QueryFailed, Seen
from flctl.facility.shell import Answer, quote, read_file
from flctl.records import Run, Stage

RECORDS = (("id", "job.id"), ("err", "claim/err"), ("owner", "owner"), ("done", "done.json"))
"""What is read of an attempt at each look, by the name of the command that reads it."""


def check(session: Session, runs: list[Run]) -> list[Run]:
    """All submitted runs of a site, judged after one look: one query of the scheduler, and each attempt's records."""
    scheduler = session.scheduler
    commands = {"now": "date +%s", "queue": scheduler.queue()}
    doubtful = [run.job.token for run in runs if run.job.absent_at is not None]
    accounting = scheduler.accounting(doubtful) if doubtful else None
    if accounting:
        commands["accounting"] = accounting
    for run in runs:
        folder = remote_folder(session, run)
        for name, path in RECORDS:
            commands[f"{name}{run.number}"] = read_file(folder / path)
        # The claim's own time where whoever made it was cut off before it wrote one.
        commands[f"at{run.number}"] = f"grep . {quote(folder / 'claim/at')} || stat -c %Y {quote(folder / 'claim')}"
    answers = session.ask(commands)
    seen = _listing(session, answers)
    poll, now = session.site.poll, time.time()
    judged = []
    for run in runs:
        evidence = _evidence(session, run, answers, seen)
        verdict = judge(run, evidence, now=now, absence=poll.absence, window=poll.claim_window)
        if verdict.revoke:
            verdict = revoke(session, run, verdict, answers)
        judged.append(_apply(session, run, verdict, answers))
    return judged


def _listing(session: Session, answers: dict[str, Answer]) -> tuple[Seen, ...] | None:
    """What queue and accounting know; None if the query failed, which changes nothing."""
    scheduler = session.scheduler
    try:
        queue = answers["queue"]
        seen = scheduler.seen(queue.status, queue.stdout, queue.stderr)
        if "accounting" in answers:
            told = answers["accounting"]
            known = {job.name for job in seen}
            past = scheduler.accounted(told.status, told.stdout, told.stderr) or ()
            seen += tuple(job for job in past if job.name not in known)
        return seen
    except QueryFailed as failure:
        session.workspace.journal.append("query failed", site=session.site.name, reason=clean(str(failure)))
        return None


def _evidence(session: Session, run: Run, answers: dict[str, Answer], seen: tuple[Seen, ...] | None) -> Evidence:
    def text(name: str) -> str:
        answer = answers[f"{name}{run.number}"]
        return answer.stdout if answer.status == 0 else ""

    def moment(text: str) -> float | None:
        return float(text) if re.fullmatch(r"\s*\d{1,12}\s*", text, re.ASCII) else None

    now, claimed_at = moment(answers["now"].stdout), moment(text("at"))
    return Evidence(
        seen=seen,
        job_id=session.scheduler.job_id(text("id")),
        refusal=session.scheduler.refusal(text("err")) if text("err") else None,
        base_sha256=session.workspace.model_record(run.order.base)["sha256"],
        claim_age=now - claimed_at if now is not None and claimed_at is not None else None,
        claimed_at=claimed_at,
        owner=_object(text("owner")),
        done=_object(text("done")),
    )


def revoke(session: Session, run: Run, verdict: Verdict, looked: dict[str, Answer]) -> Verdict:
    """Take the attempt's owner so that nothing of it can start any more, cancel by name, and judge what is left. What
    is read anew takes its place in `looked`."""
    folder = remote_folder(session, run)
    seal = f"{quote(session.site.environment.seal_python)} {quote(session.payload / 'seal.py')}"
    answers = session.ask(
        {
            "owner": f"{seal} revoke --run {quote(folder)} --nonce r{run.job.token}",
            "cancel": session.scheduler.cancel(run.job.token, run.job.id),
            "done": read_file(folder / "done.json"),
        }
    )
    owner = _object(answers["owner"].stdout)
    if owner is None:
        raise JobFailed(
            f"run {attempt_name(run)} could not be revoked: {clean(answers['owner'].stderr)}",
            hint=f"is {session.site.environment.seal_python} a Python 3.6 or newer on the login host?",
            site=run.site,
        )
    looked[f"owner{run.number}"], looked[f"done{run.number}"] = answers["owner"], answers["done"]
    base = session.workspace.model_record(run.order.base)["sha256"]
    done, said = _object(answers["done"].stdout), clean(looked[f"err{run.number}"].stdout)
    return after_revoking(run, verdict.job, owner, done, base, verdict.refusal, said)


def cancel(session: Session, run: Run) -> None:
    """Nothing of this attempt starts any more, and what runs of it is told to end."""
    seal = f"{quote(session.site.environment.seal_python)} {quote(session.payload / 'seal.py')}"
    folder = remote_folder(session, run)
    answers = session.ask(
        {
            "owner": f"test -d {quote(folder)} || exit 0; {seal} revoke --run {quote(folder)} --nonce r{run.job.token}",
            "cancel": session.scheduler.cancel(run.job.token, run.job.id),
        }
    )
    for name, answer in answers.items():
        if answer.status != 0:
            raise JobFailed(
                f"cancelling job {run.job.id or run.job.token} failed ({name}): {clean(answer.stderr)}",
                hint=f"flctl cancel {run.site} again",
                site=run.site,
            )


def _apply(session: Session, run: Run, verdict: Verdict, answers: dict[str, Answer]) -> Run:
    """The run as judged; what was read of its attempt is journaled when it changed the run's stage."""
    if verdict.stage != run.stage:
        for name, path in RECORDS:
            answer = answers[f"{name}{run.number}"]
            if answer.status == 0 and answer.stdout:
                session.note_read(remote_folder(session, run) / path, answer.stdout)
    done = answers[f"done{run.number}"]
    if verdict.stage in (Stage.ENDED, Stage.FAILED) and done.status == 0:
        write_atomic(session.workspace.attempt_folder(run) / "done.json", done.stdout.encode())
    return replace(
        run,
        stage=verdict.stage,
        job=verdict.job,
        contribution=verdict.contribution or run.contribution,
        failure=verdict.failure,
    )


def _object(text: str) -> dict[str, Any] | None:
    try:
        data = json.loads(text)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None
