"""Owns the road for rsync over the connection that flctl has already: where a login of its own would cost a code."""

import contextlib
import io
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flctl.errors import FlctlError, SiteUnreachable
from flctl.facility import patience, scratch
from flctl.facility.profile import Site
from flctl.facility.rsync import Shell
from flctl.facility.sockets import listening
from flctl.words import printable

if TYPE_CHECKING:
    import paramiko

    from flctl.facility.connection import Road

CHUNK = 1 << 17


class OverConnection:
    """rsync over a channel of the connection that is there: no second login."""

    refusal: FlctlError | None = None

    def __init__(self, site: Site, road: "Road", wire: "paramiko.Transport") -> None:
        self.site, self.road, self.lock_fds, self._wire = site, road, road.lock_fds, wire
        self._end = contextlib.ExitStack()
        self._folder = self._end.enter_context(scratch.for_sockets(road.runtime))
        self._channel: Any = None
        self._problem = ""

    @contextlib.contextmanager
    def open(self) -> Iterator[Shell]:
        address, self._channel, self._problem = self._folder / "bridge", None, ""
        with listening(address, self._carry):
            script = Path(__file__).with_name("bridge.py")
            try:
                yield Shell(argv=[sys.executable, "-I", str(script), str(address)], host="site", environment={})
            finally:
                # Our rsync is gone: so goes the other one, even if the site has fallen silent.
                if self._channel is not None:
                    with contextlib.suppress(Exception):  # a lost connection: why it ended is told by then
                        self._channel.close()

    def explain(self, status: int, words: str) -> FlctlError | None:
        if self._wire.is_active() and not self._problem:
            return None
        return SiteUnreachable(
            f"the connection was lost while files moved: {self._problem or 'the site does not answer'}",
            hint="the next contact goes on where it stopped",
            site=self.site.name,
        )

    def close(self) -> None:
        self._end.close()

    def _carry(self, link: socket.socket) -> None:
        """One rsync: its streams and its command come over the link, its exit status goes back."""
        from flctl.facility.login import open_session

        streams = [io.FileIO(number, "r+") for number in socket.recv_fds(link, 1, 3)[1]]
        for stream in streams:
            # rsync leaves some of them non-blocking for the ssh that it expects.
            os.set_blocking(stream.fileno(), True)
        reader = threading.Thread(target=lambda: None)
        status = 255
        try:
            command = b"".join(iter(lambda: link.recv(65536), b""))
            self._channel = channel = open_session(self._wire)
            try:
                mark = secrets.token_hex(16).encode()
                channel.exec_command(b"printf '\\n%s\\n' " + mark + b"; exec " + command)
                reader = threading.Thread(target=_up, args=(streams[0], channel), daemon=True)
                status = _exchange(channel, reader, streams, mark)
            finally:
                channel.close()
        except Exception as error:  # whatever the library throws, rsync must hear that it is over
            self._problem = printable(str(error)) or type(error).__name__
        with contextlib.suppress(OSError):
            link.sendall(bytes([status if 0 <= status <= 255 else 255]))
        # It reads until rsync, which has its exit status now, is gone: no descriptor is closed under it.
        if reader.ident:
            reader.join()
        for stream in streams:
            stream.close()


def _exchange(channel: Any, reader: threading.Thread, streams: list[io.FileIO], mark: bytes) -> int:
    complaints = threading.Thread(target=_down, args=(channel.recv_stderr, streams[2]), daemon=True)
    reader.start()
    complaints.start()
    _down(_after(mark, channel.recv), streams[1])
    streams[1].close()
    complaints.join(timeout=5)
    # A server may never say how it ended, and paramiko would wait for that without an end.
    channel.status_event.wait(patience.ENDING)
    return int(channel.recv_exit_status()) if channel.exit_status_ready() else 255


def _after(mark: bytes, receive: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """The same stream without what a noisy shell prints before the mark, which rsync would take for the other rsync."""
    noise: bytes | None = b""

    def quiet(size: int) -> bytes:
        nonlocal noise
        while noise is not None and (data := receive(size)):
            _, found, rest = (noise + data).partition(b"\n" + mark + b"\n")
            noise = None if found else (noise + data)[-len(mark) - 2 :]
            if rest:
                return rest
        return receive(size) if noise is None else b""

    return quiet


def _up(stream: io.FileIO, channel: Any) -> None:
    with contextlib.suppress(OSError, EOFError, ValueError):
        while data := os.read(stream.fileno(), CHUNK):
            channel.sendall(data)
        channel.shutdown_write()


def _down(receive: Callable[[int], bytes], stream: io.FileIO) -> None:
    with contextlib.suppress(OSError, EOFError, ValueError):
        while data := receive(CHUNK):
            view = memoryview(data)
            while view:
                view = view[os.write(stream.fileno(), view) :]
