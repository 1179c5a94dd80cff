"""Owns the look at submitted runs: one program per site and contact, a verdict per run, and revocation."""

import json
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
        for name, path in (("id", "job.id"), ("err", "claim/err"), ("at", "claim/at"), ("owner", "owner")):
            commands[f"{name}{run.number}"] = read_file(folder / path)
        commands[f"done{run.number}"] = read_file(folder / "done.json")
    answers = session.ask(commands)
    seen = _listing(session, answers)
    poll, now = session.site.poll, time.time()
    judged = []
    for run in runs:
        evidence = _evidence(session, run, answers, seen)
        verdict = judge(run, evidence, now=now, absence=poll.absence, window=poll.claim_window)
        if verdict.revoke:
            verdict = revoke(session, run, verdict)
        judged.append(_apply(session, run, verdict, answers[f"done{run.number}"]))
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

    claimed_at = float(text("at")) if text("at").strip().isdigit() else None
    return Evidence(
        seen=seen,
        job_id=session.scheduler.job_id(text("id")),
        refusal=session.scheduler.refusal(text("err")) if text("err") else None,
        base_sha256=session.workspace.model_record(run.order.base)["sha256"],
        claim_age=float(answers["now"].stdout) - claimed_at if claimed_at else None,
        claimed_at=claimed_at,
        owner=_object(text("owner")),
        done=_object(text("done")),
    )


def revoke(session: Session, run: Run, verdict: Verdict) -> Verdict:
    """Take the attempt's owner so that nothing of it can start any more, cancel by name, and judge what is left."""
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
    base = session.workspace.model_record(run.order.base)["sha256"]
    return after_revoking(run, verdict.job, owner, _object(answers["done"].stdout), base, verdict.refusal)


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


def _apply(session: Session, run: Run, verdict: Verdict, done: Answer) -> Run:
    """The run as judged; its completion record is kept at home once it counted."""
    if verdict.stage in (Stage.ENDED, Stage.FAILED) and done.status == 0:
        write_atomic(session.workspace.attempt_folder(run) / "done.json", done.stdout.encode())
        session.note_read(remote_folder(session, run) / "done.json", done.stdout)
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
