"""Running flctl as the orchestrator: an unprivileged account with a private home and a bare environment."""

import contextlib
import errno
import fcntl
import os
import select
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .accounts import Account


def environment(owner: Account, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(owner.home),
        "USER": owner.name,
        "LOGNAME": owner.name,
        "LANG": "C.UTF-8",
        **(extra or {}),
    }


def popen(
    owner: Account,
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[Any]:
    """A process of the account in a session (so: process group) of its own. `env` replaces the environment if given."""
    return subprocess.Popen(
        argv,
        cwd=cwd or owner.home,
        env=environment(owner) if env is None else dict(env),
        user=owner.uid,
        group=owner.gid,
        extra_groups=[],
        umask=0o022,
        start_new_session=True,
        **{"stdin": subprocess.DEVNULL, **options},
    )


def run(
    owner: Account,
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    tty: bool = False,
    input: str | None = None,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """Run to the end. `tty`: on a terminal of its own, whose screen is the answer's stdout; `input` is then typed."""
    if tty:
        return _on_terminal(owner, argv, cwd=cwd, env=env, typed=input or "", timeout=timeout)
    pipe = subprocess.PIPE
    stdin = subprocess.DEVNULL if input is None else pipe
    with popen(owner, argv, cwd=cwd, env=env, stdin=stdin, stdout=pipe, stderr=pipe, text=True) as child:
        try:
            stdout, stderr = child.communicate(input, timeout=timeout)
        except BaseException:
            child.kill()
            raise
    return subprocess.CompletedProcess(argv, child.returncode, stdout, stderr)


def _on_terminal(
    owner: Account,
    argv: Sequence[str],
    *,
    cwd: Path | None,
    env: Mapping[str, str] | None,
    typed: str,
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    screen, terminal = os.openpty()
    try:
        os.fchown(terminal, owner.uid, owner.gid)  # so that the account can open /dev/tty
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, b"\x28\x00\x78\x00\x00\x00\x00\x00")  # 40 lines of 120 columns
        child = popen(
            owner,
            argv,
            cwd=cwd,
            env={**environment(owner), "TERM": "xterm-256color", **(env or {})},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
    finally:
        os.close(terminal)
    with child, contextlib.closing(os.fdopen(screen, "r+b", buffering=0)):
        os.write(screen, typed.encode())
        try:
            shown = _read_screen(screen, time.monotonic() + timeout)
            code = child.wait(timeout=10)
        except BaseException:
            child.kill()
            raise
    return subprocess.CompletedProcess(argv, code, shown.decode(errors="replace"), "")


def _read_screen(screen: int, limit: float) -> bytes:
    """All that is written to a terminal until its last user leaves."""
    shown = bytearray()
    while True:
        if not select.select([screen], [], [], max(0.0, limit - time.monotonic()))[0]:
            raise TimeoutError(f"still running; its screen: {shown[-2000:].decode(errors='replace')}")
        try:
            chunk = os.read(screen, 65536)
        except OSError as error:
            if error.errno == errno.EIO:
                return bytes(shown)
            raise
        if not chunk:
            return bytes(shown)
        shown += chunk
