"""Owns how the system's OpenSSH is called: options that leave nothing to configuration files, a bare environment."""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from flctl.errors import SiteUnreachable
from flctl.facility import patience
from flctl.facility.profile import Site
from flctl.words import printable

CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "chacha20-poly1305@openssh.com",
    *("aes128-ctr", "aes192-ctr", "aes256-ctr"),
)
"""AES-GCM first: with AES instructions it is several times faster than OpenSSH's default, chacha20."""

_INHERITED = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TZ", "SSH_AUTH_SOCK", "XDG_RUNTIME_DIR")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One host of a site as ssh names it."""

    host: str
    port: int
    user: str

    @property
    def name(self) -> str:
        """Its name in a known_hosts file."""
        return self.host if self.port == 22 else f"[{self.host}]:{self.port}"

    def __str__(self) -> str:
        return self.name


def login_place(site: Site) -> Place:
    return Place(host=site.login.host, port=site.login.port, user=site.login.user)


def transfer_place(site: Site) -> Place:
    if not site.transfer.host:
        return login_place(site)
    return Place(host=site.transfer.host, port=site.transfer.port, user=site.login.user)


def jump_place(site: Site) -> Place | None:
    """The host that connections go through; its user is the site's own where the profile names none."""
    match = re.fullmatch(r"(?:([^@]+)@)?([^:]+)(?::(\d+))?", site.login.proxy_jump)
    if not match:
        return None
    return Place(host=match[2], port=int(match[3] or 22), user=match[1] or site.login.user)


def expand(path: str) -> Path:
    """A path of a profile on this machine: `~` and variables replaced."""
    return Path(os.path.expandvars(path)).expanduser()


def certificate_path(site: Site) -> Path:
    return expand(site.login.certificate or f"{site.login.key}-cert.pub")


def ssh(site: Site, place: Place, known_hosts: Path, *, code: bool = False, via_jump: bool = True) -> list[str]:
    """The argv of an ssh to `place`, without the host. `code`: questions will be asked, and somebody answers: flctl, or
    a person where the kind of login is attended."""
    methods = _methods(site) if code else ("publickey",)
    options = {
        "UserKnownHostsFile": quoted(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "CheckHostIP": "no",
        "UpdateHostKeys": "no",
        "VerifyHostKeyDNS": "no",
        "PreferredAuthentications": ",".join(methods),
        "PubkeyAuthentication": "yes" if "publickey" in methods else "no",
        "PasswordAuthentication": "yes" if "password" in methods else "no",
        "NumberOfPasswordPrompts": "1",
        "BatchMode": "no" if code else "yes",
        "Ciphers": ",".join(CIPHERS),
        "Compression": "no",
        "ConnectTimeout": str(patience.CONNECT),
        "ServerAliveInterval": str(patience.ALIVE_INTERVAL),
        "ServerAliveCountMax": str(patience.ALIVE_COUNT),
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "ClearAllForwardings": "yes",
        "PermitLocalCommand": "no",
        "RequestTTY": "no",
        "LogLevel": "ERROR",
        **_identity(site),
    }
    if via_jump and site.login.proxy_jump:
        options["ProxyCommand"] = shlex.join(jump_command(site, place, known_hosts)).replace("%", "%%")
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    if site.login.key == "agent":
        from flctl.facility.keys import agent_files

        files = [quoted(path) for path in (agent_files(site) if "publickey" in methods else [])] or ["none"]
        words += [word for file in files for word in ("-o", f"IdentityFile={file}")]
    return ["ssh", "-F", "none", *words, "-p", str(place.port), "-l", place.user]


def jump_command(site: Site, place: Place, known_hosts: Path) -> list[str]:
    """The argv of an ssh to the jump host that carries a connection to `place` on its standard streams."""
    jump = jump_place(site)
    if jump is None:
        raise ValueError("the site has no jump host")
    host = f"[{place.host}]" if ":" in place.host else place.host
    return [*ssh(site, jump, known_hosts, via_jump=False), "-W", f"{host}:{place.port}", jump.host]


def environment(**extra: str) -> dict[str, str]:
    """What our ssh and rsync children get of our environment: secrets kept in variables are not among it, nor are
    RSYNC_RSH and the like. Messages come in English, because they are read."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {"PATH": os.defpath, **inherited, "LC_ALL": "C", **extra}


def unreachable(site: Site, place: Place, error: BaseException, what: str = "cannot be reached") -> SiteUnreachable:
    """A failed or lost connection as our error, with the words of the library that noticed it."""
    words = printable(str(error)) or type(error).__name__
    return SiteUnreachable(
        f"{place} {what}: {words}",
        hint=f"is the network up, are host and port in sites/{site.name}.toml right? "
        "Rounds and ticks try again by themselves",
        site=site.name,
    )


def _methods(site: Site) -> tuple[str, ...]:
    """How the login host may be asked to let us in. The agent's keys are not shown where no key is known to help."""
    login = site.login
    keyed = login.keyed or (login.kind == "attended" and login.key != "agent")
    return (
        *(("publickey",) if keyed else ()),
        *(("keyboard-interactive",) if login.coded else ()),
        *(("password",) if login.coded and login.kind != "key+totp" else ()),
    )


def _identity(site: Site) -> dict[str, str]:
    login = site.login
    if login.key == "agent":
        return {"IdentitiesOnly": "yes"}
    identity = {"IdentitiesOnly": "yes", "IdentityFile": quoted(expand(login.key))}
    if login.kind == "certificate":
        identity["CertificateFile"] = quoted(certificate_path(site))
    return identity


def quoted(path: Path) -> str:
    """A path as a value of an ssh option, which splits at blanks and expands %."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"'
