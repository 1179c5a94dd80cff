"""Owns logging in with paramiko: reach the host, verify its key, then authenticate; one attempt, never a second."""

import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paramiko

from flctl.facility import hostkeys
from flctl.facility.authentication import authenticate
from flctl.facility.codes import Answers
from flctl.facility.hostkeys import HostKey
from flctl.facility.keys import keys_of
from flctl.facility.openssh import (
    ALIVE_COUNT,
    ALIVE_INTERVAL,
    CIPHERS,
    CONNECT_TIMEOUT,
    Place,
    environment,
    jump_command,
    jump_place,
    login_place,
    unreachable,
)
from flctl.facility.profile import Site
from flctl.facility.wire import AUTH_TIMEOUT, Wire

REKEY_BYTES, REKEY_PACKETS = 1 << 36, 1 << 31
"""paramiko asks for new keys after 512 MB and may lose the channel while a transfer runs. 64 GiB is what RFC 4344
(section 3.2) allows a cipher with 128-bit blocks, and what OpenSSH itself uses for AES; packet numbers, which must not
wrap, have 32 bits."""

WINDOW = 16 << 20
SESSION_PATIENCE = 5.0


def log_in(site: Site, known_hosts: Path, on_login: Callable[[], None]) -> paramiko.Transport:
    """An authenticated connection to the site's login host. HostKeyRefused, LoginNeeded, CodeSpent, SiteUnreachable
    or ConfigurationError; whatever is wrong at home is found before the site is bothered."""
    answers = Answers(site) if site.login.kind == "key+totp" else None
    keys = keys_of(site)
    wire = reach(site, login_place(site), known_hosts)
    try:
        if site.login.proxy_jump:
            on_login()
        authenticate(wire, site, keys, answers)
        on_login()
    except BaseException:
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


def reach(site: Site, place: Place, known_hosts: Path) -> Wire:
    """A connection to a host whose key is verified; nobody is logged in yet."""
    wire = _greet(site, place, known_hosts)
    try:
        hostkeys.verify(_key_of(wire), site, place, known_hosts)
    except BaseException:
        wire.close()
        raise
    return wire


def _greet(site: Site, place: Place, known_hosts: Path) -> Wire:
    """Connected, with an encrypted channel; whose it is has not been looked at."""
    link, wire = _dial(site, place, known_hosts), None
    try:
        wire = Wire(link, default_window_size=WINDOW)
        wire.banner_timeout = wire.handshake_timeout = CONNECT_TIMEOUT
        wire.auth_timeout, wire.channel_timeout = AUTH_TIMEOUT, CONNECT_TIMEOUT
        wire.packetizer.REKEY_BYTES, wire.packetizer.REKEY_PACKETS = REKEY_BYTES, REKEY_PACKETS
        options = wire.get_security_options()
        options.ciphers = [name for name in CIPHERS if name in options.ciphers]
        options.key_types = _ordered(options.key_types, hostkeys.kinds_on_file(site, place, known_hosts))
        wire.start_client(timeout=CONNECT_TIMEOUT)
        # When its time is over, start_client returns as if all were well.
        if not wire.initial_kex_done:
            raise EOFError("it did not answer in time")
    except BaseException as error:
        if wire is not None:
            wire.close()
        link.close()
        if isinstance(error, (paramiko.SSHException, EOFError, OSError)):
            raise unreachable(site, place, error) from error
        raise
    return wire


def _ordered(possible: tuple[str, ...], known: tuple[str, ...]) -> list[str]:
    """Host key algorithms with those of the known types first ("ssh-rsa" keys sign as rsa-sha2-*)."""
    first = [name for name in possible if name in known or ("ssh-rsa" in known and name.startswith("rsa-"))]
    return [*first, *(name for name in possible if name not in first)]


def _key_of(wire: paramiko.Transport) -> HostKey:
    key = wire.get_remote_server_key()
    return HostKey(kind=key.get_name(), blob=key.asbytes())


def _dial(site: Site, place: Place, known_hosts: Path) -> socket.socket:
    if place == jump_place(site) or not site.login.proxy_jump:
        try:
            link = socket.create_connection((place.host, place.port), timeout=CONNECT_TIMEOUT)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise unreachable(site, place, error) from error
        return link
    check_jump(site, known_hosts)
    ours, theirs = socket.socketpair()
    with theirs:
        argv = jump_command(site, place, known_hosts)
        # Ends by itself when our end of the pair is closed.
        child = subprocess.Popen(
            argv,
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,
        )
    threading.Thread(target=child.wait, name="reap jump", daemon=True).start()
    return ours


def check_jump(site: Site, known_hosts: Path) -> None:
    """HostKeyRefused unless the jump host is trusted; its key is then in the campaign's file, where ssh looks."""
    jump = jump_place(site)
    if jump is not None:
        check_place(site, jump, known_hosts)


def check_place(site: Site, place: Place, known_hosts: Path) -> None:
    """HostKeyRefused unless the host is trusted. One that the campaign's file does not know is met once for it."""
    if not any(not entry.marker for entry in hostkeys.entries(known_hosts, place)):
        reach(site, place, known_hosts).close()


def open_session(wire: paramiko.Transport) -> Any:
    """A channel for one command. A server that allows one at a time needs a moment to see that the last one ended."""
    deadline = time.monotonic() + SESSION_PATIENCE
    while True:
        try:
            return wire.open_session(timeout=CONNECT_TIMEOUT)
        except paramiko.ChannelException:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _pulse(wire: paramiko.Transport) -> None:
    """Close the connection once the peer does not answer any more: nothing in paramiko notices that by itself."""
    while wire.is_active():
        time.sleep(ALIVE_INTERVAL)
        alarm = threading.Timer(ALIVE_INTERVAL * (ALIVE_COUNT - 1), wire.close)
        alarm.daemon = True
        alarm.start()
        try:
            wire.global_request("keepalive@openssh.com", wait=True)
        except Exception:  # however it fails, the connection is gone
            return
        finally:
            alarm.cancel()
