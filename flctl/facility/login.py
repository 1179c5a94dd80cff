"""Owns logging in with paramiko: reach the host, verify its key, then authenticate; one attempt, never a second."""

import logging
import os
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import paramiko

from flctl.errors import ConfigurationError, LoginNeeded
from flctl.facility import hostkeys
from flctl.facility.certificates import is_valid, valid_certificate
from flctl.facility.codes import Answers
from flctl.facility.hostkeys import HostKey
from flctl.facility.openssh import (
    ALIVE_COUNT,
    ALIVE_INTERVAL,
    CIPHERS,
    CONNECT_TIMEOUT,
    Place,
    certificate_path,
    environment,
    expand,
    jump_command,
    jump_place,
    login_place,
    printable,
    unreachable,
)
from flctl.facility.profile import Site

AUTH_TIMEOUT = 60.0
AGENT_KEYS_MOST = 4
"""Servers hang up after six refused keys, and some block the address: an agent with more keys must be told which."""

REKEY_BYTES, REKEY_PACKETS = 1 << 36, 1 << 31
"""paramiko asks for new keys after 512 MB and may lose the channel while a transfer runs. 64 GiB is what RFC 4344
(section 3.2) allows a cipher with 128-bit blocks, and what OpenSSH itself uses for AES; packet numbers, which must not
wrap, have 32 bits."""

WINDOW = 16 << 20
SESSION_PATIENCE = 5.0

# What paramiko thinks worth telling reaches the user as one of our errors.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


class Wire(paramiko.Transport):  # type: ignore[misc]
    """paramiko's transport, which also keeps what the server says when it hangs up."""

    farewell = ""

    def _parse_disconnect(self, message: paramiko.Message) -> None:
        message.get_int()
        self.farewell = printable(message.get_text())


def log_in(site: Site, known_hosts: Path, on_login: Callable[[], None]) -> paramiko.Transport:
    """An authenticated connection to the site's login host. HostKeyRefused, LoginNeeded, CodeSpent, SiteUnreachable
    or ConfigurationError; whatever is wrong at home is found before the site is bothered."""
    answers = Answers(site) if site.login.kind == "key+totp" else None
    try:
        keys = _keys(site)
    except LoginNeeded as error:
        error.attempted = False
        raise
    wire = reach(site, login_place(site), known_hosts)
    try:
        if site.login.jump:
            on_login()
        _authenticate(wire, site, keys, answers)
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
    if place == jump_place(site) or not site.login.jump:
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


# Keys


def _keys(site: Site) -> list[paramiko.PKey]:
    """The keys to offer, in order; more than one only from an agent."""
    if site.login.key == "agent":
        return _agent_keys(site)
    path = expand(site.login.key)
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigurationError(
            f"the key {path} cannot be read: {error.strerror}",
            hint=f"see login.key in sites/{site.name}.toml",
            site=site.name,
        ) from None
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigurationError(
            f"the key {path} must be yours and closed to everybody else", hint=f"chmod 600 {path}", site=site.name
        )
    key = _load(path, site)
    key.public_blob = None
    if site.login.kind == "certificate":
        key.load_certificate(str(valid_certificate(certificate_path(site), site)))
    return [key]


def _load(path: Path, site: Site) -> paramiko.PKey:
    try:
        return paramiko.PKey.from_path(path)
    except (TypeError, paramiko.PasswordRequiredException):
        key = _in_agent(path)
    except (ValueError, paramiko.SSHException, paramiko.UnknownKeyType, OSError) as error:
        raise ConfigurationError(
            f"the key {path} cannot be used: {printable(str(error))}",
            hint=f"see login.key in sites/{site.name}.toml; ssh-keygen -y -f {path} shows whether ssh can read it",
            site=site.name,
        ) from None
    if key is None:
        raise LoginNeeded(
            f"the key {path} has a passphrase, and no ssh-agent holds it", hint=f"ssh-add {path}", site=site.name
        )
    return key


def _in_agent(path: Path) -> paramiko.PKey | None:
    """The agent's copy of a key with a passphrase, found by the public half beside it."""
    with suppress(OSError, ValueError, IndexError, paramiko.SSHException):
        public = paramiko.pkey.PublicBlob.from_file(str(path) + ".pub").key_blob
        return next((key for key in paramiko.Agent().get_keys() if key.blob == public), None)
    return None


