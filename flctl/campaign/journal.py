"""Owns journal.jsonl: the history, append-only, each line chained to the one before by its sha256."""

import errno
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from flctl import faults
from flctl.durable import fsync_folder, lock
from flctl.errors import BudgetRefused, ConfigurationError, FlctlError

START = "0" * 64
CHECK = re.compile(rb', "check": "([0-9a-f]{16})"\}$')
"""How a line ends: with the first 16 digits of the sha256 of the line without this."""
HEAD = re.compile(rb'\{"seq": (\d+), "prev": "([0-9a-f]{64})", "at": ')


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A line of the journal that is not as it was written: its number in the file from 1, its `seq` (None where it
    cannot be read), the offset in bytes at which it begins, the sha256 that it has now, and what is wrong."""

    line: int
    seq: int | None
    offset: int
    sha256: str
    what: str

    def __str__(self) -> str:
        seq = "" if self.seq is None else f" (seq {self.seq})"
        return f"line {self.line}{seq}, at byte {self.offset}: {self.what}"


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
        is_new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            lock(descriptor)
            last = _last_line(file)
            sequence = _sequence(last, file) + 1
            previous = sha256(last).hexdigest() if last else START
            entry = {"seq": sequence, "prev": previous, "at": round(time.time(), 3), "event": event, **facts}
            whole = file.seek(0, os.SEEK_END)
            faults.point("journal", event)
            try:
                _write(file.fileno(), _line(entry))
                faults.point("journal-flushed", event)
                os.fsync(descriptor)
            except OSError:
                # What was not flushed is lost, whatever a second flush says: the next line begins where this one did.
                with suppress(OSError):
                    file.truncate(whole)
                raise
        if is_new:
            fsync_folder(self.path.parent)
        faults.point("journaled", event)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The entries, oldest first; a torn or damaged line is left out."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    with suppress(ValueError, RecursionError):
                        entry = json.loads(line)
                        if isinstance(entry, dict):
                            yield entry

    def damage(self) -> tuple[Damage, ...]:
        """Every line that is not as it was written, by its own checksum, and by the hash of it in the line after it. A
        torn last line is none: it was never acknowledged. Each line is hashed twice, none is parsed."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise ConfigurationError(f"{self.path}: {error.strerror}") from error
        return tuple(_damaged(content))


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return text[:-1] + b', "check": "' + _check(text) + b'"}\n'


def _check(text: bytes) -> bytes:
    return sha256(text).hexdigest()[:16].encode()


def _write(descriptor: int, line: bytes) -> None:
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _damaged(content: bytes) -> Iterator[Damage]:
    *lines, torn = content.split(b"\n")
    if torn and _agrees(torn[:-1]):  # a whole line, whose newline is another byte now
        lines.append(torn)
    offset, previous, checked = 0, START, False
    hashes = [sha256(line).hexdigest() for line in lines]
    for number, line in enumerate(lines):
        head, found = HEAD.match(line), CHECK.search(line)
        checked = checked or found is not None
        what = ""
        if head is None or (found is None and not _is_json(line)):
            what = "it cannot be read"
        elif found is not None and not _agrees(line):
            what = "it is not as it was written: its checksum differs"
        elif found is None and checked:
            what = "it is not as it was written: it has lost its checksum"
        elif head[2].decode() != previous:
            what = "the line before it is not the one that it followed: lines are missing, or were changed"
        elif found is None and _disowned(lines, hashes, number):
            what = "it is not as it was written: the line after it says so"
        if what:
            seq = int(head[1]) if head else None
            yield Damage(line=number + 1, seq=seq, offset=offset, sha256=hashes[number], what=what)
        # What follows a damaged line was chained to it either before it was damaged, or after.
        previous = hashes[number]
        if what and number + 1 < len(lines) and (after := HEAD.match(lines[number + 1])):
            previous = after[2].decode()
        offset += len(line) + 1


def _agrees(line: bytes) -> bool:
    found = CHECK.search(line)
    return found is not None and _check(line[: found.start()] + b"}") == found[1]


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _disowned(lines: list[bytes], hashes: list[str], number: int) -> bool:
    """Whether the line after this one, which is as it was written, followed another."""
    if number + 1 >= len(lines):
        return False
    head, after = HEAD.match(lines[number]), HEAD.match(lines[number + 1])
    if head is None or after is None or after[2].decode() == hashes[number] or int(after[1]) != int(head[1]) + 1:
        return False
    further = HEAD.match(lines[number + 2]) if number + 2 < len(lines) else None
    return _agrees(lines[number + 1]) or further is None or further[2].decode() == hashes[number + 1]


def unwritable(path: Path, error: OSError) -> FlctlError:
    """A failed write at home: a full disk or quota, or a folder that may not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BudgetRefused(
            f"{path} cannot be written: {error.strerror}", hint="make room; the same command goes on from here"
        )
    hints = {
        errno.EIO: "the disk fails: see dmesg; what this was about to write is not there, all before it is",
        errno.EROFS: "the file system is mounted read-only: see dmesg; the same command goes on once it can be written",
        errno.ELOOP: f"flctl makes no links in a campaign's folder: who made {path}?",
    }
    hint = hints.get(error.errno or 0, f"who owns {path.parent}?")
    return ConfigurationError(f"{path} cannot be written: {error.strerror}", hint=hint)


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
    if torn and _agrees(torn[:-1]):
        # A whole line, whose newline is another byte now: it was acknowledged, so it stays.
        os.pwrite(file.fileno(), b"\n", file.seek(0, os.SEEK_END) - 1)
        return bytes(torn[:-1])
    if torn:
        file.truncate(file.seek(0, os.SEEK_END) - len(torn))
    file.seek(0, os.SEEK_END)
    return bytes(whole.rpartition(b"\n")[2]) if newline else b""
