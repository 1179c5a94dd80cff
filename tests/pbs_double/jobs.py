"""A job of the double: what qsub's options and #PBS lines ask for, and the attributes that qstat -f shows of it."""

import getopt
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .client import OPTIONS

Value = str | int | dict[str, Any]


class Refused(Exception):
    """What qsub says and the status with which it ends."""

    def __init__(self, words: str, status: int) -> None:
        super().__init__(words)
        self.words, self.status = words, status


@dataclass(kw_only=True)
class Job:
    number: int
    server: str
    options: dict[str, str]
    resources: dict[str, str]
    arguments: list[str]
    script: str
    user: str
    environment: Mapping[str, str]
    cwd: str
    created: float
    state: str = "Q"
    substate: int = 10
    comment: str = ""
    held: str = "n"
    eligible: float | None = None
    started: float | None = None
    ended: float | None = None
    changed: float = 0.0
    history: float | None = None
    slot: int = 0
    session: int | None = None
    used: float | None = None
    exit_status: int | None = None
    runs: int = 0
    waiting_indices: list[int] = field(default_factory=list)
    estimated: float | None = None
    due: float = 0.0

    @property
    def array(self) -> str:
        return self.options.get("J", "")

    @property
    def id(self) -> str:
        return f"{self.number}{'[]' if self.array else ''}.{self.server}"

    @property
    def name(self) -> str:
        return self.options.get("N", "job")

    @property
    def ended_well(self) -> bool:
        return self.state == "F" and self.exit_status == 0

    @property
    def chunks(self) -> int:
        return int(self.select.split(":")[0])

    @property
    def ncpus(self) -> int:
        each = re.search(r":ncpus=(\d+)", self.select)
        return self.chunks * int(each[1] if each else 1)

    @property
    def select(self) -> str:
        text = self.resources.get("select", "1")
        return text if "ncpus=" in text else f"{text}:ncpus=1"

    @property
    def walltime(self) -> int | None:
        return seconds(self.resources["walltime"]) if "walltime" in self.resources else None

    @property
    def spooled_to(self) -> str:
        """Where standard output goes at the job's end."""
        return self._path("o").partition(":")[2]

    def _path(self, kind: str) -> str:
        path = self.options.get(kind, f"{self.name}.{kind}{self.number}{'.^array_index^' if self.array else ''}")
        return f"{self.server}:{path if path.startswith('/') else f'{self.cwd}/{path}'}"

    def variables(self) -> dict[str, str]:
        one = self.environment
        given = {
            f"PBS_O_{name}": one[name] for name in ("HOME", "LANG", "LOGNAME", "PATH", "MAIL", "SHELL") if name in one
        }
        own = dict(item.split("=", 1) for item in self.options.get("v", "").split(",") if "=" in item)
        return {
            **given,
            "PBS_O_INTERACTIVE_AUTH_METHOD": "resvport",
            "PBS_O_INTERACTIVE_ENCRYPT_METHOD": "",
            "PBS_O_WORKDIR": self.cwd,
            "PBS_O_SYSTEM": "Linux",
            **own,
            "PBS_O_QUEUE": "workq",
            "PBS_O_HOST": self.server,
        }

    def attributes(self, moment: Callable[[float], str]) -> Iterator[tuple[str, Value]]:
        """Names and values in qstat's order; those with a dictionary are printed as NAME.KEY, or as one list."""
        ran = self.started is not None and not self.array
        yield "Job_Name", self.name
        yield "Job_Owner", f"{self.user}@{self.server}"
        if self.used is not None:
            yield "resources_used", self._used()
        yield "job_state", self.state
        yield "queue", "workq"
        yield "server", self.server
        if "A" in self.options:
            yield "Account_Name", self.options["A"]
        yield "Checkpoint", "u"
        yield "ctime", moment(self.created)
        if "depend=" in self.options.get("W", ""):
            yield "depend", f"{self.options['W'].partition('depend=')[2]}@{self.server}"
        yield "Error_Path", self._path("e")
        if ran:
            yield "exec_host", f"{self.server}/{self.slot}"
            yield "exec_vnode", f"({self.server}:ncpus={self.ncpus})"
        if self.state == "W":
            yield "Execution_Time", moment(self.due)
        yield "Hold_Types", self.held
        yield "Join_Path", self.options.get("j", "n")
        yield "Keep_Files", "n"
        yield "Mail_Points", self.options.get("m", "a")
        yield "mtime", moment(self.changed)
        yield "Output_Path", self._path("o")
        yield "Priority", 0
        yield "qtime", moment(self.created)
        yield "Rerunable", "False" if self.options.get("r") == "n" else "True"
        yield "Resource_List", self._listed()
        yield from self._times(moment, ran)
        yield "substate", self.substate
        yield "Variable_List", self.variables()
        yield from self._end(moment)
        yield "Submit_arguments", " ".join(self.arguments)
        yield from self._indices()
        if self.history is not None:
            yield "history_timestamp", int(self.history)
        yield "project", "_pbs_project_default"
        yield "Submit_Host", self.server

    def _used(self) -> dict[str, Value]:
        walltime = clock(self.used or 0.0)
        return {
            "cpupercent": 0,
            "cput": "00:00:00",
            "mem": "0kb",
            "ncpus": self.ncpus,
            "vmem": "0kb",
            "walltime": walltime,
        }

    def _listed(self) -> dict[str, Value]:
        listed: dict[str, Value] = {"ncpus": self.ncpus, "nodect": self.chunks, "place": "free", "select": self.select}
        listed |= {name: value for name, value in self.resources.items() if name not in ("select", "walltime")}
        return listed | ({"walltime": clock(self.walltime)} if self.walltime is not None else {})

    def _times(self, moment: Callable[[float], str], ran: bool) -> Iterator[tuple[str, Value]]:
        if self.started is not None:
            yield "stime", moment(self.started)
        if self.ended is not None and self.state == "F":
            yield "obittime", moment(self.ended)
        if ran and self.session:
            yield "session_id", self.session
        if ran:
            yield "jobdir", self.environment.get("HOME", "/")
        if self.estimated is not None:
            yield "estimated", {"start_time": moment(self.estimated)}

    def _end(self, moment: Callable[[float], str]) -> Iterator[tuple[str, Value]]:
        if self.comment:
            yield "comment", self.comment
        if self.eligible is not None:
            yield "etime", moment(self.eligible)
        if self.runs and not self.array:
            yield "run_count", self.runs
        if self.exit_status is not None:
            yield "Stageout_status", 1
            yield "Exit_status", self.exit_status

    def _indices(self) -> Iterator[tuple[str, Value]]:
        if self.array:
            left = self.waiting_indices
            yield "array", "True"
            yield "array_state_count", f"Queued:{len(left)} Running:0 Exiting:0 Expired:0"
            yield "array_indices_submitted", self.array
            yield "array_indices_remaining", f"{left[0]}-{left[-1]}" if left else "-"


