"""Owns looking back at a model version: is it what was recorded, does it come out of its contributions again with
every bit, and a copy of it for others."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flctl.campaign.collected import collected_on, said
from flctl.campaign.config import load_configuration
from flctl.campaign.frozen import base_of
from flctl.campaign.merging import STATE, combined, contribution_folder, sources_of, state_record
from flctl.campaign.workspace import RESTORE, Workspace, fsync_folder, lock
from flctl.codec import from_data
from flctl.errors import ConfigurationError, Interrupted, UsageError
from flctl.model.manifest import hash_file, hash_folder
from flctl.records import FileEntry, folder_sha256

Progress = Callable[[str, int, int], None]
"""What is being done, bytes so far, bytes in all."""
Stop = Callable[[], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """What a look back found. `differing` and `missing`: files and folders of the version and of all it was made from
    that are not what was recorded, or gone, by their paths in the campaign's folder; `remade`: files that came out
    otherwise when the version was made again, `rebuilt` whether it was (a first model is not made from anything, and
    from changed files nothing can be proved); `collected`: the day on which gc took what it was made from. `files`,
    `bytes`: what was hashed."""

    version: int
    sha256: str
    agrees: bool
    rebuilt: bool
    contributions: int
    differing: tuple[str, ...]
    missing: tuple[str, ...]
    remade: tuple[str, ...]
    files: int
    bytes: int
    seconds: float
    collected: str = ""


@dataclass(slots=True, kw_only=True)
class Findings:
    """What is wrong so far, and how much was looked at."""

    differing: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    collected: str = ""
    files: int = 0
    bytes: int = 0

    @property
    def clean(self) -> bool:
        return not self.differing and not self.missing


def rebuild(
    workspace: Workspace, version: int | None = None, *, progress: Progress | None = None, stop: Stop | None = None
) -> Rebuilt:
    """Hash a model version (None: the newest), the frozen base of adapters, and all that the version was made from
    against the records, make it again beside the others from its flctl.json, and compare. Nothing is changed; what was
    made goes away in every case."""
    began = time.monotonic()
    version = whole_version(workspace, version)
    record = workspace.model_record(version)
    told, stopped = progress or _silent, stop or _never
    own, given = Findings(), Findings()
    back = record.get("rolled_back_to") is not None
    theirs = [*_inputs(workspace, record, given)] if record.get("contributions") or back else []
    mine = [*_model_entries(workspace, version, record), *_frozen_entries(workspace)]
    _hash(workspace.root, [(entry, own) for entry in mine] + [(entry, given) for entry in theirs], told, stopped)
    if folder_sha256(_entries(record["files"])) != record["sha256"]:
        own.differing.append(_place(workspace, workspace.model_folder(version) / "flctl.json"))
    possible = bool(record.get("contributions") or back) and given.clean and not given.collected
    remake = _copied if back else _remade
    remade = remake(workspace, version, record, told, stopped) if possible else ()
    return Rebuilt(
        version=version,
        sha256=record["sha256"],
        agrees=own.clean and given.clean and not remade,
        rebuilt=possible,
        contributions=len(record.get("contributions", [])),
        differing=tuple(own.differing + given.differing),
        missing=tuple(own.missing + given.missing),
        remade=remade,
        files=own.files + given.files,
        bytes=own.bytes + given.bytes,
        seconds=time.monotonic() - began,
        collected=given.collected,
    )


def whole_version(workspace: Workspace, version: int | None) -> int:
    """The version itself, or the newest. UsageError if there is no such version, or if gc took its files."""
    version = known_version(workspace, version)
    if day := collected_on(workspace.model_folder(version)):
        raise UsageError(
            said(f"model {version:04d}", day),
            hint="its record is kept; its files are where you copied them, if you did: flctl export before flctl gc",
        )
    return version


def known_version(workspace: Workspace, version: int | None) -> int:
    """The version itself, or the newest. UsageError if there is no such version."""
    versions = [model.version for model in workspace.models()]
    if version is None:
        return workspace.newest_model().version
    if version not in versions:
        raise UsageError(
            f"the campaign has no model {version:04d}",
            hint=f"it has {versions[0]:04d} to {versions[-1]:04d}" if versions else "flctl init makes the first",
        )
    return version


def _inputs(workspace: Workspace, record: Mapping[str, Any], found: Findings) -> Iterable[FileEntry]:
    """What a version was made from: contributions, their bases, the base's state. Records that are wrong are found."""
    (parent,) = record["parents"]
    for base in sorted({parent["version"], *(item["base"] for item in record["contributions"])}):
        path = workspace.model_folder(base) / "flctl.json"
        if not path.is_file():
            found.missing.append(_place(workspace, path))
            continue
        its = workspace.model_record(base)
        if base == parent["version"] and its["sha256"] != parent["sha256"]:
            found.differing.append(_place(workspace, path))
        if day := collected_on(path.parent):
            found.collected = day
            continue
        yield from _model_entries(workspace, base, its if base == parent["version"] else {**its, "state": None})
    for item in record["contributions"]:
        yield from _contribution_entries(workspace, item, found)


