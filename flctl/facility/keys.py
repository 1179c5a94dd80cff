"""Owns which keys and certificates are offered to a site; a private key never leaves its file or agent."""

import os
import stat
from contextlib import suppress
from pathlib import Path

import paramiko

from flctl.errors import ConfigurationError, LoginNeeded
from flctl.facility import patience
from flctl.facility.certificates import Dates, dates_in_file, dates_of_blob, ended, kept_public, rank
from flctl.facility.openssh import certificate_path, expand
from flctl.facility.profile import Site
from flctl.words import printable

AGENT_KEYS_MOST = 4
"""Servers hang up after six refused keys, and some block the address: an agent with more keys must be told which."""


def keys_of(site: Site) -> list[paramiko.PKey]:
    """The keys to offer, in order; more than one only from an agent. A LoginNeeded of this room was never tried at the
    site."""
    try:
        return _keys(site)
    except LoginNeeded as error:
        error.attempted = False
        raise


def _keys(site: Site) -> list[paramiko.PKey]:
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
        dates = certificate_dates(site)
        if dates is None or not dates.valid():
            raise ended(site, dates)
        key.load_certificate(str(certificate_path(site)))
    return [key]


def certificate_dates(site: Site) -> Dates | None:
    """Of the certificate that would be offered first: in its file, or the agent's. It need not be valid any more; None
    if there is none at all."""
    if site.login.key != "agent":
        return dates_in_file(certificate_path(site), site)
    held = _held_certificates(site)
    return held[0][1] if held else None


def agent_files(site: Site) -> list[Path]:
    """Files with the public halves of what we offer of the agent's, the one to offer first at their head. Given them,
    ssh offers them alone: it would try all that the agent holds, and servers hang up after six."""
    keys: list[paramiko.AgentKey] = []
    if site.login.kind == "certificate":
        keys = [key for key, dates in _held_certificates(site) if dates.valid()]
    else:
        with suppress(paramiko.SSHException, OSError):
            keys = [key for key in _agents() if not _is_certificate(key)]
    return [kept_public(f"{key.get_name()} {key.get_base64()}\n") for key in keys]


def _held_certificates(site: Site) -> list[tuple[paramiko.AgentKey, Dates]]:
    """The agent's, best first; none where no agent answers."""
    with suppress(paramiko.SSHException, OSError):
        keys = [key for key in _agents() if _is_certificate(key)]
        held = [(key, dates_of_blob(key.blob)) for key in keys]
        return sorted(held, key=lambda pair: rank(pair[1], site.login.user), reverse=True)
    return []


def _agents() -> list[paramiko.AgentKey]:
    """The keys that an ssh-agent holds. paramiko.SSHException or OSError; one that was stopped, or waits for somebody
    at another screen, would keep us for ever."""
    silence = f"it says nothing for {patience.AGENT:.0f} s"
    return patience.within(patience.AGENT, lambda: list(paramiko.Agent().get_keys()), silence)


def _is_certificate(key: paramiko.AgentKey) -> bool:
    return str(key.get_name()).endswith("-cert-v01@openssh.com")


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
        return next((key for key in _agents() if key.blob == public), None)
    return None


def _agent_keys(site: Site) -> list[paramiko.PKey]:
    hint = "ssh-add PATH-OF-YOUR-KEY; cron and systemd need SSH_AUTH_SOCK to be set, or login.key to name a file"
    try:
        held = _agents()
    except (paramiko.SSHException, OSError) as error:
        raise LoginNeeded(
            f"the ssh-agent does not answer: {printable(str(error))}", hint=hint, site=site.name
        ) from None
    if site.login.kind == "certificate":
        certificates = _held_certificates(site)
        keys = [key for key, dates in certificates if dates.valid()]
        if not keys:
            raise ended(site, certificates[0][1] if certificates else None)
    else:
        keys = [key for key in held if not _is_certificate(key)]
    if not keys:
        raise LoginNeeded("no ssh-agent that can be reached holds a key", hint=hint, site=site.name)
    if len(keys) > AGENT_KEYS_MOST:
        raise ConfigurationError(
            f"the ssh-agent holds {len(keys)} keys, and offering all of them looks like an attack to a site",
            hint=f"name the file of the one to use: login.key in sites/{site.name}.toml (a passphrase is no obstacle)",
            site=site.name,
        )
    return keys
