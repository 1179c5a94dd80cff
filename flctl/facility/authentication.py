"""Owns proving who we are to a host that is known: keys first, then one answer to each question it may ask."""

import time
from collections.abc import Callable

import paramiko

from flctl.errors import LoginNeeded
from flctl.facility import allowance, patience
from flctl.facility.codes import Answers
from flctl.facility.openssh import login_place, unreachable
from flctl.facility.profile import Site
from flctl.facility.wire import Wire
from flctl.facility.witness import Witness
from flctl.words import printable

ASKING = ("keyboard-interactive", "password")
"""Methods by which a server asks, in the order of preference."""

STEPS_MOST = 4
"""Methods that one login may take one after the other."""

SPARE = 5.0
"""Seconds after which a step is ended that paramiko should have ended."""


def authenticate(wire: Wire, site: Site, keys: list[paramiko.PKey], answers: Answers | None, witness: Witness) -> None:
    """Offer the keys, if the kind of login has any; then answer what the server asks."""
    further = _offer_keys(wire, site, keys, witness) if keys else _methods(wire, site)
    for _ in range(STEPS_MOST):
        if not further:
            return
        method = next((name for name in _may_answer(site) if name in further), "")
        if answers is None or not method:
            break
        further = _answer(wire, site, answers, method)
    raise _wants_more(site, further, bool(keys), answers)


def _may_answer(site: Site) -> tuple[str, ...]:
    """The method "password" sends its answer unasked: only where that is what logs in."""
    return ASKING[:1] if site.login.kind == "key+totp" else ASKING


def _methods(wire: Wire, site: Site) -> list[str]:
    """What the server offers to one who has no key; empty if it lets anybody in."""
    try:
        with wire.bounded(patience.AUTH + SPARE):
            return list(wire.auth_none(site.login.user))
    except paramiko.BadAuthenticationType as error:
        return list(error.allowed_types)
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise unreachable(site, login_place(site), error) from error


def _offer_keys(wire: Wire, site: Site, keys: list[paramiko.PKey], witness: Witness) -> list[str]:
    """What the server wants besides the key: empty if it lets us in."""
    for key in keys:
        began = _now()
        blob = key.public_blob or paramiko.pkey.PublicBlob(key.get_name(), key.asbytes())
        try:
            with wire.bounded(patience.AUTH + SPARE):
                further = list(wire.auth_publickey(site.login.user, key))
            witness.note_offer(blob.key_type, blob.key_blob, accepted=True)
            return further
        except (paramiko.AuthenticationException, paramiko.SSHException, EOFError, OSError) as error:
            if not _is_refusal(wire, error, began, hung_up=bool(wire.farewell)):
                raise unreachable(site, login_place(site), error) from error
            witness.note_offer(blob.key_type, blob.key_blob, accepted=False)
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


def _answer(wire: Wire, site: Site, answers: Answers, method: str) -> list[str]:
    """Go through one method; what the server wants after it."""

    def ask(title: str, instructions: str, prompts: list[tuple[str, bool]]) -> list[str]:
        # PAM sends rounds without a question, for messages and after every success.
        return [answers.answer(question, f"{title} {instructions}") for question, _ in prompts]

    if method == "password":
        password = answers.answer("Password:")
        return _tried(wire, site, answers, lambda: wire.auth_password(site.login.user, password, fallback=False))
    return _tried(wire, site, answers, lambda: wire.auth_interactive(site.login.user, ask))


def _tried(wire: Wire, site: Site, answers: Answers, attempt: Callable[[], list[str]]) -> list[str]:
    began = _now()
    try:
        with wire.bounded(patience.AUTH + SPARE):
            return list(attempt())
    except Exception as error:
        if answers.refusal is not None:
            raise answers.refusal from None
        if not isinstance(error, (paramiko.SSHException, EOFError, OSError)):
            raise
        refused = isinstance(error, paramiko.AuthenticationException) and wire.is_active()
        # Who hangs up on an answer has refused it, for all we know: to try again may lock the account.
        if not _is_refusal(wire, error, began, hung_up=bool(wire.farewell or answers.given)):
            raise unreachable(site, login_place(site), error) from error
        raise _refused(site, answers, wire.farewell, "refused" if refused else "hung up on") from None


def _now() -> tuple[float, float]:
    return time.monotonic(), time.time()


def _is_refusal(wire: Wire, error: Exception, began: tuple[float, float], *, hung_up: bool) -> bool:
    """Whether the server said no, or hung up where that means no. Not after a long time, by either clock: this machine
    may have slept, when the monotonic one stood still, and the server has given us up since."""
    if isinstance(error, paramiko.AuthenticationException) and wire.is_active():
        return "timeout" not in str(error)  # paramiko's word for a server that says nothing
    waited = max(now - before for now, before in zip(_now(), began, strict=True))
    return hung_up and waited <= patience.AUTH


def _refused(site: Site, answers: Answers, farewell: str, what: str) -> LoginNeeded:
    name, login = site.name, site.login
    if not answers.given:
        return allowance.unasked(site, login_place(site), farewell)
    keys = [f"login.{'totp' if kind == 'code' else kind}.secret" for kind in answers.kinds]
    return LoginNeeded(
        f"{login.host} {what} the {answers.given}; it is not tried again by itself",
        hint=f"is this machine's clock right, is {' and '.join(keys)} in sites/{name}.toml that of {login.user}? "
        f"Log in by hand once; then flctl release {name}",
        site=name,
    )


def _wants_more(site: Site, further: list[str], keyed: bool, answers: Answers | None) -> LoginNeeded:
    taken = [*(["key"] if keyed else []), *([answers.given] if answers and answers.given else [])]
    wants = printable(", ".join(further))
    if not taken:
        return LoginNeeded(
            f"{site.login.host} lets nobody in by a question: it wants {wants}",
            hint=f"set login.kind in sites/{site.name}.toml to what it wants; then flctl release {site.name}",
            site=site.name,
        )
    hint = "log in by hand once to see what it wants"
    if answers is None:
        hint = f'if it asks for a one-time code, login.kind in sites/{site.name}.toml is "key+totp"'
    return LoginNeeded(
        f"{site.login.host} took the {' and '.join(taken)} and wants more: {wants}", hint=hint, site=site.name
    )
