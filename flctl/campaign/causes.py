"""Owns what the end of a job means: the scheduler's last word and the job's own record, as one Cause.

Pure tables. Slurm's words are those of squeue(1) and sacct(1); PBS's are the exit statuses of qstat(1B) and of job.h of
OpenPBS (JOB_EXEC_*, negative), where 256 + N is signal N of the job's shell.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flctl.facility.scheduler import NOBODY
from flctl.records import Cause, Job

ENDS: Mapping[str, Cause] = MappingProxyType(
    {
        "COMPLETED": Cause.PROGRAM,  # without a record of success
        "FAILED": Cause.PROGRAM,
        "TIMEOUT": Cause.TIME,
        "DEADLINE": Cause.TIME,
        "OUT_OF_MEMORY": Cause.MEMORY,
        "NODE_FAIL": Cause.INFRASTRUCTURE,
        "BOOT_FAIL": Cause.INFRASTRUCTURE,
        "LAUNCH_FAILED": Cause.INFRASTRUCTURE,
        "RECONFIG_FAIL": Cause.INFRASTRUCTURE,
        "PREEMPTED": Cause.INFRASTRUCTURE,
        "CANCELLED": Cause.CANCELLED_BY_OTHER,
        "LOST": Cause.LOST,  # of a machine without a batch system: the job's processes went without a word
    }
)

UNDER_ZERO: Mapping[int, Cause] = MappingProxyType(
    {
        -10: Cause.CONFIGURATION,  # no such account on the node
        -17: Cause.CANCELLED_BY_OTHER,  # deleted by a hook
        -19: Cause.CANCELLED_BY_OTHER,
        -21: Cause.CONFIGURATION,  # security
        -23: Cause.CONFIGURATION,  # Kerberos
        -24: Cause.PROGRAM,  # over its ncpus
        -25: Cause.PROGRAM,
        -26: Cause.MEMORY,
        -27: Cause.MEMORY,
        -28: Cause.TIME,  # over its cput
        -29: Cause.TIME,
    }
)
"""PBS's own exit statuses; every other negative one means that the job never ran properly, for no fault of its own."""

NAMED: Mapping[str, Cause] = MappingProxyType(
    {
        cause.value: cause
        for cause in (Cause.MEMORY, Cause.DIVERGED, Cause.DATA, Cause.TOKENIZER, Cause.MODEL, Cause.OPTIONS, Cause.TIME)
    }
)
"""The classes of failure that a program may name in its last line."""

REMEDIES: Mapping[Cause, str] = MappingProxyType(
    {
        Cause.MEMORY: 'try a smaller micro_batch, activation_checkpointing = true or sharding = "full" in [train] of '
        "sites/{site}.toml, or more memory (gpus, ranks, nodes) in its shape",
        Cause.DIVERGED: "try a smaller lr, more warmup_steps or a smaller clip in [train] of flctl.toml",
        Cause.DATA: "correct the data or storage.data in sites/{site}.toml, or what it is read as: text_field, format, "
        "sequence_length in [train]",
        Cause.TOKENIZER: "install what the model's tokenizer needs at {site}, or begin with one whose tokenizer fits",
        Cause.MODEL: "install what the model needs (transformers) in the environment of sites/{site}.toml",
        Cause.OPTIONS: "correct [train] of flctl.toml or of sites/{site}.toml",
        Cause.TIME: "a longer walltime in sites/{site}.toml, or fewer steps in [train] of flctl.toml",
    }
)
"""What to try before `flctl retry`."""

STRONGER = frozenset(set(Cause) - {Cause.PROGRAM, Cause.CONFIGURATION, Cause.REFUSED})
"""What the scheduler says that explains a program's bad end better than the program does."""

SIGTERM_STATUS, SIGKILL_STATUS = 143, 137
SLACK = 5.0
"""Seconds before the end of its time at which a job that was ended is taken for one that ran out of it."""

STUCK: tuple[tuple[str, str], ...] = (
    (r"(?i:requeued held)|JobHoldMaxRequeue", "it could not be launched; flctl gives it up and tries again by itself"),
    (r"JobHeldAdmin|SPECIAL_EXIT|RESV_DEL_HOLD", "held by the site's operators: ask them, or flctl skip {site}"),
    (r"JobHeldUser|REQUEUE_HOLD", "held for you: scontrol release {id} there, or flctl skip {site}"),
    (r"held \([a-z]*[so][a-z]*\)", "held by the site's operators: ask them, or flctl skip {site}"),
    (r"held \(u\)", "held for you: qrls {id} there, or flctl skip {site}"),
    (r"PartitionDown|PartitionInactive", "its partition is down: wait, or another in sites/{site}.toml"),
    (r"PartitionNodeLimit|PartitionConfig", "more than its partition has just now: wait, or less in sites/{site}.toml"),
    (
        r"(?:QOS|Assoc)Grp\w*(?:Minutes|RunMinutes)\w*",
        "the account's hours are used up: ask the site",
    ),
    (
        r"AssocMaxJobsLimit|QOSMax\w*PerUser\w*",
        "as many jobs as you may have there: it starts after another",
    ),
    (
        r"ReqNodeNotAvail\w*|Nodes_required_for_job\w*|Reservation",
        "nodes are down or reserved: maintenance?",
    ),
)
"""Why a job waits that may wait for long (slurm.schedmd.com/job_reason_codes.html), and what to do about it."""


