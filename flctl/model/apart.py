"""A rule's state for merges without a campaign: which one belongs to the base, and, where the user keeps it in a folder
of its own, its replacement by the next one, at no moment of which there is none."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flctl.errors import AggregationRefused, ConfigurationError, Interrupted
from flctl.model.draft import translated
from flctl.model.manifest import RECORD, hash_file, model_files
from flctl.model.shards import open_shards
from flctl.model.state import FOLDER, State, read_state
from flctl.records import folder_sha256

Stop = Callable[[], bool]
ANEW = "to begin anew, give --state an empty folder"


def find_state(base: Path, kept: Path | None, stop: Stop = lambda: False) -> State | None:
    """What the rule goes on from: the state kept in that folder, else the one beside the base; None: it begins, as it
    does wherever the folder is empty.

    A replacement that was interrupted is brought to its end. AggregationRefused if the state belongs to another model,
    ConfigurationError if it is damaged; its sizes are looked at, its hashes are not."""
    found = _kept(base, kept, stop) if kept else None
    if found is None and (base / FOLDER).exists() and not (kept and begins_anew(kept)):
        found = _belonging(base / FOLDER, identity(base, stop))
        if found is None:
            raise _mismatch(base / FOLDER, base, ANEW)
    if found is not None:
        _check_sizes(found)
    return found


def begins_anew(kept: Path) -> bool:
    """An empty folder that is there says so; one that is not may be a slip of the pen."""
    return kept.is_dir() and not any(kept.iterdir())


def had_state(base: Path, rule: str, *, master: bool) -> str:
    """The rule that left a state with the base, by the base's own record, if `rule` (or, with `master`, any rule that
    finds its master weights there) would go on from it; else nothing."""
    record = own_record(base)
    state = record.get("state")
    left = str(state.get("rule")) if isinstance(state, dict) else ""
    return left if left == rule or (master and record.get("master")) else ""


def identity(base: Path, stop: Stop = lambda: False) -> str:
    """sha256 of the base's folder: what its flctl.json says, else that of its files."""

    def read(size: int) -> None:
        if stop():
            raise Interrupted("stopped before the merge; nothing was written")

    if record := own_record(base):
        return str(record["sha256"])
    entries = []
    for path in model_files(open_shards(base)):
        file = (base / path).resolve()  # a hub's cache is made of links
        entries.append(replace(hash_file(file.parent, file.name, read), path=path))
    return folder_sha256(entries)


def own_record(folder: Path) -> Mapping[str, Any]:
    """flctl.json of a model folder; empty if it has none."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("sha256"), str):
        raise ConfigurationError(f"{path} is damaged: it names no sha256", hint="restore it, or remove it")
    return record


def stage(state: Path, kept: Path) -> None:
    """Move the new state beside the folder that it will replace, whatever file system that is on. It is on the disk
    for good when this returns."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        unstage(kept)
        try:
            state.rename(_next(kept))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy(state, _next(kept))
            shutil.rmtree(state)
        sync(kept.parent)
    except OSError as error:
        unstage(kept)
        raise translated(error, kept) from error


def unstage(kept: Path) -> None:
    shutil.rmtree(_next(kept), ignore_errors=True)


def install(kept: Path) -> None:
    """The staged state takes the folder's place; the one before goes last."""
    try:
        if kept.exists():
            shutil.rmtree(_last(kept), ignore_errors=True)
            kept.rename(_last(kept))
        _next(kept).rename(kept)
        sync(kept.parent)
    except OSError as error:
        raise translated(error, kept) from error
    shutil.rmtree(_last(kept), ignore_errors=True)


def sync(path: Path) -> None:
    """A file's content, or a folder's names, are on the disk for good."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _kept(base: Path, kept: Path, stop: Stop) -> State | None:
    places = [place for place in (kept, _next(kept), _last(kept)) if _holds_something(place)]
    if not places:
        return None
    model = identity(base, stop)
    if places[0] == kept and (found := _belonging(kept, model)):
        return found
    if _next(kept) in places and _belonging(_next(kept), model):  # killed between the model's renaming and the state's
        install(kept)
        return _belonging(kept, model)
    if kept not in places and _last(kept) in places:
        _last(kept).rename(kept)
        return _kept(base, kept, stop)
    if kept not in places:
        return None
    raise _mismatch(kept, base, f"give --base the model it belongs to; {ANEW}")


def _holds_something(place: Path) -> bool:
    return place.exists() and not (place.is_dir() and not any(place.iterdir()))


def _belonging(place: Path, model: str) -> State | None:
    state = read_state(place)
    return state if state is not None and state.model == model else None


def _mismatch(place: Path, base: Path, hint: str) -> AggregationRefused:
    return AggregationRefused(f"{place} is the state of another model, not of {base}", hint=hint)


def _check_sizes(state: State) -> None:
    for entry in state.files:
        path = state.folder / entry.path
        size = path.stat().st_size if path.is_file() else None
        if size != entry.size:
            found = "is missing" if size is None else f"has {size} bytes, not {entry.size}"
            raise ConfigurationError(f"{path} {found}", hint=f"restore it from a backup; {ANEW}")


def _copy(state: Path, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(state, part)
        for folder, _, names in os.walk(part):
            for path in (*(Path(folder, name) for name in names), Path(folder)):
                sync(path)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _next(kept: Path) -> Path:
    return kept.with_name(f".{kept.name}.new")


def _last(kept: Path) -> Path:
    return kept.with_name(f".{kept.name}.old")
