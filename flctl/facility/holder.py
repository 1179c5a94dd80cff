"""Owns the end of one kept connection: it lives beside the ssh, and lets it go at the stated time.

    python -I holder.py SOCKET RECORD UNTIL LOCK READY

SOCKET is ssh's control socket; being connected to it keeps the ssh alive, which ends by itself seconds after we do.
RECORD is removed at the end; UNTIL is in Unix seconds; LOCK a descriptor whose lock says that we live; READY one that
hears of it when we do. No password and no code ever comes here.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

LOOK_EVERY = 2.0
"""Seconds between two looks at the clock: the time during which a laptop sleeps counts."""


def main(address: str, record: str, until: float, ready: int) -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(0))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as lifeline:
        lifeline.connect(address)
        os.write(ready, b"+")
        os.close(ready)
        try:
            stay(lifeline, until)
        finally:
            leave(address)
            Path(record).unlink(missing_ok=True)
    return 0


def stay(lifeline: socket.socket, until: float) -> None:
    """Return at the stated time, by either clock, or when ssh has ended."""
    latest = time.monotonic() + until - time.time()
    while (left := min(until - time.time(), latest - time.monotonic())) > 0:
        if select.select([lifeline], [], [], min(LOOK_EVERY, left))[0] and not lifeline.recv(4096):
            return


def leave(address: str) -> None:
    """End the ssh, and with it whatever still uses its connection."""
    argv = ["ssh", "-F", "none", "-S", address.replace("%", "%%"), "-O", "exit", "kept"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[5])))
