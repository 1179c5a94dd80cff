"""Owns what a completion record counts for: where a site's signers are pinned, only a signed one is a success."""

from typing import Any

from flctl.campaign.testimony import table_of
from flctl.facility.profile import Site
from flctl.facility.signatures import fault, signer_of


def record_of(site: Site, content: str, signature: str) -> dict[str, Any] | None:
    """The completion record in `content`, None if it is none. Without a valid signature of a pinned key on exactly
    these bytes, where there is one, it says that the run failed, and why."""
    record = table_of(content)
    if record is None or record.get("outcome") != "done" or not (reason := unsigned(site, content, signature)):
        return record
    told = record.get("signed")
    words = f"{reason}; it says: {told}" if isinstance(told, str) else reason
    return {**record, "outcome": "failed", "reason": f"the completion record does not count: {words}"}


def unsigned(site: Site, content: str, signature: str) -> str:
    """Why a record of the site does not count; empty if it does, or if no signers are pinned."""
    signers, raw = site.signing.signers, content.encode()
    if not signers or signer_of(raw, signature, site.name, signers) is not None:
        return ""
    return fault(raw, signature, site.name, signers[0])
