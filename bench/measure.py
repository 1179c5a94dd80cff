"""One program run to its end, and what it took: time, memory, bytes. And the state of the page cache before it."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

DROP = Path("/proc/sys/vm/drop_caches")
TAIL = 2000
INTERVAL = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Times in seconds; `peak` in bytes, of all its processes together; `read` and `written` are bytes of system calls
    (mapped pages are not among them), `fetched` those that came from the disk; `trouble` is empty if all went well."""

    wall: float
    user: float
    system: float
    peak: int
    read: int
    written: int
    fetched: int
    trouble: str
    output: str

    @property
    def cpu(self) -> float:
        return self.user + self.system


def run(command: Sequence[str], log: Path, *, cwd: Path | None = None) -> Run:
    """A run that ends badly is a result, not an error."""
    began = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=cwd, start_new_session=True
        )
    try:
        _first_to_go(process.pid)
        with _Watch(process.pid) as watch:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            wall = time.perf_counter() - began
        moved = _moved(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text(errors="replace")
    return Run(
        wall=wall,
        user=usage.ru_utime,
        system=usage.ru_stime,
        peak=max(usage.ru_maxrss * 1024, watch.peak),
        read=moved.get("rchar", 0),
        written=moved.get("wchar", 0),
        fetched=moved.get("read_bytes", 0),
        trouble=_trouble(process.returncode, text),
        output=text[-TAIL:],
    )


class _Watch:
    """The memory of a program that starts others, all together: the kernel's own peak is that of the largest alone.
    Shared pages count once. A program without children is not looked at, for looking takes its time."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._ended.wait(INTERVAL):
            family = _family(self._pid)
            if len(family) > 1:
                self.peak = max(self.peak, sum(map(_proportional, family)))

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def warm(files: Iterable[Path]) -> None:
    """Inputs into the page cache, and nothing left to be written that would slow what comes next."""
    os.sync()
    block = memoryview(bytearray(4 << 20))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def can_drop_caches() -> bool:
    return os.access(DROP, os.W_OK)


def drop_caches() -> None:
    os.sync()
    DROP.write_text("3")


def _first_to_go(pid: int) -> None:
    """When memory runs out, the kernel shall kill this program and none of somebody else's."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def _family(pid: int) -> list[int]:
    """The process and its descendants, whichever of its threads started them."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found


def _proportional(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _moved(pid: int) -> dict[str, int]:
    """The kernel's counters of a program that has ended but was not yet waited for."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def _trouble(code: int, text: str) -> str:
    if code == -signal.SIGKILL:
        return "killed (out of memory)"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    last = text.strip().splitlines()[-1] if text.strip() else ""
    return f"exit status {code}: {last[:120]}" if code else ""
