"""Owns `flctl auth`: one login to see how it goes, and storing the secret of a site's one-time codes."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from flctl.campaign.config import load_profile, whole_profile
from flctl.campaign.contacts import failure_of
from flctl.campaign.engine import Engine
from flctl.campaign.workspace import Workspace
from flctl.errors import ConfigurationError, FlctlError, Interrupted, LoginPaused, LoginTooSoon
from flctl.facility.codes import parse_secret
from flctl.facility.openssh import jump_place, login_place
from flctl.facility.profile import Site
from flctl.facility.references import store_in_file, store_in_keyring
from flctl.facility.witness import Witness
from flctl.records import Failure

KINDS = ("key+totp", "password+totp", "totp")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginTest:
    """What one login showed, as far as it came. `host` as USER@HOST; `digits` of a code; `jump`: the jump host."""

    site: str
    kind: str
    host: str = ""
    jump: str = ""
    digits: int = 6
    seen: Witness = field(default_factory=Witness)
    failure: Failure | None = None


def try_login(engine: Engine, name: str) -> LoginTest:
    """Log in to a site once. Raises only LoginTooSoon (the caller may wait for it a little), Interrupted, and
    ConfigurationError where the profile is not ready."""
    site = load_profile(engine.workspace, name)
    if site.connection == "local":
        return LoginTest(site=name, kind="local")
    site = whole_profile(engine.workspace, name)
    seen, failure, place = Witness(), None, login_place(site)
    try:
        with engine.workspace.lock_site(name):
            engine.access.rehearse(site, seen)
    except Interrupted:
        raise
    except FlctlError as error:
        if isinstance(error, LoginTooSoon) and not isinstance(error, LoginPaused):
            raise
        failure = failure_of(error)
    return LoginTest(
        site=name,
        kind=site.login.kind,
        host=f"{place.user}@{place}",
        jump=str(jump_place(site) or ""),
        digits=site.login.totp.digits,
        seen=seen,
        failure=failure,
    )


def storable(workspace: Workspace, name: str) -> Site:
    """The site, if a program may be given the secret of its codes; ConfigurationError with the reason if not."""
    site, file = load_profile(workspace, name), f"sites/{name}.toml"
    kind = site.login.kind
    if kind == "attended":
        raise ConfigurationError(
            f'{file} says login.kind = "attended": only a person can answer there, so no secret is stored',
            hint=f"flctl login {name}; if the facility permits codes made by a program, set login.kind first",
            site=name,
        )
    if kind not in KINDS:
        raise ConfigurationError(
            f'{file} says login.kind = "{kind}": no one-time code is asked for there',
            hint=f"if it is, set login.kind to one of {', '.join(KINDS)} first",
            site=name,
        )
    return site


def store(site: Site, secret: str, permission: str, *, keyring: bool, replace: bool) -> str:
    """Store the secret of a site's codes where only this user can read it, if it is one; the lines that the profile
    needs then. ConfigurationError."""
    try:
        parse_secret(secret, site.login.totp)
        if keyring:
            reference = store_in_keyring(f"flctl/{site.name}", secret.strip(), replace=replace)
        else:
            reference = store_in_file(secret_path(site.name), secret.strip(), replace=replace)
    except ConfigurationError as error:
        error.site = site.name
        raise
    lines = {"automation": "permitted", "permission": permission, "secret": reference}
    return "[login.totp]\n" + "".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in lines.items()
    )


def secret_path(name: str) -> Path:
    """Where the secret of a site's codes is stored."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(base) if base.startswith("/") else Path.home() / ".config"
    return folder / "flctl" / f"{name}.totp"
