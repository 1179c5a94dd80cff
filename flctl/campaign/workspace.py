"""Owns the campaign folder: paths, locks, atomic records. Records are the truth; nothing is kept in memory."""

import fcntl
import json
import os
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from flctl.campaign.journal import Journal, unwritable
from flctl.errors import ConfigurationError, Locked
from flctl.records import Contact, Model, Plan, Run, from_data, to_data

Record = TypeVar("Record")

LOCK_PATIENCE = 5.0
RESTORE = "restore it from a backup of the campaign's folder; what the sites know is adopted from there"


class Workspace:
    """One campaign's folder. `name` and `id` come from flctl.toml, the rest is read when asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.journal = Journal(root / "journal.jsonl")
        table = read_toml(root / "flctl.toml").get("campaign", {})
        self.name, self.id = str(table.get("name", "")), str(table.get("id", ""))
        if not self.name or not self.id:
            raise ConfigurationError(
                f"{root / 'flctl.toml'}: [campaign] needs name and id", hint="flctl init writes both"
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
        return {path.stem: path for path in sorted((self.root / "sites").glob("*.toml"))}

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

    def plan(self) -> Plan | None:
        path = self.root / "plan.json"
        return _load(Plan, path) if path.exists() else None

    def save_plan(self, plan: Plan) -> None:
        write_json(self.root / "plan.json", to_data(plan))

    def model_record(self, version: int) -> dict[str, Any]:
        """flctl.json of one model version, as data."""
        record = _read_json(self.model_folder(version) / "flctl.json")
        if not isinstance(record, dict) or not {"sha256", "files"} <= record.keys():
            raise ConfigurationError(f"{self.model_folder(version) / 'flctl.json'} is damaged: it names no files")
        return record

    def models(self) -> tuple[Model, ...]:
        """Every version of the global model, oldest first."""
        versions = sorted(
            int(path.parent.name) for path in (self.root / "models").glob("*/flctl.json") if path.parent.name.isdigit()
        )
        return tuple(self._model(version) for version in versions)

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
            )
        except (KeyError, TypeError) as error:
            raise ConfigurationError(f"{self.model_folder(version) / 'flctl.json'}: {error!r} is wrong") from error


@contextmanager
def lock(path: Path, what: str, patience: float) -> Iterator[int]:
    """An exclusive flock on `path`, waited for at most `patience` seconds; Locked after that. The kernel ends it with
    the last process that holds the descriptor, so no lock is ever stale."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
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
    """The whole content or the old one, whatever happens: temporary name, fsync, rename, fsync of the folder."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
        fsync_folder(path.parent)
    except OSError as error:
        _remove(draft)
        raise unwritable(path, error) from error
    except BaseException:
        _remove(draft)
        raise


def _remove(draft: Path) -> None:
    with suppress(OSError):
        draft.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    write_atomic(path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; ConfigurationError with file and line if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path}: {error}", hint=f"correct {path}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is damaged: {error}", hint=RESTORE) from error


def _load(kind: type[Record], path: Path) -> Record:
    try:
        record: Record = from_data(kind, _read_json(path))
    except ValueError as error:
        raise ConfigurationError(f"{path} is damaged: {error}", hint=RESTORE) from error
    return record
