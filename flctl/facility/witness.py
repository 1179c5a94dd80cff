"""Owns what can be told of one login afterwards: whose host it was, what was offered and asked; never an answer."""

import base64
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

from flctl.facility.certificates import dates_of_blob

if TYPE_CHECKING:
    from flctl.facility.codes import Exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A key that was shown to the host. `kind` as SSH names it; `until` (Unix seconds): when its certificate ends, None
    for a plain key."""

    kind: str
    fingerprint: str
    accepted: bool
    until: float | None = None


@dataclass(slots=True, kw_only=True)
class Witness:
    """What a login showed as far as it came. `trust`: where the trust in the host's key comes from; `logins` counts the
    hosts that let us in."""

    host_key: str = ""
    trust: str = ""
    offers: list[Offer] = field(default_factory=list)
    dialogue: "list[Exchange]" = field(default_factory=list)
    logins: int = 0

    def note_offer(self, kind: str, blob: bytes, *, accepted: bool) -> None:
        """`blob`: the key or its certificate, as it was shown."""
        certified = kind.endswith("-cert-v01@openssh.com")
        until = dates_of_blob(blob).before if certified else None
        offer = Offer(kind=kind, fingerprint=_fingerprint(kind, blob), accepted=accepted, until=until)
        self.offers.append(offer)


def _fingerprint(kind: str, blob: bytes) -> str:
    """As ssh-keygen -l prints it: that of the key, also where a certificate was shown."""
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        SSHCertificate,
        load_ssh_public_identity,
    )

    found = load_ssh_public_identity(kind.encode() + b" " + base64.b64encode(blob))
    key = found.public_key() if isinstance(found, SSHCertificate) else found
    plain = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1]
    return "SHA256:" + base64.b64encode(sha256(base64.b64decode(plain)).digest()).decode().rstrip("=")
