"""Owns one-time codes: the reference to their secret, RFC 6238, and which question of a server gets one."""

import base64
import os
import re
import shlex
import signal
import stat
import subprocess
import threading
import time
import urllib.parse
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from flctl.errors import CodeSpent, ConfigurationError, FlctlError, LoginNeeded
from flctl.facility import ledger
from flctl.facility.openssh import expand, printable
from flctl.facility.profile import Site, Totp

COMMAND_TIMEOUT = 30.0
SHORTEST = 10
"""Bytes of the shortest secret: 80 bits, which RFC 4226 calls too short and several facilities use."""

_taken: dict[str, str] = {}
"""Secrets read from environment variables, which are removed there so that no child inherits them."""
_taking = threading.Lock()


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


class Answers:
    """Answers the questions of one login with one code at most. `refusal` says why a question was not answered."""

    def __init__(self, site: Site) -> None:
        """ConfigurationError if codes may not be automated here or the secret cannot be had; CodeSpent if the present
        code is used already (no connection need be made then)."""
        self.site = site
        self.secret = secret_of(site)
        self.sent = False
        self.refusal: FlctlError | None = None
        try:
            ledger.check(self.secret.key, self.secret.period)
        except CodeSpent as spent:
            spent.site = site.name
            raise

    def answer(self, question: str, context: str = "") -> str:
        """The code, if the question asks for it; else LoginNeeded, with the server's words. CodeSpent if another
        process took the code meanwhile."""
        try:
            return self._answer(question, context)
        except FlctlError as error:
            error.site = self.site.name
            self.refusal = error
            raise

    def _answer(self, question: str, context: str) -> str:
        words = printable(f"{context} {question}")
        if self.sent:
            raise LoginNeeded(
                f"the one-time code was not enough: the site asked again, {words!r}",
                hint=f"log in by hand once to see what it wants, then flctl release {self.site.name}",
            )
        if not re.search(self.site.login.totp.prompt, question.strip()):
            raise LoginNeeded(
                f"the site asked {words!r}, which is not the question for a one-time code; nothing was answered",
                hint=f"if it is that question, set login.totp.prompt in sites/{self.site.name}.toml; "
                f"then flctl release {self.site.name}",
            )
        moment = time.time()
        ledger.spend(self.secret.key, self.secret.period, now=moment)
        self.sent = True
        return self.secret.code(moment)


def secret_of(site: Site) -> Secret:
    """The secret that the site's profile refers to; ConfigurationError saying what is missing or wrong."""
    totp = site.login.totp
    if totp.automation != "permitted" or not totp.permission:
        raise ConfigurationError(
            "logging in costs a one-time code, and the profile does not say that the facility permits automating it",
            hint=f'ask the facility; then set login.totp in sites/{site.name}.toml: automation = "permitted", '
            "permission (where it says so) and secret",
            site=site.name,
        )
    try:
        return parse_secret(read_reference(totp.secret), totp)
    except ConfigurationError as error:
        error.site = site.name
        error.hint = error.hint or f"see login.totp.secret in sites/{site.name}.toml"
        raise


def read_reference(reference: str) -> str:
    """The text that a reference stands for: command:, file:, env:, keyring:."""
    kind, _, rest = reference.partition(":")
    rest = rest.strip()
    sources = {"command": _from_command, "file": _from_file, "env": _from_environment, "keyring": _from_keyring}
    if kind not in sources or not rest:
        raise ConfigurationError(
            "login.totp.secret is not a reference to a secret",
            hint="write command:PROGRAM ARGS, file:PATH, env:NAME or keyring:SERVICE/USER",
        )
    return sources[kind](rest)


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
        raise ConfigurationError("what the reference gives is neither a base32 secret nor an otpauth:// address")
    algorithm = values["algorithm"].upper().replace("-", "")
    digits, period = values["digits"], values["period"]
    if (
        algorithm not in ("SHA1", "SHA256", "SHA512")
        or digits not in ("6", "8")
        or not re.fullmatch(r"\d{1,4}", period)
    ):
        raise ConfigurationError("the otpauth:// address asks for a kind of code that flctl does not know")
    return Secret(key=key, digits=int(digits), algorithm=algorithm, period=max(1, int(period)))


def _from_command(command: str) -> str:
    try:
        argv = shlex.split(command)
    except ValueError as error:
        raise ConfigurationError(f"the secret's command cannot be read: {error}") from None
    try:
        # Its standard error is dropped: password programs print secrets there when they fail.
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigurationError(f"the secret's program {argv[0]} cannot be run: {error.strerror}") from None
    with child:
        try:
            output, _ = child.communicate(timeout=COMMAND_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ConfigurationError(
                f"the secret's program {argv[0]} did not answer within {COMMAND_TIMEOUT:.0f} s",
                hint="it must not ask anything: unlock its store first",
            ) from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    lines = output.decode("utf-8", "replace").strip().splitlines()
    if child.returncode != 0 or not lines:
        raise ConfigurationError(
            f"the secret's program {argv[0]} gave no secret (exit status {child.returncode})",
            hint="run it by hand to see why",
        )
    return lines[0]


def _from_file(name: str) -> str:
    path = expand(name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "it is a symbolic link" if path.is_symlink() else error.strerror
        raise ConfigurationError(f"the secret's file {path} cannot be read: {reason}") from None
    with os.fdopen(descriptor, "rb") as stream:
        found, parent = os.fstat(stream.fileno()), path.parent.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ConfigurationError(f"the secret's file {path} is not a regular file")
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077 or found.st_nlink != 1:
            raise ConfigurationError(
                f"the secret's file {path} must belong to you, have one name, and be closed to everybody else",
                hint=f"chmod 600 {path}; if others could read it until now, enrol a new secret",
            )
        if parent.st_mode & stat.S_IWOTH and not parent.st_mode & stat.S_ISVTX:
            raise ConfigurationError(f"anybody may replace the secret's file {path}", hint=f"chmod o-w {path.parent}")
        return _text_of(stream.read(65536), path)


def _text_of(content: bytes, path: Path) -> str:
    lines = content.decode("utf-8", "replace").strip().splitlines()
    if not lines:
        raise ConfigurationError(f"the secret's file {path} is empty")
    return lines[0]


def _from_environment(name: str) -> str:
    with _taking:
        if value := os.environ.pop(name, ""):
            _taken[name] = value
        if name not in _taken:
            raise ConfigurationError(f"the environment variable {name}, which should hold the secret, is not set")
        return _taken[name]


def _from_keyring(name: str) -> str:
    service, _, user = name.rpartition("/")
    try:
        import keyring
        import keyring.errors
    except ImportError:
        raise ConfigurationError(
            "the secret is in a keyring, and Python's keyring package is not installed",
            hint="python -m pip install 'flctl[keyring]'",
        ) from None
    try:
        value = keyring.get_password(service, user)
    except keyring.errors.KeyringError as error:
        raise ConfigurationError(
            f"the keyring did not give the secret of {name}: {type(error).__name__}", hint="unlock it first"
        ) from None
    if not value:
        raise ConfigurationError(f"the keyring holds no secret for {name} (it is written keyring:SERVICE/USER)")
    return str(value)
