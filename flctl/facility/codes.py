"""Owns one-time codes and passwords: RFC 6238, and which question of a server gets which answer, each once."""

import base64
import re
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import Literal

from flctl.errors import CodeSpent, ConfigurationError, FlctlError, LoginNeeded
from flctl.facility import allowance, fields, holding, ledger
from flctl.facility.profile import Site, Totp
from flctl.facility.references import read_reference, withhold
from flctl.words import printable

SHORTEST = 10
"""Bytes of the shortest secret: 80 bits, which RFC 4226 calls too short and several facilities use."""

Given = Literal["password", "code"]

BARE = re.compile(r"(?i)^(?:\S+@\S+'s )?(?:enter )?(?:your )?(?:password|passcode)\s*[:>]?$")
"""How a server that asks for nothing but a code may ask for it; "me@host's password:" is OpenSSH's own question for the
method "password"."""

COMBINED = re.compile(r"(?i)password\s*(?:&|and|\+)\s*(?:verification code|(?:one[- ]time )?(?:pass)?code|otp|token)")
"""One question for the password with the code right after it, as pam_google_authenticator asks ("forward_pass")."""

CHANGE = re.compile(r"(?i)\b(?:new|retype|repeat|current|old|expired|chang\w*)\b.*\b(?:password|pin)\b")
"""A question of a change of password, which is never answered, whatever a profile's pattern matches."""

LONGEST = 1000
"""Characters of the longest question that is compared with patterns: a longer one could keep us for hours."""

