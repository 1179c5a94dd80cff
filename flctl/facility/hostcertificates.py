"""Owns what the certificate of a host key must say to be believed: who signed it, for which hosts, until when.

The rules are those of OpenSSH (PROTOCOL.certkeys, sshkey.c); one that names no host is not believed, either.
"""

import base64
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from flctl.facility.openssh import Place

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.serialization import SSHCertificate

ALGORITHMS = tuple(
    f"{name}-cert-v01@openssh.com"
    for name in (
        *("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"),
        *("rsa-sha2-512", "rsa-sha2-256"),
    )
)
"""Host key algorithms with which a server shows its certificate; it does so only if it is asked for one of them."""


def objection(certificate: bytes, key: bytes, place: Place, authorities: set[bytes], now: float | None = None) -> str:
    """Why a certificate does not vouch for the key of this host; empty if it does. Keys as SSH writes them."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import SSHCertificateType

    authority = signer(certificate)
    try:
        found = _read(certificate)
        found.verify_cert_signature()
        certified = _blob(found.public_key())
    except (ValueError, InvalidSignature, UnsupportedAlgorithm):
        return "it cannot be read, or its signature is wrong"
    if authority not in authorities:
        return "your known_hosts names another authority for this host"
    if found.type is not SSHCertificateType.HOST or certified != key:
        return "it is not one of this host key"
    if _signature_kind(certificate, authority) == b"ssh-rsa":
        return "it is signed with SHA-1"
    if found.critical_options:
        return "it has critical options, which hosts' certificates do not have"
    moment = time.time() if now is None else now
    if not found.valid_after <= moment < found.valid_before:
        return f"it is valid from {_day(found.valid_after)} to {_day(found.valid_before)}"
    names = [name.decode("utf-8", "replace") for name in found.valid_principals]
    if not any(_matches(name, place.host.lower()) for name in names):
        return f"it is for {', '.join(names) or 'no host at all'}"
    return ""


def signer(certificate: bytes) -> bytes:
    """The key of the authority that signed a certificate; empty if it cannot be read."""
    from cryptography.exceptions import UnsupportedAlgorithm

    with suppress(ValueError, UnsupportedAlgorithm):
        return _blob(_read(certificate).signature_key())
    return b""


def _read(certificate: bytes) -> "SSHCertificate":
    """ValueError if it is none."""
    from cryptography.hazmat.primitives.serialization import SSHCertificate, load_ssh_public_identity

    kind = certificate[4 : 4 + int.from_bytes(certificate[:4], "big")]
    found = load_ssh_public_identity(kind + b" " + base64.b64encode(certificate))
    if not isinstance(found, SSHCertificate):
        raise ValueError("it is no certificate")
    return found


def _blob(key: object) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    text: bytes = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)  # type: ignore[attr-defined]
    return base64.b64decode(text.split()[1])


def _signature_kind(certificate: bytes, signer: bytes) -> bytes:
    """The signature is the last field, right behind the key that made it: its length, then its kind as a string."""
    tail = certificate.rpartition(signer)[2]
    return tail[8 : 8 + int.from_bytes(tail[4:8], "big")]


def _day(moment: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(min(moment, 1 << 40)))


def _matches(pattern: str, host: str) -> bool:
    """Whether a principal stands for a host; `*` and `?` as in known_hosts."""
    expression = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern.lower())
    return re.fullmatch(expression, host) is not None
