"""Owns which one-time codes all flctl processes of a user have used, each time step of each secret once; and the user's
state folder with its files under locks."""

import errno
import hashlib
import hmac
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flctl import faults
from flctl.durable import fsync_folder, lock, make_folder
from flctl.errors import BudgetRefused, CodeSpent, ConfigurationError, FlctlError, Locked

MARGIN = 3.0
"""Seconds that must be left in a step before its code is sent: it has to arrive and be checked within it."""

GREETING = 2.0
"""Seconds more that must be left before a connection is made on which the code will be asked for."""


Entries = dict[str, Any]

LONGEST = 3600.0
"""Seconds of the longest period that a profile may have: a step that is used until later than that from now is one of a
clock that was set back since."""


def state_folder() -> Path:
    """The user's state folder of flctl, private to the user."""
    base = os.environ.get("XDG_STATE_HOME", "")
    folder = (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "flctl"
    try:
        make_folder(folder)
    except OSError as error:
        raise ConfigurationError(
            f"{folder} cannot be made: {error.strerror}; it keeps which one-time codes were used",
            hint="see why; or let XDG_STATE_HOME name a folder of yours",
        ) from None
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigurationError(
            f"{folder} must be a folder of yours that nobody else can enter: it keeps which one-time codes were used",
            hint=f"chmod 700 {folder}",
        )
    return folder


def check(key: bytes, period: int, *, now: float | None = None) -> None:
    """CodeSpent if the code of the present time step is used, or if too little of it is left to log in."""
    moment = time.time() if now is None else now
    with _ledger(moment) as (entries, _):
        _refuse_if_spent(entries, key, period, moment, margin=MARGIN + GREETING)


def spend(key: bytes, period: int, *, now: float | None = None) -> int:
    """Take the present time step for this caller alone; its number. Written to disk before this returns, so that a
    crash can only waste a code, never use one twice. CodeSpent if it is taken already."""
    moment = time.time() if now is None else now
    with _ledger(moment) as (entries, path):
        _refuse_if_spent(entries, key, period, moment, margin=MARGIN)
        step = int(moment // period)
        entries["used_until"][_name(entries, key)] = (step + 1) * period
        faults.point("code-spend")
        write(path, entries)
        faults.point("code-spent")
        return step


def _refuse_if_spent(entries: Entries, key: bytes, period: int, now: float, *, margin: float) -> None:
    following = (now // period + 1) * period
    used_until = entries["used_until"].get(_name(entries, key), 0)
    if used_until > now:
        raise CodeSpent(
            "the one-time code of this moment is already used; a code works once",
            until=float(used_until),
            hint=f"wait {used_until - now:.0f} s for the next one",
        )
    if following - now < margin * min(1.0, period / 30):
        raise CodeSpent(
            "the one-time code of this moment is about to expire",
            until=following,
            hint=f"wait {following - now:.0f} s for the next one",
        )


def _name(entries: Entries, key: bytes) -> str:
    """A secret's name in the ledger; it tells nothing about the secret."""
    return hmac.new(bytes.fromhex(entries["salt"]), key, hashlib.sha256).hexdigest()


@contextmanager
def _ledger(now: float) -> Iterator[tuple[Entries, Path]]:
    """The ledger of codes and where it lies, for this process and thread alone. After a clock that ran far ahead was
    set back, the steps that it used count as those of an hour at most, beginning now."""
    with locked("codes") as path:
        entries = _read(path)
        ahead = [name for name, until in entries["used_until"].items() if until > now + LONGEST]
        if ahead:
            entries["used_until"].update(dict.fromkeys(ahead, int(now + 1)))
            write(path, entries)
        yield entries, path


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """The path of a ledger, for this process and thread alone. Locked if another one keeps it for longer than any has a
    reason to: one that was stopped must not stop every site of every campaign."""
    path = state_folder() / f"{name}.json"
    try:
        descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        try:
            lock(descriptor)
        except OSError as error:
            raise _unusable(path, error) from error
        yield path
    finally:
        os.close(descriptor)


def _unusable(path: Path, error: OSError) -> FlctlError:
    """A ledger that cannot be kept: then nothing is sent, for it could not be remembered."""
    what = f"{path}, which keeps what logins were made, cannot be used: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BudgetRefused(what, hint="make room; the same command goes on from here")
    if error.errno == errno.ETIMEDOUT:
        return Locked(what, hint=f"find it: fuser -v {path.with_suffix('.lock')}")
    return ConfigurationError(what, hint=f"who owns {path}?")


def text_of(path: Path) -> str | None:
    """What a ledger holds, None where there is none yet. It is replaced whole: to read it needs no lock."""
    try:
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error) from error


def _read(path: Path) -> Entries:
    try:
        text = text_of(path)
        if text is None:
            return {"salt": secrets.token_hex(16), "used_until": {}}
        entries = json.loads(text)
        bytes.fromhex(entries["salt"])
        if all(isinstance(value, int) for value in entries["used_until"].values()):
            return {"salt": entries["salt"], "used_until": dict(entries["used_until"])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ConfigurationError(
        f"{path}, which keeps which one-time codes were used, cannot be understood",
        hint=f"wait a minute, so that no code of its time is valid any more, then rm {path}",
    )


def write(path: Path, entries: Entries) -> None:
    """Replace a ledger, which is locked; on disk when this returns."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as stream:
            json.dump(entries, stream)
            stream.flush()
            os.fsync(stream.fileno())
        draft.rename(path)
        fsync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise _unusable(path, error) from error
