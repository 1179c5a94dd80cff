"""Owns the commands of OpenPBS and PBS Pro and what their answers mean (captured from 23.06; src/cmds of OpenPBS)."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flctl.facility.scheduler import Estimate, QueryFailed, QueueSeen, Seen, qstat

PLACE = 'PATH="$PATH:/opt/pbs/bin:/opt/pbs/default/bin"'
"""PBS puts itself on PATH in /etc/profile.d, which a shell that is no login shell does not read."""

ME = '-u "$(id -un)"'

RECENT = 100
"""So many finished jobs are listed with the live ones: PBS keeps them for weeks, and qstat asks for each by itself. A
job beyond that is still found by its name in `accounting`."""

SHOW = "TZ=UTC0 qstat"
"""qstat writes local time without its zone, by its own TZ (ctime(3) in qstat.c): UTC it is, then."""

NO_HISTORY = "PBS is not configured to maintain job history"
HARMLESS = re.compile(rf"qstat: (?:Unknown Job Id \S+|\S+ Job has finished, use -x .*)|qselect: {NO_HISTORY}")
"""A job that was selected and gone a moment later, said with status 153 or 35 beside the jobs that are known; and an
empty history, said with status 0. The same words of qstat's own would stand in place of a listing."""

DOUBTFUL = re.compile(
    r"errno=|connect|communication|time[d ]? ?out|protocol|end of file|broken pipe|system (?:error|call)|internal error"
    r"|shutting down|temporarily|no free|too many open|credential|authenticat|munge|pbs_iff|warning|error \(\d+\)",
    re.IGNORECASE,
)
"""The server may have taken the job although qsub says so (pbs_messages.c)."""

DEFINITE = re.compile(r"^(?:(?:\S*/)?qsub:\s+\S|usage: *qsub|.*\bqsub\b.*not found)", re.MULTILINE)
"""Everything else that qsub says is the server's own answer, or a hook's, in words that only the facility knows
and as many lines as it likes."""

FULL = re.compile(r"would exceed .*limit|maximum number of jobs already in queue", re.IGNORECASE)
"""Limits on what is queued at a time, of a user, a project or all (svr_chk_owner.c, PBSE_MAXQUED); what one job alone
asks for too much of is told in other words (PBSE_EXCQRESC)."""

