"""The server of the double: one process that answers the commands, starts jobs when there is room, and ends them.

python -m tests.pbs_double.server FOLDER NAME NCPUS KILL_DELAY HISTORY"""

import contextlib
import json
import os
import pwd
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import answers, facts
from .client import address
from .jobs import Job, Refused, asked, at
from .machine import Machine

UNKNOWN, FINISHED = 15001 % 256, 15139 % 256
NO_HISTORY = "PBS is not configured to maintain job history"
Answer = tuple[int, str, str]


class Server(Machine):
    last = 0  # the number of the newest job

    def serve(self, ready: Callable[[], None]) -> None:
        with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
            listener.bind(address(str(self.folder)))
            listener.listen(64)
            selector.register(listener, selectors.EVENT_READ)
            ready()
            while True:
                if selector.select(timeout=0.05):
                    link, _ = listener.accept()
                    with link, contextlib.suppress(OSError, ValueError):
                        self._converse(link)
                self.tick()

    def _converse(self, link: socket.socket) -> None:
        link.settimeout(10)
        text = b""
        while piece := link.recv(1 << 16):
            text += piece
        request = json.loads(text)
        _, uid, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        request["user"] = pwd.getpwuid(uid).pw_name
        self.tick()
        with _zone(request.get("environment", {}).get("TZ")):
            status, out, err = self.answer(request)
        self.tick()
        link.sendall(json.dumps({"status": status, "stdout": out, "stderr": err}).encode())

    def answer(self, request: dict[str, Any]) -> Answer:
        programs = {
            "qsub": self.qsub,
            "qstat": self.qstat,
            "qdel": self.qdel,
            "qselect": self.qselect,
            "pbsnodes": lambda _: (0, answers.as_json(self.name, {"nodes": {self.name: facts.node(self)}}), ""),
            "pbs_rstat": lambda _: (0, "", ""),
            "control": self.control,
        }
        return programs[request["program"]](request)

    def qsub(self, request: dict[str, Any]) -> Answer:
        try:
            options, resources = asked(request["options"], request["script"])
        except Refused as refused:
            self.last += refused.status == 15014 % 256  # its number was given before its values were looked at
            return refused.status, "", refused.words + "\n"
        self.last += 1
        options.setdefault("N", os.path.basename(request["operands"][0])[:15])
        now = time.time()
        job = Job(
            number=self.last,
            server=self.name,
            options=options,
            resources=resources,
            arguments=request["arguments"],
            script=request["script"],
            user=request["user"],
            environment=request["environment"],
            cwd=request["cwd"],
            created=now,
            changed=now,
            eligible=now,
        )
        if job.array:
            first, last = (int(end) for end in job.array.split("-"))
            job.waiting_indices = list(range(first, last + 1))
        if "h" in options:
            job.state, job.substate, job.held, job.eligible = "H", 20, "u", None
        elif "a" in options and (due := at(options["a"])) > now:
            job.state, job.substate, job.eligible, job.due = "W", 30, None, due
        elif "depend" in options.get("W", ""):
            job.state, job.substate, job.held, job.eligible = "H", 22, "s", None
        self.jobs[job.id] = job
        return 0, job.id + "\n", ""

    def qstat(self, request: dict[str, Any]) -> Answer:
        options, ids = dict(request["options"]), request["operands"]
        if "-B" in options:
            return 0, answers.as_json(self.name, {"Server": {self.name: facts.server(self)}}), ""
        if "-Q" in options:
            return 0, answers.as_json(self.name, {"Queue": {"workq": facts.queue(self)}}), ""
        past = "-x" in options
        status, err, shown = 0, "", list[Job]()
        if past and not self.history:
            err = f"qstat: {NO_HISTORY} \n"
        elif ids:
            for one in ids:
                job = self.jobs.get(one)
                if job is None:
                    status, err = UNKNOWN, err + f"qstat: Unknown Job Id {one}\n"
                elif job.state == "F" and not past:
                    status = FINISHED
                    err += f"qstat: {one} Job has finished, use -x or -H to obtain historical job information\n"
                else:
                    shown.append(job)
        else:
            shown = [job for job in self.jobs.values() if past or job.state != "F"]
        if options.get("-F") == "json":
            # Of several ids asked for, the JSON holds the first that is known.
            return status, answers.as_json(self.name, answers.jobs_json(shown[:1] if ids else shown)), err
        if "-f" in options:
            return status, answers.jobs_text(shown), err
        return status, answers.wide(self.name, shown) if "-w" in options else answers.plain(shown), err

    def qselect(self, request: dict[str, Any]) -> Answer:
        options = dict(request["options"])
        past = "-x" in options
        if past and not self.history:
            return 0, "", f"qselect: {NO_HISTORY} \n"
        found = [
            job.id
            for job in self.jobs.values()
            if (past or job.state != "F")
            and options.get("-N", job.name) == job.name
            and options.get("-u", job.user) == job.user
        ]
        return 0, "".join(f"{one}\n" for one in found), ""

    def qdel(self, request: dict[str, Any]) -> Answer:
        status, err = 0, ""
        for one in request["operands"]:
            job = self.jobs.get(one)
            if job is None:
                status, err = UNKNOWN, err + f"qdel: Unknown Job Id {one}\n"
            elif job.state == "F":
                status, err = FINISHED, err + f"qdel: Job has finished {one}\n"
            else:
                self.delete(job, f"{request['user']}@{self.name}")
        return status, "", err

    def control(self, request: dict[str, Any]) -> Answer:
        """What a test may do that no command of a user can."""
        words = request["arguments"]
        if request["user"] != pwd.getpwuid(os.getuid()).pw_name:
            return 1, "", "not yours\n"
        match words:
            case ["history", value]:
                self.history = value == "on"
                if not self.history:
                    self.jobs = {one: job for one, job in self.jobs.items() if job.state != "F"}
            case ["hold", one]:
                self.jobs[one].state, self.jobs[one].substate, self.jobs[one].held = "H", 20, "u"
            case ["release", one]:
                self.jobs[one].state, self.jobs[one].substate, self.jobs[one].held = "Q", 10, "n"
                self.jobs[one].eligible = time.time()
            case ["kill", one]:
                for running in self.running:
                    if running.job.id == one:
                        running.signal(signal.SIGKILL)
            case ["forget", one]:
                self.jobs.pop(one, None)
            case ["limit status", value]:
                self.limit_status = int(value)
            case ["estimate", one, value]:
                self.jobs[one].estimated = float(value)
        listed = {one: [job.name, job.state, job.exit_status, job.user] for one, job in self.jobs.items()}
        return 0, json.dumps(listed), ""


@contextlib.contextmanager
def _zone(name: str | None) -> Any:
    """qstat writes times in the zone of who asks; the server itself lives in UTC."""
    os.environ.pop("TZ")
    if name is not None:
        os.environ["TZ"] = name
    time.tzset()
    try:
        yield
    finally:
        os.environ["TZ"] = "UTC0"
        time.tzset()


def main() -> None:
    folder, name, ncpus, kill_delay, history = sys.argv[1:]
    os.environ["TZ"] = "UTC0"
    time.tzset()
    server = Server(Path(folder), name, int(ncpus), float(kill_delay), history == "on")

    def end(*_: object) -> None:
        for running in server.running:
            running.signal(signal.SIGKILL)
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    server.serve(lambda: print("ready", flush=True))


if __name__ == "__main__":
    main()
