"""Owns what can be seen of a site before anybody logs in: does its address lead to an SSH server, whose key is it."""

from pathlib import Path

from flctl.errors import HostKeyRefused, SiteUnreachable
from flctl.facility import hostkeys
from flctl.facility.hostkeys import HostKey
from flctl.facility.openssh import Place, jump_place, login_place, transfer_place
from flctl.facility.probe import Check
from flctl.facility.profile import Site


def look(site: Site, known_hosts: Path) -> tuple[list[Check], bool]:
    """Address and host key of the hosts that can be reached without a login (in front of a jump host: of that alone),
    and whether a login may be tried. Each host is met once; nothing is sent to it."""
    first, jump, transfer = login_place(site), jump_place(site), transfer_place(site)
    if jump is not None:
        checks = _meet(site, jump, known_hosts, "jump host's ")
        return checks, _passed(checks)
    checks = _meet(site, first, known_hosts, "")
    ready = _passed(checks)
    if transfer != first:
        checks += _meet(site, transfer, known_hosts, "transfer host's ")
    return checks, ready


def behind(site: Site, known_hosts: Path) -> list[Check]:
    """The host key of a login host behind a jump host, as the login has just verified it."""
    place = login_place(site)
    if jump_place(site) is None:
        return []
    known = [f"{entry.marker} {entry.key}".strip() for entry in hostkeys.entries(known_hosts, place)]
    return [Check(name="host key", result="ok", detail=f"{place} behind the jump host: {' or '.join(known)}")]


def _passed(checks: list[Check]) -> bool:
    return all(check.result != "fail" for check in checks)


def _meet(site: Site, place: Place, known_hosts: Path, whose: str) -> list[Check]:
    from flctl.facility.login import addresses, shown_key

    file, name = f"sites/{site.name}.toml", f"{whose}address"
    try:
        found = ", ".join(addresses(place))
    except OSError as error:
        fix = f"is the network up, is the host right in {file}?"
        detail = f"{place.host} does not resolve: {error.strerror or error}"
        return [Check(name=name, result="fail", detail=detail, fix=fix, exit_code=5)]
    try:
        shown = shown_key(site, place, known_hosts)
    except SiteUnreachable as error:
        detail = f"{found}: {error.message}"
        return [Check(name=name, result="fail", detail=detail, fix=error.hint, exit_code=error.exit_code)]
    resolved = "" if found == place.host else f" ({found})"
    reached = Check(name=name, result="ok", detail=f"{place.host}{resolved}, port {place.port} answers")
    return [reached, _key(shown, site, place, known_hosts, f"{whose}{'key' if whose else 'host key'}")]


def _key(shown: HostKey, site: Site, place: Place, known_hosts: Path, name: str) -> Check:
    try:
        trust = hostkeys.verify(shown, site, place, known_hosts)
    except HostKeyRefused as error:
        return Check(name=name, result="fail", detail=error.message, fix=error.hint, exit_code=error.exit_code)
    return Check(name=name, result="ok", detail=f"{shown}, trusted by {trust}")
