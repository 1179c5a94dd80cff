"""Owns logging in with paramiko: reach the host, verify its key, then authenticate; one attempt, never a second."""

import os
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import paramiko

from flctl.errors import FlctlError, LoginNeeded
from flctl.facility import allowance, hostkeys, patience
from flctl.facility.authentication import authenticate
from flctl.facility.codes import Answers
from flctl.facility.hostcertificates import ALGORITHMS
from flctl.facility.hostkeys import HostKey
from flctl.facility.keys import keys_of
from flctl.facility.openssh import (
    CIPHERS,
    Place,
    environment,
    jump_command,
    jump_place,
    login_place,
    unreachable,
)
from flctl.facility.profile import Site
from flctl.facility.wire import Wire
from flctl.facility.witness import Witness
from flctl.words import printable

REKEY_BYTES, REKEY_PACKETS = 1 << 36, 1 << 31
"""paramiko asks for new keys after 512 MB and may lose the channel while a transfer runs. 64 GiB is what RFC 4344
(section 3.2) allows a cipher with 128-bit blocks, and what OpenSSH itself uses for AES; packet numbers, which must not
wrap, have 32 bits."""

WINDOW = 16 << 20


def log_in(
    site: Site, known_hosts: Path, on_login: Callable[[Place], None], witness: Witness | None = None
) -> paramiko.Transport:
    """An authenticated connection to the site's login host; `on_login` hears of each host that let us in.
    HostKeyRefused, LoginNeeded, LoginTooSoon, SiteUnreachable or ConfigurationError; whatever is wrong at home is found
    before the site is bothered."""
    witness = witness or Witness()
    answers = Answers(site) if site.login.coded else None
    witness.dialogue = answers.dialogue if answers else []
    keys = keys_of(site) if site.login.keyed else []
    allowance.take(site, login_place(site))
    wire: Wire | None = None
    try:
        with allowance.outcome(site, login_place(site)) as attempt:
            wire = reach(site, login_place(site), known_hosts, witness)
            attempt.met = True
            if jump := jump_place(site):
                on_login(jump)
            authenticate(wire, site, keys, answers, witness)
            on_login(login_place(site))
    except BaseException:
        if wire is not None:
            wire.close()
        raise
    threading.Thread(target=_pulse, args=(wire,), name=f"pulse {site.name}", daemon=True).start()
    return wire


def shown_key(site: Site, place: Place, known_hosts: Path) -> HostKey:
    """The key that a host shows, whether it is trusted or not. Nothing is sent to the host; a jump host on the way
    must be trusted."""
    wire = _greet(site, place, known_hosts)
    try:
        return _key_of(wire)
    finally:
        wire.close()


def rehearse(site: Site, known_hosts: Path, on_login: Callable[[Place], None], witness: Witness) -> None:
    """Log in once and leave at once; `witness` sees how it goes, as far as it goes. Errors as of `log_in`."""

    def count(place: Place) -> None:
        witness.logins += 1
        on_login(place)

    log_in(site, known_hosts, count, witness).close()


def reach(site: Site, place: Place, known_hosts: Path, witness: Witness | None = None) -> Wire:
    """A connection to a host whose key is verified; nobody is logged in yet."""
    wire = _greet(site, place, known_hosts)
    try:
        key, witness = _key_of(wire), witness or Witness()
        witness.host_key = str(key)
        witness.trust = hostkeys.verify(key, site, place, known_hosts)
    except BaseException:
        wire.close()
        raise
    return wire


def _greet(site: Site, place: Place, known_hosts: Path) -> Wire:
    """Connected, with an encrypted channel; whose it is has not been looked at."""
    with tempfile.TemporaryFile() as complaints:
        link, wire = _dial(site, place, known_hosts, complaints), None
        try:
            wire = Wire(link, default_window_size=WINDOW)
            _negotiate(wire, place, known_hosts)
        except BaseException as error:
            if wire is not None:
                wire.close()
            link.close()
            if isinstance(error, (paramiko.SSHException, EOFError, OSError)):
                raise _lost(site, place, error, os.pread(complaints.fileno(), 4096, 0)) from error
            raise
    return wire


def _negotiate(wire: Wire, place: Place, known_hosts: Path) -> None:
    wire.banner_timeout = wire.handshake_timeout = patience.CONNECT
    wire.auth_timeout, wire.channel_timeout = patience.AUTH, patience.CONNECT
    wire.packetizer.REKEY_BYTES, wire.packetizer.REKEY_PACKETS = REKEY_BYTES, REKEY_PACKETS
    options = wire.get_security_options()
    options.ciphers = [name for name in CIPHERS if name in options.ciphers]
    certificates = ALGORITHMS if hostkeys.certified(place, known_hosts) else ()
    known = hostkeys.kinds_on_file(place, known_hosts)
    options.key_types = [*certificates, *_ordered(options.key_types, known)]
    with wire.bounded(patience.CONNECT + 5.0):
        wire.start_client(timeout=patience.CONNECT)
    # When its time is over, start_client returns as if all were well.
    if not wire.initial_kex_done:
        raise EOFError("it did not answer in time")


