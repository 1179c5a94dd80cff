"""A stand-in for OpenPBS, which cannot be had here: its commands on PATH, answering as the captured ones of 23.06
(tests/data/pbs), and a server that really runs the jobs.

with PbsServer(folder) as pbs:
    subprocess.run(["qsub", "job.sh"], env=pbs.env(os.environ)); pbs.jobs(); pbs.wait_state("1.vm", "F")

`folder` must be one that every account may enter. The commands find the server by their own place, so an account on an
sshd needs no more than `pbs.bin` on its PATH: Sshd(environment={"PATH": f"{pbs.bin}:/usr/bin:/bin"}). Run by root, the
server runs each job as the account that submitted it.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from . import client

ROOT = Path(__file__).parent.parent.parent
COMMANDS = tuple(client.OPTIONS)


class PbsServer:
    """`name`: what stands behind the dot of a job's id; `kill_delay`: seconds from SIGTERM to SIGKILL (PBS: 10)."""

    def __init__(
        self, folder: Path, *, name: str = "vm", ncpus: int = 2, kill_delay: float = 10.0, history: bool = True
    ) -> None:
        self.folder, self.name, self.ncpus, self.kill_delay, self.history = folder, name, ncpus, kill_delay, history
        self.process: subprocess.Popen[str] | None = None

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    def start(self) -> Self:
        if self.running:
            return self
        for place in (self.folder, self.bin, self.folder / "jobs", self.folder / "spool"):
            place.mkdir(parents=True, exist_ok=True)
            place.chmod(0o755)
        for command in COMMANDS:
            shutil.copyfile(client.__file__, self.bin / command)
            (self.bin / command).chmod(0o755)
        (self.folder / "name").write_text(self.name)
        self.up()
        words = (str(self.folder), self.name, str(self.ncpus), str(self.kill_delay), "on" if self.history else "off")
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.pbs_double.server", *words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n", (self.folder / "server.log").read_text()
        return self

    def stop(self) -> None:
        """End the server and its jobs."""
        if self.process:
            self.process.terminate()
            self.process.wait(20)
            if self.process.stdout:
                self.process.stdout.close()
            self.process = None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def env(self, environment: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment with the commands in front of its PATH."""
        given = dict(os.environ if environment is None else environment)
        return given | {"PATH": f"{self.bin}:{given.get('PATH', '/usr/bin:/bin')}"}

    def down(self) -> None:
        """Nobody can reach the server any more; its jobs go on."""
        (self.folder / "down").touch()

    def up(self) -> None:
        (self.folder / "down").unlink(missing_ok=True)

    def jobs(self) -> dict[str, str]:
        """Job id -> state letter of every job that the server still knows."""
        return {job_id: state for job_id, (_, state, _, _) in self.control().items()}

    def exit_status(self, job_id: str) -> int | None:
        status = self.control()[job_id][2]
        return None if status is None else int(str(status))

    def attributes(self, job_id: str) -> dict[str, Any]:
        """What `qstat -x -f -F json` shows of the job, whoever's it is."""
        done = subprocess.run(
            [str(self.bin / "qstat"), "-x", "-f", "-F", "json", job_id], capture_output=True, text=True, check=True
        )
        found: dict[str, Any] = json.loads(done.stdout)["Jobs"][job_id]
        return found

    def hold(self, job_id: str) -> None:
        self.control("hold", job_id)

    def release(self, job_id: str) -> None:
        self.control("release", job_id)

    def kill(self, job_id: str) -> None:
        """SIGKILL to every process of the job, as where a node is lost or memory runs out."""
        self.control("kill", job_id)

    def forget(self, job_id: str) -> None:
        """The server knows no such job any more, without a word."""
        self.control("forget", job_id)

    def estimate(self, job_id: str, start: float) -> None:
        """What the scheduler expects as the job's start, in Unix seconds."""
        self.control("estimate", job_id, str(start))

    def tell_limit(self, status: int) -> None:
        """The exit status of jobs over their walltime, with PBS's words for it, as newer servers have it (-29); without
        this it is that of the job's shell, 271."""
        self.control("limit status", str(status))

    def keep_history(self, kept: bool) -> None:
        self.control("history", "on" if kept else "off")

    def wait_state(self, job_id: str, *states: str | None, timeout: float = 60.0) -> str | None:
        """Wait until the job is in one of the states; None: the server does not know it."""
        deadline = time.monotonic() + timeout
        while (state := self.jobs().get(job_id)) not in states:
            assert time.monotonic() < deadline, f"job {job_id} is {state}, not {states}"
            time.sleep(0.05)
        return state

    def control(self, *words: str) -> dict[str, list[str | int | None]]:
        answer = client.ask(client.address(str(self.folder)), {"program": "control", "arguments": list(words)})
        assert answer["status"] == 0, answer["stderr"]
        found: dict[str, list[str | int | None]] = json.loads(answer["stdout"])
        return found
