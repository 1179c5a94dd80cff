"""Owns journal.jsonl: the history, append-only, each line chained to the one before by its sha256."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

START = "0" * 64


class Journal:
    """What happened, in order. History, reports and audits read it; no decision does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **facts: Any) -> None:
        """Add one line, durable when this returns. A torn last line (a kill in the middle of a write) is cut off."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            last = _last_line(file)
            sequence = json.loads(last)["seq"] + 1 if last else 1
            previous = sha256(last).hexdigest() if last else START
            entry = {"seq": sequence, "prev": previous, "at": round(time.time(), 3), "event": event, **facts}
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The entries, oldest first; a torn last line is left out."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)


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
