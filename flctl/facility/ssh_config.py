"""Owns what the user's ~/.ssh/config adds to a profile: HostName, Port, User, IdentityFile, CertificateFile, ProxyJump.

The profile comes first; only what it leaves open is taken from there. ssh itself reads the file. Nothing else in it
counts: not what weakens the check of host keys, forwards anything, or runs a program as a way there (ProxyCommand).
"""

import dataclasses
import functools
import getpass
import re
import subprocess
from pathlib import Path

from flctl.errors import ConfigurationError
from flctl.facility import scratch
from flctl.facility.fields import HOST, USER
from flctl.facility.openssh import certificate_path, environment, expand, quoted
from flctl.facility.profile import Login, Site, Transfer
from flctl.words import printable

UNSAID = {"User": "flctl-unsaid", "Port": "1", "IdentityFile": "none", "CertificateFile": "none"}
"""Put behind the user's file, of whose values the first one counts: what comes out was not said there."""

TIMEOUT = 20.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the file says of one host; empty or 0: nothing. `host`: where it really is."""

    host: str
    port: int
    user: str
    keys: tuple[Path, ...]
    certificates: tuple[Path, ...]
    jump: str


def effective(site: Site) -> Site:
    """The site with what ~/.ssh/config says of its hosts filled in. ConfigurationError if ssh cannot read the file, or
    if the way there is one that flctl cannot go."""
    file = Path.home() / ".ssh" / "config"
    if site.connection != "ssh" or not site.login.host or not file.exists():
        return site
    try:
        return dataclasses.replace(site, login=_login(site, file), transfer=_transfer(site.transfer, site, file))
    except ConfigurationError as error:
        error.site = site.name
        raise


def _login(site: Site, file: Path) -> Login:
    login = site.login
    said = _said(file, login.host, login.user, login.port)
    filled = dataclasses.replace(
        login,
        host=said.host,
        port=login.port if login.port != 22 else said.port or 22,
        user=login.user or said.user,
        proxy_jump=_jump(file, login.proxy_jump or said.jump, login),
    )
    return _with_key(site, filled, said) if login.keyed else filled


def _with_key(site: Site, login: Login, said: Said) -> Login:
    """With the first key of those named that is there, and its certificate if the kind of login wants one: an agent
    may hold both without any file."""
    key = login.key if login.key != "agent" else next((str(path) for path in said.keys if path.is_file()), "agent")
    named = dataclasses.replace(login, key=key)
    if login.kind != "certificate" or key == "agent":
        return named
    if certificate_path(dataclasses.replace(site, login=named)).exists():
        return named
    certificate = next((str(path) for path in said.certificates if path.is_file()), "")
    return dataclasses.replace(named, certificate=certificate) if certificate and not login.certificate else login


def _transfer(transfer: Transfer, site: Site, file: Path) -> Transfer:
    if not transfer.host:
        return transfer
    said = _said(file, transfer.host, site.login.user, transfer.port)
    port = transfer.port if transfer.port != 22 else said.port or 22
    return dataclasses.replace(transfer, host=said.host, port=port)


def _jump(file: Path, jump: str, login: Login) -> str:
    """The jump host by its real name, as [user@]host[:port]. One that the profile names is reached directly."""
    if not jump:
        return ""
    match = re.fullmatch(r"(?:([^@,/]+)@)?([A-Za-z0-9][A-Za-z0-9.-]*)(?::(\d{1,5}))?", jump)
    said = _said(file, match[2], match[1] or "", int(match[3] or 22)) if match else None
    further = said.jump if said is not None and not login.proxy_jump and said.jump != jump else ""
    if match is None or said is None or further:
        way = printable(f"{further}, then {jump}" if further else jump)
        raise ConfigurationError(
            f"~/.ssh/config leads to {login.host} through {way}, and flctl goes through one jump host at most, a "
            "[user@]host[:port]",
            hint="set login.proxy_jump in the site's profile to the one that can be reached from here",
        )
    user, port = match[1] or said.user, int(match[3] or said.port or 22)
    return (f"{user}@" if user else "") + said.host + (f":{port}" if port != 22 else "")


@functools.cache
def _said(file: Path, host: str, user: str, port: int) -> Said:
    lines = _asked(file, host, user, port)
    values = {name: [value for key, value in lines if key == name.lower()] for name in (*UNSAID, "HostName")}
    told = {name: [value for value in values[name] if value != unsaid] for name, unsaid in UNSAID.items()}
    jump = next((value for key, value in lines if key == "proxyjump"), "")
    real = next(iter(values["HostName"]), host)
    tokens = {"%": "%", "d": str(Path.home()), "h": real, "r": user or "".join(told["User"]), "u": getpass.getuser()}
    login = next(iter(told["User"]), "")
    for value, kind in ((real, HOST), (login, USER)):
        if value and not re.fullmatch(kind, value):
            raise ConfigurationError(
                f"{file} gives {host} a name that flctl does not use: {printable(value)!r}",
                hint=f"ssh -G {host} shows it; put it right there",
            )
    return Said(
        host=real,
        port=int(next(iter(told["Port"]), 0)),
        user=login,
        keys=tuple(path for text in told["IdentityFile"] if (path := _path(text, tokens)).suffix != ".pub"),
        certificates=tuple(_path(text, tokens) for text in told["CertificateFile"]),
        jump=jump if jump != "none" else "",
    )


def _path(text: str, tokens: dict[str, str]) -> Path:
    return expand(re.sub(r"%(.)", lambda match: tokens.get(match[1], match[0]), text))


def _asked(file: Path, host: str, user: str, port: int) -> list[tuple[str, str]]:
    """What ssh makes of the file for a host: its keywords in small letters, with their values."""
    given = ["-l", user] if user else []
    given += ["-p", str(port)] if port != 22 else []
    with scratch.folder() as folder:
        wrapped, ends = folder / "config", "".join(f"{name} {value}\n" for name, value in UNSAID.items())
        wrapped.write_text(f"Include {quoted(file)}\nMatch all\n{ends}", encoding="utf-8")
        try:
            done = subprocess.run(
                ["ssh", "-F", str(wrapped), "-G", *given, host],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT,
                env=environment(),
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            why = error.strerror if isinstance(error, OSError) else f"it did not answer within {TIMEOUT:.0f} s"
            raise ConfigurationError(
                f"ssh cannot be asked what {file} says of {host}: {why}",
                hint=f"is OpenSSH's client installed? ssh -G {host} must answer",
            ) from None
    if done.returncode != 0:
        raise ConfigurationError(
            f"{file} cannot be used: {printable(done.stderr)}", hint=f"ssh -G {host} shows it; put it right there"
        )
    return [(name, value) for name, _, value in (line.partition(" ") for line in done.stdout.splitlines())]
