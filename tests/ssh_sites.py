"""Sites over real sshds for tests: profiles, roads, a log of what the server saw, a network that can fail."""

import base64
import contextlib
import functools
import os
import re
import selectors
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flctl.errors import CodeSpent
from flctl.facility.connection import Connection, Road, connect
from flctl.facility.profile import Environment, Login, Poll, Scheduler, Shape, Site, Storage, Totp, Transfer
from tests.testbed.sshd import Sshd

GONE = r"(Connection (closed|reset)|Disconnected|Received disconnect|ssh_dispatch_run_fatal).*\[preauth\]"
"""What sshd writes when a client leaves before it is let in."""


def site_of(
    server: Sshd, *, secret: str = "", transfer: Transfer | None = None, totp: Any = None, **login: Any
) -> Site:
    """A profile for the server; `totp` and further arguments replace fields of [login.totp] and [login]."""
    permitted = Totp(automation="permitted", permission="by the test", secret=secret, period=server.period)
    default = permitted if "totp" in server.kind else Totp()
    fields = {
        "host": server.address,
        "port": server.port,
        "user": server.user,
        "kind": server.kind,
        "key": str(server.client_key),
        "totp": replace(default, **(totp or {})),
    }
    return Site(
        schema=1,
        name=server.name,
        login=Login(**(fields | login)),
        transfer=transfer or Transfer(),
        scheduler=Scheduler(kind="local"),
        shapes={"prod": Shape()},
        storage=Storage(work="/tmp", data="/tmp"),
        environment=Environment(),
        poll=Poll(),
    )


def local_site() -> Site:
    return Site(
        schema=1,
        name="home",
        connection="local",
        login=Login(),
        transfer=Transfer(),
        scheduler=Scheduler(kind="local"),
        shapes={"prod": Shape()},
        storage=Storage(work="/tmp", data="/tmp"),
        environment=Environment(),
        poll=Poll(),
    )


def road_to(folder: Path, *servers: Sshd, **fields: Any) -> Road:
    """A road whose known_hosts holds the servers' keys."""
    (folder / "run").mkdir(mode=0o700, exist_ok=True)
    known_hosts = folder / "known_hosts"
    known_hosts.write_text("".join(server.known_hosts_line for server in servers))
    return Road(**{"known_hosts": known_hosts, "runtime": folder / "run"} | fields)


def secret_file(folder: Path, secret: str) -> str:
    """The reference to a private file that holds a secret."""
    path = folder / "secret"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as stream:
        stream.write(secret + "\n")
    return f"file:{path}"


def another_secret() -> str:
    return base64.b32encode(os.urandom(20)).decode()


def early_in_a_step(period: int = 30, room: float = 8.0) -> None:
    """Wait for the next time step unless there is room for some logins in this one."""
    left = period - time.time() % period
    if left < room:
        time.sleep(left + 0.01)


@contextlib.contextmanager
def connected(site: Site, road: Road) -> Iterator[Any]:
    connection = patiently(lambda: connect(site, road))
    try:
        yield connection
    finally:
        connection.close()


def patiently(attempt: Callable[[], Connection]) -> Connection:
    """Try again when the code of the moment is used or about to expire, as flctl's commands do."""
    while True:
        try:
            return attempt()
        except CodeSpent as spent:
            time.sleep(max(0.0, spent.until - time.time()) + 0.05)


@contextlib.contextmanager
def agent(*keys: Path, passphrase: str = "", certificates: bool = False) -> Iterator[str]:
    """A real ssh-agent that holds these keys; its socket."""
    child = subprocess.Popen(["ssh-agent", "-D"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        address = child.stdout.readline().split("=", 1)[1].split(";")[0]
        folder = Path(address).parent
        helper = folder / "answer"
        helper.write_text(f"#!/bin/sh\necho '{passphrase}'\n")
        helper.chmod(0o700)
        variables = {"SSH_AUTH_SOCK": address, "SSH_ASKPASS": str(helper), "SSH_ASKPASS_REQUIRE": "force"}
        for key in keys:
            argv = ["ssh-add", *([] if certificates else ["-k"]), str(key)]
            subprocess.run(argv, env={"PATH": os.environ["PATH"], **variables}, check=True, capture_output=True)
        helper.unlink()
        yield address
    finally:
        child.terminate()
        child.wait(timeout=10)
        child.stdout.close()


def keygen(path: Path, *, passphrase: str = "", kind: str = "ed25519") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "a test", "-f", str(path)], check=True)
    return path


