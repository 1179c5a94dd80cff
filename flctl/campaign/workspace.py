"""Owns the campaign folder: paths, locks, atomic records. Records are the truth; nothing is kept in memory."""

import errno
import fcntl
import json
import os
import re
import stat
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from flctl.campaign.journal import Journal, unwritable
from flctl.codec import SCHEMA, from_data, sealed, to_data, unsealed
from flctl.durable import fsync_folder, make_folder, read_plain, write_whole
from flctl.errors import BudgetRefused, ConfigurationError, Locked
from flctl.records import Contact, Driver, Frozen, Model, Plan, Run
from flctl.words import plain

__all__ = ["Workspace", "fsync_folder", "lock", "read_toml", "write_atomic", "write_json"]

Record = TypeVar("Record")

LOCK_PATIENCE = 5.0
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
"""NAME-ID: a folder's name, never a way out of the folder that it is in."""
RESTORE = "restore it from a backup of the campaign's folder, or rebuild the folder from the sites: flctl adopt --help"
ROOM, ROOM_FILES = 1 << 20, 32
"""Bytes and files that must be free at home before anything is asked of a site: its records have to be written."""


class Workspace:
    """One campaign's folder. `name` and `id` come from flctl.toml, the rest is read when asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        _check_private(root)
        self.journal = Journal(root / "journal.jsonl")
        table = read_toml(root / "flctl.toml").get("campaign", {})
        self.name, self.id = str(table.get("name", "")), str(table.get("id", ""))
        if not self.name or not self.id:
            raise ConfigurationError(
                f"{root / 'flctl.toml'}: [campaign] needs name and id", hint="flctl init writes both"
            )
        if not PLAIN.fullmatch(self.label):
            raise ConfigurationError(
                f"{root / 'flctl.toml'}: the campaign's folder at the sites cannot be called {self.label!r}",
                hint="name and id are letters, digits, - and _, as flctl init writes them",
            )

    @classmethod
    def find(cls, explicit: Path | None, environ: Mapping[str, str], start: Path) -> "Workspace":
        """The campaign of a command: `-C DIR`, else FLCTL_CAMPAIGN, else the nearest folder upwards from `start`."""
        named = explicit or (Path(environ["FLCTL_CAMPAIGN"]) if environ.get("FLCTL_CAMPAIGN") else None)
        if named is not None:
            if not (named / "flctl.toml").is_file():
                raise ConfigurationError(
                    f"{named} is not a campaign: it has no flctl.toml",
                    hint=f"flctl init {named} --sites ... --model ...",
                )
            return cls(named.resolve())
        for folder in (start, *start.parents):
            if (folder / "flctl.toml").is_file():
                return cls(folder)
        raise ConfigurationError(
            f"no campaign here: no flctl.toml in {start} or above",
            hint="cd into one, give -C DIR, or make one: flctl init DIR --sites ... --model ...",
        )

    @property
    def label(self) -> str:
        """The campaign's folder name at every site."""
        return f"{self.name}-{self.id}"

    # Paths

    def model_folder(self, version: int) -> Path:
        return self.root / "models" / f"{version:04d}"

    def site_folder(self, site: str) -> Path:
        return self.root / "runs" / site

    def run_folder(self, site: str, number: int) -> Path:
        return self.site_folder(site) / f"{number:04d}"

    def attempt_folder(self, run: Run) -> Path:
        return self.run_folder(run.site, run.number) / str(run.attempt)

    @property
    def profiles(self) -> dict[str, Path]:
        paths = sorted((self.root / "sites").glob("[!.]*.toml"))  # an editor's own begin with a dot
        found = {path.stem: path for path in paths}
        if strange := next((name for name in found if not PLAIN.fullmatch(name)), None):
            raise ConfigurationError(
                f"{str(found[strange])!r} is no name of a site's profile", hint="rename it, or take it out of sites/"
            )
        return found

    def check_room(self) -> None:
        """BudgetRefused or ConfigurationError if records cannot be written: asked before what has effects at a site."""
        path = self.root / "runs"
        try:
            system = os.statvfs(self.root)
        except OSError as error:
            raise unwritable(path, error) from error
        if system.f_flag & os.ST_RDONLY:
            raise unwritable(path, OSError(errno.EROFS, os.strerror(errno.EROFS)))
        # Some network file systems tell nothing: 0 blocks, 0 files.
        full = system.f_blocks and system.f_bavail * system.f_frsize < ROOM
        if full or (system.f_files and system.f_favail < ROOM_FILES):
            what = "less than 1 MiB is free" if full else "hardly a file can be made there any more (inodes)"
            raise BudgetRefused(f"{path}: {what}", hint="make room; the same command goes on from here")

    # Locks

    @contextmanager
    def lock_site(self, site: str, *, patience: float = LOCK_PATIENCE) -> Iterator[int]:
        """Whoever holds the site's lock may move its runs. Yields the descriptor, for children to inherit."""
        with lock(self.site_folder(site) / "lock", f"site {site}", patience) as descriptor:
            yield descriptor

    @contextmanager
    def lock_campaign(self, *, patience: float = LOCK_PATIENCE) -> Iterator[int]:
        """The campaign's lock: whoever holds it may decide: merge, and give orders."""
        with lock(self.root / "lock", "campaign", patience) as descriptor:
            yield descriptor

    # Records

    def runs(self, site: str | None = None) -> tuple[Run, ...]:
        pattern = f"{site or '*'}/*/run.json"
        return tuple(_load(Run, path) for path in sorted((self.root / "runs").glob(pattern)))

    def run(self, site: str, number: int) -> Run:
        return _load(Run, self.run_folder(site, number) / "run.json")

    def save_run(self, run: Run) -> None:
        write_json(self.run_folder(run.site, run.number) / "run.json", to_data(run))

    def contact(self, site: str) -> Contact:
        path = self.site_folder(site) / "contact.json"
        return _load(Contact, path) if path.exists() else Contact()

    def save_contact(self, site: str, contact: Contact) -> None:
        write_json(self.site_folder(site) / "contact.json", to_data(contact))

    def driver(self) -> Driver | None:
        path = self.root / "driver.json"
        return _load(Driver, path) if path.exists() else None

    def save_driver(self, driver: Driver) -> None:
        write_json(self.root / "driver.json", to_data(driver))

    def plan(self) -> Plan | None:
        path = self.root / "plan.json"
        return _load(Plan, path) if path.exists() else None

    def save_plan(self, plan: Plan) -> None:
        write_json(self.root / "plan.json", to_data(plan))

    def frozen(self) -> Frozen | None:
        """The frozen base of the campaign's adapters; None where whole models travel."""
        path = self.root / "frozen.json"
        return _load(Frozen, path) if path.exists() else None

    def model_record(self, version: int) -> dict[str, Any]:
        """flctl.json of one model version, as data."""
        record = read_record(self.model_folder(version) / "flctl.json")
        if not isinstance(record.get("sha256"), str) or not isinstance(record.get("files"), list):
            raise ConfigurationError(f"{self.model_folder(version) / 'flctl.json'} is damaged: it names no files")
        return record

    def models(self) -> tuple[Model, ...]:
        """Every version of the global model, oldest first."""
        versions = sorted(
            int(path.parent.name) for path in (self.root / "models").glob("*/flctl.json") if path.parent.name.isdigit()
        )
        return tuple(self._model(version) for version in versions)

    def has_model(self, version: int) -> bool:
        return (self.model_folder(version) / "flctl.json").is_file()

    def newest_model(self) -> Model:
        models = self.models()
        if not models:
            raise ConfigurationError(f"{self.root / 'models'} holds no model", hint="flctl init makes models/0000")
        return models[-1]

    def _model(self, version: int) -> Model:
        record = self.model_record(version)
        try:
            return Model(
                version=version,
                sha256=record["sha256"],
                steps=record.get("steps", 0),
                merged=tuple((item["site"], item["number"]) for item in record.get("contributions", [])),
                rolled_back_to=record.get("rolled_back_to"),
            )
        except (KeyError, TypeError) as error:
            raise ConfigurationError(f"{self.model_folder(version) / 'flctl.json'}: {error!r} is wrong") from error


