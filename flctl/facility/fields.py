"""Owns the kinds of values that a site's profile holds: what a host, a path, a walltime, an option may look like."""

import datetime
import re
import shlex
from typing import Annotated, Any

from flctl.facility.table import REFERENCES, Check, between, like

PASSWORD_PROMPT = r"(?i)^(?!.*\b(?:new|retype|current|expired|changing)\b).*password"

CODE_PROMPT = (
    r"(?i)^(?!.*\bnew\b)(?!.*password\s*(?:&|and|\+)).*"
    r"(?:verification code|one[- ]time (?:password|passcode|code)|\bt?otp\b|authenticator code|second factor)"
)

HOST = r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}"
USER = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+@-]{0,127}"
_PLAIN_PATH = r"[A-Za-z0-9_.+@/-]"
_VARIABLE = r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})"
_PLAIN = r"""[^$'"`\\<>|;&*?!\x00-\x1f\x7f]"""
_PATH = rf"(?:/|~(?:/|$)|{_VARIABLE})(?:{_PLAIN}|{_VARIABLE})*"
_OPTION = r"--[a-z][a-z0-9-]*(?:=[A-Za-z0-9_.,:/@%+=*&()\[\]-]+)?"
_PBS_OPTION = r"-[a-zA-Z](?: ?[A-Za-z0-9_][A-Za-z0-9_.,:/@%+=*&()\[\]-]*)?"


def seconds_of(text: Any) -> int:
    """`MM:SS`, `HH:MM:SS` or `D-HH:MM:SS` in seconds."""
    match = isinstance(text, str) and re.fullmatch(r"(?:(?:(\d{1,3})-)?(\d{1,4}):)?(\d{1,2}):(\d{2})", text, re.ASCII)
    if not match:
        raise ValueError(f'{text!r} is not a time: "HH:MM:SS", "D-HH:MM:SS" or "MM:SS"')
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    if minutes > 59 or seconds > 59 or not (days or hours or minutes or seconds):
        raise ValueError(f'{text!r} is not a time: "HH:MM:SS", "D-HH:MM:SS" or "MM:SS", more than zero')
    return days * 86400 + hours * 3600 + minutes * 60 + seconds


def optional_seconds_of(text: Any) -> int:
    """The same, or 0 for empty text."""
    return 0 if text == "" else seconds_of(text)


def moment_of(text: Any) -> float:
    """`2026-11-21T08:00+01:00` (ISO 8601, with its zone) in Unix seconds; 0 for empty text."""
    if text == "":
        return 0.0
    try:
        moment = datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ValueError(f'{text!r} is not a moment with its time zone: "2026-11-21T08:00+01:00"')
    return moment.timestamp()


def _option(text: str) -> str:
    if not re.fullmatch(rf"{_OPTION}|{_PBS_OPTION}", text):
        raise ValueError(
            f'{text!r} is not one option of the scheduler, written "--name=value" or, for PBS, "-l name=value"'
        )
    return text


def _day(text: str) -> str:
    try:
        return text and datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise ValueError(f'{text!r} is not a day: "2026-11-21"') from None


def _secret(text: str) -> str:
    if not re.fullmatch(r"|(?:command|file|keyring):\s*\S.*|env:[A-Za-z_]\w*", text, re.ASCII):
        looks = "looks like a secret itself" if re.fullmatch(r"[A-Za-z2-7 =-]{16,}", text) else "is not a reference"
        raise ValueError(f"{looks}; a profile holds a reference to the secret: {REFERENCES}")
    return text


def _command(text: str) -> str:
    try:
        shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{text!r} cannot be split into words: {error}") from None
    return text


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    return text


def _exports(table: dict[str, str]) -> dict[str, str]:
    for name, value in table.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name.startswith("FLCTL_"):
            raise ValueError(f"{name!r} is not a variable that a profile may set")
        if "$" in value and not re.fullmatch(rf"(?:{_PLAIN}|{_VARIABLE}|[;*?<>|&])*", value, re.ASCII):
            raise ValueError(f"{name} may hold $NAME or ${{NAME}}, then no quotes, backslashes, ! or commands")
    return table


def _train(table: dict[str, Any]) -> dict[str, Any]:
    command = table.get("command", "")
    if not isinstance(command, str) or (command and not re.fullmatch(_WORDS, command)):
        raise ValueError(f"command: {command!r} is not {_COMMAND_RULE}")
    return table


