"""How qstat of the double writes what the server knows: JSON as cJSON prints it, text cut at 78 columns, two tables."""

import json
import time
from collections.abc import Iterable
from typing import Any

from .client import VERSION
from .jobs import Job, Value, clock

COLUMNS = 78

PLAIN = (
    "Job id            Name             User              Time Use S Queue\n"
    "----------------  ---------------- ----------------  -------- - -----\n"
)
WIDE = (
    f"{'':99}Req'd  Req'd   Elap\n"
    f"{'Job ID':<30} {'Username':<15} {'Queue':<15} {'Jobname':<15} SessID   NDS  TSK   Memory Time  S Time\n"
    f"{'-' * 30} {'-' * 15} {'-' * 15} {'-' * 15} -------- ---- ----- ------ ----- - -----\n"
)


def moment(value: float) -> str:
    """ctime(3), in the asker's zone."""
    return time.ctime(value)


def as_json(server: str, found: dict[str, Any]) -> str:
    head = {"timestamp": int(time.time()), "pbs_version": VERSION, "pbs_server": server}
    return json.dumps(head | found, indent="\t", separators=(",", ":\t"), ensure_ascii=False) + "\n"


def jobs_json(jobs: Iterable[Job]) -> dict[str, Any]:
    found = {job.id: dict(job.attributes(moment)) for job in jobs}
    return {"Jobs": found} if found else {}


def jobs_text(jobs: Iterable[Job]) -> str:
    text = ""
    for job in jobs:
        lines = "".join(_lines(name, value) for name, value in job.attributes(moment))
        text += f"Job Id: {job.id}\n{lines}\n"
    return text


def _lines(name: str, value: Value) -> str:
    if isinstance(value, dict) and name != "Variable_List":
        return "".join(_wrapped(f"{name}.{key}", str(inner)) for key, inner in value.items())
    text = ",".join(f"{key}={inner}" for key, inner in value.items()) if isinstance(value, dict) else str(value)
    return _wrapped(name, text)


def _wrapped(name: str, text: str) -> str:
    """prt_attr in qstat.c: parts between commas stay whole where they fit, and are cut where not."""
    out, column = f"    {name} = ", len(name) + 7
    for number, part in enumerate(part for part in text.split(",") if part):
        if number:
            out += ","
        if len(part) + column < COLUMNS:
            out, column = out + part, column + len(part)
            continue
        if number:
            out, column = out + "\n\t", 9
        for character in part:
            out, column = out + character, column + 1
            if column > COLUMNS:
                out, column = out + "\n\t", 8
    return out + "\n"


def plain(jobs: list[Job]) -> str:
    rows = (f"{job.id:<16}  {job.name:<16} {job.user:<16}  {0:>8} {job.state:>1} {'workq':<15} \n" for job in jobs)
    return PLAIN + "".join(rows) if jobs else ""


def wide(server: str, jobs: list[Job]) -> str:
    """qstat -answ1."""
    if not jobs:
        return ""
    text = f"\n{server}: \n{WIDE}"
    for job in jobs:
        limit = clock(job.walltime or 0)[:5]
        place = f"{job.server}/{job.slot}" if job.state == "R" else "-- "
        text += f"{job.id:<30} {job.user:<15} {'workq':<15} {job.name:<15} {'--':>5}    {job.chunks:>4} {job.ncpus:>5}"
        text += f" {'--':>5}  {limit:>5} {job.state}  {'--':>3}   {place}\n   {job.comment or ' -- '}\n"
    return text
