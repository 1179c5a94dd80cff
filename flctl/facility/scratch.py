"""Owns the scratch folders of running processes: for sockets and short-lived files, private, gone with their process.

They lie in the user's state folder, each with a lock that is held as long as its process lives; whoever makes one
removes those of processes that were killed. Not in /tmp, which may be mounted noexec, and where a service removes what
is some days old, while a round may last weeks.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flctl.durable import lock
from flctl.errors import ConfigurationError, Locked
from flctl.facility import ledger

PATH_MOST = 103 - 17
"""Bytes of a socket's path on macOS, less what ssh adds while it makes its own."""
SOCKET, NAME = 6, 13
"""Bytes of the longest name of a socket in a scratch folder, and of such a folder's own name, each with its slash."""


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A new one, short enough for sockets, until the end of the block. ConfigurationError if there can be none."""
    root = private(ledger.state_folder() / "run", room=NAME + SOCKET, make=True)
    with contextlib.ExitStack() as held:
        with _locked(root / "lock"):
            _sweep(root)
            made = Path(tempfile.mkdtemp(prefix=_machine(), dir=root))
            held.enter_context(_locked(made / "lock"))
        held.callback(shutil.rmtree, made, ignore_errors=True)
        yield made


@contextlib.contextmanager
def for_sockets(given: Path) -> Iterator[Path]:
    """The given folder if sockets can have their place in it, else one of ours."""
    if _fits(given, SOCKET):
        yield given
        return
    with folder() as made:
        yield made


def private(path: Path, *, room: int, make: bool = False) -> Path:
    """This folder, or one in /tmp if names of `room` bytes would make too long a path for a socket.
    ConfigurationError if others can enter it."""
    if not _fits(path, room):
        path = Path("/tmp") / f"flctl-{os.geteuid()}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    if make:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    try:
        found = path.lstat()
    except FileNotFoundError:
        return path
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigurationError(
            f"{path} must be a folder of yours that nobody else can enter: who can may use the connections kept there",
            hint=f"see who made it; then rm -r {path}",
        )
    return path


def _fits(path: Path, room: int) -> bool:
    return len(os.fsencode(path)) + room <= PATH_MOST


def _machine() -> str:
    """Where machines share a home, each looks after its own processes: a lock may not reach the others."""
    return hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:4]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _wait_for(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, path: Path) -> None:
    try:
        lock(descriptor)
    except OSError as error:
        raise Locked(f"{path} cannot be locked: {error.strerror}", hint=f"find it: fuser -v {path}") from error


def _sweep(root: Path) -> None:
    for made in root.glob(f"{_machine()}*"):
        if not _lives(made / "lock"):
            shutil.rmtree(made, ignore_errors=True)


def _lives(path: Path) -> bool:
    """Whether its process holds it. There is none where a process was killed, or is just removing its folder."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
