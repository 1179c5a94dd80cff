"""Owns submission: the claim, and the one command that may submit."""

from dataclasses import replace

from flctl import faults
from flctl.campaign import driver
from flctl.campaign.session import Session
from flctl.campaign.steps.attempt import attempt_name, remote_folder
from flctl.errors import Locked
from flctl.facility.rsync import refusal
from flctl.facility.shell import quote, read_file
from flctl.records import Run, Stage

SUBMIT_TIMEOUT = 180.0
"""Seconds: sbatch's own retries when the controller's queue is full last up to 120 s."""


def submit(session: Session, run: Run) -> Run:
    """Claim the attempt and submit its job, once: only the command that makes `claim/` ever submits."""
    folder = remote_folder(session, run)
    command = (
        f"cd {quote(folder)} || exit 45\n"
        f"(cd {quote(session.root)} && {driver.guard(session.workspace)}) || exit 48\n"
        "test -e claim || { test -s job.sh && test -s order.json; } || exit 45\n"  # purged before they were used
        "mkdir claim || { test -d claim && exit 0; exit 47; }\n"
        "date +%s >claim/at\n"
        f"{session.scheduler.submit(str(folder / 'job.sh'), run.job.token)} >claim/out 2>claim/err || exit 0\n"
        "test -s claim/out && mv claim/out job.id"
    )
    faults.point("submit", f"{run.site}/{attempt_name(run)}")
    answers = session.ask({"submit": command, "id": read_file(folder / "job.id")}, timeout=SUBMIT_TIMEOUT)
    faults.point("submitted", f"{run.site}/{attempt_name(run)}")
    if answers["submit"].status == 45:
        return replace(run, stage=Stage.ORDERED)
    if answers["submit"].status == 48:
        raise Locked("another host has become the campaign's driver", hint=driver.TAKE_OVER, site=run.site)
    if answers["submit"].status == 47:
        what = f"the attempt could not be claimed in {folder}"
        raise refusal(session.site, answers["submit"].stderr, what, ours=False)
    if answers["id"].status == 0:
        session.note_read(folder / "job.id", answers["id"].stdout)
    job_id = session.scheduler.job_id(answers["id"].stdout) if answers["id"].status == 0 else None
    return replace(run, stage=Stage.QUEUED if job_id else Stage.CLAIMED, job=replace(run.job, id=job_id))
