"""Owns what flctl asks of a batch scheduler: text in, text out; nothing in this room sees a connection.

Each scheduler gives the command for a POSIX shell at the site, and its twin reads the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
    words where it says that the job can never run as it is."""

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

    def queue(self) -> str:
        """One query for all jobs of this user, ended ones included while the scheduler still lists them."""

    def seen(self, status: int, stdout: str, stderr: str) -> tuple[Seen, ...]:
        """The jobs in the answer to `queue`. Raises QueryFailed."""

    def accounting(self, tokens: Sequence[str]) -> str | None:
        """A query for jobs of these names that the queue has forgotten; None where there is no accounting."""

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


def scheduler_of(site: Site, payload: str) -> Scheduler:
    """The site's scheduler; `payload` is the absolute path of the payload's folder there."""
    from flctl.facility.scheduler import local, slurm

    if site.scheduler.kind == "slurm":
        return slurm.Slurm(accounted_for=site.scheduler.accounting, one_partition="," not in site.shape.partition)
    if site.scheduler.kind == "pbs":
        from flctl.facility.scheduler import pbs

        return pbs.Pbs(history=site.scheduler.accounting)
    return local.Local(python=site.environment.seal_python, payload=payload, shape=site.shape)
