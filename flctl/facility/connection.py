"""Owns the connection to a site: run a shell program there, move named files; over SSH, or on this machine."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from flctl.errors import HostKeyRefused, SiteUnreachable
from flctl.facility import allowance, hostkeys
from flctl.facility.hostkeys import HostKey
from flctl.facility.openssh import Place, jump_place, login_place, transfer_place, unreachable
from flctl.facility.profile import Site
from flctl.records import FileEntry

if TYPE_CHECKING:
    import paramiko

    from flctl.facility.rsync import Carrier

OUTPUT_MOST = 8 << 20
"""Bytes of output that are kept of a command; what comes after is read and dropped."""

Progress = Callable[[int], None]
"""Hears the bytes moved so far in this call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Road:
    """What a connection needs from its campaign. `runtime`: a private folder for sockets; `lock_fds` are inherited by
    every rsync child; `stop` is asked while files move: True ends rsync and raises Interrupted; `on_login` is called
    once per authentication, with the host that let us in and what for (commands, files, jump host); `on_rsync`
    hears which rsync the transfer host has, each time that files move; `sparing`: files go over the connection that
    commands use wherever they can, more slowly but without a login of their own."""

    known_hosts: Path
    runtime: Path
    lock_fds: tuple[int, ...] = ()
    stop: Callable[[], bool] = lambda: False
    on_login: Callable[[Place, str], None] = lambda place, why: None
    on_rsync: Callable[[str], None] = lambda version: None
    sparing: bool = False


class Connection(Protocol):
    """An open connection. One thread uses it at a time. `logins`: authentications it has cost so far; `lock_fds` may
    be set anew whenever a lock was taken anew."""

    logins: int
    lock_fds: tuple[int, ...]

    def run(self, script: str, *, timeout: float = 60.0) -> Output:
        """Run a POSIX shell program. SiteUnreachable if there is no exit status within `timeout` seconds."""

    def push(self, source: Path, names: Sequence[str], target: PurePosixPath, progress: Progress | None = None) -> None:
        """Copy the named files below `source` into the folder `target`, which is made if need be; TransferFailed."""

    def pull(
        self, source: PurePosixPath, files: Sequence[FileEntry], target: Path, progress: Progress | None = None
    ) -> None:
        """Copy exactly these files below `source` into `target`; each is there then, regular and of the recorded size,
        its content not yet verified. TransferFailed."""

    def close(self) -> None: ...


def connect(site: Site, road: Road) -> Connection:
    """Over the connection that a person has opened, if there is one; else log in, once. LoginNeeded where only a person
    can; never waits for a fresh code (CodeSpent says when there will be one)."""
    if site.connection == "local":
        from flctl.facility.local import LocalConnection

        return LocalConnection(site, road)
    if site.login.hold or site.login.kind == "attended":
        from flctl.facility.over_kept import kept_connection

        if kept := kept_connection(site, road):
            return kept
    return SshConnection(site, road)


class SshConnection:
    """A site over one authenticated SSH connection."""

    def __init__(self, site: Site, road: Road) -> None:
        from flctl.facility.login import log_in

        self.site, self.road, self.lock_fds = site, road, road.lock_fds
        self.logins = 0
        self._counting = threading.Lock()
        self._wire: paramiko.Transport = log_in(site, road.known_hosts, partial(self._count, "commands"))
        self._fabric = _fabric_over(self._wire, site)
        self._carrier: Carrier | None = None

    def run(self, script: str, *, timeout: float = 60.0) -> Output:
        with self._lost():
            return _run(self._fabric, script, timeout)

    def push(self, source: Path, names: Sequence[str], target: PurePosixPath, progress: Progress | None = None) -> None:
        from flctl.facility import rsync, transfer

        made = self.run(transfer.landing(self.site, target))
        if made.status != 0:
            raise rsync.refusal(self.site, made.stderr, f"the folder {target} cannot be made there", ours=False)
        transfer.push(self._road(), source, names, target, progress)

    def pull(
        self, source: PurePosixPath, files: Sequence[FileEntry], target: Path, progress: Progress | None = None
    ) -> None:
        from flctl.facility import transfer

        transfer.pull(self._road(), source, files, target, progress)

    def close(self) -> None:
        if self._carrier is not None:
            self._carrier.close()
        self._wire.close()

    def _road(self) -> "Carrier":
        """How rsync gets there: over this connection where a login of its own would cost a code, where the shell prints
        something before a command, or once few of the day's logins are left; else over ssh, several times faster."""
        from flctl.facility.over_connection import OverConnection
        from flctl.facility.over_ssh import OverSsh

        carrier = self._carrier
        if carrier is None or (isinstance(carrier, OverSsh) and not carrier.is_in()):
            sparing = self.road.sparing or allowance.scarce(self.site)
            if shares(self.site, sparing=sparing) or (carrier is None and self._is_noisy()):
                if carrier is not None:
                    carrier.close()
                carrier = OverConnection(self.site, self.road, self._wire)
            elif carrier is None:
                carrier = OverSsh(self.site, self.road, partial(self._count, "files"))
        carrier.lock_fds = self.lock_fds
        self._carrier = carrier
        return carrier

    def _is_noisy(self) -> bool:
        """Whether the shell that rsync would meet prints anything by itself."""
        return transfer_place(self.site) == login_place(self.site) and bool(self.run(":").stdout)

    def _count(self, why: str, place: Place) -> None:
        with self._counting:
            self.logins += 1
        self.road.on_login(place, "jump host" if place == jump_place(self.site) else why)

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        """paramiko's and the network's exceptions as ours."""
        import invoke
        import paramiko

        try:
            yield
        except (paramiko.SSHException, invoke.exceptions.ThreadException, EOFError, OSError) as error:
            raise unreachable(self.site, login_place(self.site), error, "does not answer any more") from error