@contextmanager
def lock(path: Path, what: str, patience: float) -> Iterator[int]:
    """An exclusive flock on `path`, waited for at most `patience` seconds; Locked after that. The kernel ends it with
    the last process that holds the descriptor, so no lock is ever stale."""
    try:
        make_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise unwritable(path, error) from error
    deadline = time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Locked(
                        f"another flctl is working on the {what} and holds {path}",
                        hint="wait for it to end, or find it: fuser -v " + str(path),
                    ) from None
                time.sleep(0.05)
        yield descriptor
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """The whole content or the old one, whatever happens; for good when this returns."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise unwritable(path, error) from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """A record, with its schema and its checksum."""
    write_atomic(path, (json.dumps(sealed(data), indent=1, ensure_ascii=False) + "\n").encode())


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; ConfigurationError with file and line if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path}: {error}", hint=f"correct {path}") from error


def read_record(path: Path) -> dict[str, Any]:
    """A record's data without its checksum. ConfigurationError if it is damaged, if it is a link, or if a newer flctl
    wrote it."""
    try:
        data = json.loads(read_plain(path))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is damaged: {error}", hint=RESTORE) from error
    try:
        record: dict[str, Any] = _harmless(unsealed(data))
    except ValueError as error:
        raise ConfigurationError(f"{path} is damaged: {error}", hint=RESTORE) from error
    if record.get("schema", 1) not in range(1, SCHEMA + 1):
        raise ConfigurationError(
            f"{path} was written by a newer flctl: its schema is {record['schema']!r}, this one knows up to {SCHEMA}",
            hint="nothing was changed; go on with that flctl, or a newer one: pip install --upgrade flctl",
        )
    return record


def _harmless(value: Any) -> Any:
    """A record's data with harmless words: whoever made the folder may have written them."""
    if isinstance(value, dict):
        return {plain(key): _harmless(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_harmless(item) for item in value]
    return plain(value) if isinstance(value, str) else value


def _load(kind: type[Record], path: Path) -> Record:
    record = read_record(path)
    try:
        value: Record = from_data(kind, record)
    except ValueError as error:
        raise ConfigurationError(f"{path} is damaged: {error}", hint=RESTORE) from error
    return value


def _check_private(root: Path) -> None:
    """ConfigurationError if somebody else may change the campaign: they could make flctl do anything in our name."""
    try:
        found = root.stat()
    except OSError as error:
        raise ConfigurationError(f"{root}: {error.strerror}") from error
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigurationError(f"{root} may be changed by other users", hint=f"chmod go-w {root}")
    if found.st_uid not in (os.geteuid(), 0) and os.geteuid() != 0:
        raise ConfigurationError(f"{root} belongs to another user", hint="work on a campaign of your own")
