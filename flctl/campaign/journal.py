"""Owns journal.jsonl: the history, append-only, each line chained to the one before by its sha256."""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from flctl.errors import BudgetRefused, ConfigurationError, FlctlError

START = "0" * 64


class Journal:
    """What happened, in order. History, reports and audits read it; no decision does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **facts: Any) -> None:
        """Add one line, durable when this returns. A torn last line (a kill in the middle of a write) is cut off."""
        try:
            self._append(event, facts)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _append(self, event: str, facts: dict[str, Any]) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            last = _last_line(file)
            sequence = _sequence(last, file) + 1
            previous = sha256(last).hexdigest() if last else START
            entry = {"seq": sequence, "prev": previous, "at": round(time.time(), 3), "event": event, **facts}
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The entries, oldest first; a torn or damaged line is left out."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    with suppress(ValueError):
                        yield json.loads(line)


def unwritable(path: Path, error: OSError) -> FlctlError:
    """A failed write at home: a full disk or quota, or a folder that may not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BudgetRefused(
            f"{path} cannot be written: {error.strerror}", hint="make room; the same command goes on from here"
        )
    return ConfigurationError(f"{path} cannot be written: {error.strerror}", hint=f"who owns {path.parent}?")


def _sequence(last: bytes, file: Any) -> int:
    """The last line's number; where the line is damaged, how many there are: history must not stop a campaign."""
    try:
        return int(json.loads(last)["seq"]) if last else 0
    except (ValueError, KeyError, TypeError):
        file.seek(0)
        return sum(1 for _ in file)


def _last_line(file: Any) -> bytes:
    """The last whole line without its newline (b"" if there is none); what follows it is cut off the file."""
    end = file.seek(0, os.SEEK_END)
    tail = b""
    while end > 0 and tail.count(b"\n") < 2:
        step = min(65536, end)
        end -= step
        file.seek(end)
        tail = file.read(step) + tail
    whole, newline, torn = tail.rpartition(b"\n")
    if torn:
        file.truncate(file.seek(0, os.SEEK_END) - len(torn))
    file.seek(0, os.SEEK_END)
    return bytes(whole.rpartition(b"\n")[2]) if newline else b""
