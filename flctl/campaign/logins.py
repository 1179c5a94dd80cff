"""Owns what a person does for a campaign's logins: `flctl login` and `flctl logout`."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from flctl.campaign.access import take_secrets
from flctl.campaign.config import load_profile, whole_profile
from flctl.campaign.workspace import Workspace
from flctl.errors import ConfigurationError, Locked, LoginNeeded
from flctl.facility import allowance, attended, holding, renewal
from flctl.facility.certificates import clock
from flctl.facility.holding import Kept
from flctl.facility.openssh import Place, jump_place
from flctl.facility.profile import Site

Say = Callable[[str], None]


def log_in(workspace: Workspace, name: str, limit: float | None, say: Say) -> None:
    """Do what a person must for one site: get a certificate, open the connections that are kept, for `limit` seconds at
    most and never longer than the profile allows. What is there already stays as it is, and nobody is asked again."""
    site = whole_profile(workspace, name)
    if not _needs_person(site, say):
        return
    if not attended.has_terminal():
        error = LoginNeeded(
            "a person must answer, and there is no terminal to ask on",
            hint=f"in a terminal: flctl login {name}",
            site=name,
        )
        error.attempted = False
        raise error
    take_secrets(workspace)
    with workspace.lock_site(name):
        ends = [_renew(site, say)] if site.login.kind == "certificate" and site.login.renew else []
        if site.login.hold:
            ends += _open(workspace, site, limit, say)
        _go_on(workspace, name, min(ends))
    held = workspace.contact(name).held
    if held is not None:
        say(f"{name} is still HELD: {held.reason}\n  -> flctl release {name}")


def log_out(workspace: Workspace | None, names: Sequence[str]) -> list[Kept]:
    """Close the connections kept to these sites (all of them without a name); those that were open. A site of the
    campaign is known by its hosts as well: it may have had another name when the connection was opened."""
    known = {name: _files(workspace, name) for name in names or workspace.profiles} if workspace is not None else {}
    closed = []
    for kept, _ in holding.everything():
        called = next((name for name, files in known.items() if kept.name in files), kept.site)
        if not names or called in names:
            closed.append(replace(kept, site=called))
    stuck = [error for kept in closed if (error := _close(kept))]
    for name in {kept.site for kept in closed} - {error.site for error in stuck}:
        if workspace is not None and name in workspace.profiles:
            workspace.journal.append("logout", site=name)
            with suppress(Locked), workspace.lock_site(name, patience=0.0):
                workspace.save_contact(name, replace(workspace.contact(name), login_until=None))
    if stuck:
        raise stuck[0]
    return closed


def _close(kept: Kept) -> Locked | None:
    """End a connection; why not, if it does not let go, so that the others are ended all the same."""
    try:
        holding.close(kept)
    except Locked as error:
        return error
    return None


def _files(workspace: Workspace, name: str) -> set[str]:
    """The files of a site's kept connections; none where the profile cannot be read."""
    with suppress(ConfigurationError):
        site = load_profile(workspace, name)
        if site.connection == "ssh":
            return {holding.name_of(site, place, workspace.root / "known_hosts") for place in holding.places(site)}
    return set()


def _needs_person(site: Site, say: Say) -> bool:
    login = site.login
    if site.connection == "local":
        say(f"{site.name}: this machine, nothing to log in to")
    elif login.hold or (login.kind == "certificate" and login.renew):
        return True
    elif login.attended or login.kind == "certificate":
        # One says which key of the profile would allow it, the other which names the program.
        raise holding.needed(site) if login.attended else _no_program(site)
    else:
        what = "its codes are made and answered by flctl" if login.coded else "a key is all that it asks for"
        say(f"{site.name}: no person is needed: {what}")
    return False


def _no_program(site: Site) -> ConfigurationError:
    return ConfigurationError(
        "the profile does not say which program gets a new certificate",
        hint=f'set login.renew in sites/{site.name}.toml, for example: renew = "step ssh login me@example.org"',
        site=site.name,
    )


def _renew(site: Site, say: Say) -> float:
    until = renewal.renew(site, interactive=True)
    say(f"{site.name}: the certificate is good until {clock(until)}")
    return until


def _open(workspace: Workspace, site: Site, limit: float | None, say: Say) -> list[float]:
    """The connections of a site, each until when; what is asked goes from ssh to the person and back."""
    known_hosts, ends = workspace.root / "known_hosts", []
    seconds = min(limit or site.login.hold, site.login.hold)
    asked = False
    for place in holding.places(site):
        kept = holding.find(site, place, known_hosts)
        if kept is not None:
            say(f"{site.name}: a connection to {kept.place} is open already, until {clock(kept.until)}")
        else:
            if asked and site.login.coded:
                say(f"{site.name}: a code works once: wait for the next one before you answer {place}")
            asked = True
            used, most = allowance.used(site), site.login.per_day
            if used >= most:
                say(f"{site.name}: the day's {most} logins are used up (login.per_day); this is one more")
            holding.end_older(site, place, known_hosts)
            kept = attended.keep(site, place, known_hosts, seconds, partial(_count, workspace, site, place))
            say(f"{site.name}: the connection to {kept.place} is kept until {clock(kept.until)}")
        ends.append(kept.until)
    return ends


def _count(workspace: Workspace, site: Site, place: Place) -> None:
    jump = jump_place(site)
    for host, why in [*([(jump, "jump host")] if jump else []), (place, "kept")]:
        contact = workspace.contact(site.name)
        workspace.save_contact(site.name, replace(contact, logins=contact.logins + 1, login_at=time.time()))
        workspace.journal.append(
            "login", site=site.name, count=contact.logins + 1, host=str(host), kind=site.login.kind, why=why
        )


def _go_on(workspace: Workspace, name: str, until: float) -> None:
    """The site is due at once: what waited for the person need wait no longer."""
    contact = replace(workspace.contact(name), login_until=until, due=0.0)
    if contact.trouble is not None and contact.trouble.code == "login_needed":
        contact = replace(contact, trouble=None, failures=0)
    workspace.save_contact(name, contact)
