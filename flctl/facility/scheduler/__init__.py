"""Owns what flctl asks of a batch scheduler: text in, text out; nothing in this room sees a connection.

Each scheduler gives the command for a POSIX shell at the site, and its twin reads the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from flctl.facility.profile import Site


class QueryFailed(Exception):
    """The scheduler's answer is not whole, or not understood: it says nothing about any job."""


class Activity(StrEnum):
    """What a state means for us. A word that nobody knows is ACTIVE: it never counts as an end."""

    WAITING = "waiting"
    ACTIVE = "active"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One job as a listing shows it. `state` is the scheduler's own word; times are Unix seconds on its clock.
    `expected_start` is an estimate of the scheduler's; `elapsed`: seconds that it ran so far; `never`: the scheduler's
    words where it says that the job can never run as it is. `cluster`: its name where the scheduler tells it;
    `cancelled_by`: the uid of who cancelled it, as accounting has it."""

    id: str
    name: str
    state: str
    activity: Activity
    submitted_at: float | None = None
    started_at: float | None = None
    expected_start: float | None = None
    expected_end: float | None = None
    elapsed: float | None = None
    reason: str = ""
    never: str = ""
    cluster: str = ""
    cancelled_by: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a dry run of a submission says. `start`: Unix seconds, an estimate; `refusal`: why it would be refused."""

    start: float | None = None
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSeen:
    """A partition or queue as the scheduler shows it; None where it names no limit. `max_walltime` in seconds."""

    name: str
    open: bool
    max_walltime: int | None = None
    min_nodes: int | None = None
    max_nodes: int | None = None


class Scheduler(Protocol):
    def submit(self, script: str, token: str) -> str:
        """One simple command that submits the script (an absolute path) under the name `token`."""

    def job_id(self, stdout: str) -> str | None:
        """The id in what `submit` printed; None if there is none."""

    def refusal(self, text: str) -> str | None:
        """The scheduler's words on stderr if it definitely did not take the job; None when in doubt."""

    def full(self, text: str) -> bool:
        """Whether it says on stderr that too many jobs are there just now: the same job may be taken later."""

    def queue(self, tokens: Sequence[str] = ()) -> str:
        """One query for all jobs of this user, ended ones included while the scheduler still lists them; where it can
        be asked for names, only for these: what other jobs are called cannot be taken for one of them then."""

    def seen(self, status: int, stdout: str, stderr: str) -> tuple[Seen, ...]:
        """The jobs in the answer to `queue`. Raises QueryFailed."""

    def accounting(self, tokens: Sequence[str], ids: Sequence[str | None] = ()) -> str | None:
        """A query for jobs of these names that the queue has forgotten; None where there is no accounting. `ids`: what
        is known of theirs, one each; what is no id is never part of a command."""

    def accounted(self, status: int, stdout: str, stderr: str) -> tuple[Seen, ...] | None:
        """The jobs in the answer to `accounting`; None if it turns out that there is none. Raises QueryFailed."""

    def cancel(self, token: str, job_id: str | None) -> str:
        """Cancels every job of that name; succeeds also if there is none."""

    # What `flctl site test` and `flctl plan` ask; any of these may fail without harm to a run.

    def version(self) -> str:
        """A command that prints the scheduler's name and version in one line."""

    def trial(self, script: str) -> str | None:
        """A dry run of a submission; None where the scheduler has none."""

    def estimate(self, status: int, stdout: str, stderr: str) -> Estimate:
        """What the answer to `trial` says. Raises QueryFailed."""

    def queues(self) -> str | None:
        """A query for the partitions or queues; None where there are none."""

    def queues_seen(self, status: int, stdout: str, stderr: str) -> tuple[QueueSeen, ...]:
        """The answer to `queues`. Raises QueryFailed."""

    def accounts(self) -> str | None:
        """A query for the accounts that this user may charge; None where the scheduler cannot tell."""

    def accounts_seen(self, status: int, stdout: str, stderr: str) -> tuple[str, ...] | None:
        """The answer to `accounts`; None if it turns out that it cannot tell. Raises QueryFailed."""


def together(queue: Sequence[Seen], past: Sequence[Seen]) -> tuple[Seen, ...]:
    """The jobs of a queue, each with what only accounting knows of it (an ended one's exit status with it), and those
    that accounting alone knows. A name that the queue shows is its to tell: rows of accounting come late."""
    rows = {(job.id, job.name): job for job in past}
    names = {job.name for job in queue}
    known = [
        replace(
            job,
            cluster=job.cluster or row.cluster,
            cancelled_by=row.cancelled_by,
            reason="; ".join(dict.fromkeys(filter(None, (job.reason, row.reason if row.activity == "ended" else "")))),
        )
        if (row := rows.get((job.id, job.name)))
        else job
        for job in queue
    ]
    return (*known, *(_by_whom(job) for job in past if job.name not in names))


UNNAMED = "allocation"
"""What slurmdbd calls a job whose name it never heard, as of one that had ended before its start was told."""

NOBODY = "nobody cancelled it"


def _by_whom(job: Seen) -> Seen:
    """A job that accounting alone knows. Where a controller lost its state, slurmdbd calls what ran there CANCELLED
    (as_mysql_flush_jobs_on_cluster), but by nobody: whom scancel served it always names."""
    if job.state == "CANCELLED" and job.cancelled_by is None:
        return replace(job, reason="; ".join(filter(None, (job.reason, NOBODY))))
    return job


def is_known(kind: str, state: str) -> bool:
    """Whether a state is one that the scheduler of that kind documents. Others count as ACTIVE."""
    from flctl.facility.scheduler import local, qstat, slurm

    if kind == "slurm":
        return any(state in words for words in slurm.STATES.values())
    if kind == "pbs":
        return any(state in letters for letters in qstat.STATES.values())
    return state in local.STATES


def scheduler_of(site: Site, payload: str) -> Scheduler:
    """The site's scheduler; `payload` is the absolute path of the payload's folder there."""
    from flctl.facility.scheduler import local, slurm

    if site.scheduler.kind == "slurm":
        return slurm.Slurm(accounted_for=site.scheduler.accounting, one_partition="," not in site.shape.partition)
    if site.scheduler.kind == "pbs":
        from flctl.facility.scheduler import pbs

        return pbs.Pbs(history=site.scheduler.accounting)
    return local.Local(python=site.environment.seal_python, payload=payload, shape=site.shape)
