"""Owns the row "restart": how long after kill -9 the next process does something useful, its login left out.

Useful is the first thing that takes the campaign on: a command at a site, or a record written. The times are those of
the process's own fault log, read under strace: its start, the begin and the end of logins, the first other point.
"""

import random
import re
import time
from pathlib import Path

from tests.chaos.beds import federation, keys_only, made
from tests.chaos.driven import Driven
from tests.chaos.results import ROWS, Result
from tests.testbed import Testbed
from tests.testbed.python import FLCTL

MOST = 2.0
"""Seconds."""
USELESS = ("login ", "login-", "logged-in ", "code-", "journal", "write ", "rename", "written ")
"""Points of logging in and of its bookkeeping."""
_LINE = re.compile(r"^\d+ +(?P<at>\d+\.\d+) (?P<call>\w+)\((?P<words>.*)")


def run(*, seed: int, trials: int | None = None, bed: Testbed | None = None) -> Result:
    """`trials` kills at random moments of a campaign, the restart after each measured. A failure takes over 2 s."""
    began, wanted, dice = time.monotonic(), trials or ROWS["restart"].trials, random.Random(seed)
    times: list[float] = []
    notes: list[str] = []
    with made(bed) as testbed, keys_only(testbed):
        while len(times) < wanted:
            driven = Driven(federation(testbed, f"restart-{len(times)}"), rounds=min(3, wanted))
            while not driven.done and len(times) < wanted:
                after_a_kill = driven.processes > 0
                seconds = measured(driven, fault=f"*:{dice.randint(40, 120)}")
                if seconds is not None and after_a_kill:
                    times.append(seconds)
            driven.finish()
            notes += driven.judged(final=None)
            driven.remove()
    slow = [f"{seconds:.2f} s" for seconds in times if seconds > MOST]
    return Result(
        row="restart",
        trials=len(times),
        failures=len(slow) + len(notes),
        seconds=time.monotonic() - began,
        figures={"worst": f"{max(times):.2f} s", "median": f"{sorted(times)[len(times) // 2]:.2f} s"},
        notes=(*slow, *notes),
    )


def measured(driven: Driven, *, fault: str) -> float | None:
    """Seconds from a process's start to its first useful action, less its logins; None if it did nothing useful. The
    process is killed at a later point, so that the next one restarts as well."""
    driven.processes += 1
    points = driven.bed.user.home / f"{driven.place.name}.restart"
    points.unlink(missing_ok=True)
    traced = ("strace", "-f", "--seccomp-bpf", "-ttt", "-s", "200", "-y", "-o", str(driven.trace))
    words = (*traced, "-e", "trace=execve,write", str(FLCTL), "round", "--rounds", str(driven.rounds))
    driven.bed.run(*words, env={"FLCTL_FAULT_LOG": str(points), "FLCTL_FAULT": fault}, cwd=driven.place)
    found = elapsed(driven.trace.read_text(errors="replace"), points)
    points.unlink(missing_ok=True)
    return found


def elapsed(trace: str, points: Path) -> float | None:
    """The same from what strace wrote: the first execve, then the lines written to the log of fault points."""
    lines = [match for line in trace.splitlines() if (match := _LINE.match(line))]
    start = float(lines[0]["at"])
    logging_in: dict[str, float] = {}
    logins = 0.0
    for line in lines:
        if line["call"] != "write" or str(points) not in line["words"]:
            continue
        text = line["words"].split('"')[1].removesuffix("\\n")
        name, _, site = text.partition(" ")
        at = float(line["at"])
        if name == "login":
            logging_in[site] = at
        elif name == "logged-in":
            # Sites log in side by side: what counts is the time of the one that is useful first.
            logins = max(logins, at - logging_in.pop(site, at))
        elif not text.startswith(USELESS):
            return at - start - logins
    return None
