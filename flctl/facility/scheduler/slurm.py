"""Owns Slurm's commands and what their answers mean (22.05 and its manual pages; slurm_errno.c)."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flctl.facility.scheduler import UNNAMED, Activity, Estimate, QueryFailed, QueueSeen, Seen, listing

ME = '--user="$(id -un)"'
"""`--me` came with Slurm 20.02 (squeue) and 22.05 (scancel); this is as good and older."""

FORMAT = "%i|%T|%V|%S|%e|%M|%r|%j"
"""As listing reads it. %S of a job that waits is Slurm's estimate; %M is the time that it ran, without suspensions."""

ID = re.compile(r"[0-9]{1,10}", re.ASCII)

NODES = r"infinite|[0-9]{1,9}(?:-(?:[0-9]{1,9}|infinite))?"

FILTERS = "SQUEUE_ACCOUNT SQUEUE_FORMAT2 SQUEUE_LICENSES SQUEUE_NAMES SQUEUE_PARTITION SQUEUE_QOS SQUEUE_USERS"
"""Variables of the user's own that would hide jobs from the listing."""

STATES = {
    Activity.WAITING: (
        *("PENDING", "CONFIGURING", "POWER_UP_NODE", "EXPEDITING"),
        # The same id starts again later, or waits for a person to release it. seal.py admits one start only.
        *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
    ),
    Activity.ACTIVE: (
        *("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT", "UPDATE_DB"),
        "REVOKED",  # of a federation: another cluster started the job
    ),
    Activity.ENDED: (
        *("COMPLETED", "FAILED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "CANCELLED", "PREEMPTED"),
        *("NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL"),
    ),
}
"""Every state word that Slurm documents (squeue(1), sacct(1): base states and flags)."""

_ACTIVITY = {word: activity for activity, words in STATES.items() for word in words}

DOUBTFUL = re.compile(
    r"timed out|unable to contact|communication|connection|transport endpoint|zero bytes|broken pipe|no route"
    r"|message (?:send|receive)|unexpected message|temporarily unable|resource temporarily|try again|standby"
    r"|authentication|credential|munge|unspecified error",
    re.IGNORECASE,
)
"""The controller may have taken the job although sbatch says so."""

DEFINITE = re.compile(
    r"sbatch: (?:unrecognized|invalid|ambiguous) option|sbatch: option .* requires an argument"
    r"|option '--?[\w-]+' (?:requires|doesn't allow|is ambiguous)"
    r"|sbatch: error: (?:invalid|unknown|unable to open file|unable to read|this does not look like a batch script"
    r"|batch script (?:contains|is empty)|--?[\w-]+ |\"[^\"]*\" is not a valid)"
    r"|sbatch: fatal: (?:invalid|unable to process configuration|could not establish a configuration)"
    r"|invalid (?:account|partition|qos|generic resource|feature|job|node|number|time|wckey|license|mpi|burst|cluster"
    r"|user|group|working directory|dependency|memory|cpu)"
    r"|requested (?:time limit|node configuration|reservation|partition|operation|topology|gres|nodes?) "
    r"|(?:node|task|cpu) count specification invalid|more processors requested|too many|job size specification"
    r"|memory specification can not be satisfied|memory required|violates accounting/qos policy"
    r"|access/permission denied|permission denied|group not permitted|not permitted to use|not allowed"
    r"|no (?:partition specified|account)|duplicate job|job script|pathname of a file|user not found|reached the limit"
    r"|sbatch[^\n]*not found",
    re.IGNORECASE,
)
"""The job was refused: an option, or the controller's words (slurm_errno.c)."""

FULL = re.compile(
    r"job submit limit|temporarily unable to accept job|job queue full|submission failed: resource temporarily",
    re.IGNORECASE,
)
"""MaxJobCount jobs are in the controller (EAGAIN, after sbatch tried for two minutes: sbatch.c), or as many as an
association or a QOS may submit, which has the same words as its limits on one job's size."""

NO_MORE = "submission failed: Resource temporarily unavailable"
"""The last answer, after those of the same kind. Should it ever be that of another call, the attempt is revoked before
another is opened."""

LIMIT = re.compile(r"\b(?:QOS|Assoc)[A-Z]\w+")
"""Which limit it is, where sbatch tells: AssocMaxSubmitJobLimit, QOSMaxSubmitJobPerUserLimit, QOSGrpSubmitJobsLimit."""


NEVER = re.compile(
    r"DependencyNeverSatisfied|BadConstraints|ReservationDeleted|MaxMemPerLimit"
    r"|InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed"
    r"|(?:QOS|Assoc)Max\w+(?:PerJob|PerNode)(?:Limit)?|QOSMin\w+"
)
"""Reasons of a pending job for which no other job's end, no node's return and no time is a remedy
(slurm.schedmd.com/job_reason_codes.html): what it asks for, against what one job may have. Not PartitionNodeLimit and
PartitionConfig, which mean nodes that are down as well, nor limits that jobs share (PerUser, PerAccount, Grp), nor
holds."""

NEVER_THERE = re.compile(r"PartitionTimeLimit")
"""The same, of one partition: where a job may choose among several it says nothing of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slurm:
    """`one_partition`: jobs name one partition, or leave it to Slurm."""

    accounted_for: bool = True
    one_partition: bool = True

    def submit(self, script: str, token: str) -> str:
        return f"sbatch --parsable --no-requeue --job-name={shlex.quote(token)} {shlex.quote(script)}"

    def job_id(self, stdout: str) -> str | None:
        """`--parsable` prints ID or ID;CLUSTER; a site's own wrapper may print more lines around it."""
        found = re.findall(r"^([0-9]+)(?:;[A-Za-z0-9_.-]+)?$", stdout.strip(), re.MULTILINE)
        return found[0] if len(found) == 1 else None

    def refusal(self, text: str) -> str | None:
        if DOUBTFUL.search(text) and NO_MORE not in text:
            return None
        known = [line.strip() for line in text.splitlines() if DEFINITE.search(line) or LIMIT.search(line)]
        words = known or [line.strip() for line in text.splitlines() if NO_MORE in line]
        return "; ".join(words)[:500] or None

    def full(self, text: str) -> bool:
        limits = LIMIT.findall(text)
        return all("Submit" in limit for limit in limits) if limits else FULL.search(text) is not None

    def queue(self, tokens: Sequence[str] = ()) -> str:
        """-a: hidden partitions too. Times as Unix seconds, since only the site knows the zone of its local time."""
        only = f" --name={shlex.quote(','.join(tokens))}" if tokens else ""
        return f"(unset {FILTERS}; SLURM_TIME_FORMAT=%s squeue -h -a -t all {ME}{only} -o '{FORMAT}')"

    def seen(self, status: int, stdout: str, stderr: str) -> tuple[Seen, ...]:
        """An unknown user gets an empty listing and exit status 0, but an error on stderr."""
        if status != 0 or re.search(r"^(?:squeue|slurm_\w+)\b.*\b(?:error|fatal)\b", stderr, re.MULTILINE):
            raise QueryFailed(_words("squeue", status, stderr))
        return tuple(self._judged(job) for job in listing.jobs(stdout, activity_of))

    def _judged(self, job: Seen) -> Seen:
        hopeless = NEVER.fullmatch(job.reason) or (self.one_partition and NEVER_THERE.fullmatch(job.reason))
        return replace(job, never=job.reason) if hopeless and job.activity == Activity.WAITING else job

    def accounting(self, tokens: Sequence[str], ids: Sequence[str | None] = ()) -> str | None:
        """Without an id sacct shows no job that was never eligible (cancelled while held, or while it waited for
        another), without a start time today's only, without an end time none that is eligible later. An id alone names
        nothing: they start again where a controller lost its state. -X: jobs, not their steps. -D: also those whose
        id another job has by now. Rows come a second or more after the submission. The user's own only: root is shown
        everybody's."""
        if not self.accounted_for:
            return None
        known = [job_id for job_id in ids if job_id and ID.fullmatch(job_id)]
        by_id = bool(known) and len(known) == len(tokens)
        which = f"-j {','.join(known)}" if by_id else "-S now-30days -E now+365days"
        names = shlex.quote(",".join([*tokens, UNNAMED] if by_id else tokens))
        fields = "JobID,State,Submit,Start,End,ElapsedRaw,ExitCode,Cluster,JobName"
        return f"SLURM_TIME_FORMAT=%s sacct -n -P -X -D {which} {ME} --name={names} --format={fields}"

    def accounted(self, status: int, stdout: str, stderr: str) -> tuple[Seen, ...] | None:
        if re.search(r"accounting storage is disabled|sacct[^\n]*not found", stderr, re.IGNORECASE):
            return None
        if status != 0 or re.search(r"^(?:sacct|slurm\w*)\b.*\b(?:error|fatal)\b", stderr, re.MULTILINE):
            raise QueryFailed(_words("sacct", status, stderr))
        return listing.jobs(stdout, activity_of, clusters=True)

    def cancel(self, token: str, job_id: str | None) -> str:
        """By name only: ids start again where a controller lost its state, and the id may be another job's by now."""
        return f"scancel {ME} --name={shlex.quote(token)}"

    def version(self) -> str:
        return "squeue --version"

    def trial(self, script: str) -> str | None:
        """Times as Unix seconds, as in `queue`."""
        return f"SLURM_TIME_FORMAT=%s sbatch --test-only {shlex.quote(script)}"

    def estimate(self, status: int, stdout: str, stderr: str) -> Estimate:
        """`sbatch: Job 1 to start at TIME using ...`. Where EnforcePartLimits is off, as by default, it tells a start
        also for a job that its partition's limits will keep waiting: those are in `queues`."""
        found = re.search(r"^sbatch: Job [0-9]+ to start at ([0-9]{1,11}) using ", stderr, re.MULTILINE | re.ASCII)
        if status == 0 and found:
            return Estimate(start=float(found[1]))
        words = re.findall(r"^(?:sbatch: (?:error|fatal)|allocation failure): .+", stderr, re.MULTILINE)
        if status in (0, 255) or not words or DOUBTFUL.search(stderr):
            raise QueryFailed(_words("sbatch --test-only", status, stderr))
        return Estimate(refusal="; ".join(words)[:500])

    def queues(self) -> str | None:
        """-a: hidden partitions too."""
        return "(unset SINFO_PARTITION; sinfo -h -a --noconvert -o '%R|%a|%l|%s')"

    def queues_seen(self, status: int, stdout: str, stderr: str) -> tuple[QueueSeen, ...]:
        """`batch|up|1-00:00:00|1-infinite`: name, state, time limit, nodes of a job. A partition that is down takes
        jobs and starts none; one that drains takes none."""
        rows = [line.split("|") for line in stdout.splitlines() if line.strip()]
        if status != 0 or any(len(row) != 4 or not re.fullmatch(NODES, row[3], re.ASCII) for row in rows):
            raise QueryFailed(_words("sinfo", status, stderr or stdout))
        found: dict[str, QueueSeen] = {}
        for name, state, limit, nodes in rows:
            least, _, most = nodes.partition("-")
            walltime = listing.duration(limit)
            seen = QueueSeen(
                name=name,
                open=state == "up",
                max_walltime=None if walltime is None else int(walltime),
                min_nodes=int(least) if least.isdigit() else None,
                max_nodes=int(most or least) if (most or least).isdigit() else None,
            )
            found.setdefault(name, seen)
        return tuple(found.values())

    def accounts(self) -> str | None:
        if not self.accounted_for:
            return None
        return 'sacctmgr -n -P show associations where user="$(id -un)" format=Account'

    def accounts_seen(self, status: int, stdout: str, stderr: str) -> tuple[str, ...] | None:
        """Those of every cluster that shares the site's database, a name per line and partition."""
        if re.search(r"not running a supported accounting_storage|sacctmgr[^\n]*not found", stderr, re.IGNORECASE):
            return None
        names = [line.strip() for line in stdout.splitlines() if line.strip()]
        if status != 0 or not all(re.fullmatch(r"[\w.@+-]+", name) for name in names):
            raise QueryFailed(_words("sacctmgr", status, stderr or stdout))
        return tuple(sorted(set(names)))


def activity_of(state: str) -> Activity:
    return _ACTIVITY.get(state, Activity.ACTIVE)


def _words(program: str, status: int, stderr: str) -> str:
    return f"{program} ended with status {status}: {stderr.strip()[-300:] or 'without a word'}"
