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

NEVER = "Can Never Run: "

UNDER_ZERO = {
    -1: "could not be started",
    -2: "could not be started",
    -4: "PBS on its node began anew",
    -10: "no such account on its node",
    -26: "over its vmem",
    -27: "over its mem",
    -28: "over its cput",
    -29: "over its walltime",
}
"""Exit statuses that are PBS's own (JOB_EXEC_* in job.h of OpenPBS)."""

_ACTIVITY = {letter: activity for activity, letters in STATES.items() for letter in letters}

_JOB = re.compile(r"Job Id: ([0-9]{1,18}(?:\[[0-9]*\])?\.\S+)")
_ATTRIBUTE = re.compile(r"    ([A-Za-z_]\w*(?:\.[\w-]+)?) = (.*)", re.ASCII)
_MOMENT = re.compile(r"[A-Z][a-z]{2} ([A-Z][a-z]{2}) +(\d{1,2}) (\d\d):(\d\d):(\d\d) ([1-9]\d{3})", re.ASCII)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def jobs(stdout: str) -> tuple[Seen, ...]:
    """The jobs of a listing, oldest first. Raises QueryFailed on text that is no listing.

    What comes after a newer job may be an older listing in one of its variables: where it is cut it is no job, and of
    an id that comes twice the first block counts."""
    found: dict[str, Seen] = {}
    newest = 0
    for job_id, attributes in _blocks(stdout):
        number = int(re.split(r"\D", job_id)[0])
        if number > newest or attributes.keys() >= {"Job_Name", "job_state"}:
            found.setdefault(job_id, _job(job_id, attributes))
        newest = max(newest, number)
    return tuple(found.values())


def activity_of(state: str) -> Activity:
    return _ACTIVITY.get(state, Activity.ACTIVE)


def duration(text: str) -> int | None:
    """Seconds of `HH:MM:SS`, `MM:SS` or `SS`."""
    if not re.fullmatch(r"(?:\d{1,9}:){0,2}\d{1,9}", text, re.ASCII):
        return None
    seconds = 0
    for part in text.split(":"):
        seconds = 60 * seconds + int(part)
    return seconds


def _blocks(stdout: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each job's id and attributes, after an empty line. A long value goes on after a tab; any other line that begins
    nothing belongs to a value with a line end (a variable's, a name's). Of attributes of one name the first counts."""
    job_id, attributes, last, before = "", dict[str, list[str]](), "", ""
    for line in stdout.split("\n"):
        begun, before = None if before else _JOB.fullmatch(line), line
        if begun:
            if job_id:
                yield job_id, _whole(attributes)
            job_id, attributes, last = begun[1], {}, ""
        elif not job_id:
            if line.strip():
                raise QueryFailed(f"not a listing of jobs: {line[:200]!r}")
        elif attribute := _ATTRIBUTE.fullmatch(line):
            last = attribute[1] if attribute[1] not in attributes else ""
            attributes.setdefault(attribute[1], [attribute[2]])
        elif last and line:
            attributes[last].append(line[1:] if line[0] == "\t" else "\n" + line)
    if job_id:
        yield job_id, _whole(attributes)


def _whole(attributes: dict[str, list[str]]) -> dict[str, str]:
    return {name: "".join(parts) for name, parts in attributes.items()}


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
        never=comment.removeprefix(NEVER) if activity == Activity.WAITING and comment.startswith(NEVER) else "",
    )


def _reasons(activity: Activity, attributes: dict[str, str]) -> Iterator[str]:
    """Why it waits, or how it ended. Above 256: the signal that killed the job's shell (qstat(1B)). Of a job deleted
    for its dependency PBS keeps no word."""
    status = attributes.get("Exit_status", "")
    if activity == Activity.ENDED and re.fullmatch(r"-?\d{1,6}", status, re.ASCII):
        number = int(status)
        by_signal = number - 256 in signal.Signals.__members__.values()
        words = signal.Signals(number - 256).name if by_signal else UNDER_ZERO.get(number, "")
        yield f"exit status {status}{f', {words}' if words else ''}"
    elif activity == Activity.ENDED and not status and "stime" not in attributes:
        yield "never started"
        if "depend" in attributes:
            yield f"depended on {attributes['depend']}"
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
