"""Daemons of the testbed: started with a record of pid and start time, found again, ended; nobody else's process."""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STATE = Path("/var/lib/flctl-testbed")
RUN = Path("/run/flctl-testbed")

_children: dict[int, subprocess.Popen[bytes]] = {}  # kept so that an ended child can be reaped


class TestbedError(Exception):
    """The testbed cannot do what was asked; the message says why."""

    __test__ = False


def _fields(pid: int) -> list[str]:
    """/proc/PID/stat after the name: state, ppid, ...; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def start_time(pid: int) -> str:
    """The kernel's start time of a process, empty if it is gone or a zombie: pid and start time name one process."""
    fields = _fields(pid)
    return "" if not fields or fields[0] == "Z" else fields[19]


def pids() -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            yield int(entry)


def descendants(pid: int) -> list[int]:
    parents = {other: int(fields[1]) for other in pids() if (fields := _fields(other))}
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def owned_by(uid: int) -> list[int]:
    found = []
    for pid in pids():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}").stat().st_uid == uid and start_time(pid):
                found.append(pid)
    return found


def end(pid: int, *, grace: float = 5.0) -> None:
    """SIGTERM, then SIGKILL after `grace` seconds; returns when the process is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for signal_number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
            if seconds <= 0:
                continue
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal_number)
            if select.select([handle], [], [], seconds)[0]:
                return
        raise TestbedError(f"process {pid} does not end")
    finally:
        os.close(handle)
        if child := _children.pop(pid, None):
            child.wait(timeout=10)


def kill_all_of(uid: int) -> None:
    """End every process of one of the testbed's own accounts, also those forked meanwhile."""
    for _ in range(10):
        found = owned_by(uid)
        if not found:
            return
        for pid in found:
            end(pid, grace=0)
    raise TestbedError(f"processes of uid {uid} keep coming back: {owned_by(uid)}")


def wait_until(condition: Callable[[], object], what: str, *, timeout: float = 30.0, every: float = 0.05) -> None:
    """Wait for something that offers no event of its own."""
    limit = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > limit:
            raise TestbedError(f"waited {timeout:g} s in vain: {what}")
        time.sleep(every)


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """A program that stays in the foreground; `name` is unique in the testbed."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None

    @property
    def _record(self) -> Path:
        return RUN / f"{self.name}.pid"

    @property
    def output(self) -> Path:
        return RUN / f"{self.name}.out"

    @property
    def pid(self) -> int | None:
        """Its pid if it runs. A record left by a crash or an earlier boot names a process that is gone: None."""
        try:
            pid, started = self._record.read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        return int(pid) if start_time(int(pid)) == started else None

    def start(self) -> None:
        if self.pid is not None:
            return
        RUN.mkdir(mode=0o755, parents=True, exist_ok=True)
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **self.environment}
        with self.output.open("ab") as output:
            child = subprocess.Popen(
                self.argv,
                env=environment,
                user=self.user,
                group=self.user,
                extra_groups=None if self.user is None else [],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        _children[child.pid] = child
        self._record.write_text(f"{child.pid} {start_time(child.pid)}\n")

    def freeze(self) -> None:
        """SIGSTOP: its port takes connections, and nobody answers there."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        if self.pid is not None:
            os.kill(self.pid, signal.SIGCONT)

    def failed(self) -> str:
        """Why it is not running: the end of its output."""
        return f"{self.name} does not run: {self.output.read_text(errors='replace')[-2000:] or 'it said nothing'}"

    def stop(self, *, with_children: bool = False, grace: float = 5.0) -> None:
        pid = self.pid
        if pid is not None:
            children = descendants(pid) if with_children else []
            end(pid, grace=grace)
            for child in children:
                end(child, grace=grace)
        self._record.unlink(missing_ok=True)


def call(argv: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout: float = 120.0) -> str:
    """Standard output of a program that must succeed."""
    done = subprocess.run(
        argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode != 0:
        raise TestbedError(f"{' '.join(argv)}: exit {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
