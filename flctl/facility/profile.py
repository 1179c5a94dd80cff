"""Owns site profiles: sites/<name>.toml -> Site, with all checks; nothing in a profile is ever a secret."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from flctl.facility import fields as kinds
from flctl.facility.consistency import contradictions
from flctl.facility.table import between, load_table, refused

__all__ = [
    *("About", "Budget", "Container", "Environment", "Login", "Password", "Poll", "Queue", "Reservation", "Scheduler"),
    *("Shape", "Signing", "Site", "Storage", "Totp", "Transfer", "load_site", "load_table", "missing"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """Where a profile's facts come from. `checked`: the day on which they were last compared with `evidence`;
    `questions`: what the evidence does not settle."""

    docs: kinds.Address = ""
    checked: kinds.Day = ""
    evidence: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Password:
    """The account's password, where the server asks for one. `secret` is a reference; `prompt` the regular expression
    that the server's question must match (searched) before it is sent."""

    secret: kinds.Secret = ""
    prompt: kinds.Pattern = kinds.PASSWORD_PROMPT


@dataclass(frozen=True, slots=True, kw_only=True)
class Totp:
    """The one-time code. `secret` is a reference; `prompt` the regular expression that the server's question must match
    (searched) before a code is sent; `permission` names the facility's consent to automation."""

    automation: Literal["forbidden", "permitted"] = "forbidden"
    permission: str = ""
    secret: kinds.Secret = ""
    digits: Literal[6, 8] = 6
    algorithm: Literal["SHA1", "SHA256", "SHA512"] = "SHA1"
    period: Annotated[int, between(5, 3600)] = 30
    prompt: kinds.Pattern = kinds.CODE_PROMPT


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """Where commands run, and how one gets in.

    `key`: a file here, or "agent"; `renew`: a program here that gets a new certificate (words, no shell), and
    `renew_unattended` whether it does so without asking anybody; `multiplex`: whether the facility allows several
    sessions over one connection; `interval`: seconds between two logins at least; `per_day`: logins within 24 hours
    that flctl makes by itself at most; `cooldown`: seconds without a login after one that the facility did not even
    ask anything; `hold`: seconds for which `flctl login` may keep a connection for later commands (0: the facility
    does not allow it)."""

    host: kinds.Host = ""
    port: kinds.Port = 22
    user: kinds.User = ""
    kind: Literal["key", "certificate", "key+totp", "password+totp", "totp", "attended"] = "key"
    key: kinds.LocalPath = "agent"
    certificate: kinds.LocalPath = ""
    renew: kinds.LocalCommand = ""
    renew_unattended: bool = False
    proxy_jump: kinds.Jump = ""
    host_keys: tuple[kinds.Fingerprint, ...] = ()
    multiplex: bool = True
    interval: Annotated[int, between(0, 3600)] = 0
    per_day: Annotated[int, between(1, 100_000)] = 12
    cooldown: Annotated[int, between(1, 86400)] = 900
    hold: kinds.Walltime = 0
    password: Password = field(default_factory=Password)
    totp: Totp = field(default_factory=Totp)

    @property
    def coded(self) -> bool:
        """Whether each login costs a one-time code, or a person."""
        return self.kind not in ("key", "certificate")

    @property
    def keyed(self) -> bool:
        """Whether a key or a certificate is offered."""
        return self.kind in ("key", "certificate", "key+totp")

    @property
    def attended(self) -> bool:
        """Whether a person must answer each login."""
        return self.coded and (self.kind == "attended" or self.totp.automation != "permitted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Where files go; an empty host is the login host. `shell`: whether commands run there at all; `rsync`: the program
    there, where it is not in the PATH of a login."""

    host: kinds.Host = ""
    port: kinds.Port = 22
    host_keys: tuple[kinds.Fingerprint, ...] = ()
    shell: bool = True
    rsync: kinds.MaybeProgram = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Nodes set aside; used from `start` to `end` (Unix seconds; 0: without an end on that side)."""

    name: kinds.Word = ""
    start: kinds.Moment = 0.0
    end: kinds.Moment = 0.0

    def holds(self, now: float, walltime: int) -> bool:
        """Whether a job submitted now would end within it."""
        return bool(self.name) and self.start <= now and (not self.end or now + walltime <= self.end)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Named resources of a job: `ranks` (processes, which environment.launch starts), `gpus` and `cpus` (0: the
    scheduler's default) per node; `walltime` in seconds.
    `select` replaces the select statement of PBS; `dependency`: jobs to wait for, as the scheduler writes it.
    What is empty comes from the scheduler's table."""

    nodes: Annotated[int, between(1, 100_000)] = 1
    ranks: Annotated[int, between(1, 1024)] = 1
    gpus: Annotated[int, between(0, 64)] = 0
    cpus: Annotated[int, between(0, 4096)] = 0
    walltime: kinds.Seconds = 3600
    account: kinds.Word = ""
    partition: kinds.Partition = ""
    queue: kinds.Word = ""
    qos: kinds.Word = ""
    reservation: Reservation = field(default_factory=Reservation)
    dependency: kinds.Dependency = ""
    select: kinds.Resources = ""
    place: kinds.Resources = ""
    filesystems: kinds.Resources = ""
    extra: tuple[kinds.Option, ...] = ()

    @property
    def cpus_per_rank(self) -> int:
        """0: the scheduler's default."""
        return self.cpus // self.ranks

    @property
    def warning(self) -> int:
        """Seconds before the walltime's end at which the scheduler is asked to warn the job."""
        return max(1, min(120, self.walltime // 10))


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """What the partition, the queue or the QOS of that name allows a job; 0 where no limit is known. `max_walltime` in
    seconds; `max_running`: jobs of one user; `charge`: node-hours charged for each used."""

    min_nodes: Annotated[int, between(0, 100_000)] = 0
    max_nodes: Annotated[int, between(0, 100_000)] = 0
    max_walltime: kinds.Walltime = 0
    max_node_hours: Annotated[float, between(0)] = 0.0
    max_running: Annotated[int, between(0, 100_000)] = 0
    charge: Annotated[float, between(0, 1000)] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler:
    """`account`: None where the facility asks for none, empty while it is still to be filled in. `shape` names the
    table of [shapes] that jobs get; `accounting`: whether sacct, or PBS's history, may be asked."""

    kind: Literal["slurm", "pbs", "local"]
    account: kinds.Word | None = None
    partition: kinds.Partition = ""
    queue: kinds.Word = ""
    qos: kinds.Word = ""
    reservation: Reservation = field(default_factory=Reservation)
    place: kinds.Resources = ""
    filesystems: kinds.Resources = ""
    shape: str = "prod"
    accounting: bool = True
    extra: tuple[kinds.Option, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Paths at the site; variables in them are resolved there, once. `data` never leaves it. `purge_days`: after how
    many days the site removes what nobody touched there (0: never); `quota`: a command there that shows the rest;
    `frozen`: a folder that holds the frozen base of adapters already (empty: flctl brings it)."""

    work: kinds.RemotePath = ""
    data: kinds.RemotePath = ""
    purge_days: Annotated[int, between(0, 3650)] = 0
    quota: kinds.Words = ""
    frozen: kinds.RemotePath = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """The image in which the trainer runs. `program`: what runs it (empty: no container); `image`: its path there;
    `gpu`: the flag that lets it see the GPUs; `binds`: folders it sees besides the run's own."""

    program: Literal["", "apptainer", "singularity"] = ""
    image: kinds.RemotePath = ""
    gpu: kinds.Flags = ""
    binds: tuple[kinds.Bind, ...] = ()
    options: tuple[kinds.Flag, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a job does before it trains: module folders and modules, variables to unset, then `activate` (shell lines,
    as they are), then exports and proxy. `offline`: no library asks a hub. `python` runs the trainer, in the
    container if there is one; `seal_python` (3.6 or newer, also on the login host) keeps the records. `trainer`:
    what profiles of flctl 0.1 say in the place of train.command."""

    modules_use: tuple[kinds.RemotePath, ...] = ()
    modules: tuple[kinds.Module, ...] = ()
    unset: tuple[kinds.Variable, ...] = ()
    activate: tuple[str, ...] = ()
    exports: kinds.Exports = field(default_factory=dict)
    proxy: kinds.Proxy = ""
    offline: bool = True
    container: Container = field(default_factory=Container)
    python: kinds.Program = "python3"
    seal_python: kinds.PlainProgram = "python3"
    launch: kinds.Words = ""
    trainer: kinds.RemotePath = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Poll:
    """Seconds: between contacts, at first and at most (they grow apart while nothing changes); between contacts that
    each cost a one-time code; between the two looks that prove a job gone; from a claim to giving up on a job that
    nobody ever saw."""

    every: Annotated[int, between(1, 86400)] = 60
    most: Annotated[int, between(1, 86400)] = 600
    login_every: Annotated[int, between(1, 604800)] = 3600
    absence: Annotated[int, between(1, 86400)] = 60
    claim_window: Annotated[int, between(1, 86400)] = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """`max_node_hours`: what this campaign's jobs may use there (0: no limit), as the scheduler counts their time.
    `gpus_per_node`: where a job may get a part of a node, that part counts; `balance`: a command there that shows what
    the project has left, in the facility's own `unit`."""

    max_node_hours: Annotated[float, between(0)] = 0.0
    gpus_per_node: Annotated[int, between(0, 64)] = 0
    unit: str = ""
    balance: kinds.Words = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signing:
    """Signed completion records. `key`: a private key at the site, without a passphrase, for ssh-keygen; `signers`: the
    public keys whose signature counts ("ssh-ed25519 AAAA..."); where there is one, a record without a valid
    signature is no success."""

    key: kinds.RemotePath = ""
    signers: tuple[kinds.PublicKey, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One facility. `train` overrides keys of the campaign's [train] there."""

    schema: Literal[1]
    name: kinds.Name
    title: str = ""
    about: About = field(default_factory=About)
    connection: Literal["ssh", "local"] = "ssh"
    login: Login = field(default_factory=Login)
    transfer: Transfer = field(default_factory=Transfer)
    scheduler: Scheduler
    shapes: dict[str, Shape]
    queues: dict[str, Queue] = field(default_factory=dict)
    storage: Storage = field(default_factory=Storage)
    environment: Environment = field(default_factory=Environment)
    budget: Budget = field(default_factory=Budget)
    poll: Poll = field(default_factory=Poll)
    signing: Signing = field(default_factory=Signing)
    train: kinds.Train = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        """The shape that jobs get, with what it leaves open filled in from the scheduler's table."""
        shape, scheduler = self.shapes[self.scheduler.shape], self.scheduler
        return dataclasses.replace(
            shape,
            account=shape.account or scheduler.account or "",
            partition=shape.partition or scheduler.partition,
            queue=shape.queue or scheduler.queue,
            qos=shape.qos or scheduler.qos,
            reservation=shape.reservation if shape.reservation.name else scheduler.reservation,
            place=shape.place or scheduler.place,
            filesystems=shape.filesystems or scheduler.filesystems,
            extra=(*scheduler.extra, *shape.extra),
        )


def load_site(path: Path) -> Site:
    """The profile in a file; ConfigurationError naming the file and, one per line, each key that is wrong and why."""
    site = load_table(path, Site)
    problems = contradictions(site)
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
