"""Owns site profiles: sites/<name>.toml -> Site, with all checks; nothing in a profile is ever a secret."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from flctl.facility.table import REFERENCES, Check, between, dotted, like, load_table, nearest, refused

__all__ = [
    *("Environment", "Login", "Poll", "Scheduler", "Shape", "Site", "Storage", "Totp", "Transfer"),
    *("load_site", "load_table", "missing"),
]

CODE_PROMPT = (
    r"(?i)^(?!.*\bnew\b)(?!.*password\s*(?:&|and|\+)).*"
    r"(?:verification code|one[- ]time (?:password|passcode|code)|\bt?otp\b|authenticator code|second factor)"
)

_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}"
_USER = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+@-]{0,127}"
_VARIABLE = r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})"
_PLAIN = r"""[^$'"`\\<>|;&*?\x00-\x1f\x7f]"""
_PATH = rf"(?:/|~(?:/|$)|{_VARIABLE})(?:{_PLAIN}|{_VARIABLE})*"
_OPTION = r"--[a-z][a-z0-9-]*(?:=[A-Za-z0-9_.,:/@%+=*&()\[\]-]+)?"
_OURS = frozenset(
    {"job-name", "requeue", "no-requeue", "output", "error", "open-mode", "signal", "array", "wait", "wrap", "chdir"}
    | {"parsable", "test-only", "account", "partition", "qos", "reservation", "nodes", "time"}
)
"""Options of sbatch that the job template gives itself; a second one would break the claim, the log or the record."""


def seconds_of(text: Any) -> int:
    """`MM:SS`, `HH:MM:SS` or `D-HH:MM:SS` in seconds."""
    match = isinstance(text, str) and re.fullmatch(r"(?:(?:(\d{1,3})-)?(\d{1,4}):)?(\d{1,2}):(\d{2})", text, re.ASCII)
    if not match:
        raise ValueError(f'{text!r} is not a time: "HH:MM:SS", "D-HH:MM:SS" or "MM:SS"')
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    if minutes > 59 or seconds > 59 or not (days or hours or minutes or seconds):
        raise ValueError(f'{text!r} is not a time: "HH:MM:SS", "D-HH:MM:SS" or "MM:SS", more than zero')
    return days * 86400 + hours * 3600 + minutes * 60 + seconds


def _option(text: str) -> str:
    if not re.fullmatch(_OPTION, text):
        raise ValueError(f'{text!r} is not one option of the scheduler, written "--name=value"')
    name = text[2:].split("=")[0]
    if name in _OURS:
        raise ValueError(f"--{name} is set by the job template: use the profile's own key for it, or leave it out")
    return text


def _secret(text: str) -> str:
    if not re.fullmatch(r"|(?:command|file|keyring):\s*\S.*|env:[A-Za-z_]\w*", text, re.ASCII):
        looks = "looks like a secret itself" if re.fullmatch(r"[A-Za-z2-7 =-]{16,}", text) else "is not a reference"
        raise ValueError(f"{looks}; a profile holds a reference to the secret: {REFERENCES}")
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
            raise ValueError(f"{name} may hold $NAME or ${{NAME}}, then no quotes, backslashes or commands")
    return table


def _given(pattern: str, what: str) -> Check:
    return like(pattern, what, empty=False)


_PATH_RULE = "an absolute path; it may hold $NAME or ${NAME}, but no quotes, backslashes, wildcards or commands"
_BARE = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"

Name = Annotated[str, _given(r"[a-z0-9][a-z0-9_-]{0,62}", "a site's name: lower-case letters, digits, - and _")]
Host = Annotated[str, like(_HOST, "a host name")]
User = Annotated[str, like(_USER, "a user name")]
Port = Annotated[int, between(1, 65535)]
Word = Annotated[str, like(_WORD, "a name: letters, digits and _ . + @ -")]
Partition = Annotated[str, like(rf"{_WORD}(?:,{_WORD})*", "a partition, or several with commas between")]
RemotePath = Annotated[str, like(_PATH, _PATH_RULE)]
Program = Annotated[str, _given(rf"(?:{_PATH})|{_BARE}", "a program's name or absolute path")]
PlainProgram = Annotated[str, _given(rf"/{_PLAIN}*|{_BARE}", "a program's name or absolute path, without variables")]
LocalPath = Annotated[str, like(rf"(?:{_PLAIN}|{_VARIABLE})+", "a path")]
Fingerprint = Annotated[str, _given(r"SHA256:[A-Za-z0-9+/]{43}=?", "a fingerprint as ssh-keygen -l prints: SHA256:...")]
Option = Annotated[str, Check(_option)]
Module = Annotated[str, _given(r"[A-Za-z0-9_][A-Za-z0-9_.+/@-]*", "a module's name")]
Seconds = Annotated[int, Check(seconds_of, before=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Totp:
    """The one-time code of `key+totp`. `secret` is a reference; `prompt` the regular expression that the server's
    question must match (searched) before a code is sent; `permission` names the facility's consent to automation."""

    automation: Literal["forbidden", "permitted"] = "forbidden"
    permission: str = ""
    secret: Annotated[str, Check(_secret)] = ""
    digits: Literal[6, 8] = 6
    algorithm: Literal["SHA1", "SHA256", "SHA512"] = "SHA1"
    period: Annotated[int, between(5, 3600)] = 30
    prompt: Annotated[str, Check(_pattern)] = CODE_PROMPT


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """Where commands run. `key`: a file here, or "agent"; `jump`: [user@]host[:port]; `multiplex`: whether the
    facility allows several sessions over one connection."""

    host: Host = ""
    port: Port = 22
    user: User = ""
    kind: Literal["key", "certificate", "key+totp"] = "key"
    key: LocalPath = "agent"
    certificate: LocalPath = ""
    jump: Annotated[str, like(rf"(?:{_USER}@)?(?:[A-Za-z0-9][A-Za-z0-9.-]*)(?::\d{{1,5}})?", "[user@]host[:port]")] = ""
    host_keys: tuple[Fingerprint, ...] = ()
    multiplex: bool = True
    totp: Totp = field(default_factory=Totp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Where files go; an empty host is the login host. `shell`: whether commands run there at all."""

    host: Host = ""
    port: Port = 22
    host_keys: tuple[Fingerprint, ...] = ()
    shell: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Named resources of a job: `gpus` per node, `cpus` per node (0: the scheduler's default), `walltime` in seconds.
    What is empty comes from the scheduler's table."""

    nodes: Annotated[int, between(1, 100_000)] = 1
    gpus: Annotated[int, between(0, 64)] = 0
    cpus: Annotated[int, between(0, 4096)] = 0
    walltime: Seconds = 3600
    account: Word = ""
    partition: Partition = ""
    qos: Word = ""
    reservation: Word = ""
    extra: tuple[Option, ...] = ()

    @property
    def warning(self) -> int:
        """Seconds before the walltime's end at which the scheduler is asked to warn the job."""
        return max(1, min(120, self.walltime // 10))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler:
    """`account`: None where the facility asks for none, empty while it is still to be filled in. `shape` names the
    table of [shapes] that jobs get; `accounting`: whether sacct may be asked."""

    kind: Literal["slurm", "local"]
    account: Word | None = None
    partition: Partition = ""
    qos: Word = ""
    reservation: Word = ""
    shape: str = "prod"
    accounting: bool = True
    extra: tuple[Option, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Paths at the site; variables in them are resolved there, once. `data` never leaves it."""

    work: RemotePath = ""
    data: RemotePath = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a job does before it trains: modules, then `activate` (shell lines, as they are), then exports and proxy.
    `python` runs the trainer; `seal_python` (3.6 or newer, also on the login host) keeps the records."""

    modules: tuple[Module, ...] = ()
    activate: tuple[str, ...] = ()
    exports: Annotated[dict[str, str], Check(_exports)] = field(default_factory=dict)
    proxy: Annotated[str, like(r"https?://[A-Za-z0-9.-]+(?::\d{1,5})?/?", "a proxy: http://host:port")] = ""
    python: Program = "python3"
    seal_python: PlainProgram = "python3"
    launch: Annotated[str, like(rf"(?:{_PLAIN}|{_VARIABLE})+", "a launcher and its options, such as srun")] = ""
    trainer: RemotePath = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Poll:
    """Seconds: between contacts; between contacts that each cost a one-time code; between the two looks that prove a
    job gone; from a claim to giving up on a job that nobody ever saw."""

    every: Annotated[int, between(1, 86400)] = 60
    login_every: Annotated[int, between(1, 604800)] = 3600
    absence: Annotated[int, between(1, 86400)] = 60
    claim_window: Annotated[int, between(1, 86400)] = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One facility. `train` overrides keys of the campaign's [train] there."""

    schema: Literal[1]
    name: Name
    title: str = ""
    connection: Literal["ssh", "local"] = "ssh"
    login: Login = field(default_factory=Login)
    transfer: Transfer = field(default_factory=Transfer)
    scheduler: Scheduler
    shapes: dict[str, Shape]
    storage: Storage = field(default_factory=Storage)
    environment: Environment = field(default_factory=Environment)
    poll: Poll = field(default_factory=Poll)
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        """The shape that jobs get, with what it leaves open filled in from the scheduler's table."""
        shape, scheduler = self.shapes[self.scheduler.shape], self.scheduler
        return dataclasses.replace(
            shape,
            account=shape.account or scheduler.account or "",
            partition=shape.partition or scheduler.partition,
            qos=shape.qos or scheduler.qos,
            reservation=shape.reservation or scheduler.reservation,
            extra=(*scheduler.extra, *shape.extra),
        )


def load_site(path: Path) -> Site:
    """The profile in a file; ConfigurationError naming the file and, one per line, each key that is wrong and why."""
    site = load_table(path, Site)
    problems = _contradictions(site)
    if site.name != path.stem:
        problems.insert(0, f"name: {site.name!r} must be the file's own name, {path.stem!r}")
    if problems:
        raise refused(path, problems)
    return site


def missing(site: Site) -> list[str]:
    """The keys that the user must still fill in before anything can run there, as TOML names them."""
    empty = {
        "login.host": site.connection == "ssh" and not site.login.host,
        "login.user": site.connection == "ssh" and not site.login.user,
        "scheduler.account": site.scheduler.account == "" and not site.shapes[site.scheduler.shape].account,
        "storage.work": not site.storage.work,
        "storage.data": not site.storage.data,
    }
    return [key for key, is_empty in empty.items() if is_empty]


def _contradictions(site: Site) -> list[str]:
    """What is wrong between values that are each right."""
    login, totp, transfer = site.login, site.login.totp, site.transfer
    problems = []
    if site.scheduler.shape not in site.shapes:
        close = nearest(site.scheduler.shape, site.shapes)
        advice = f"did you mean {close!r}?" if close else f"there is: {', '.join(site.shapes) or 'none'}"
        problems.append(f"scheduler.shape: there is no [{dotted(('shapes', site.scheduler.shape))}]; {advice}")
    if site.connection == "local":
        for key, value in (("login.host", login.host), ("login.jump", login.jump), ("transfer.host", transfer.host)):
            if value:
                problems.append(f'{key}: must be left out where connection = "local"')
    if login.certificate and login.kind != "certificate":
        problems.append(f'login.certificate: needs login.kind = "certificate", not {login.kind!r}')
    if login.certificate and login.key == "agent":
        problems.append("login.certificate: needs login.key, the file of the key that it certifies")
    if totp.automation == "permitted" and login.kind != "key+totp":
        problems.append(f'login.totp.automation: needs login.kind = "key+totp", not {login.kind!r}')
    if totp.automation == "permitted" and not totp.permission:
        problems.append("login.totp.permission: must say where the facility permits automated codes")
    if not transfer.shell and not transfer.host:
        problems.append("transfer.shell: only a transfer host of its own may lack a shell")
    return problems
