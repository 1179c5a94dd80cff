"""Owns the one listing of PBS that flctl reads: the text of `qstat -f`, a block per job, times in UTC.

Text and not JSON: up to 23.06 qstat writes JSON with numbers of its own kind and unescaped values, later it gives up
with "json error" on a variable without a value, each time for all jobs because of one. The text is the same in every
version, and what flctl needs of it holds no line end.
"""

import re
import signal
from calendar import timegm
from collections.abc import Iterator

from flctl.facility.scheduler import Activity, QueryFailed, Seen

STATES = {
    Activity.WAITING: "QHWT",
    Activity.ACTIVE: "RBESUM",  # M: moved to another server, which runs it
    Activity.ENDED: "FX",
}
"""Every state letter that PBS documents (qstat(1B)): T in transit, B an array that began, E ending, X a subjob done."""

_ACTIVITY = {letter: activity for activity, letters in STATES.items() for letter in letters}

_JOB = re.compile(r"Job Id: ([0-9]+(?:\[[0-9]*\])?\.\S+)")
_ATTRIBUTE = re.compile(r"    ([A-Za-z_]\w*(?:\.[\w-]+)?) = (.*)", re.ASCII)
_MOMENT = re.compile(r"[A-Z][a-z]{2} ([A-Z][a-z]{2}) +(\d{1,2}) (\d\d):(\d\d):(\d\d) (\d{4})", re.ASCII)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def jobs(stdout: str) -> tuple[Seen, ...]:
    """The jobs of a listing; the first block of an id counts. Raises QueryFailed on text that is no listing."""
    found: dict[str, Seen] = {}
    for job_id, attributes in _blocks(stdout):
        found.setdefault(job_id, _job(job_id, attributes))
    return tuple(found.values())


def activity_of(state: str) -> Activity:
    return _ACTIVITY.get(state, Activity.ACTIVE)


def duration(text: str) -> int | None:
    """Seconds of `HH:MM:SS`, `MM:SS` or `SS`."""
    if not re.fullmatch(r"(?:\d+:){0,2}\d+", text, re.ASCII):
        return None
    seconds = 0
    for part in text.split(":"):
        seconds = 60 * seconds + int(part)
    return seconds


def _blocks(stdout: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each job's id and attributes. A long value goes on after a tab; any other line that begins nothing belongs to a
    value with a line end (a variable's, a name's). The first of two attributes of a name counts."""
    job_id, attributes, last = "", dict[str, str](), ""
    for line in stdout.split("\n"):
        if begun := _JOB.fullmatch(line):
            if job_id:
                yield job_id, attributes
            job_id, attributes, last = begun[1], {}, ""
        elif not job_id:
            if line.strip():
                raise QueryFailed(f"not a listing of jobs: {line[:200]!r}")
        elif attribute := _ATTRIBUTE.fullmatch(line):
            last = attribute[1] if attribute[1] not in attributes else ""
            attributes.setdefault(attribute[1], attribute[2])
        elif last and line:
            attributes[last] += line[1:] if line[0] == "\t" else "\n" + line
    if job_id:
        yield job_id, attributes


def _job(job_id: str, attributes: dict[str, str]) -> Seen:
    state = attributes.get("job_state", "").upper()
    if not state or "Job_Name" not in attributes:
        raise QueryFailed(f"the listing of job {job_id} is cut off")
    activity, comment = activity_of(state), attributes.get("comment", "")
    started = None if activity == Activity.WAITING else _moment(attributes.get("stime", ""))
    limit = duration(attributes.get("Resource_List.walltime", ""))
    ends = started + limit if activity == Activity.ACTIVE and started and limit else None
    expected = attributes.get("estimated.start_time") or attributes.get("Execution_Time", "")
    return Seen(
        id=job_id,
        name=attributes["Job_Name"],
        state=state,
        activity=activity,
        submitted_at=_moment(attributes.get("ctime", "")),
        started_at=started,
        expected_start=_moment(expected) if activity == Activity.WAITING else None,
        expected_end=ends,
        elapsed=duration(attributes.get("resources_used.walltime", "")),
        reason="; ".join(_reasons(activity, attributes)),
        never=comment if activity == Activity.WAITING and comment.startswith("Can Never Run") else "",
    )


def _reasons(activity: Activity, attributes: dict[str, str]) -> Iterator[str]:
    """Why it waits, or how it ended. Above 256: the signal that killed the job's shell (qstat(1B))."""
    status = attributes.get("Exit_status", "")
    if activity == Activity.ENDED and re.fullmatch(r"-?\d+", status, re.ASCII):
        number = int(status) - 256
        name = signal.Signals(number).name if number in signal.Signals.__members__.values() else ""
        yield f"exit status {status}{f', {name}' if name else ''}"
    held = attributes.get("Hold_Types", "n")
    if activity == Activity.WAITING and held != "n":
        yield f"held ({held})"
    if activity != Activity.ACTIVE and attributes.get("comment"):
        yield attributes["comment"]


def _moment(text: str) -> float | None:
    """Unix seconds of ctime(3)'s text in UTC; none for UNKNOWN and whatever else."""
    if not (match := _MOMENT.fullmatch(text)) or match[1] not in _MONTHS:
        return None
    day, hour, minute, second, year = (int(part) for part in match.groups()[1:])
    return float(timegm((year, _MONTHS.index(match[1]) + 1, day, hour, minute, second)))
