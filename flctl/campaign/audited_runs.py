"""Owns the audit of runs: each one's record, and of every attempt what was sent, what came back and who signed it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flctl.campaign.chain import KEPT, sha_of
from flctl.campaign.look import UNREADABLE, Look, record_fault
from flctl.campaign.signing import unsigned
from flctl.codec import from_data
from flctl.errors import ConfigurationError
from flctl.facility.profile import load_site
from flctl.model.manifest import hash_folder
from flctl.records import FileEntry, Run, Stage, Work, folder_sha256


def look_at_run(look: Look, folder: Path) -> None:
    """A run's record, and of each attempt what was sent and what came back."""
    path, site, number = folder / "run.json", folder.parent.name, int(folder.name)
    item = look.given.get((site, number), {})
    named, digest, run = item.get("records", {}).get("run.json"), sha_of(path), None
    if named and digest != named:
        what = "is missing" if digest is None else f"is not the record that model {item['version']:04d} names"
    else:
        what = record_fault(path) if digest else "is missing"
    if not what:
        try:
            run = look.workspace.run(site, number)
        except ConfigurationError as error:
            what = error.message
    version = run.order.round if run else item.get("version", _ordered(look, folder))
    if what and (digest or item or any(folder.glob("*/done.json"))):
        look.differs(path, version, what)
    for attempt in sorted(folder.glob("*/")):
        if attempt.name.isdigit():
            _attempt(look, attempt, site, number, run, item, version)


def _ordered(look: Look, folder: Path) -> int | None:
    """The round of a run whose record says nothing, by its order."""
    for path in sorted(folder.glob("*/order.json")):
        try:
            found = json.loads(path.read_bytes())["round"]
        except (OSError, *UNREADABLE):
            continue
        if isinstance(found, int):
            return found
    return None


def _attempt(
    look: Look, folder: Path, site: str, number: int, run: Run | None, item: Mapping[str, Any], version: int | None
) -> None:
    attempt = int(folder.name)
    chained = item.get("records", {}) if _is_of(item, run, attempt) else {}
    moved = {one.path: one.sha256 for one in look.trail.moved() if one.site == site}
    for name in KEPT:
        path = folder / name
        wanted = chained.get(name) or moved.get(f"runs/{number:04d}-{attempt}/{name}")
        found = sha_of(path)
        if found is None and name in chained:
            look.differs(path, version, "is missing")
        elif found is not None and wanted is not None and found != wanted:
            look.differs(path, version, "is not what was recorded")
        elif found is not None and wanted is None and name.startswith("done") and not look.trail.damaged:
            look.differs(path, version, "is named by no record")
        elif name == "done.json" and found is not None:
            look.done[site, number, attempt] = _manifest(path)
    if chained.get("done.json.sig") and site in look.workspace.profiles:
        _signature(look, folder, site, version)
    _output(look, folder / "out", run if run and run.attempt == attempt else None, item if chained else {}, version)


def _is_of(item: Mapping[str, Any], run: Run | None, attempt: int) -> bool:
    return bool(item.get("attempt", run.attempt if run else None) == attempt)


def _manifest(path: Path) -> tuple[FileEntry, ...]:
    try:
        return tuple(from_data(FileEntry, item) for item in json.loads(path.read_bytes())["files"])
    except (OSError, *UNREADABLE):
        return ()


def _signature(look: Look, folder: Path, site: str, version: int | None) -> None:
    try:
        content, signature = (folder / "done.json").read_text(), (folder / "done.json.sig").read_text()
        reason = unsigned(load_site(look.workspace.profiles[site]), content, signature)
    except (OSError, ValueError, ConfigurationError):
        return  # what is missing or damaged is told already; a profile that cannot be read pins nobody
    if reason:
        look.differs(folder / "done.json.sig", version, f"does not count any more: {reason}")


def _output(look: Look, folder: Path, run: Run | None, item: Mapping[str, Any], version: int | None) -> None:
    """What was fetched, against the run's record and the model that was made of it."""
    if look.is_collected(folder.parent, version):
        return
    told = run is not None and run.contribution is not None and not run.contribution.sha256
    if not folder.exists() and not item and (told or not (folder.parent / "done.json").exists()):
        return  # adopted from what its site tells: it was never fetched to this folder
    fetched = run is not None and run.stage == Stage.FETCHED and run.order.work != Work.EVALUATE
    entries = run.contribution.files if run and fetched and run.contribution else ()
    wanted = item.get("sha256")
    if entries and wanted in (None, folder_sha256(entries)):
        look.compare(folder, entries, version)
    elif wanted is not None:
        try:
            found = hash_folder(folder)
        except ConfigurationError as error:
            look.differs(folder, version, error.message)
            return
        look.files, look.bytes = look.files + len(found), look.bytes + sum(entry.size for entry in found)
        if folder_sha256(found) != wanted:
            look.differs(folder, version, "is not what was recorded")
