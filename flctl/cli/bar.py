"""How far a long piece of work with files is: a bar on a terminal, a line now and then elsewhere; on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flctl.cli.output import say

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

EVERY = 10.0  # seconds between lines

Tell = Callable[[str, int, int], None]
"""What is being done, bytes so far, bytes in all."""


@contextmanager
def shown(*, silent: bool = False) -> Iterator[Tell]:
    """Yields what is to be told how far the work is."""
    if silent:
        yield lambda what, done, total: None
    elif not sys.stderr.isatty():
        yield _Lines().tell
    else:
        with _bars() as bars:
            yield _Bars(bars).tell


class _Lines:
    def __init__(self) -> None:
        self._what = ""
        self._began = self._last = 0.0

    def tell(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._began, self._last = what, now, now
        if now - self._last < EVERY or not done:
            return
        self._last = now
        rate = done / (now - self._began)
        left = f"{rate / 1e6:.0f} MB/s, {(total - done) / rate:.0f} s left"
        say(f"{what}: {done / 1e6:.0f} of {total / 1e6:.0f} MB, {left}", sys.stderr)


class _Bars:
    def __init__(self, bars: "Progress") -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def tell(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)


def _bars() -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)
