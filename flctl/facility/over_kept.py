"""Owns a site's connection over a kept one: each command and each rsync is a session of an ssh that runs already.

It never logs in: an ssh that finds no kept connection has no other way to the host.
"""

import contextlib
import os
import re
import secrets
import selectors
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from flctl.errors import FlctlError, SiteUnreachable
from flctl.facility import connection as connections
from flctl.facility import holding
from flctl.facility.connection import Output, Progress, program_of
from flctl.facility.holding import Kept
from flctl.facility.openssh import Place, environment, login_place, transfer_place
from flctl.facility.profile import Site
from flctl.facility.rsync import Shell, end
from flctl.records import FileEntry
from flctl.words import printable

if TYPE_CHECKING:
    from flctl.facility.connection import Road
    from flctl.facility.rsync import Carrier

TURN_PATIENCE = 20.0
"""Seconds for which a server that allows one session at a time is asked again: the last one may not have ended yet."""

GRACE = 1.0
"""Seconds for which output is awaited after the end: a daemon left behind may hold it open for ever."""


def kept_connection(site: Site, road: "Road") -> "KeptConnection | None":
    """The site over the connections that are kept to it; None if it must be logged in to. LoginNeeded if only a person
    can do that."""
    kept = holding.found(site, road.known_hosts)
    if site.login.attended and len(kept) < len(holding.places(site)):
        raise holding.needed(site)
    return KeptConnection(site, road, kept) if login_place(site) in kept else None


class KeptConnection:
    """A site over connections that a person opened; `until` (Unix seconds) one of them ends."""

    logins = 0

    def __init__(self, site: Site, road: "Road", kept: dict[Place, Kept]) -> None:
        self.site, self.road, self.lock_fds, self._kept = site, road, road.lock_fds, kept
        self.until = min(one.until for one in kept.values())
        self._carrier: Carrier | None = None

    def run(self, script: str, *, timeout: float = 60.0) -> Output:
        place = login_place(self.site)
        self._check(place)
        argv = [*_ssh(self._kept[place], place), place.host, "/bin/sh"]
        ended = f"flctl-{secrets.token_hex(8)}"
        # In a subshell, which the program may leave as it likes; its status comes as a word, since the ssh may stay.
        program = b"(\n" + program_of(script) + f")\nprintf '\\n%s %d\\n' {ended} $?\n".encode()
        deadline = time.monotonic() + timeout
        patience = min(deadline, time.monotonic() + TURN_PATIENCE)
        while True:
            status, stdout, stderr = _converse(argv, program, ended.encode(), deadline)
            if not holding.is_refused(status, stderr):
                break
            if time.monotonic() > patience:
                raise busy(self.site, place)
            time.sleep(0.05)
        if status is None or status in (255, -1):
            late = status is None and time.monotonic() >= deadline
            words = f"no answer within {timeout:.0f} s" if late else printable(stderr) or "it ended without a word"
            raise lost(self.site, self._kept[place], place, words)
        return Output(status=status, stdout=stdout, stderr=stderr)

    def _check(self, place: Place) -> None:
        """Nothing more is sent past its time, or when its holder has gone and cannot end it."""
        if not self._kept[place].alive:
            raise lost(self.site, self._kept[place], place, "it has ended")

    def push(self, source: Path, names: Sequence[str], target: PurePosixPath, progress: Progress | None = None) -> None:
        from flctl.facility import rsync, transfer

        made = self.run(transfer.landing(self.site, target))
        if made.status != 0:
            raise rsync.refusal(self.site, made.stderr, f"the folder {target} cannot be made there", ours=False)
        self._in_turn(lambda carrier: transfer.push(carrier, source, names, target, progress))

    def pull(
        self, source: PurePosixPath, files: Sequence[FileEntry], target: Path, progress: Progress | None = None
    ) -> None:
        from flctl.facility import transfer

        self._in_turn(lambda carrier: transfer.pull(carrier, source, files, target, progress))

    def close(self) -> None:
        """The kept connection stays."""
        if self._carrier is not None:
            self._carrier.close()

    def _in_turn(self, move: "Callable[[Carrier], None]") -> None:
        """Move files; once more if the server allows one session at a time and there was one."""
        deadline = time.monotonic() + TURN_PATIENCE
        while True:
            carrier = self._road()
            try:
                return move(carrier)
            except Busy:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def _road(self) -> "Carrier":
        from flctl.facility.over_ssh import OverSsh

        place = transfer_place(self.site)
        if place in self._kept:
            self._check(place)
        if self._carrier is None:
            if place in self._kept:
                self._carrier = OverKept(self.site, self.road, self._kept[place], place)
            else:
                self._carrier = OverSsh(self.site, self.road, self._count)
        self._carrier.lock_fds = self.lock_fds
        return self._carrier

    def _count(self, place: Place) -> None:
        self.logins += 1
        self.road.on_login(place, "files")