def _given(pattern: str, what: str) -> Check:
    return like(pattern, what, empty=False)


_COMMAND_RULE = "a command: words and variables, but no quotes, backslashes, wildcards, pipes, ! or further commands"
_PATH_RULE = "an absolute path; it may hold $NAME or ${NAME}, but no quotes, backslashes, wildcards, ! or commands"
_WORDS = rf"(?:{_PLAIN}|{_VARIABLE})+"
_BARE = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"

Name = Annotated[str, _given(r"[a-z0-9][a-z0-9_-]{0,62}", "a site's name: lower-case letters, digits, - and _")]
Host = Annotated[str, like(HOST, "a host name")]
User = Annotated[str, like(USER, "a user name")]
Port = Annotated[int, between(1, 65535)]
Word = Annotated[str, like(_WORD, "a name: letters, digits and _ . + @ -")]
Partition = Annotated[str, like(rf"{_WORD}(?:,{_WORD})*", "a partition, or several with commas between")]
RemotePath = Annotated[str, like(_PATH, _PATH_RULE)]
Program = Annotated[str, _given(rf"(?:{_PATH})|{_BARE}", "a program's name or absolute path")]
MaybeProgram = Annotated[str, like(rf"/{_PLAIN}*|{_BARE}", "a program's name or absolute path, without variables")]
PlainProgram = Annotated[str, _given(rf"/{_PLAIN}*|{_BARE}", "a program's name or absolute path, without variables")]
LocalPath = Annotated[str, like(rf"(?:{_PLAIN}|{_VARIABLE})+", "a path")]
Fingerprint = Annotated[str, _given(r"SHA256:[A-Za-z0-9+/]{43}=?", "a fingerprint as ssh-keygen -l prints: SHA256:...")]
PublicKey = Annotated[
    str,
    like(
        r"(?:ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(?:256|384|521)) [A-Za-z0-9+/]{60,1200}={0,2}",
        'a public key without its comment: "ssh-ed25519 AAAA..."',
    ),
]
Walltime = Annotated[int, Check(optional_seconds_of, before=True)]
Moment = Annotated[float, Check(moment_of, before=True)]
Day = Annotated[str, Check(_day)]
Address = Annotated[str, like(r"https?://[!-~]+", "an address: https://...")]
Jump = Annotated[str, like(rf"(?:{USER}@)?(?:[A-Za-z0-9][A-Za-z0-9.-]*)(?::\d{{1,5}})?", "[user@]host[:port]")]
Proxy = Annotated[str, like(r"https?://[A-Za-z0-9.-]+(?::\d{1,5})?/?", "a proxy: http://host:port")]
Words = Annotated[str, like(_WORDS, _COMMAND_RULE)]
Train = Annotated[dict[str, Any], Check(_train)]
LocalCommand = Annotated[str, Check(_command)]
Secret = Annotated[str, Check(_secret)]
Pattern = Annotated[str, Check(_pattern)]
Exports = Annotated[dict[str, str], Check(_exports)]
Variable = Annotated[str, _given(r"(?!FLCTL_)[A-Za-z_]\w*", "the name of a variable")]
Resources = Annotated[
    str, like(r"[A-Za-z0-9_][A-Za-z0-9_.,:/+=-]*", "a list of resources, such as home:eagle or 2:ncpus=64")
]
Dependency = Annotated[str, like(r"[a-z]+(?::[0-9][A-Za-z0-9_.\[\]-]*)*", "a dependency: afterok:1234, singleton")]
Bind = Annotated[
    str, _given(rf"(?:{_PATH})(?::/{_PLAIN_PATH}*)?(?::r[ow])?", "a folder to bind: /path or /path:/place:ro")
]
_FLAG = r"--?[A-Za-z][A-Za-z0-9-]*(?:=[A-Za-z0-9_.,:/@%+=-]+)?"
Flag = Annotated[str, _given(_FLAG, "an option: --name or --name=value")]
Flags = Annotated[str, like(rf"{_FLAG}(?: {_FLAG})*", "options: --name or --name=value, blanks between")]
Option = Annotated[str, Check(_option)]
Module = Annotated[str, _given(r"[A-Za-z0-9_][A-Za-z0-9_.+/@-]*", "a module's name")]
Seconds = Annotated[int, Check(seconds_of, before=True)]
