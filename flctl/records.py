"""The values flctl keeps: orders, runs, jobs, contributions, plans; frozen."""

import typing
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256

from flctl.codec import SCHEMA
from flctl.words import plain, printable


class Stage(StrEnum):
    """Where a run is; the order of the names is the order of a run's life (`failed` may follow any)."""

    ORDERED = "ordered"
    DELIVERED = "delivered"
    CLAIMED = "claimed"
    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"
    FETCHED = "fetched"
    FAILED = "failed"


CLOSED = frozenset({Stage.FETCHED, Stage.FAILED})


class Work(StrEnum):
    TRAIN = "train"
    EVALUATE = "evaluate"
    MERGE = "merge"


class Cause(StrEnum):
    """Why an attempt ended without success, as far as it decides what may be done about it."""

    INFRASTRUCTURE = "infrastructure"
    """A node, a launch, a preemption: the same job may well succeed next time."""
    LOST = "lost"
    """It never came into the queue, or went out of it, and nobody says why."""
    TIME = "time"
    MEMORY = "memory"
    DIVERGED = "diverged"
    """This one and those below the program itself named (`train.py: error [diverged]: ...`)."""
    DATA = "data"
    TOKENIZER = "tokenizer"
    MODEL = "model"
    OPTIONS = "options"
    PROGRAM = "program"
    CONFIGURATION = "configuration"
    """The job's own folder or log could not be opened, or its account is unknown there."""
    REFUSED = "refused"
    """The scheduler did not take it, or says that it can never run."""
    FULL = "queue full"
    """There are as many jobs as the site, or it for us, allows: the same job may be taken later."""
    CANCELLED_BY_US = "cancelled by flctl"
    CANCELLED_BY_OTHER = "cancelled at the site"


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Why a run or a site waits for a person, or for a time (`until`, Unix seconds)."""

    reason: str
    since: float
    until: float | None = None

    def __post_init__(self) -> None:
        _harmless(self, "reason")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a manifest: relative POSIX path, bytes, sha256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A folder that an evaluate or merge run reads: `name` (a version `0003`, what a rule left beside one
    `0003-state`, or a site's contribution `karolina-0002-1`) and its sha256."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One contribution to a merge that a site makes: the subject's name, the run that brought it, its weight before
    normalisation, its optimizer steps, and the version it was trained from."""

    name: str
    site: str
    number: int
    weight: float
    steps: int
    base: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteMerge:
    """What a site is to merge, and how: the rule with its options, and whether float32 master weights are kept."""

    rule: str
    options: dict[str, typing.Any]
    master: bool
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is asked of a site: train from `base` for `steps` optimizer steps, evaluate `subjects`, or `merge` some of
    them into a successor of `base`.

    `global_step` is the number of optimizer steps behind the base, `total_steps` those of the whole plan;
    `continues` is the number of the run whose state at the site (optimizer, data cursor) a training goes on from;
    `round` is the version of the model the run is to contribute to (train), that it looks at (evaluate) or makes
    (merge), `plan` the number of the plan that asked for it."""

    site: str
    work: Work
    base: int
    round: int
    plan: int = 0
    steps: int = 0
    global_step: int = 0
    total_steps: int = 0
    continues: int | None = None
    subjects: tuple[Subject, ...] = ()
    merge: SiteMerge | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the scheduler and the site said of one attempt. Times are Unix seconds: `claimed_at`, `started_at` and
    `ended_at` on the site's clock, `absent_at` (first successful listing without the job) on ours. `elapsed`: seconds
    that it ran, as the scheduler counts them; `never`: its words where it says that the job can never run, seen first
    at `never_at` (ours). `rate` and `walltime`: node-hours charged per hour, and seconds, as the budget admitted it.
    A job is who it is by `cluster`, `id`, `submitted_at` (the scheduler's clock) and its name, the token. `again_at`:
    first look (ours) at which it waited although it had started, or could not be launched; `launched_at`: its last
    start as the scheduler has it. `progress`: optimizer
    steps in the program's own checkpoint. `cancelled_by`: uid of who cancelled the job, as accounting has it.
    `ending`: why a person had flctl end this attempt, and `revoked` whether flctl gave it up by itself, both written
    before the site is told; `ending` is empty again once it was."""

    token: str
    id: str | None = None
    state: str = ""
    reason: str = ""
    claimed_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    expected_start: float | None = None
    expected_end: float | None = None
    absent_at: float | None = None
    elapsed: float | None = None
    never: str = ""
    never_at: float | None = None
    rate: float | None = None
    walltime: float | None = None
    cluster: str = ""
    submitted_at: float | None = None
    again_at: float | None = None
    launched_at: float | None = None
    progress: int | None = None
    cancelled_by: int | None = None
    ending: str = ""
    revoked: bool = False

    def __post_init__(self) -> None:
        _harmless(self, "id", "state", "reason", "never", "cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What a finished run gave. `files`, and `sha256` of the whole folder, are those the site's record names until the
    files are here, then those of the fetched folder; `gates` is what the gates saw in it."""

    steps: int
    samples: int
    tokens: int
    sha256: str
    files: tuple[FileEntry, ...]
    metrics: dict[str, typing.Any]
    gates: dict[str, typing.Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a run failed: `code` and `exit_code` of the error tree, the message and the next thing to type; `cause`: of
    what kind the end of its job was."""

    code: str
    exit_code: int
    message: str
    hint: str = ""
    cause: Cause | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", plain(self.message))
        object.__setattr__(self, "hint", plain(self.hint))


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An earlier attempt of a run: its job, why it ended without success, the steps in its checkpoint, and whether
    flctl opened the next one by itself (`automatic`) or a person did."""

    number: int
    job_id: str | None
    cause: Cause | None
    reason: str
    progress: int | None = None
    automatic: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One piece of work at one site. `number` counts that site's runs from 1; `attempt` counts its tries from 1;
    `past`: the earlier ones, `spent`: node-hours that they used. An open run that is held and has a `failure` waits for
    a person because of what happened to its job."""

    number: int
    order: Order
    stage: Stage = Stage.ORDERED
    attempt: int = 1
    job: Job
    held: Held | None = None
    contribution: Contribution | None = None
    failure: Failure | None = None
    skipped: bool = False
    spent: float = 0.0
    past: tuple[Attempt, ...] = ()
    created_at: float
    changed_at: float
    schema: int = SCHEMA

    @property
    def site(self) -> str:
        return self.order.site

    @property
    def open(self) -> bool:
        return self.stage not in CLOSED


@dataclass(frozen=True, slots=True, kw_only=True)
class RollBack:
    """A decision to go on from an earlier version: `version` is to have the weights of `source`."""

    version: int
    source: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `round` or `campaign start` set out to do: models `first`..`target` by these sites. Plans are numbered from
    1; a run belongs to the plan that ordered it, so that a cancelled plan's failures do not count against the next.
    `evaluates`: the version that these sites are only to evaluate; nothing is made then. `ended`: why it ended before
    its target, which is then the newest version of that moment. `rolled_back`: by this plan and those before it."""

    number: int = 1
    sites: tuple[str, ...]
    first: int
    target: int
    steps: int
    min_sites: int
    skipped: tuple[tuple[int, str], ...] = ()
    evaluates: int | None = None
    ended: str = ""
    rolled_back: tuple[RollBack, ...] = ()
    schema: int = SCHEMA

    def skips(self, version: int) -> frozenset[str]:
        return frozenset(site for number, site in self.skipped if number == version)


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """Who drives a campaign: `host`, what a machine is known by, called `name`; `epoch` counts the take-overs from 1.
    `since`: Unix seconds."""

    host: str
    name: str
    epoch: int = 1
    since: float = 0.0
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One version of the global model, as its flctl.json tells it (`merged`: the (site, run number) pairs in it;
    `rolled_back_to`: the earlier version whose weights it has again)."""

    version: int
    sha256: str
    steps: int = 0
    merged: tuple[tuple[str, int], ...] = ()
    rolled_back_to: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """The base of a campaign's adapters, which no round changes: its files, and sha256 of them all. `adapter`: what a
    reader wants to know of the adapters (r, lora_alpha, target_modules)."""

    sha256: str
    files: tuple[FileEntry, ...]
    adapter: dict[str, typing.Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """A policy's decision: make `version` of these runs, each with its weight before normalisation."""

    version: int
    base: int
    runs: tuple[tuple[str, int], ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """What is remembered of a site between contacts; written only under the site's lock. `due`: Unix seconds of the
    next one, as of `known_at` (a run ordered after that is due at once); `failures`: tries in a row that did not reach
    it; `logins`: authentications ever made for this campaign, the last one at `login_at`, with what is good until
    `login_until` (a certificate, a kept connection); `rsync`: the version that the transfer host has; `free`: bytes
    left in the work folder when it was last asked; `workdir` and `data`: what `resolved`, the profile's two paths,
    mean there; `ask_after`: Unix seconds before which its scheduler is not asked again;
    `serial`: how many processes of ours have begun to work there; `paced`: Unix seconds until which the contacts of
    before would last at an even pace; `skew`: seconds by which our clock was ahead of the site's;
    `frozen`: the folder there in which the frozen base of adapters was found whole."""

    due: float = 0.0
    known_at: float = 0.0
    reached_at: float | None = None
    failures: int = 0
    unreachable_since: float | None = None
    trouble: Failure | None = None
    held: Held | None = None
    logins: int = 0
    login_at: float | None = None
    login_until: float | None = None
    rsync: str | None = None
    free: int | None = None
    workdir: str | None = None
    data: str | None = None
    resolved: tuple[str, str] | None = None
    ask_after: float = 0.0
    serial: int = 0
    paced: float = 0.0
    skew: float | None = None
    frozen: str | None = None
    schema: int = SCHEMA


def _harmless(record: typing.Any, *names: str) -> None:
    """Let these values of a record, which may be a site's words, be short printable lines."""
    for name in names:
        value = getattr(record, name)
        if isinstance(value, str):
            object.__setattr__(record, name, printable(value, 500))


def token_of(campaign: str, site: str, number: int, attempt: int) -> str:
    """The name of one attempt everywhere, `[a-z][a-z0-9]{14}`: a function of these four values and nothing else."""
    digest = int.from_bytes(sha256(f"{campaign}/{site}/{number}/{attempt}".encode()).digest(), "big")
    letters = "0123456789abcdefghijklmnopqrstuvwxyz"
    text = ""
    for _ in range(14):
        digest, place = divmod(digest, len(letters))
        text += letters[place]
    return "f" + text


def seed_of(campaign_seed: int, site: str, number: int) -> int:
    """FLCTL_SEED: 31 bits from the campaign's seed, the site and the run's number; the same in every attempt."""
    return int.from_bytes(sha256(f"{campaign_seed}/{site}/{number}".encode()).digest()[:4], "big") >> 1


def folder_sha256(files: "typing.Iterable[FileEntry]") -> str:
    """sha256 of a folder: that of its sorted lines `<sha256>  <relative path>\\n`, flctl.json left out."""
    lines = sorted(f"{entry.sha256}  {entry.path}\n" for entry in files if entry.path != "flctl.json")
    return sha256("".join(lines).encode()).hexdigest()
