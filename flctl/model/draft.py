"""A model folder in the making: files are hashed as they are written, and all of it goes if anything fails."""

import errno
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from flctl.durable import fsync_folders
from flctl.errors import BudgetRefused, ConfigurationError
from flctl.records import FileEntry

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
BLOCK = 1 << 20
AT_ONCE = 256 << 10  # bytes of a write: larger ones take larger pages, which a hypervisor may have to find first
FLUSHED = 64 << 20  # bytes after which the disk is asked to begin, so that little is left to wait for at the end


class DraftFile:
    """One file being written. Written from its first byte to its last, it is hashed on its way."""

    def __init__(self, path: str, descriptor: int, flusher: ThreadPoolExecutor) -> None:
        self._path = path
        self._descriptor = descriptor
        self._flusher = flusher
        self._flushing: Future[None] | None = None
        self._digest = sha256()
        self._size = 0
        self._waiting = 0

    def write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self.place(self._size, data)
        self._size += len(data)

    def place(self, offset: int, data: bytes | memoryview) -> None:
        """Write at an offset, without hashing."""
        rest = memoryview(data)
        self._waiting += len(rest)
        while rest:
            count = os.pwrite(self._descriptor, rest[:AT_ONCE], offset)
            rest, offset = rest[count:], offset + count
        if self._waiting >= FLUSHED and (self._flushing is None or self._flushing.done()):
            self._settled()
            self._waiting = 0
            self._flushing = self._flusher.submit(os.fdatasync, self._descriptor)

    def finish(self) -> None:
        self._settled()
        os.fsync(self._descriptor)

    def close(self) -> None:
        if self._flushing is not None:
            self._flushing.exception()
        os.close(self._descriptor)

    def entry(self) -> FileEntry:
        return FileEntry(path=self._path, size=self._size, sha256=self._digest.hexdigest())

    def _settled(self) -> None:
        if self._flushing is not None:
            self._flushing.result()
            self._flushing = None


class Draft:
    """The files written so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[FileEntry] = []
        self.settled = False
        self._flusher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flush")

    @contextmanager
    def file(self, path: str) -> Iterator[DraftFile]:
        """A new file, hashed, and on the disk for good when the block ends."""
        with self._open(path, os.O_CREAT | os.O_EXCL) as file:
            yield file
        self.entries.append(file.entry())

    @contextmanager
    def shared_file(self, path: str) -> Iterator[DraftFile]:
        """A file that several processes write in places; it is hashed and entered once all have."""
        with self._open(path, os.O_CREAT) as file:
            yield file

    @contextmanager
    def _open(self, path: str, flags: int) -> Iterator[DraftFile]:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        file = DraftFile(path, os.open(target, os.O_WRONLY | flags, 0o666), self._flusher)
        try:
            yield file
            file.finish()
        finally:
            file.close()

    def copy(self, folder: Path, path: str) -> None:
        with self.file(path) as target, (folder / path).open("rb") as source:
            while block := source.read(BLOCK):
                target.write(block)

    def settle(self) -> None:
        """The names of the files, too, are on the disk for good. At the latest the end of `fresh_draft` sees to it."""
        self.settled = True
        fsync_folders(self.folder)

    def close(self) -> None:
        self._flusher.shutdown()


@contextmanager
def fresh_draft(folder: Path, *, needed: int) -> Iterator[Draft]:
    """A new folder that stays only if the block ends without an error. `needed`: the bytes that will be written.

    Raises BudgetRefused if they do not fit, now or later, and ConfigurationError if the folder cannot be written."""
    try:
        folder.mkdir()
    except OSError as error:
        raise translated(error, folder) from error
    made = Draft(folder)
    try:
        _room(folder, needed)
        yield made
        if not made.settled:
            made.settle()
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise translated(error, folder) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        made.close()


@contextmanager
def joined_draft(folder: Path) -> Iterator[Draft]:
    """A draft that another process made, and removes if anything fails."""
    made = Draft(folder)
    try:
        yield made
    except OSError as error:
        raise translated(error, folder) from error
    finally:
        made.close()


def _room(folder: Path, needed: int) -> None:
    system = os.statvfs(folder)
    free = system.f_bavail * system.f_frsize
    if system.f_blocks and free < needed:  # some network file systems tell nothing: 0 blocks
        raise _full(folder, f"the disk is too full: {needed:,} bytes are needed, {free:,} are free")


def translated(error: OSError, folder: Path) -> Exception:
    """What went wrong with writing a draft, as an error of ours."""
    if error.errno in FULL:
        return _full(folder, f"the disk is full: {os.strerror(error.errno or 0)}")
    return ConfigurationError(f"{error.filename or folder}: {os.strerror(error.errno or 0)}")


def _full(folder: Path, reason: str) -> BudgetRefused:
    return BudgetRefused(f"{folder}: {reason}", hint=f"make room in {folder.parent}, then repeat the command")
