"""Owns the audit: is every record, model and line of the journal what it was, by the chain that binds them together;
and what crossed each site's border, by the journal (border.py)."""

import time
from dataclasses import dataclass
from typing import Any

from flctl.campaign.audited_runs import look_at_run
from flctl.campaign.border import Crossing, crossings, uninvited
from flctl.campaign.chain import sha_of
from flctl.campaign.look import Difference, Look, record_fault
from flctl.campaign.merging import STATE
from flctl.campaign.rebuilding import Progress, Stop
from flctl.campaign.trail import Trail, trail_of
from flctl.campaign.workspace import Workspace, read_record
from flctl.codec import from_data
from flctl.records import FileEntry, folder_sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was found. `head`: sha256 of the newest model's flctl.json, which the whole chain hangs on; `files` and
    `bytes`: what was hashed; `collected`: model versions whose files flctl gc took."""

    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    crossings: tuple[Crossing, ...]
    logins: dict[str, int]
    head: str
    models: int
    collected: tuple[int, ...]
    lines: int
    files: int
    bytes: int
    seconds: float


def audit(workspace: Workspace, *, progress: Progress | None = None, stop: Stop | None = None) -> Audit:
    """Look at all of a campaign's folder that flctl wrote. Nothing is changed, no site is asked."""
    began = time.monotonic()
    look = Look(
        workspace=workspace,
        trail=trail_of(workspace.journal),
        tell=progress or (lambda what, done, total: None),
        stopped=stop or (lambda: False),
    )
    _models(look)
    _journal(look)
    for path in sorted((workspace.root / "runs").glob("*/*/")):
        if path.name.isdigit():
            look_at_run(look, path)
    newest = max(look.trail.ends, default=0)
    for path in (*sorted(workspace.root.glob("*.json")), *sorted((workspace.root / "runs").glob("*/*.json"))):
        if fault := record_fault(path):
            look.differs(path, newest + 1, fault)
    journal = workspace.journal.path
    files = {version: _entries(record) for version, record in look.records.items()}
    for line, what in uninvited(look.trail, look.done, files):
        look.differs(journal, look.trail.round_of(line), f"line {line}: {what}")
    return Audit(
        differences=tuple(sorted(set(look.differences), key=lambda found: (found.round or 0, found.file, found.what))),
        notes=tuple(look.notes),
        crossings=crossings(look.trail),
        logins={site: _logins(look.trail, site) for site in workspace.profiles},
        head=sha_of(workspace.model_folder(max(look.records)) / "flctl.json") or "" if look.records else "",
        models=len(look.records),
        collected=tuple(sorted(look.collected)),
        lines=len(look.trail.lines),
        files=look.files,
        bytes=look.bytes,
        seconds=time.monotonic() - began,
    )


def _entries(record: dict[str, Any]) -> tuple[FileEntry, ...]:
    return tuple(from_data(FileEntry, item) for item in record["files"])


def _logins(trail: Trail, site: str) -> int:
    return sum(one.entry.get("site") == site for one in trail.sound("login"))


def _models(look: Look) -> None:
    """Newest first: each record is what the journal and the one after it say; then its files."""
    told, workspace = look.trail.models(), look.workspace
    there = {int(path.name) for path in (workspace.root / "models").glob("*/") if path.name.isdigit()}
    for version in range(max([*there, *told], default=-1), -1, -1):
        path = workspace.model_folder(version) / "flctl.json"
        after = (look.records.get(version + 1) or {}).get("previous") or {}
        line = told.get(version)
        named = {
            "the journal": line.entry.get("record") if line else None,
            f"model {version + 1:04d}": after.get("sha256"),
        }
        digest = sha_of(path)
        against = [who for who, sha in named.items() if sha and sha != digest]
        if digest is None:
            # A campaign that was adopted begins with the version that a site had.
            if any(named.values()) or line or version in _parents(look, version + 1):
                look.differs(path, version, "is missing")
        elif against:
            look.differs(path, version, f"is not the record that {' and '.join(against)} name{'s'[len(against) > 1 :]}")
        elif fault := record_fault(path):
            look.differs(path, version, fault)
        else:
            look.records[version] = read_record(path)
            if version and not any(named.values()):
                look.notes.append(
                    f"model {version:04d}: no other record names its own (an older flctl made it, or it was adopted)"
                )
    for version, line in told.items():
        look.trail.ends[version] = line.number
    for version, record in look.records.items():
        anchor = (record.get("journal") or {}).get("line")
        if isinstance(anchor, int):
            look.trail.ends.setdefault(version, anchor + 1)
    for version in sorted(look.records):
        _files_of(look, version)
        _frozen_of(look, version)


def _parents(look: Look, version: int) -> set[Any]:
    return {parent.get("version") for parent in look.records.get(version, {}).get("parents", [])}


def _files_of(look: Look, version: int) -> None:
    record, folder = look.records[version], look.workspace.model_folder(version)
    for item in record.get("contributions", []):
        look.given[item["site"], item["number"]] = {**item, "version": version}
    made_by = record.get("made_by") or {}
    if "number" in made_by:
        look.given[made_by["site"], made_by["number"]] = {**made_by, "version": version}
    if look.is_collected(folder, version):
        look.collected.append(version)
        return
    state = [{**item, "path": f"{STATE}/{item['path']}"} for item in (record.get("state") or {}).get("files", [])]
    entries = tuple(from_data(FileEntry, item) for item in [*record["files"], *state])
    if folder_sha256(entries[: len(record["files"])]) != record["sha256"]:
        look.differs(folder / "flctl.json", version, "names files that are not those of its sha256")
    look.compare(folder, entries, version, besides="flctl.json")


def _frozen_of(look: Look, version: int) -> None:
    """Whether the base of an adapter is still the one that its record names."""
    named, path = look.records[version].get("frozen"), look.workspace.root / "frozen.json"
    if not named or (path.exists() and record_fault(path)):
        return
    frozen = look.workspace.frozen()
    if frozen is None:
        look.differs(path, version, "is missing")
    elif (frozen.sha256, folder_sha256(frozen.files)) != (named, named):
        look.differs(path, version, f"is not of the base that model {version:04d} names")


def _journal(look: Look) -> None:
    path, trail = look.workspace.journal.path, look.trail
    for line, what in trail.damaged.items():
        look.differs(path, trail.round_of(line), f"line {line}: {what}")
    for line, version, what in trail.anchored(look.records):
        look.differs(path, version, f"line {line}: {what}")