_WORDS: dict[Given, str] = {"password": "password", "code": "one-time code"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """The shared secret of one account and how codes are made of it."""

    key: bytes = field(repr=False)
    digits: int = 6
    algorithm: str = "SHA1"
    period: int = 30

    def code(self, at: float) -> str:
        """The code of RFC 6238 for a moment (Unix seconds)."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.twofactor.totp import TOTP

        algorithms: dict[str, hashes.SHA1 | hashes.SHA256 | hashes.SHA512] = {
            "SHA1": hashes.SHA1(),
            "SHA256": hashes.SHA256(),
            "SHA512": hashes.SHA512(),
        }
        totp = TOTP(self.key, self.digits, algorithms[self.algorithm], self.period, enforce_key_length=False)
        return totp.generate(at).decode("ascii")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A question of a server, as one printable line, and the kinds of what it was given; never the words themselves."""

    question: str
    given: tuple[Given, ...] = ()


class Answers:
    """Answers the questions of one login: the password once, one code once. `refusal` says why a question was not
    answered; `dialogue` what was asked so far."""

    def __init__(self, site: Site) -> None:
        """LoginNeeded (not attempted) where a person must answer; ConfigurationError if a secret cannot be had;
        CodeSpent if the present code is used already. No connection need be made then."""
        if site.login.attended:
            raise holding.needed(site, "what the site asks at a login, flctl may not answer")
        self.site = site
        self.refusal: FlctlError | None = None
        self.dialogue: list[Exchange] = []
        self._given: set[Given] = set()
        self._secret = secret_of(site)
        if abs(ahead := allowance.skew(site)) > self._secret.period:
            raise _wrong_clock(site, ahead)
        try:
            ledger.check(self._secret.key, self._secret.period)
        except CodeSpent as spent:
            spent.site = site.name
            raise
        self._password = password_of(site)

    @property
    def sent(self) -> bool:
        """Whether a code was sent."""
        return "code" in self._given

    @property
    def kinds(self) -> list[Given]:
        """What was sent so far."""
        return [kind for kind in _WORDS if kind in self._given]

    @property
    def given(self) -> str:
        """The same in words."""
        return " and ".join(_WORDS[kind] for kind in self.kinds)

    def answer(self, question: str, context: str = "") -> str:
        """The password or the code, if the question asks for it; else LoginNeeded, with the server's words. CodeSpent
        if another process took the code meanwhile."""
        words = f"{printable(context, 200)} {printable(question)}".strip()
        try:
            wanted = self._wanted(question.strip() if len(question) <= LONGEST else "", words)
            given = "".join(self._give(kind) for kind in wanted)
        except FlctlError as error:
            self.dialogue.append(Exchange(question=words))
            error.site = self.site.name
            self.refusal = error
            raise
        self.dialogue.append(Exchange(question=words, given=wanted))
        return given

    def _wanted(self, question: str, words: str) -> tuple[Given, ...]:
        wanted = wanted_by(question, self.site)
        release = f"then flctl release {self.site.name}"
        if CHANGE.search(question):
            raise LoginNeeded(
                f"the site asks for a change of the password, {words!r}; nothing was answered",
                hint=f"log in by hand and change it; {release}",
            )
        if self._given.intersection(wanted) or (self.sent and not wanted):
            raise LoginNeeded(
                f"the {self.given} {'was' if len(self._given) == 1 else 'were'} not enough: the site asked again, "
                f"{words!r}",
                hint=f"log in by hand once to see what it wants, {release}",
            )
        if not wanted:
            both = self.site.login.kind == "password+totp"
            asked, keys = (
                ("a password or a", "login.password.prompt or login.totp.prompt")
                if both
                else ("a", "login.totp.prompt")
            )
            raise LoginNeeded(
                f"the site asked {words!r}, which is not the question for {asked} one-time code; nothing was answered",
                hint=f"if it is that question, set {keys} in sites/{self.site.name}.toml; {release}",
            )
        return wanted

    def _give(self, kind: Given) -> str:
        if kind == "password":
            self._given.add(kind)
            password, self._password = self._password, ""
            return password
        moment = time.time()
        ledger.spend(self._secret.key, self._secret.period, now=moment)
        self._given.add(kind)
        return self._secret.code(moment)


def _wrong_clock(site: Site, ahead: float) -> LoginNeeded:
    error = LoginNeeded(
        f"this machine's clock was {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the site's at the last "
        "login: no code is made with it",
        hint=f"put the clock right (timedatectl set-ntp true), then flctl release {site.name}",
        site=site.name,
    )
    error.attempted = False
    return error


def wanted_by(question: str, site: Site) -> tuple[Given, ...]:
    """What a question asks for, by the profile's patterns. A question that both match asks for a code: "One-time
    password". Where the code is all that is ever asked for, and the profile has no pattern of its own, a bare
    "Password:" asks for it as well."""
    login = site.login
    if login.kind == "password+totp" and COMBINED.search(question):
        return ("password", "code")
    if re.search(login.totp.prompt, question):
        return ("code",)
    if login.kind == "totp" and login.totp.prompt == fields.CODE_PROMPT and BARE.search(question):
        return ("code",)
    if login.kind == "password+totp" and re.search(login.password.prompt, question):
        return ("password",)
    return ()


def secret_of(site: Site) -> Secret:
    """The secret that the site's profile refers to; ConfigurationError saying what is missing or wrong."""
    totp = site.login.totp
    if totp.automation != "permitted" or not totp.permission:
        raise ConfigurationError(
            "logging in costs a one-time code, and the profile does not say where the facility permits automating it",
            hint=f'ask the facility; then set login.totp in sites/{site.name}.toml: automation = "permitted", '
            "permission (where it says so) and secret",
            site=site.name,
        )
    withhold(totp.secret, site.login.password.secret)
    try:
        return parse_secret(read_reference(totp.secret), totp)
    except ConfigurationError as error:
        raise _placed(error, site, "login.totp.secret") from None


def password_of(site: Site) -> str:
    """The password that the site's profile refers to; empty where none is ever asked for."""
    if site.login.kind != "password+totp":
        return ""
    withhold(site.login.totp.secret, site.login.password.secret)
    try:
        return read_reference(site.login.password.secret)
    except ConfigurationError as error:
        raise _placed(error, site, "login.password.secret") from None


def _placed(error: ConfigurationError, site: Site, key: str) -> ConfigurationError:
    """The error with where it belongs; a reference that is none says how one is written."""
    error.message = f"{key}: {error.message}"
    error.hint = error.hint or f"see {key} in sites/{site.name}.toml"
    error.site = site.name
    return error


def parse_secret(text: str, totp: Totp) -> Secret:
    """A secret as enrolment shows it: base32 (blanks, dashes and padding do not matter) or an otpauth:// address,
    whose own digits, algorithm and period come before the profile's."""
    text = text.strip()
    values = {"digits": str(totp.digits), "algorithm": totp.algorithm, "period": str(totp.period)}
    if text.lower().startswith("otpauth:"):
        address = urllib.parse.urlsplit(text)
        given = dict(urllib.parse.parse_qsl(address.query))
        if address.netloc.lower() != "totp" or "secret" not in given:
            raise ConfigurationError("the secret is an otpauth:// address, but not of a time-based code (totp)")
        text = given["secret"]
        values |= {name: value for name, value in given.items() if name in values}
    letters = re.sub(r"[\s-]", "", text).rstrip("=").upper()
    try:
        key = base64.b32decode(letters + "=" * (-len(letters) % 8))
    except ValueError:
        key = b""
    if len(key) < SHORTEST:
        raise ConfigurationError("the secret is neither base32 nor an otpauth:// address")
    algorithm = values["algorithm"].upper().replace("-", "")
    digits, period = values["digits"], values["period"]
    if (
        algorithm not in ("SHA1", "SHA256", "SHA512")
        or digits not in ("6", "8")
        or not re.fullmatch(r"\d{1,4}", period)
    ):
        raise ConfigurationError("the otpauth:// address asks for a kind of code that flctl does not know")
    return Secret(key=key, digits=int(digits), algorithm=algorithm, period=max(1, int(period)))
