"""Owns what is on the disk for good: files and folders that a power cut, or a full disk, leaves whole or absent.

A name is durable once the folder that holds it was flushed, and a new folder once its parent was. A file whose flush
failed is lost: its pages may count as clean although they were never written (fsync(2), "fsyncgate" 2018), so that a
second flush of it proves nothing; what is written again is a new file.
"""

import errno
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from flctl import faults

LOCK_PATIENCE = 20.0
"""Seconds for another process to be done with a small file, which takes it milliseconds."""


def lock(descriptor: int) -> None:
    """Lock a small open file for this process and thread alone. OSError (ETIMEDOUT) if another one keeps it for longer
    than any has a reason to: one that was stopped must not stop all others."""
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise OSError(errno.ETIMEDOUT, "another flctl holds it and does not go on") from None
            time.sleep(0.01)


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folders(folder: Path) -> None:
    """Every name below a folder is for good. OSError."""
    for place, _, _ in os.walk(folder):
        fsync_folder(Path(place))


def make_folder(folder: Path) -> None:
    """Make a folder and its parents where they do not exist, private to the user, each for good. OSError."""
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
        fsync_folder(missing.parent)


def write_whole(path: Path, content: bytes) -> None:
    """The whole content or the old one, whatever happens; for good when this returns. OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    about = "/".join(path.parts[-3:])
    try:
        make_folder(path.parent)
        remove(draft)
        faults.point("write", about)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        faults.point("rename", about)
        draft.rename(path)
        faults.point("renamed", about)
        fsync_folder(path.parent)
        faults.point("written", about)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def move(draft: Path, target: Path) -> None:
    """Give a file or folder, whose content is durable, its final name for good. OSError."""
    draft.rename(target)
    faults.point("moved", "/".join(target.parts[-3:]))
    fsync_folder(target.parent)


def link_files(source: Path, names: Iterable[str], target: Path) -> None:
    """The files of these relative names in another folder too, by hard links where they can be, for good. OSError."""
    for name in names:
        make_folder((target / name).parent)
        try:
            os.link(source / name, target / name)
        except OSError:
            shutil.copyfile(source / name, target / name)
            with (target / name).open("rb") as file:
                os.fsync(file.fileno())
    fsync_folders(target)


def read_plain(path: Path) -> bytes:
    """A file's content, if it is a file: a link in its place is not followed. OSError."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link, and flctl makes none") from None
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if there is one; of a link, only the link. OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
