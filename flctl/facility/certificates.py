"""Owns the dates of SSH user certificates: one that is not valid now is never offered."""

import base64
import time
from contextlib import suppress
from pathlib import Path

from cryptography.hazmat.primitives.serialization import SSHCertificate, load_ssh_public_identity

from flctl.errors import ConfigurationError, LoginNeeded
from flctl.facility.profile import Site


def valid_certificate(path: Path, site: Site) -> Path:
    """The path of a certificate that is valid now; LoginNeeded otherwise, for only a person can get a new one."""
    hint = "get a new one as the facility says (for example: step ssh login), then flctl goes on"
    try:
        certificate = load_ssh_public_identity(path.read_bytes())
    except OSError as error:
        raise LoginNeeded(
            f"the certificate {path} cannot be read: {error.strerror}", hint=hint, site=site.name
        ) from None
    except ValueError as error:
        raise ConfigurationError(f"{path} is no certificate: {error}", hint=hint, site=site.name) from None
    if (
        isinstance(certificate, SSHCertificate)
        and not certificate.valid_after <= time.time() < certificate.valid_before
    ):
        ended = time.strftime("%Y-%m-%d %H:%M", time.localtime(min(certificate.valid_before, 1 << 40)))
        raise LoginNeeded(f"the certificate {path} is not valid now (it ends {ended})", hint=hint, site=site.name)
    return path


def is_valid(blob: bytes) -> bool:
    """Whether a certificate in an agent is valid now; one that cannot be read is left to the server to judge."""
    kind = blob[4 : 4 + int.from_bytes(blob[:4], "big")]
    with suppress(ValueError):
        certificate = load_ssh_public_identity(kind + b" " + base64.b64encode(blob))
        return (
            isinstance(certificate, SSHCertificate)
            and certificate.valid_after <= time.time() < certificate.valid_before
        )
    return True