class Watch:
    """Looks at the command line and the environment of every process, over and over: of a new one at each look, of an
    old one now and then. `makers`: of the one-time codes for a moment."""

    def __init__(self, *words: str, makers: Sequence[Callable[[float], str]] = ()) -> None:
        self.words, self.makers = words, makers
        self.found: list[str] = []
        self.looks = 0
        self._known: dict[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.01):
            forbidden = self._forbidden(time.time() // 30 * 30)
            self.looks += 1
            self._known = {pid: self._known.get(pid, 0) + 1 for pid in os.listdir("/proc") if pid.isdigit()}
            for pid, looks in self._known.items():
                for name in ("cmdline", "environ") if looks < 20 or looks % 50 == 0 else ():
                    with contextlib.suppress(OSError):
                        seen = forbidden.search(Path(f"/proc/{pid}/{name}").read_bytes())
                        self.found += [f"{pid}/{name}"] if seen else []

    @functools.lru_cache(maxsize=1)  # noqa: B019  lives as long as a test
    def _forbidden(self, step: float) -> re.Pattern[bytes]:
        """The words; and the codes of about now, each as a word of its own: six digits turn up in others by chance."""
        codes = {make(step + shift) for make in self.makers for shift in (-30, 0, 30)}
        alone = [rf"(?<![0-9A-Za-z]){code}(?![0-9A-Za-z])" for code in codes]
        return re.compile("|".join([*map(re.escape, self.words), *alone]).encode())


class Network:
    """A TCP road to a server that can be cut or fall silent after a number of bytes from the server."""

    def __init__(self, server: Sshd, *, cut_after: int | None = None, freeze_after: int | None = None) -> None:
        self.server, self.cut_after, self.freeze_after = server, cut_after, freeze_after
        self.received = self.sent = 0
        self.frozen = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._links: list[socket.socket] = []
        self._over = False

    @property
    def known_hosts_line(self) -> str:
        return f"[127.0.0.1]:{self.port} {self.server.host_key_line}\n"

    def site(self, **fields: Any) -> Site:
        return site_of(self.server, host="127.0.0.1", port=self.port, **fields)

    def target(self) -> Sshd:
        """Where the next connection leads."""
        return self.server

    def freeze(self) -> None:
        """Nothing comes or goes from now on; nobody is told."""
        self.frozen.set()

    def cut(self) -> None:
        """Reset every connection."""
        for link in self._links:
            with contextlib.suppress(OSError):
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                link.shutdown(socket.SHUT_RDWR)
            link.close()
        self._links.clear()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        self._listener.settimeout(0.1)
        while not self._over:
            with contextlib.suppress(OSError):
                ours, _ = self._listener.accept()
                server = self.target()
                theirs = socket.create_connection((server.address, server.port))
                self._links += [ours, theirs]
                threading.Thread(target=self._carry, args=(ours, theirs), daemon=True).start()

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while not self._over:
                for key, _ in selector.select(0.1):
                    if self.frozen.is_set():
                        time.sleep(0.05)
                        continue
                    data = key.fileobj.recv(16384)  # type: ignore[union-attr]
                    if not data:
                        client.close()
                        server.close()
                        return
                    self._note(len(data), from_server=key.fileobj is server)
                    if not self.frozen.is_set():
                        key.data.sendall(data)

    def _note(self, size: int, *, from_server: bool) -> None:
        if not from_server:
            self.sent += size
            moved = self.sent
        else:
            self.received += size
            moved = self.received
        if self.cut_after is not None and max(self.received, moved) >= self.cut_after:
            self.cut_after = None
            self.cut()
            raise OSError("cut")
        if self.freeze_after is not None and max(self.received, moved) >= self.freeze_after:
            self.freeze()
