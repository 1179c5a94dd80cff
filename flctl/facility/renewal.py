"""Owns getting a new certificate: when it is time for one, and running the program that the profile names for it."""

import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flctl.errors import ConfigurationError, Interrupted, LoginNeeded
from flctl.facility.certificates import Dates, ended
from flctl.facility.profile import Site
from flctl.words import printable

MARGIN = 300.0
"""Seconds before its end at which a certificate is renewed; for a short-lived one, a quarter of its life."""

UNATTENDED_TIMEOUT = 60.0

_terminal = threading.Lock()
"""There is one terminal, whoever asks: two programs never ask at once."""


def certificate_until(site: Site) -> float | None:
    """When the certificate ends that a login would use now (Unix seconds); None where none is valid, or none is used.
    ConfigurationError if its file holds something else."""
    dates = _dates(site) if _certified(site) else None
    return dates.before if dates is not None and dates.valid() else None


def is_time(site: Site) -> bool:
    """Whether the site's certificate is missing, has ended or is about to."""
    if not _certified(site):
        return False
    dates = _dates(site)
    if dates is None or not dates.valid():
        return True
    return time.time() > dates.before - min(MARGIN, (dates.before - dates.after) / 4)


def check(site: Site) -> None:
    """LoginNeeded, never tried at the site, if a login there takes a certificate and none is valid now."""
    if _certified(site):
        dates = _dates(site)
        if dates is None or not dates.valid():
            raise ended(site, dates)


def _certified(site: Site) -> bool:
    return site.connection == "ssh" and site.login.kind == "certificate"


def _dates(site: Site) -> Dates | None:
    from flctl.facility.keys import certificate_dates

    return certificate_dates(site)


def renew(site: Site, *, interactive: bool, stop: Callable[[], bool] = lambda: False) -> float:
    """Run login.renew; the end of the certificate that there is then (Unix seconds). `interactive`: it has our terminal
    and as long as it wants; else it has none, and UNATTENDED_TIMEOUT seconds. ConfigurationError if the profile names
    no program; LoginNeeded, never tried at the site, if it fails or brings no valid certificate."""
    words = [str(Path(word).expanduser()) if word[:1] == "~" else word for word in shlex.split(site.login.renew)]
    if not words:
        raise ConfigurationError(
            "the profile does not say which program gets a new certificate",
            hint=f'set login.renew in sites/{site.name}.toml, for example: renew = "step ssh login me@example.org"',
            site=site.name,
        )
    status, said = _attended(words, site, stop) if interactive else _unattended(words, site, stop)
    until = certificate_until(site)
    if status == 0 and until is not None:
        return until
    why = f"ended with exit status {status}" if status else "brought no valid certificate"
    raise _failed(site, words, why + (f": {said}" if said else ""))


def _attended(words: list[str], site: Site, stop: Callable[[], bool]) -> tuple[int, str]:
    """On the terminal. What it prints goes to standard error: our own output may be read by a program."""
    with _terminal, _settings_kept():
        print(f"flctl: {site.name}: {shlex.join(words)}", file=sys.stderr, flush=True)
        return _run(words, site, stop, math.inf, stdout=sys.stderr.fileno()), ""


def _unattended(words: list[str], site: Site, stop: Callable[[], bool]) -> tuple[int, str]:
    """Without a terminal. What it complains of is kept for the error; what it gives may be a key or a token."""
    with tempfile.TemporaryFile() as output:
        status = _run(
            words,
            site,
            stop,
            UNATTENDED_TIMEOUT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,
        )
        output.seek(max(0, output.seek(0, os.SEEK_END) - 2000))
        return status, printable(output.read().decode("utf-8", "replace"))


def _run(words: list[str], site: Site, stop: Callable[[], bool], timeout: float, **options: Any) -> int:
    try:
        child = subprocess.Popen(words, env=_environment(site), **options)
    except OSError as error:
        raise _failed(site, words, f"cannot be run: {error.strerror}") from None
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            if stop():
                raise Interrupted("getting a new certificate was interrupted", site=site.name)
            with suppress(subprocess.TimeoutExpired):
                return child.wait(timeout=0.1)
        raise _failed(site, words, f"did not end within {timeout:.0f} s")
    finally:
        if child.poll() is None:
            _end(child, whole=bool(options.get("start_new_session")))


def _end(child: "subprocess.Popen[bytes]", *, whole: bool) -> None:
    """End a program, with all that it started where it leads a session of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(child.pid, number) if whole else child.send_signal(number)
            child.wait(timeout=2)


def _environment(site: Site) -> dict[str, str]:
    """The user's own, which such programs need, less the secrets that the profile says are kept there."""
    references = (site.login.password.secret, site.login.totp.secret)
    secret = {reference.removeprefix("env:") for reference in references}
    return {name: value for name, value in os.environ.items() if name not in secret}


@contextmanager
def _settings_kept() -> Iterator[None]:
    """The terminal as it was, also after a program that was ended while it asked for a password."""
    kept = None
    with suppress(termios.error, OSError, ValueError):
        kept = termios.tcgetattr(0)
    try:
        yield
    finally:
        if kept is not None:
            with suppress(termios.error, OSError):
                termios.tcsetattr(0, termios.TCSANOW, kept)


def _failed(site: Site, words: list[str], why: str) -> LoginNeeded:
    error = LoginNeeded(f"login.renew ({printable(words[0])}) {why}", hint=f"flctl login {site.name}", site=site.name)
    error.attempted = False
    return error
