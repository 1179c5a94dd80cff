"""Owns the fault points: named places where a test kills this process, to prove that the campaign goes on from there.

FLCTL_FAULT=NAME[:n] ends the process by SIGKILL when it passes the point of that name for the n-th time (1 if left
out). NAME may be a point's name, or name and subject as they are logged (`ordered karolina/1`), or `*` for any point;
several are separated by `;`. FLCTL_FAULT_LOG=FILE gets a line for each point passed. Without them a point does nothing.
"""

import os
import signal
from collections import Counter
from threading import Lock

_FAULT = os.environ.get("FLCTL_FAULT", "")
_LOG = os.environ.get("FLCTL_FAULT_LOG", "")
_passed: Counter[str] = Counter()
_lock = Lock()


def _parsed(text: str) -> dict[str, int]:
    wanted: dict[str, int] = {}
    for item in filter(None, text.split(";")):
        name, colon, count = item.rpartition(":")
        if colon and count.isdecimal():
            wanted[name] = int(count)
        else:
            wanted[item] = 1
    return wanted


_WANTED = _parsed(_FAULT)


def point(name: str, subject: str = "") -> None:
    """Pass a named place in the program; `subject` tells what it is about there (a site, a record)."""
    if _WANTED or _LOG:
        _pass(name, f"{name} {subject}".rstrip())


def _pass(name: str, line: str) -> None:
    with _lock:
        if _LOG:
            descriptor = os.open(_LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, f"{line}\n".encode())
            finally:
                os.close(descriptor)
        for key in {name, line, "*"}:
            _passed[key] += 1
            if _passed[key] == _WANTED.get(key):
                os.kill(os.getpid(), signal.SIGKILL)
                signal.pause()  # another thread may be the one that takes the signal
