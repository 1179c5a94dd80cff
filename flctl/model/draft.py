"""A model folder in the making: files are hashed as they are written, and all of it goes if anything fails."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from flctl.errors import BudgetRefused, ConfigurationError
from flctl.records import FileEntry

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
BLOCK = 1 << 20


class DraftFile:
    """One file being written, hashed on its way."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._digest = sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        rest = memoryview(data)
        self._size += len(rest)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]

    def entry(self, path: str) -> FileEntry:
        return FileEntry(path=path, size=self._size, sha256=self._digest.hexdigest())


class Draft:
    """The files written so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: list[FileEntry] = []

    @property
    def entries(self) -> tuple[FileEntry, ...]:
        return tuple(sorted(self._entries, key=lambda entry: entry.path))

    @contextmanager
    def file(self, path: str) -> Iterator[DraftFile]:
        """A new file, on the disk for good when the block ends."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            file = DraftFile(descriptor)
            yield file
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._entries.append(file.entry(path))

    def copy(self, folder: Path, path: str) -> None:
        with self.file(path) as target, (folder / path).open("rb") as source:
            while block := source.read(BLOCK):
                target.write(block)

    def settle(self) -> None:
        """The names of the files, too, are on the disk for good."""
        for folder, _, _ in os.walk(self.folder):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextmanager
def fresh_draft(folder: Path, *, needed: int) -> Iterator[Draft]:
    """A new folder that stays only if the block ends without an error. `needed`: the bytes that will be written.

    Raises BudgetRefused if they do not fit, now or later, and ConfigurationError if the folder cannot be written."""
    try:
        folder.mkdir()
    except OSError as error:
        raise _translated(error, folder) from error
    try:
        _room(folder, needed)
        made = Draft(folder)
        yield made
        made.settle()
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _translated(error, folder) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _room(folder: Path, needed: int) -> None:
    system = os.statvfs(folder)
    free = system.f_bavail * system.f_frsize
    if system.f_blocks and free < needed:  # some network file systems tell nothing: 0 blocks
        raise _full(folder, f"the disk is too full: {needed:,} bytes are needed, {free:,} are free")


def _translated(error: OSError, folder: Path) -> Exception:
    if error.errno in FULL:
        return _full(folder, f"the disk is full: {os.strerror(error.errno or 0)}")
    return ConfigurationError(f"{error.filename or folder}: {os.strerror(error.errno or 0)}")


def _full(folder: Path, reason: str) -> BudgetRefused:
    return BudgetRefused(f"{folder}: {reason}", hint=f"make room in {folder.parent}, then repeat the command")