def _lost(site: Site, place: Place, error: Exception, complaints: bytes) -> FlctlError:
    """Why there is no connection; `complaints`: what the ssh to the jump host wrote."""
    refused = re.search(r"Permission denied \(([^)]*)\)", printable(complaints.decode("utf-8", "replace"), 4096))
    if refused is None:
        return unreachable(site, place, error)
    return LoginNeeded(
        f"the jump host {jump_place(site)} does not let us in with a key alone: it wants {refused[1]}",
        hint="register the key there; a jump host that asks for a password or a code is out of flctl's reach: is there "
        f"another one (login.proxy_jump in sites/{site.name}.toml)? Then flctl release {site.name}",
        site=site.name,
    )


def _ordered(possible: tuple[str, ...], known: tuple[str, ...]) -> list[str]:
    """Host key algorithms with those of the known types first ("ssh-rsa" keys sign as rsa-sha2-*)."""
    first = [name for name in possible if name in known or ("ssh-rsa" in known and name.startswith("rsa-"))]
    return [*first, *(name for name in possible if name not in first)]


def _key_of(wire: paramiko.Transport) -> HostKey:
    key = wire.get_remote_server_key()
    certificate = key.public_blob.key_blob if key.public_blob else b""
    return HostKey(kind=key.get_name(), blob=key.asbytes(), certificate=certificate)


def _dial(site: Site, place: Place, known_hosts: Path, complaints: IO[bytes]) -> socket.socket:
    if place == jump_place(site) or not site.login.proxy_jump:
        return _connected(site, place)
    check_jump(site, known_hosts)
    ours, theirs = socket.socketpair()
    with theirs:
        argv = jump_command(site, place, known_hosts)
        child = subprocess.Popen(
            argv,
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=complaints,
            env=environment(),
            start_new_session=True,
        )
    threading.Thread(target=child.wait, name="reap jump", daemon=True).start()
    return _Leg(ours, child)


class _Leg(socket.socket):
    """Our end of the way through a jump host. The ssh at its other end is ended with it: it would wait without an end
    for a host behind the jump host that has fallen silent."""

    def __init__(self, end: socket.socket, child: "subprocess.Popen[bytes]") -> None:
        super().__init__(fileno=end.detach())
        self._child = child

    def close(self) -> None:
        super().close()
        self._child.terminate()


def _connected(site: Site, place: Place) -> socket.socket:
    """A TCP connection to one of the host's addresses; what is silent is not waited for once per address."""
    deadline, lost = time.monotonic() + patience.CONNECT_ALL, OSError("its name has no address")
    try:
        found = addresses(place)
    except OSError as error:
        raise unreachable(site, place, error) from error
    for address in found:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            link = socket.create_connection((address, place.port), timeout=min(patience.CONNECT, left))
        except OSError as error:
            lost = error
            continue
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return link
    raise unreachable(site, place, lost) from lost


def addresses(place: Place) -> list[str]:
    """Of a host's name, each once. OSError if there are none, or if no name server answers in time."""
    silence = f"no name server answered within {patience.RESOLVE:.0f} s"
    entries = patience.within(
        patience.RESOLVE, lambda: socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM), silence
    )
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


def check_jump(site: Site, known_hosts: Path) -> None:
    """HostKeyRefused unless the jump host is trusted; its key is then in the campaign's file, where ssh looks."""
    jump = jump_place(site)
    if jump is not None:
        check_place(site, jump, known_hosts)


def check_place(site: Site, place: Place, known_hosts: Path) -> None:
    """HostKeyRefused unless the host is trusted. One that the campaign's file cannot judge is met once for it."""
    if not hostkeys.settled(place, known_hosts):
        reach(site, place, known_hosts).close()


def open_session(wire: paramiko.Transport) -> Any:
    """A channel for one command. A server that allows one at a time needs a moment to see that the last one ended."""
    deadline = time.monotonic() + patience.SESSION
    while True:
        try:
            return wire.open_session(timeout=patience.CONNECT)
        except paramiko.ChannelException:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _pulse(wire: paramiko.Transport) -> None:
    """Close the connection once the peer does not answer any more: nothing in paramiko notices that by itself."""
    while wire.is_active():
        wire.join(patience.ALIVE_INTERVAL)
        alarm = threading.Timer(patience.ALIVE_INTERVAL * (patience.ALIVE_COUNT - 1), wire.close)
        alarm.daemon = True
        alarm.start()
        try:
            wire.global_request("keepalive@openssh.com", wait=True)
        except Exception:  # however it fails, the connection is gone
            return
        finally:
            alarm.cancel()