class OverKept:
    """rsync over a kept connection."""

    refusal: FlctlError | None = None

    def __init__(self, site: Site, road: "Road", kept: Kept, place: Place) -> None:
        self.site, self.road, self.lock_fds, self._kept, self._place = site, road, road.lock_fds, kept, place

    @contextlib.contextmanager
    def open(self) -> Iterator[Shell]:
        host = f"[{self._place.host}]" if ":" in self._place.host else self._place.host
        yield Shell(argv=_ssh(self._kept, self._place), host=host, environment={})

    def explain(self, status: int, words: str) -> FlctlError | None:
        if not self._kept.alive:
            return lost(self.site, self._kept, self._place, printable(words))
        return busy(self.site, self._place) if holding.is_refused(255, words) else None

    def close(self) -> None:
        pass


class Busy(SiteUnreachable):
    """The sessions that a server allows over a connection are taken."""


def busy(site: Site, place: Place) -> Busy:
    return Busy(
        f"{place} allows no further session over the kept connection: another flctl uses it",
        hint="rounds and ticks try again by themselves",
        site=site.name,
    )


def lost(site: Site, kept: Kept, place: Place, words: str) -> FlctlError:
    """What a failed session means: where a person must log in, an end of the kept connection needs that person."""
    if site.login.attended and not kept.alive:
        return holding.needed(site, "the kept connection has ended")
    return SiteUnreachable(
        f"{place} does not answer over the kept connection: {words}",
        hint="rounds and ticks try again by themselves",
        site=site.name,
    )


def _ssh(kept: Kept, place: Place) -> list[str]:
    return [*holding.through(kept), "-p", str(place.port), "-l", place.user]


def _converse(argv: Sequence[str], program: bytes, ended: bytes, deadline: float) -> tuple[int | None, str, str]:
    """Feed a program to a shell; its status (None: it did not end in time), output and errors."""
    with tempfile.TemporaryFile() as stdin:
        stdin.write(program)
        stdin.seek(0)
        child = subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )
    assert child.stdout is not None and child.stderr is not None
    with child.stdout, child.stderr:
        try:
            out, errors = _Stream(ended), _Stream(ended)
            _read(child, out, errors, deadline)
            status = out.status
            if status is None and out.over and errors.over:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = child.wait(timeout=max(0.1, deadline - time.monotonic()))
        finally:
            end(child)
    return status, out.text, errors.text


class _Stream:
    """What came over one stream: the first OUTPUT_MOST bytes, and the line that ends the program."""

    def __init__(self, ended: bytes) -> None:
        self._end = re.compile(rb"\n" + ended + rb" (\d{1,3})\n")
        self._kept, self._tail = bytearray(), b""
        self.over = False
        self.status: int | None = None

    def add(self, data: bytes) -> None:
        self._kept += data[: max(0, connections.OUTPUT_MOST - len(self._kept))]
        self._tail = self._tail[-64:] + data
        if self.status is None and (match := self._end.search(self._tail)):
            self.status = int(match[1])

    @property
    def text(self) -> str:
        match = self._end.search(self._kept)
        whole = bytes(self._kept[: match.start()] if match else self._kept)
        return whole.decode("utf-8", "replace")


def _read(child: "subprocess.Popen[bytes]", out: _Stream, errors: _Stream, deadline: float) -> None:
    """Until both streams are over, the time is, or a moment after the program's end."""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ, out)  # type: ignore[arg-type]
        selector.register(child.stderr, selectors.EVENT_READ, errors)  # type: ignore[arg-type]
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            known = out.status is not None
            for key, _ in selector.select(timeout=left):
                data = os.read(key.fd, 65536)
                key.data.add(data)
                if not data:
                    key.data.over = True
                    selector.unregister(key.fileobj)
            if out.status is not None and not known:
                deadline = min(deadline, time.monotonic() + GRACE)