def cause_of(state: str, reason: str, *, over: bool = False, started: bool = False) -> Cause | None:
    """What the scheduler's last word says; None if it is no end (or nothing that anybody knows). `over`: whether the
    job had used its time; `started`: whether its first line was carried out."""
    if state in ("F", "X"):
        return _pbs(reason, over)
    if state == "FAILED":
        return _failed(reason, started)
    if state == "CANCELLED" and NOBODY in reason:
        return Cause.LOST
    return ENDS.get(state)


def _failed(reason: str, started: bool) -> Cause:
    """Slurm tells the exit status (sacct: `0:53`) or the signal (squeue: `RaisedSignal:53(...)`). 53: slurmstepd could
    not open the job's output or enter its folder; 0:125: out of memory in older versions. JobLaunchFailure is what
    22.05 says of every script that a signal killed, however long it ran."""
    if re.search(r"\b0:53\b|RaisedSignal:53\b", reason):
        return Cause.CONFIGURATION
    if re.search(r"\b0:125\b|OutOfMemory|RaisedSignal:125\b", reason):
        return Cause.MEMORY
    if re.search(r"[Ll]aunch fail|NodeDown|node fail", reason) or ("JobLaunchFailure" in reason and not started):
        return Cause.INFRASTRUCTURE
    return Cause.PROGRAM


def _pbs(reason: str, over: bool) -> Cause:
    found = re.search(r"exit status (-?\d{1,6})", reason)
    if found is None:
        return Cause.REFUSED if "depended on" in reason else Cause.CANCELLED_BY_OTHER  # never started
    status = int(found[1])
    if re.search(r"terminated by \S", reason):  # as PBS's comment says of a qdel, and whose it was
        return Cause.CANCELLED_BY_OTHER
    if "exceeded resource walltime" in reason:
        return Cause.TIME
    if status < 0:
        return UNDER_ZERO.get(status, Cause.INFRASTRUCTURE)
    if status in (256 + 15, SIGTERM_STATUS):
        return Cause.TIME if over else Cause.CANCELLED_BY_OTHER
    if status == 256 + 9 and over:
        return Cause.TIME
    return Cause.PROGRAM


def unexplained(done: Mapping[str, Any]) -> bool:
    """Whether a record of failure leaves open why: the job was ended from outside, or what it was to start from was
    not there."""
    return done.get("cause") in ("signal", "base") or done.get("exit_status") in (SIGTERM_STATUS, SIGKILL_STATUS)


def cause_with_record(done: Mapping[str, Any], told: Cause | None, *, over: bool) -> Cause:
    """Of a job that left a record of failure. `told`: what the scheduler says."""
    if told in STRONGER:
        return told
    if done.get("cause") == "base":
        return Cause.INFRASTRUCTURE
    if named := NAMED.get(str(done.get("failure"))):
        return named
    if done.get("cause") == "signal" or done.get("exit_status") == SIGTERM_STATUS:
        return Cause.TIME if over else Cause.CANCELLED_BY_OTHER
    return Cause.MEMORY if done.get("exit_status") == SIGKILL_STATUS else Cause.PROGRAM


def is_over(job: Job, moment: float | None) -> bool:
    """Whether a job that ended at `moment` (None: nobody knows when) had used its time, as the scheduler or its order
    limited it."""
    counted = job.elapsed if cause_of(job.state, job.reason) else None
    if counted is not None and job.walltime is not None and counted >= job.walltime - SLACK:
        return True
    limit = job.expected_end
    if limit is None and job.started_at is not None and job.walltime is not None:
        limit = job.started_at + job.walltime
    return moment is not None and limit is not None and moment >= limit - SLACK


def remedy(cause: Cause, site: str) -> str:
    """What to type after a failure."""
    words = REMEDIES.get(cause)
    return f"{words.format(site=site)}, then flctl retry {site}" if words else ""


def advice(job: Job, site: str) -> str:
    """What to do about a job that waits for something that may take long; empty if it is nothing special."""
    for pattern, words in STUCK:
        if re.search(pattern, job.reason) or re.fullmatch(pattern, job.state):
            return words.format(site=site, id=job.id)
    return ""
