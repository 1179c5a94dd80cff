"""The values flctl keeps: orders, runs, jobs, contributions, plans; frozen, and the codec that makes them JSON."""

import dataclasses
import types
import typing
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from hashlib import sha256

SCHEMA = 1


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Why a run or a site waits for a person, or for a time (`until`, Unix seconds)."""

    reason: str
    since: float
    until: float | None = None


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
    subjects: tuple[Subject, ...] = ()
    merge: SiteMerge | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the scheduler and the site said of one attempt. Times are Unix seconds: `claimed_at`, `started_at` and
    `ended_at` on the site's clock, `absent_at` (first successful listing without the job) on ours. `elapsed`: seconds
    that it ran, as the scheduler counts them; `never`: its words where it says that the job can never run, seen first
    at `never_at` (ours). `rate` and `walltime`: node-hours charged per hour, and seconds, as the budget admitted it."""

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
    gates: dict[str, typing.Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a run failed: `code` and `exit_code` of the error tree, the message and the next thing to type."""

    code: str
    exit_code: int
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One piece of work at one site. `number` counts that site's runs from 1; `attempt` counts its tries from 1;
    `spent`: node-hours that earlier attempts used."""

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
class Plan:
    """What `round` or `campaign start` set out to do: models `first`..`target` by these sites. Plans are numbered from
    1; a run belongs to the plan that ordered it, so that a cancelled plan's failures do not count against the next."""

    number: int = 1
    sites: tuple[str, ...]
    first: int
    target: int
    steps: int
    min_sites: int
    skipped: tuple[tuple[int, str], ...] = ()
    schema: int = SCHEMA

    def skips(self, version: int) -> frozenset[str]:
        return frozenset(site for number, site in self.skipped if number == version)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One version of the global model, as its flctl.json tells it (`merged`: the (site, run number) pairs in it)."""

    version: int
    sha256: str
    steps: int = 0
    merged: tuple[tuple[str, int], ...] = ()


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
    mean there."""

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
    schema: int = SCHEMA


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


def to_data(value: typing.Any) -> typing.Any:
    """A record as JSON-ready data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_data(item) for item in value]
    if isinstance(value, dict):
        return {key: to_data(item) for key, item in value.items()}
    return value


def from_data(kind: typing.Any, data: typing.Any) -> typing.Any:
    """The record of type `kind` that `to_data` wrote. Unknown keys are dropped (a newer flctl may have added them);
    a missing or wrongly typed one raises ValueError."""
    try:
        return _decode(kind, data)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a {getattr(kind, '__name__', kind)}: {error}") from error


@cache
def _hints(kind: type) -> dict[str, typing.Any]:
    return typing.get_type_hints(kind)


def _decode(kind: typing.Any, data: typing.Any) -> typing.Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is typing.Any:
        return data
    if origin in (types.UnionType, typing.Union):
        inner = [argument for argument in arguments if argument is not type(None)]
        return None if data is None else _decode(inner[0], data)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(arguments[0], item) for item in data)
        return tuple(_decode(argument, item) for argument, item in zip(arguments, data, strict=True))
    if origin is dict:
        return dict(data)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{key: _decode(hints[key], item) for key, item in data.items() if key in hints})
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) and not issubclass(kind, StrEnum):
        raise TypeError(f"{data!r} is not a {kind.__name__}")
    return kind(data)
