"""Owns a process that moves a campaign: its engine, its runtime folder, its signals."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from flctl.campaign.workspace import Workspace
from flctl.cli.output import print_json
from flctl.errors import CodeSpent, Interrupted, LoginPaused, LoginTooSoon
from flctl.records import Failure

if TYPE_CHECKING:
    from flctl.campaign.access import Terminal
    from flctl.campaign.engine import Engine

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CODE_PATIENCE, INTERVAL_PATIENCE = 65.0, 3660.0
T = TypeVar("T")


def find(folder: Path | None) -> Workspace:
    return Workspace.find(folder, os.environ, Path.cwd())


def a_person() -> "Terminal | None":
    """The terminal of whoever typed this command, for a program that asks them something; None if nobody is there, or
    if the command was put into the background (`flctl round &`): what it asks could not be answered."""
    with suppress(OSError):
        if sys.stdin.isatty() and sys.stderr.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp():
            return nullcontext
    return None


@contextmanager
def moving(
    workspace: Workspace,
    tell: Callable[[str], None] = lambda line: None,
    command: str = "",
    terminal: "Terminal | None" = None,
) -> "Iterator[Engine]":
    """An engine for this process, which a signal stops in order. `command`: the name of a command that answers with
    JSON; `terminal`: lends the terminal to a program that asks a person (None: nobody is there)."""
    from flctl.campaign.engine import Engine
    from flctl.facility import scratch

    stop = threading.Event()
    with heeding(stop), scratch.folder() as runtime:
        engine = Engine(workspace=workspace, runtime=runtime, stop=stop, tell=tell, terminal=terminal)
        try:
            yield engine
        except Interrupted:
            engine.close()
            leave_interrupted(workspace, command)
        finally:
            engine.close()


@contextmanager
def heeding(stop: threading.Event, *, tell: bool = True) -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or SIGHUP sets `stop`, the second ends the process at once; one that was ignored when
    we began (nohup) stays ignored."""

    def interrupt(number: int, frame: object) -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()
        if tell:
            print("\nflctl: stopping; once more to leave at once", file=sys.stderr)

    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_interrupted(workspace: Workspace, command: str) -> None:
    """Say what still runs where, and leave with 130 whatever a thread may still wait for."""
    if command:
        from flctl.campaign.report import progress

        error = Failure(code="interrupted", exit_code=130, message="interrupted", hint="the same command goes on")
        data = progress(workspace, done=False)
        print_json(command, status="error", exit_code=130, data=data, errors=[("", error)])
    runs = [run for run in workspace.runs() if run.open]
    for run in runs:
        job = f", job {run.job.id}" if run.job.id else ""
        print(f"flctl: {run.site}: run {run.number:04d} is {run.stage}{job}", file=sys.stderr)
    if runs:
        print("  -> jobs at the sites go on; so does flctl round, from here", file=sys.stderr)
    leave(130)


def leave(code: int) -> NoReturn:
    """End the process now, without waiting for a thread that a site keeps waiting."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def patiently(action: "Callable[[], T]", stop: threading.Event) -> T:
    """Do something that may need a fresh one-time code, or come too soon after another login: wait for the next time
    step, or until the facility's interval is over."""
    began = time.monotonic()
    while True:
        if stop.is_set():
            raise Interrupted("interrupted")
        try:
            return action()
        except LoginPaused:
            raise
        except LoginTooSoon as early:
            pause = early.until - time.time() + 0.5
            patience = CODE_PATIENCE if isinstance(early, CodeSpent) else INTERVAL_PATIENCE
            if time.monotonic() + pause > began + patience:
                raise
            print(f"flctl: {early.message}; waiting {max(0.0, pause):.0f} s for the next", file=sys.stderr)
            if stop.wait(max(0.1, pause)):
                raise Interrupted("interrupted") from early