def _agent_keys(site: Site) -> list[paramiko.PKey]:
    hint = "ssh-add PATH-OF-YOUR-KEY; cron and systemd need SSH_AUTH_SOCK to be set, or login.key to name a file"
    try:
        held = list(paramiko.Agent().get_keys())
    except (paramiko.SSHException, OSError) as error:
        raise LoginNeeded(
            f"the ssh-agent does not answer: {printable(str(error))}", hint=hint, site=site.name
        ) from None
    certified = site.login.kind == "certificate"
    keys = [key for key in held if key.get_name().endswith("-cert-v01@openssh.com") == certified]
    if certified:
        keys = [key for key in keys if is_valid(key.blob)]
    what = "valid certificate" if certified else "key"
    if not keys:
        raise LoginNeeded(f"no ssh-agent that can be reached holds a {what}", hint=hint, site=site.name)
    if len(keys) > AGENT_KEYS_MOST:
        raise ConfigurationError(
            f"the ssh-agent holds {len(keys)} keys, and offering all of them looks like an attack to a site",
            hint=f"name the file of the one to use: login.key in sites/{site.name}.toml (a passphrase is no obstacle)",
            site=site.name,
        )
    return keys


# Authentication


def _authenticate(wire: Wire, site: Site, keys: list[paramiko.PKey], answers: Answers | None) -> None:
    further = _offer_keys(wire, site, keys)
    if not further:
        return
    if answers is None or "keyboard-interactive" not in further:
        raise LoginNeeded(
            f"{site.login.host} took the key and wants more: {printable(', '.join(further))}",
            hint=f'if it asks for a one-time code, login.kind in sites/{site.name}.toml is "key+totp"',
            site=site.name,
        )
    _give_code(wire, site, answers)


def _offer_keys(wire: Wire, site: Site, keys: list[paramiko.PKey]) -> list[str]:
    """What the server wants besides the key: empty if it lets us in."""
    began = time.monotonic()
    for key in keys:
        try:
            return list(wire.auth_publickey(site.login.user, key))
        except (paramiko.AuthenticationException, paramiko.SSHException, EOFError, OSError) as error:
            refused = isinstance(error, paramiko.AuthenticationException) and wire.is_active()
            if not (refused or wire.farewell) or time.monotonic() - began > AUTH_TIMEOUT:
                raise unreachable(site, login_place(site), error) from error
            if wire.farewell:
                break
    what = "certificate" if site.login.kind == "certificate" else "key"
    source = "the ssh-agent's" if site.login.key == "agent" else f"the {site.login.key}"
    raise LoginNeeded(
        f"{site.login.host} refused {source} {what} for user {site.login.user}"
        + (f": {wire.farewell}" if wire.farewell else ""),
        hint=f"is it registered there, is login.user right? Then: flctl release {site.name}",
        site=site.name,
    )


def _give_code(wire: Wire, site: Site, answers: Answers) -> None:
    def handler(title: str, instructions: str, prompts: list[tuple[str, bool]]) -> list[str]:
        # PAM sends rounds without a question, for messages and after every success.
        return [answers.answer(question, f"{title} {instructions}") for question, _ in prompts]

    began = time.monotonic()
    try:
        further = wire.auth_interactive(site.login.user, handler)
    except Exception as error:
        if answers.refusal is not None:
            raise answers.refusal from None
        refused = isinstance(error, paramiko.AuthenticationException) and wire.is_active()
        if not (refused or wire.farewell) or time.monotonic() - began > AUTH_TIMEOUT:
            if isinstance(error, (paramiko.SSHException, EOFError, OSError)):
                raise unreachable(site, login_place(site), error) from error
            raise
        raise _code_refused(site, answers, wire.farewell) from None
    if further:
        raise LoginNeeded(
            f"{site.login.host} took key and code and wants more: {printable(', '.join(further))}",
            hint="log in by hand once to see what it wants",
            site=site.name,
        )


def _code_refused(site: Site, answers: Answers, farewell: str) -> LoginNeeded:
    if not answers.sent:
        return LoginNeeded(
            f"{site.login.host} refused the login without asking for a code"
            + (f": {farewell}" if farewell else "; it does that after too many logins in a short time"),
            hint=f"wait some minutes, then flctl release {site.name}",
            site=site.name,
        )
    return LoginNeeded(
        f"{site.login.host} refused the one-time code; it is not tried again by itself",
        hint=f"is this machine's clock right, is login.totp.secret in sites/{site.name}.toml that of "
        f"{site.login.user}? Log in by hand once; then flctl release {site.name}",
        site=site.name,
    )


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