def asked(options: list[list[str]], script: str) -> tuple[dict[str, str], dict[str, str]]:
    """Options by letter and resources by name; qsub's own win over those of the script, whose lines count up to its
    first command. Raises Refused."""
    lines: list[list[str]] = []
    for line in script.split("\n"):
        if line.startswith("#PBS"):
            try:
                lines += [list(pair) for pair in getopt.getopt(shlex.split(line[4:]), OPTIONS["qsub"])[0]]
            except getopt.GetoptError as error:
                raise Refused(f"qsub: directive error: {error}", 2) from None
        elif line.strip() and not line.startswith("#"):
            break
    found: dict[str, str] = {}
    resources: dict[str, str] = {}
    for letter, value in [*lines, *options]:
        if letter == "-l":
            resources |= dict(item.split("=", 1) for item in _items(value))
        else:
            found[letter[1:]] = value
    _checked(found, resources)
    return found, resources


def _items(value: str) -> list[str]:
    """select and place hold commas and colons of their own, and stand alone."""
    return [value] if value.startswith(("select=", "place=")) else value.split(",")


def _checked(options: dict[str, str], resources: dict[str, str]) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_.+-]{1,230}", options.get("N", "x")):
        raise Refused("qsub: illegal -N value", 2)
    if "walltime" in resources and seconds(resources["walltime"]) is None:
        raise Refused("qsub: Illegal attribute or resource value Resource_List.walltime", 15014 % 256)
    if not re.fullmatch(r"\d+(:[a-z_]+=[\w.-]+)*", resources.get("select", "1")):
        raise Refused("qsub: Illegal attribute or resource value Resource_List.select", 15014 % 256)
    if options.get("q", "workq") != "workq":
        raise Refused("qsub: Unknown queue", 15018 % 256)


def seconds(text: str) -> int | None:
    if not re.fullmatch(r"(?:\d+:){0,2}\d+", text):
        return None
    total = 0
    for part in text.split(":"):
        total = 60 * total + int(part)
    return total


def clock(value: float) -> str:
    whole = int(value)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def at(text: str) -> float:
    """[[CC]YY]MMDDhhmm[.SS], local time."""
    return time.mktime(time.strptime(text.partition(".")[0][-12:], "%Y%m%d%H%M"))