def _contribution_entries(workspace: Workspace, item: Mapping[str, Any], found: Findings) -> list[FileEntry]:
    """The files of a contribution as its run's record lists them, if that is what the model was made from."""
    folder = contribution_folder(workspace, item)
    if day := collected_on(folder.parent):
        found.collected = day
        return []
    if not folder.is_dir():
        found.missing.append(_place(workspace, folder))
        return []
    try:
        contribution = workspace.run(item["site"], item["number"]).contribution
    except ConfigurationError:
        contribution = None
    entries = contribution.files if contribution else ()
    if folder_sha256(entries) != item["sha256"]:
        entries = hash_folder(folder)
        if folder_sha256(entries) != item["sha256"]:
            found.differing.append(_place(workspace, folder))
    return _placed(workspace, folder, entries)


def _model_entries(workspace: Workspace, version: int, record: Mapping[str, Any]) -> list[FileEntry]:
    folder, state = workspace.model_folder(version), record.get("state") or {"files": []}
    files, remembered = _entries(record["files"]), _entries(state["files"])
    return [*_placed(workspace, folder, files), *_placed(workspace, folder / STATE, remembered)]


def _frozen_entries(workspace: Workspace) -> list[FileEntry]:
    """The frozen base of adapters, if it is here: a campaign whose sites have it can do without."""
    frozen, folder = workspace.frozen(), Path(load_configuration(workspace).campaign.frozen or "/nonexistent")
    return [replace(e, path=str(folder / e.path)) for e in frozen.files] if frozen and folder.is_dir() else []


def _hash(root: Path, expected: list[tuple[FileEntry, Findings]], told: Progress, stopped: Stop) -> None:
    """Every file against its entry, whose path is relative to `root`."""
    before, total = 0, sum(entry.size for entry, _ in expected)

    def read(size: int) -> None:
        if stopped():
            raise Interrupted("stopped while checking; nothing was changed")
        told("checking files", min(before + size, total), total)

    for entry, found in expected:
        if not (root / entry.path).is_file():
            found.missing.append(entry.path)
        elif hash_file(root, entry.path, read) != entry:
            found.differing.append(entry.path)
        found.files, found.bytes, before = found.files + 1, found.bytes + entry.size, before + entry.size


def _remade(
    workspace: Workspace, version: int, record: Mapping[str, Any], told: Progress, stopped: Stop
) -> tuple[str, ...]:
    """The files, the state's among them, that come out otherwise than recorded."""
    from flctl.model.shards import open_shards

    base, target = record["parents"][0]["version"], workspace.model_folder(version)
    total = open_shards(workspace.model_folder(base)).size
    draft = target.parent / f".{target.name}.verify"
    with lock(workspace.root / "verify.lock", "verification", 0.0):
        shutil.rmtree(draft, ignore_errors=True)
        try:
            made, _ = combined(
                workspace,
                base,
                sources_of(workspace, base, record["contributions"]),
                draft,
                record,
                progress=lambda done: told(f"making model {version:04d} again", done, total),
                stop=stopped,
            )
            remembered = (state_record(made.state) or {"files": []})["files"]
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    came = [*_placed(workspace, target, made.files), *_placed(workspace, target / STATE, _entries(remembered))]
    return tuple(sorted({entry.path for entry in {*came} ^ {*_model_entries(workspace, version, record)}}))


