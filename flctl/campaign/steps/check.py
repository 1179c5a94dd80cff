"""Owns the look at submitted runs: one program per site and contact, a verdict per run, and revocation."""

import re
import time
from dataclasses import replace

from flctl import faults
from flctl.campaign.causes import cause_of
from flctl.campaign.etiquette import may_ask
from flctl.campaign.session import Session
from flctl.campaign.signing import record_of
from flctl.campaign.steps.attempt import attempt_name, remote_folder
from flctl.campaign.testimony import table_of
from flctl.campaign.verdict import Evidence, Verdict, after_revoking, judge
from flctl.campaign.workspace import write_atomic
from flctl.errors import BudgetRefused, JobFailed, SiteUnreachable
from flctl.facility import patience
from flctl.facility.probe import bounded
from flctl.facility.rsync import refusal
from flctl.facility.scheduler import QueryFailed, Seen, is_known, together
from flctl.facility.shell import MISSING, Answer, in_short, quote, read_file
from flctl.records import Cause, Job, Run, Stage
from flctl.words import printable

RECORDS = (
    ("id", "job.id"),
    ("err", "claim/err"),
    ("owner", "owner"),
    ("done", "done.json"),
    ("sig", "done.json.sig"),
)
"""What is read of an attempt at each look, by the name of the command that reads it; the signature, which appears
before its record, after it."""
OVERDUE = (124, 137)
"""The exit status of a command that `timeout` ended, by SIGTERM or by SIGKILL."""
PROGRESS = "checkpoint/progress"
"""A whole number, written by the program itself: never more than that is read, and no link is followed."""


def check(session: Session, runs: list[Run]) -> list[Run]:
    """All submitted runs of a site, judged after one look: each attempt's records, and one query of the scheduler
    unless it was asked a short while ago."""
    scheduler = session.scheduler
    commands = {"now": "date +%s", "there": _is_there(session)}
    doubtful = [run.job for run in runs if run.job.absent_at is not None]
    tokens, ids = [job.token for job in doubtful], [job.id for job in doubtful]
    accounting = scheduler.accounting(tokens, ids) if doubtful else None
    if may_ask(session, 2 if accounting else 1):
        commands["queue"] = bounded(scheduler.queue([run.job.token for run in runs]), patience.QUERY)
        commands |= {"accounting": bounded(accounting, patience.QUERY)} if accounting else {}
    for run in runs:
        folder = remote_folder(session, run)
        for name, path in RECORDS:
            commands[f"{name}{run.number}"] = read_file(folder / path)
        saved = folder / PROGRESS
        plain = f"test -f {quote(saved)} && test ! -L {quote(saved)} || exit 44"
        commands[f"progress{run.number}"] = f"{plain}; {read_file(saved, limit=32)}"
        # The claim's own time where whoever made it was cut off before it wrote one.
        commands[f"at{run.number}"] = f"grep . {quote(folder / 'claim/at')} || stat -c %Y {quote(folder / 'claim')}"
    faults.point("check", session.site.name)
    answers = session.ask(commands, timeout=60.0 + 2 * patience.QUERY)
    faults.point("checked", session.site.name)
    _check_read(session, answers, ["there", *(f"{name}{run.number}" for run in runs for name, _ in RECORDS)])
    seen = _listing(session, answers)
    poll, now = session.site.poll, time.time()
    judged = []
    for run in runs:
        evidence = _evidence(session, run, answers, seen)
        verdict = judge(run, evidence, now=now, absence=poll.absence, window=poll.claim_window)
        _note_unknown(session, run, verdict.job)
        if verdict.revoke:
            _remember(session, run, verdict)
            verdict = revoke(session, run, verdict, answers)
        judged.append(_apply(session, run, verdict, answers))
    return judged


def _is_there(session: Session) -> str:
    """The payload was seen in this contact. Should a purge have taken it since, the next one puts it there anew."""
    return f"test -d {quote(session.payload)} || {{ printf '%s is gone\\n' {quote(session.payload)} >&2; exit 1; }}"


def _check_read(session: Session, answers: dict[str, Answer], names: list[str]) -> None:
    """SiteUnreachable unless each of these was read, or is not there: a file system that is away must not look like one
    that holds no records."""
    bad = [answers[name].stderr for name in names if answers[name].status not in (0, MISSING)]
    if bad:
        raise SiteUnreachable(
            f"the campaign's folder at {session.site.name} cannot be read: {printable(bad[0])}",
            hint="is its file system away? it is looked at again at the next contact",
            site=session.site.name,
        )


def _listing(session: Session, answers: dict[str, Answer]) -> tuple[Seen, ...] | None:
    """What queue and accounting know; None if nobody asked or the query failed, which changes nothing."""
    scheduler = session.scheduler
    if "queue" not in answers:
        return None
    try:
        queue = _in_time(answers["queue"])
        seen = scheduler.seen(queue.status, queue.stdout, queue.stderr)
        if "accounting" in answers:
            told = _in_time(answers["accounting"])
            seen = together(seen, scheduler.accounted(told.status, told.stdout, told.stderr) or ())
        return seen
    except QueryFailed as failure:
        session.workspace.journal.append("query failed", site=session.site.name, reason=printable(str(failure)))
        return None


def _in_time(answer: Answer) -> Answer:
    """The answer to a query; QueryFailed if it was ended for taking too long."""
    if answer.status in OVERDUE:
        raise QueryFailed(f"no answer within {patience.QUERY} s")
    return answer


def _note_unknown(session: Session, run: Run, job: Job) -> None:
    """Journal a scheduler's word that flctl does not know, when it is new: such a job counts as one that lives."""
    if job.state and job.state != run.job.state and not is_known(session.site.scheduler.kind, job.state):
        session.workspace.journal.append("unknown state", site=run.site, number=run.number, state=job.state)


