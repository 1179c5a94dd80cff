"""Where a new folder comes to be: one process at a time, in a draft beside it, and no rest if it does not."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from flctl.errors import Locked
from flctl.model.draft import translated


@contextmanager
def alone(out: Path) -> Iterator[Path]:
    """The place of `out`'s draft, which is free: what an earlier kill left there is gone. Nobody else makes `out`
    meanwhile (Locked). Whatever of the draft and of the folders above is not in use at the end goes."""
    draft = out.with_name(f".{out.name}.draft")
    with ExitStack() as stack:
        try:
            stack.enter_context(_parents(out))
            stack.enter_context(_locked(out))
        except OSError as error:
            raise translated(error, out) from error
        shutil.rmtree(draft, ignore_errors=True)
        stack.callback(shutil.rmtree, draft, ignore_errors=True)
        yield draft


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in missing:
            with suppress(OSError):  # it holds something
                parent.rmdir()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    lock = out.with_name(f".{out.name}.lock")
    with ExitStack() as stack:
        while True:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
            stack.callback(os.close, descriptor)
            _flock(descriptor, out)
            if _lies_at(descriptor, lock):
                break
            stack.pop_all().close()  # whoever held it has removed it meanwhile: the next would not see ours
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _flock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Locked(f"another flctl is making {out}", hint="wait for it to end, or name another folder") from None
    except OSError:
        pass  # a file system without locks, as some of Lustre's


def _lies_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
