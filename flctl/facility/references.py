"""Owns references to secrets: what command:, file:, env: and keyring: give, and storing a secret behind one."""

import os
import shlex
import signal
import stat
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Literal

from flctl.errors import ConfigurationError
from flctl.facility.openssh import expand

COMMAND_TIMEOUT = 30.0

_taken: dict[str, str] = {}
"""Secrets read from environment variables, which are removed there so that no child inherits them."""
_taking = threading.Lock()


def read_reference(reference: str) -> str:
    """The text that a reference stands for: command:, file:, env:, keyring:."""
    kind, _, rest = reference.partition(":")
    rest = rest.strip()
    sources = {"command": _from_command, "file": _from_file, "env": _from_environment, "keyring": _from_keyring}
    if kind not in sources or not rest:
        raise ConfigurationError(
            "there is no reference to a secret",
            hint="write command:PROGRAM ARGS, file:PATH, env:NAME or keyring:SERVICE/USER",
        )
    return sources[kind](rest)


def _from_command(command: str) -> str:
    try:
        argv = shlex.split(command)
    except ValueError as error:
        raise ConfigurationError(f"the secret's command cannot be read: {error}") from None
    try:
        # Its standard error is dropped: password programs print secrets there when they fail.
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigurationError(f"the secret's program {argv[0]} cannot be run: {error.strerror}") from None
    with child:
        try:
            output, _ = child.communicate(timeout=COMMAND_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ConfigurationError(
                f"the secret's program {argv[0]} did not answer within {COMMAND_TIMEOUT:.0f} s",
                hint="it must not ask anything: unlock its store first",
            ) from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    lines = output.decode("utf-8", "replace").strip().splitlines()
    if child.returncode != 0 or not lines:
        raise ConfigurationError(
            f"the secret's program {argv[0]} gave no secret (exit status {child.returncode})",
            hint="run it by hand to see why",
        )
    return lines[0]


def _from_file(name: str) -> str:
    path = expand(name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "it is a symbolic link" if path.is_symlink() else error.strerror
        raise ConfigurationError(f"the secret's file {path} cannot be read: {reason}") from None
    with os.fdopen(descriptor, "rb") as stream:
        found, parent = os.fstat(stream.fileno()), path.parent.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ConfigurationError(f"the secret's file {path} is not a regular file")
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077 or found.st_nlink != 1:
            raise ConfigurationError(
                f"the secret's file {path} must belong to you, have one name, and be closed to everybody else",
                hint=f"chmod 600 {path}; if others could read it until now, enrol a new secret",
            )
        # A group of one's own is what many systems give each user.
        foreign = parent.st_mode & stat.S_IWGRP and parent.st_gid != os.getegid()
        if (foreign or parent.st_mode & stat.S_IWOTH) and not parent.st_mode & stat.S_ISVTX:
            raise ConfigurationError(f"others may replace the secret's file {path}", hint=f"chmod go-w {path.parent}")
        return _text_of(stream.read(65536), path)


def _text_of(content: bytes, path: Path) -> str:
    lines = content.decode("utf-8", "replace").strip().splitlines()
    if not lines:
        raise ConfigurationError(f"the secret's file {path} is empty")
    return lines[0]


def withhold(*references: str) -> None:
    """Take what these refer to out of our environment, so that no program which is run from now on inherits it, the one
    that gives another secret neither. They can still be read."""
    for kind, _, name in (reference.partition(":") for reference in references):
        if kind == "env":
            with _taking:
                if value := os.environ.pop(name.strip(), ""):
                    _taken[name.strip()] = value


def _from_environment(name: str) -> str:
    withhold(f"env:{name}")
    with _taking:
        if name not in _taken:
            raise ConfigurationError(f"the environment variable {name}, which should hold the secret, is not set")
        return _taken[name]


def _from_keyring(name: str) -> str:
    value = _keyring("give", name)
    if not value:
        raise ConfigurationError(f"the keyring holds no secret for {name} (it is written keyring:SERVICE/USER)")
    return value


def _keyring(verb: Literal["give", "take"], name: str, value: str = "") -> str:
    """What the system's keyring holds under SERVICE/USER, or, to take it, `value` from now on."""
    service, _, user = name.rpartition("/")
    try:
        import keyring
        import keyring.errors
    except ImportError:
        raise ConfigurationError(
            "the secret is in a keyring, and Python's keyring package is not installed",
            hint="python -m pip install 'flctl[keyring]'",
        ) from None
    try:
        if verb == "take":
            keyring.set_password(service, user, value)
            return value
        return keyring.get_password(service, user) or ""
    except keyring.errors.KeyringError as error:
        raise ConfigurationError(
            f"the keyring did not {verb} the secret of {name}: {type(error).__name__}", hint="unlock it first"
        ) from None


def store_in_keyring(name: str, secret: str, *, replace: bool) -> str:
    """Store a secret in the system's keyring under SERVICE/USER; the reference to it."""
    if not replace and _keyring("give", name):
        raise _stored_already(f"the keyring's {name}")
    _keyring("take", name, secret)
    return f"keyring:{name}"


def store_in_file(path: Path, secret: str, *, replace: bool) -> str:
    """Store a secret in a file that only its owner can read, whole or not at all; the reference to it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(secret + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            if replace:
                draft.rename(path)
            else:
                path.hardlink_to(draft)  # unlike rename, never over something
        finally:
            draft.unlink(missing_ok=True)
    except FileExistsError:
        raise _stored_already(str(path)) from None
    except OSError as error:
        raise ConfigurationError(f"the secret cannot be stored in {path}: {error.strerror}") from None
    return f"file:{path}"


def _stored_already(where: str) -> ConfigurationError:
    return ConfigurationError(f"{where} holds a secret already", hint="--replace puts the new one in its place")
