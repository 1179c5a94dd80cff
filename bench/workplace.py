"""The folder that a benchmark works in, the room on its disk, and the machine that it ran on."""

import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

GB = 1e9


@contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """The folder given, which stays; or one below /var/tmp (/tmp may be memory), which goes however the block ends."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stopped)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    spacious = Path("/var/tmp")
    made = Path(tempfile.mkdtemp(prefix="flctl-bench-", dir=spacious if os.access(spacious, os.W_OK) else None))
    try:
        yield made
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def fresh(output: Path) -> Iterator[Path]:
    """A name for an output that is gone before the block and after it."""
    shutil.rmtree(output, ignore_errors=True)
    try:
        yield output
    finally:
        shutil.rmtree(output, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def require(folder: Path, needed: int) -> None:
    if (free := free_bytes(folder)) < needed:
        room = f"{needed / GB:.0f} GB are needed, {free / GB:.0f} GB are free"
        sys.exit(f"{folder}: {room}; choose another with --folder")


def memory(name: str) -> int:
    """Bytes, as /proc/meminfo names them."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def machine() -> dict[str, object]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory("MemTotal"),
        "memory available": memory("MemAvailable"),
        "load before": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _stopped(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
