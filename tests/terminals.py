"""A program on a terminal of its own, and a person before it: waits for what is asked, then types."""

import contextlib
import fcntl
import os
import re
import select
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self


class Terminal:
    """`screen`: all that was shown so far."""

    def __init__(self, argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        self.screen, self._seen = "", 0
        self._master, slave = os.openpty()
        try:
            self.child = subprocess.Popen(
                argv,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                cwd=cwd,
                env=None if env is None else dict(env),
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )
        finally:
            os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        os.close(self._master)

    def expect(self, pattern: str, *, timeout: float = 120.0) -> str:
        """Wait for words that match, after those that were waited for before."""
        deadline = time.monotonic() + timeout
        while not (match := re.search(pattern, self.screen[self._seen :])):
            left = deadline - time.monotonic()
            if left <= 0 or not self._read(left):
                raise AssertionError(f"{pattern!r} never came; the screen: {self.screen[-2000:]}")
        self._seen += match.end()
        return match[0]

    def type(self, line: str) -> None:
        os.write(self._master, line.encode() + b"\n")

    def end(self, *, timeout: float = 240.0) -> int:
        """Its exit code."""
        deadline = time.monotonic() + timeout
        while self.child.poll() is None:
            assert time.monotonic() < deadline, f"still running; its screen: {self.screen[-2000:]}"
            self._read(0.1)
        while self._read(0.0):
            pass
        return self.child.wait()

    def _read(self, timeout: float) -> bool:
        """Whether the screen may still change."""
        with contextlib.suppress(OSError):
            if not select.select([self._master], [], [], timeout)[0]:
                return timeout > 0
            data = os.read(self._master, 65536)
            self.screen += data.decode("utf-8", "replace").replace("\r\n", "\n")
            return bool(data)
        return False