def _remember(session: Session, run: Run, verdict: Verdict) -> None:
    """Write down that flctl itself ends this attempt, before the site is told: its job may be seen as cancelled next.
    One that somebody else had cancelled already stays that."""
    foreign = cause_of(verdict.job.state, verdict.job.reason) == Cause.CANCELLED_BY_OTHER
    if not (foreign or run.job.revoked or run.job.ending):
        session.workspace.save_run(replace(run, job=replace(verdict.job, revoked=True)))
        faults.point("revocation-recorded", run.site)


def _evidence(session: Session, run: Run, answers: dict[str, Answer], seen: tuple[Seen, ...] | None) -> Evidence:
    def text(name: str) -> str:
        answer = answers[f"{name}{run.number}"]
        return answer.stdout if answer.status == 0 else ""

    def moment(text: str) -> float | None:
        return float(text) if re.fullmatch(r"\s*\d{1,12}\s*", text, re.ASCII) else None

    now, claimed_at = moment(answers["now"].stdout), moment(text("at"))
    claimed = claimed_at or run.job.claimed_at or run.changed_at  # a purge may have taken the claim
    named = re.fullmatch(r"\d+;([A-Za-z0-9_.-]{1,64})", text("id").strip(), re.ASCII)
    steps = re.fullmatch(r"\s*(\d{1,12})\s*", text("progress"), re.ASCII)
    return Evidence(
        seen=seen,
        job_id=session.scheduler.job_id(text("id")),
        cluster=named[1] if named else "",
        refusal=session.scheduler.refusal(in_short(text("err"))) if text("err") else None,
        base_sha256=session.workspace.model_record(run.order.base)["sha256"],
        claim_age=now - claimed if now is not None else None,
        claimed_at=claimed_at,
        owner=table_of(text("owner")),
        done=record_of(session.site, text("done"), text("sig")),
        progress=int(steps[1]) if steps else None,
    )


def revoke(session: Session, run: Run, verdict: Verdict, looked: dict[str, Answer]) -> Verdict:
    """Take the attempt's owner so that nothing of it can start any more, cancel by name, and judge what is left. What
    is read anew takes its place in `looked`."""
    folder = remote_folder(session, run)
    seal = f"{quote(session.site.environment.seal_python)} {quote(session.payload / 'seal.py')}"
    faults.point("revoke", run.site)
    answers = session.ask(
        {
            "there": _is_there(session),
            # Where a purge took the attempt's folder, no copy of its job can start any more.
            "owner": f"""{_is_there(session)}
test -d {quote(folder)} || {{ echo '{{"by": "flctl"}}'; exit 0; }}
{seal} revoke --run {quote(folder)} --nonce r{run.job.token}""",
            "cancel": session.scheduler.cancel(run.job.token, run.job.id),
            "done": read_file(folder / "done.json"),
            "sig": read_file(folder / "done.json.sig"),
            "fenced": f"test -e {quote(folder / 'fenced')}",
            "order": f"test -s {quote(folder / 'order.json')}",
        }
    )
    faults.point("revoked", run.site)
    _check_read(session, answers, ["there", "done", "sig"])
    owner = table_of(answers["owner"].stdout)
    if owner is None:
        said = f"run {attempt_name(run)} could not be revoked"
        error = refusal(session.site, answers["owner"].stderr, said, ours=False)
        if isinstance(error, BudgetRefused):
            raise error
        raise JobFailed(
            error.message,
            hint=f"is {session.site.environment.seal_python} a Python 3.6 or newer on the login host?",
            site=run.site,
        )
    if run.job.ending and answers["cancel"].status != 0:
        raise _not_cancelled(run, "cancel", answers["cancel"])
    looked |= {f"{name}{run.number}": answers[name] for name in ("owner", "done", "sig")}
    sealed = record_of(session.site, answers["done"].stdout, answers["sig"].stdout)
    base = session.workspace.model_record(run.order.base)["sha256"]
    said = in_short(looked[f"err{run.number}"].stdout)
    full = session.scheduler.full(said)
    fenced, purged = answers["fenced"].status == 0, answers["order"].status != 0
    return after_revoking(run, verdict.job, owner, sealed, base, verdict.refusal, printable(said), fenced, purged, full)


def cancel(session: Session, run: Run) -> None:
    """Nothing of this attempt starts any more, and what runs of it is told to end."""
    seal = f"{quote(session.site.environment.seal_python)} {quote(session.payload / 'seal.py')}"
    folder = remote_folder(session, run)
    faults.point("cancel", run.site)
    answers = session.ask(
        {
            "owner": f"{_is_there(session)}; test -d {quote(folder)} || exit 0; {seal} revoke --run {quote(folder)} "
            f"--nonce r{run.job.token}",
            "cancel": session.scheduler.cancel(run.job.token, run.job.id),
        }
    )
    faults.point("cancelled", run.site)
    for name, answer in answers.items():
        if answer.status != 0:
            raise _not_cancelled(run, name, answer)


def _not_cancelled(run: Run, what: str, answer: Answer) -> JobFailed:
    return JobFailed(
        f"cancelling job {run.job.id or run.job.token} failed ({what}): {printable(answer.stderr)}",
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
    folder = session.workspace.attempt_folder(run)
    for name in ("sig", "done"):
        answer = answers[f"{name}{run.number}"]
        if verdict.stage in (Stage.ENDED, Stage.FAILED) and answer.status == 0:
            write_atomic(folder / dict(RECORDS)[name], answer.stdout.encode())
    return replace(
        run,
        stage=verdict.stage,
        job=verdict.job,
        contribution=verdict.contribution or run.contribution,
        failure=verdict.failure,
        held=verdict.held,
    )