def _copied(
    workspace: Workspace, version: int, record: Mapping[str, Any], told: Progress, stopped: Stop
) -> tuple[str, ...]:
    """The files, the state's among them, in which a version differs from the one that it has the weights of."""
    source = record["rolled_back_to"]
    theirs, target = workspace.model_record(source), workspace.model_folder(version)
    came = [*_placed(workspace, target, _entries(theirs["files"]))]
    came += _placed(workspace, target / STATE, _entries((theirs.get("state") or {"files": []})["files"]))
    return tuple(sorted({entry.path for entry in {*came} ^ {*_model_entries(workspace, version, record)}}))


def export(workspace: Workspace, version: int | None, out: Path) -> tuple[FileEntry, ...]:
    """Copy a model's files, and nothing else that lies beside them, to the new folder `out`, which any library can
    open. Each is hashed on its way; ConfigurationError, and no folder, if one is not what was recorded. Locked if
    another process is making the same folder."""
    from flctl.model.draft import fresh_draft

    version = whole_version(workspace, version)
    source, files = workspace.model_folder(version), _entries(workspace.model_record(version)["files"])
    with _new_folder(out) as draft, fresh_draft(draft, needed=sum(entry.size for entry in files)) as made:
        for entry in files:
            made.copy(source, entry.path)
            _check_same(source, entry, made.entries[-1], version)
    return files


def export_merged(
    workspace: Workspace,
    version: int | None,
    out: Path,
    *,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> tuple[FileEntry, ...]:
    """The frozen base with the adapter of a version added to its weights, as a new folder `out`; else as `export`.
    UsageError where the models are no adapters."""
    from flctl.model.merged import write_merged

    version = whole_version(workspace, version)
    frozen, base = base_of(workspace)
    folder, told = workspace.model_folder(version), progress or _silent
    for entry in _entries(workspace.model_record(version)["files"]):
        _check_same(folder, entry, hash_file(folder, entry.path), version)
    with _new_folder(out) as draft:
        return write_merged(
            base, frozen.files, folder, draft, stop=stop, progress=lambda done, all_: told("merging", done, all_)
        )


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder in the making, which gets its name if the block ends without an error."""
    from flctl.model.draft import translated
    from flctl.model.place import alone

    out = out.absolute()
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigurationError(
            f"{out} exists and is no empty folder; flctl export never overwrites", hint="name another folder"
        )
    with alone(out) as draft:
        yield draft
        try:
            draft.rename(out)
        except OSError as error:
            raise translated(error, out) from error
    fsync_folder(out.parent)


def _check_same(folder: Path, entry: FileEntry, found: FileEntry, version: int) -> None:
    if found != entry:
        raise ConfigurationError(
            f"{folder / entry.path} is not what it was when it was recorded",
            hint=f"flctl verify {version} looks at all of it; restore it from a backup, or from a site",
        )


def _entries(data: Iterable[Mapping[str, Any]]) -> tuple[FileEntry, ...]:
    try:
        return tuple(from_data(FileEntry, item) for item in data)
    except ValueError as error:
        raise ConfigurationError(f"a model's flctl.json is damaged: {error}", hint=RESTORE) from error


def _placed(workspace: Workspace, folder: Path, entries: Iterable[FileEntry]) -> list[FileEntry]:
    """The entries with paths in the campaign's folder."""
    return [replace(entry, path=f"{_place(workspace, folder)}/{entry.path}") for entry in entries]


def _place(workspace: Workspace, path: Path) -> str:
    return path.relative_to(workspace.root).as_posix()


def _silent(what: str, done: int, total: int) -> None:
    pass


def _never() -> bool:
    return False
