"""Owns the dates of SSH user certificates: read from a file or from what an agent holds, and said to a person."""

import base64
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from flctl.errors import ConfigurationError, LoginNeeded
from flctl.facility.ledger import state_folder
from flctl.facility.profile import Site

LEAST = 5.0
"""Seconds that must be left of a certificate before it is offered: the login has to be through by then."""

KEPT = 7 * 86400.0
"""Seconds for which the public half of what an agent holds is kept; certificates live for hours or a day."""

FOREVER = float(1 << 40)
"""Unix seconds. A certificate without an end says 2**64 - 1, which no calendar can show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dates:
    """From when until when a certificate is valid (Unix seconds), and for which users (none: for any)."""

    after: float
    before: float
    users: tuple[str, ...] = ()

    def valid(self, now: float | None = None) -> bool:
        """Whether it can be used now."""
        moment = time.time() if now is None else now
        return self.after <= moment < self.before - LEAST


def dates_in_file(path: Path, site: Site) -> Dates | None:
    """None if there is no such file. ConfigurationError if it is something else than a certificate."""
    hint = f"see login.certificate in sites/{site.name}.toml, or get a new one: flctl login {site.name}"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(
            f"the certificate {path} cannot be read: {error.strerror}", hint=hint, site=site.name
        ) from None
    dates = _parse(content)
    if dates is None:
        raise ConfigurationError(f"{path} is no certificate", hint=hint, site=site.name)
    return dates


def dates_of_blob(blob: bytes) -> Dates:
    """Of a certificate in an agent; one that cannot be read is left to the server to judge."""
    kind = blob[4 : 4 + int.from_bytes(blob[:4], "big")]
    return _parse(kind + b" " + base64.b64encode(blob)) or Dates(after=0.0, before=FOREVER)


def _parse(text: bytes) -> Dates | None:
    from cryptography.hazmat.primitives.serialization import SSHCertificate, load_ssh_public_identity

    with suppress(ValueError):
        found = load_ssh_public_identity(text)
        if isinstance(found, SSHCertificate):
            users = tuple(user.decode("utf-8", "replace") for user in found.valid_principals)
            return Dates(after=float(found.valid_after), before=min(FOREVER, float(found.valid_before)), users=users)
    return None


def rank(dates: Dates, user: str) -> tuple[bool, bool, float]:
    """Of several certificates the greatest is offered first: valid now, for this user rather than for others, then the
    one that lasts longest."""
    return dates.valid(), user in dates.users or not dates.users, dates.before


def kept_public(line: str) -> Path:
    """A file with this public key or certificate, for programs that take a file only; old ones go away."""
    folder = state_folder() / "public"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{sha256(line.encode()).hexdigest()[:32]}.pub"
    draft = folder / f".{path.name}.{os.getpid()}.{threading.get_ident()}"
    draft.write_text(line, encoding="ascii")
    draft.rename(path)
    for old in folder.iterdir():
        with suppress(FileNotFoundError):
            if old.stat().st_mtime < time.time() - KEPT:
                old.unlink()
    return path


def ended(site: Site, dates: Dates | None) -> LoginNeeded:
    """That no certificate is valid now, with what to type next; nothing was sent to the site."""
    if dates is None:
        path = site.login.certificate or f"{site.login.key}-cert.pub"
        words = f"there is no certificate {path}"
        if site.login.key == "agent":
            words = "no ssh-agent that can be reached holds a certificate"
    elif dates.after > time.time():
        words = f"the certificate is valid only from {clock(dates.after)}: is this machine's clock right?"
    else:
        words = f"the certificate ended at {clock(dates.before)}"
    hint = f"flctl login {site.name}"
    if dates is None and site.login.key == "agent":
        hint += "; cron and systemd need SSH_AUTH_SOCK to be set"
    elif not site.login.renew:
        hint += f" (login.renew in sites/{site.name}.toml says how), or get one as the facility says"
    error = LoginNeeded(words, hint=hint, site=site.name)
    error.attempted = False
    return error


def clock(moment: float) -> str:
    """A moment as a person says it: 22:10 today, else with the day."""
    then, now = time.localtime(moment), time.localtime()
    return time.strftime("%H:%M" if then[:3] == now[:3] else "%Y-%m-%d %H:%M", then)