NO_NEED = f"0|{15016 % 256}|{15139 % 256}|{15001 % 256}"
"""How qdel ends where no more is needed: done, or the job is ending (PBSE_BADSTATE), has ended (PBSE_HISTJOBID), is no
longer known (PBSE_UNKJOBID). An exit status holds the lower eight bits of the error (pbs_error.h)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pbs:
    """`history`: whether finished jobs are asked for; a server that keeps none says so, and that is an answer too."""

    history: bool = True

    def submit(self, script: str, token: str) -> str:
        """-f: no qsub of ours stays behind as a server for the next one, holding the connection's channel open."""
        return f"env {PLACE} qsub -f -N {shlex.quote(token)} -r n {shlex.quote(script)}"

    def job_id(self, stdout: str) -> str | None:
        """qsub prints NUMBER.SERVER; a site's own wrapper may print more lines around it."""
        found = re.findall(r"^([0-9]+\.[A-Za-z0-9_.-]+)$", stdout.strip(), re.MULTILINE)
        return found[0] if len(found) == 1 else None

    def refusal(self, text: str) -> str | None:
        if DOUBTFUL.search(text):
            return None
        found = DEFINITE.search(text)
        return " ".join(text[found.start() :].partition("\nusage:")[0].split())[:500] if found else None

    def full(self, text: str) -> bool:
        return FULL.search(text) is not None

    def queue(self, tokens: Sequence[str] = ()) -> str:
        """The ids of this user's jobs, then these jobs: `qstat -u` shows no more than a table that cuts names off, and
        without a user qstat lists the whole machine. -x with ids says nothing of any job where no history is kept; so
        it is left out where the history, in which live jobs are as well, is empty."""
        ended = f'printf "%s\\n" $past | grep -vxF "$ids" | sort -n | tail -n {RECENT}'
        past = f"past=$(qselect -x {ME}) || exit; recent=$({ended}); "
        return (
            f"({PLACE}; set -f; past= recent=; ids=$(qselect {ME}) || exit; {past if self.history else ''}"
            'set -- $(printf "%s\\n" $ids $recent | sort -n -u); '
            f'[ $# -eq 0 ] || {SHOW} ${{past:+-x}} -f "$@")'
        )

    def seen(self, status: int, stdout: str, stderr: str) -> tuple[Seen, ...]:
        _check(status, stderr)
        return qstat.jobs(stdout)

    def accounting(self, tokens: Sequence[str], ids: Sequence[str | None] = ()) -> str | None:
        if not self.history:
            return None
        names = " ".join(shlex.quote(token) for token in tokens)
        return (
            f"({PLACE}; set -f; ids=$(for name in {names}; do qselect -x -N $name {ME} || exit; done) || exit; "
            f'[ -z "$ids" ] || {SHOW} -x -f $(printf "%s\\n" $ids | sort -n -u))'
        )

    def accounted(self, status: int, stdout: str, stderr: str) -> tuple[Seen, ...] | None:
        if status == 0 and not stdout.strip() and NO_HISTORY in stderr:
            return None
        return self.seen(status, stdout, stderr)

    def cancel(self, token: str, job_id: str | None) -> str:
        """By name only: ids start again where a server lost its state, and the id may be another job's by now."""
        return (
            f"({PLACE}; set -f; ids=$(qselect -N {shlex.quote(token)} {ME}) || exit; for id in $ids; do "
            f'qdel "$id"; status=$?; case $status in {NO_NEED}) ;; *) exit $status ;; esac; done)'
        )

    def version(self) -> str:
        """Torque's qstat says `Version: 6.1.2`, and Slurm's imitation nothing of the kind: neither is this PBS."""
        return (
            f"({PLACE}; words=$(qstat --version 2>&1 | tr '\\n' ' '); case $words in "
            '*pbs_version*) echo "PBS ${words##*pbs_version = }" ;; '
            '*) echo "qstat is not that of OpenPBS or PBS Pro: $words"; exit 1 ;; esac)'
        )

    def trial(self, script: str) -> str | None:
        return None

    def estimate(self, status: int, stdout: str, stderr: str) -> Estimate:
        return Estimate()

    def queues(self) -> str | None:
        return f"env {PLACE} qstat -Q -f -F json"

    def queues_seen(self, status: int, stdout: str, stderr: str) -> tuple[QueueSeen, ...]:
        _check(status, stderr)
        try:
            found = json.loads(stdout, strict=False)["Queue"].items()
            return tuple(_queue(name, table) for name, table in found)
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
            raise QueryFailed(f"not a listing of queues: {stdout[:200]!r}") from error

    def accounts(self) -> str | None:
        return None

    def accounts_seen(self, status: int, stdout: str, stderr: str) -> tuple[str, ...] | None:
        return None


def _check(status: int, stderr: str) -> None:
    """Raises QueryFailed unless the answer is whole. The status is that of the last job asked for, so the words decide
    whether every failure was one of a job that is gone."""
    told = [line.rstrip() for line in stderr.splitlines() if line.strip()]
    bad = [line for line in told if not HARMLESS.fullmatch(line)]
    if status == 0:
        bad = [line for line in bad if line.startswith(("qstat:", "qselect:"))]
    if status not in (0, 35, 153) or bad or (status and not told):
        raise QueryFailed(f"PBS ended with status {status}: {stderr.strip()[-300:] or 'without a word'}")


def _queue(name: str, table: dict[str, Any]) -> QueueSeen:
    most, least = table.get("resources_max", {}), table.get("resources_min", {})
    walltime = most.get("walltime")
    return QueueSeen(
        name=name,
        open=table.get("enabled") == "True" and table.get("started") == "True",
        max_walltime=None if walltime is None else qstat.duration(str(walltime)),
        min_nodes=None if least.get("nodect") is None else int(least["nodect"]),
        max_nodes=None if most.get("nodect") is None else int(most["nodect"]),
    )
