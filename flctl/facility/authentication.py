"""Owns proving who we are to a host that is known: keys first, then one answer to each question it may ask."""

import time

import paramiko

from flctl.errors import LoginNeeded
from flctl.facility.codes import Answers
from flctl.facility.openssh import login_place, printable, unreachable
from flctl.facility.profile import Site
from flctl.facility.wire import AUTH_TIMEOUT, Wire


def authenticate(wire: Wire, site: Site, keys: list[paramiko.PKey], answers: Answers | None) -> None:
    further = _offer_keys(wire, site, keys)
    if not further:
        return
    if answers is None or "keyboard-interactive" not in further:
        raise LoginNeeded(
            f"{site.login.host} took the key and wants more: {printable(', '.join(further))}",
            hint=f'if it asks for a one-time code, login.kind in sites/{site.name}.toml is "key+totp"',
            site=site.name,
        )
    _give_code(wire, site, answers)


def _offer_keys(wire: Wire, site: Site, keys: list[paramiko.PKey]) -> list[str]:
    """What the server wants besides the key: empty if it lets us in."""
    began = time.monotonic()
    for key in keys:
        try:
            return list(wire.auth_publickey(site.login.user, key))
        except (paramiko.AuthenticationException, paramiko.SSHException, EOFError, OSError) as error:
            refused = isinstance(error, paramiko.AuthenticationException) and wire.is_active()
            if not (refused or wire.farewell) or time.monotonic() - began > AUTH_TIMEOUT:
                raise unreachable(site, login_place(site), error) from error
            if wire.farewell:
                break
    what = "certificate" if site.login.kind == "certificate" else "key"
    source = "the ssh-agent's" if site.login.key == "agent" else f"the {site.login.key}"
    raise LoginNeeded(
        f"{site.login.host} refused {source} {what} for user {site.login.user}"
        + (f": {wire.farewell}" if wire.farewell else ""),
        hint=f"is it registered there, is login.user right? Then: flctl release {site.name}",
        site=site.name,
    )


def _give_code(wire: Wire, site: Site, answers: Answers) -> None:
    def handler(title: str, instructions: str, prompts: list[tuple[str, bool]]) -> list[str]:
        # PAM sends rounds without a question, for messages and after every success.
        return [answers.answer(question, f"{title} {instructions}") for question, _ in prompts]

    began = time.monotonic()
    try:
        further = wire.auth_interactive(site.login.user, handler)
    except Exception as error:
        if answers.refusal is not None:
            raise answers.refusal from None
        refused = isinstance(error, paramiko.AuthenticationException) and wire.is_active()
        if not (refused or wire.farewell) or time.monotonic() - began > AUTH_TIMEOUT:
            if isinstance(error, (paramiko.SSHException, EOFError, OSError)):
                raise unreachable(site, login_place(site), error) from error
            raise
        raise _code_refused(site, answers, wire.farewell) from None
    if further:
        raise LoginNeeded(
            f"{site.login.host} took key and code and wants more: {printable(', '.join(further))}",
            hint="log in by hand once to see what it wants",
            site=site.name,
        )


def _code_refused(site: Site, answers: Answers, farewell: str) -> LoginNeeded:
    if not answers.sent:
        return LoginNeeded(
            f"{site.login.host} refused the login without asking for a code"
            + (f": {farewell}" if farewell else "; it does that after too many logins in a short time"),
            hint=f"wait some minutes, then flctl release {site.name}",
            site=site.name,
        )
    return LoginNeeded(
        f"{site.login.host} refused the one-time code; it is not tried again by itself",
        hint=f"is this machine's clock right, is login.totp.secret in sites/{site.name}.toml that of "
        f"{site.login.user}? Log in by hand once; then flctl release {site.name}",
        site=site.name,
    )
