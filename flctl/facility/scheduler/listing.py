"""Owns the one listing format: `id|STATE|submitted|started|ends|elapsed|reason|name`, a job per line, the name last.
Accounting tells the cluster as well, before the name."""

import re
from collections.abc import Callable, Iterator

from flctl.facility.scheduler import Activity, QueryFailed, Seen

RECORD = re.compile(r"(\d+(?:[._+][\w\[\],%.:+-]+)?)\|(.*)", re.ASCII)
"""Ids as schedulers print them: 73, 73_4, 73_[2-3%1], 73+1 (heterogeneous), 1700000000.4711 (local)."""


def jobs(stdout: str, activity: Callable[[str], Activity], *, clusters: bool = False) -> tuple[Seen, ...]:
    """The jobs of a listing; the first line of an id counts. `clusters`: if they are told, as in accounting, which
    shows several jobs of one id and name: the last one submitted counts. Raises QueryFailed on text that is no
    listing."""
    found: dict[tuple[str, ...], Seen] = {}
    for fields in _records(stdout, 9 if clusters else 8):
        *told, name = fields
        cluster = told.pop() if clusters else ""
        job = _job(told, name, cluster, activity)
        first = found.setdefault((job.id, cluster, name) if clusters else (job.id,), job)
        if clusters and (job.submitted_at or 0.0) > (first.submitted_at or 0.0):
            found[job.id, cluster, name] = job
    return tuple(found.values())


def _records(stdout: str, width: int) -> Iterator[list[str]]:
    """The lines, split into `width` fields. A job's name may hold anything, also `|` and line ends: it comes last, and
    a line that is no record continues the name before it."""
    current: list[str] | None = None
    more: list[str] = []
    for line in stdout.splitlines():
        if match := RECORD.fullmatch(line):
            fields = [match[1], *match[2].split("|", width - 2)]
            if len(fields) != width:
                raise QueryFailed(f"a line of the listing is cut off: {line[:200]!r}")
            if current is not None:
                yield [*current[:-1], "\n".join([current[-1], *more])]
            current, more = fields, []
        elif current is not None:
            more.append(line)
        elif line.strip():
            raise QueryFailed(f"not a listing of jobs: {line[:200]!r}")
    if current is not None:
        yield [*current[:-1], "\n".join([current[-1], *more])]


def _job(fields: list[str], name: str, cluster: str, activity: Callable[[str], Activity]) -> Seen:
    job_id, words, submitted, starts, ends, elapsed, reason = fields
    state = words.split(" ")[0].rstrip("+").upper()
    if not state:
        raise QueryFailed(f"the listing gives no state of job {job_id}")
    kind = activity(state)
    cancelled = re.fullmatch(r"CANCELLED by ([0-9]{1,10})", words, re.ASCII)
    notes = [words if " " in words else "", reason if reason not in ("None", "0:0") else ""]
    return Seen(
        id=job_id,
        name=name,
        state=state,
        activity=kind,
        submitted_at=_moment(submitted),
        started_at=None if kind == Activity.WAITING else _moment(starts),
        expected_start=_moment(starts) if kind == Activity.WAITING else None,
        expected_end=None if kind == Activity.ENDED else _moment(ends),
        elapsed=None if kind == Activity.WAITING else duration(elapsed),
        reason="; ".join(note for note in notes if note),
        cluster=cluster,
        cancelled_by=int(cancelled[1]) if cancelled else None,
    )


def duration(text: str) -> float | None:
    """Seconds of `N`, `MM:SS`, `HH:MM:SS` or `D-HH:MM:SS`, as Slurm prints them (squeue(1), sacct(1)); else None."""
    if re.fullmatch(r"[0-9]{1,12}(?:\.[0-9]{1,12})?", text, re.ASCII):
        return float(text)
    match = re.fullmatch(r"(?:(?:([0-9]{1,6})-)?([0-9]{1,9}):)?([0-9]{1,9}):([0-9]{2})", text, re.ASCII)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 86400.0 + hours * 3600 + minutes * 60 + seconds


def _moment(text: str) -> float | None:
    """Unix seconds. `N/A` and `Unknown` are none, and so is a local time, whose zone only the site knows."""
    return float(text) if re.fullmatch(r"[1-9][0-9]{0,11}", text) else None