def shares(site: Site, *, sparing: bool = False) -> bool:
    """Whether files go over the connection that commands use: where a login of its own would cost a code, or would come
    too soon after the first, or is to be spared."""
    return (site.login.coded or site.login.interval > 0 or sparing) and transfer_place(site) == login_place(site)


def host_key(site: Site, known_hosts: Path) -> HostKey:
    """The key that the site's login host shows, trusted or not."""
    from flctl.facility.login import shown_key

    return shown_key(site, login_place(site), known_hosts)


def trust(site: Site, fingerprint: str, known_hosts: Path) -> None:
    """Write a host's key to the campaign's known_hosts, instead of an older one, if the host shows a key with this
    fingerprint: the jump host, the login host or the transfer host. HostKeyRefused if none of them does,
    SiteUnreachable if none shows any."""
    from flctl.facility.login import shown_key

    jump = jump_place(site)
    places = [*([jump] if jump else []), login_place(site), transfer_place(site)]
    shown, refused = [], False
    for place in dict.fromkeys(places):
        try:
            key = shown_key(site, place, known_hosts)
        except (HostKeyRefused, SiteUnreachable) as error:
            shown.append(error.message)
            refused = refused or isinstance(error, HostKeyRefused)
            continue
        if key.fingerprint == fingerprint.strip().rstrip("="):
            hostkeys.replace(known_hosts, place, key)
            return
        shown.append(f"{place} shows {key}")
        refused = True
    if not refused:
        raise SiteUnreachable("; ".join(shown), hint="nothing was changed; type it again later", site=site.name)
    raise HostKeyRefused(
        f"no host of the site shows {fingerprint}: {'; '.join(shown)}",
        hint="compare what is shown with what the facility publishes, and give the fingerprint that is right",
        site=site.name,
    )


def _fabric_over(wire: "paramiko.Transport", site: Site) -> Any:
    """A fabric connection on an authenticated transport. It reads no configuration, and it can never connect by
    itself: fabric would accept any host key then."""
    import fabric
    import paramiko

    from flctl.facility.login import open_session

    class Authenticated(fabric.Connection):  # type: ignore[misc]
        def open(self) -> None:
            if not self.is_connected:
                raise EOFError("the connection is lost")

        def create_session(self) -> Any:
            self.open()
            return open_session(wire)

    config = fabric.Config(lazy=True, ssh_config=paramiko.SSHConfig())
    connection = Authenticated(site.login.host, user=site.login.user, port=site.login.port, config=config)
    connection.client.set_missing_host_key_policy(paramiko.RejectPolicy())
    connection.client._transport = connection.transport = wire
    return connection


def program_of(script: str) -> bytes:
    """A script as /bin/sh reads it from its standard input: as a function, so that it begins only when all of it has
    arrived, and that its commands cannot take the rest of it for their input."""
    return f"flctl_program() {{\n:\n{script}\n}}\nflctl_program </dev/null\n".encode()


def _run(connection: Any, script: str, timeout: float) -> Output:
    """Feed a script to /bin/sh, so that no login shell has to understand it."""
    from fabric.runners import Remote

    deadline = time.monotonic() + timeout

    class Bounded(Remote):  # type: ignore[misc]
        """fabric's runner with an end in time and size; its own way of feeding standard input is a byte per 10 ms."""

        kept = 0

        def send_start_message(self, command: str) -> None:
            # paramiko waits for the server's consent without an end.
            alarm = threading.Timer(deadline - time.monotonic(), self.channel.close)
            alarm.start()
            try:
                self.channel.exec_command(command)
                self.channel.sendall(program_of(script))
                self.channel.shutdown_write()
            finally:
                alarm.cancel()
            self.channel.settimeout(0.25)

        def read_proc_stdout(self, num_bytes: int) -> bytes:
            return self._read(self.channel.recv, num_bytes)

        def read_proc_stderr(self, num_bytes: int) -> bytes:
            return self._read(self.channel.recv_stderr, num_bytes)

        def _read(self, receive: Callable[[int], bytes], num_bytes: int) -> bytes:
            ended: float | None = None
            while time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    data = receive(max(num_bytes, 32768))
                    self.kept += len(data)
                    if not data or self.kept <= OUTPUT_MOST:
                        return data
                    continue
                # A daemon that the command left behind may hold its output open for ever.
                if self.channel.exit_status_ready():
                    ended = ended or time.monotonic()
                    if time.monotonic() - ended > 1.0:
                        break
            return b""

        @property
        def process_is_finished(self) -> bool:
            return bool(self.channel.exit_status_ready()) or time.monotonic() > deadline

        def returncode(self) -> int:
            return int(self.channel.recv_exit_status()) if self.channel.exit_status_ready() else -1

    result = Bounded(context=connection).run("/bin/sh", hide=True, warn=True, in_stream=False, encoding="utf-8")
    if result.exited < 0:
        late = time.monotonic() >= deadline
        raise EOFError(
            f"no answer within {timeout:.0f} s" if late else "the connection ended in the middle of an answer"
        )
    return Output(status=result.exited, stdout=result.stdout, stderr=result.stderr)
