"""Owns the files of a merge at a site: the rule's state that goes there, and what may come back, checked."""

from pathlib import Path
from typing import TYPE_CHECKING

from flctl.campaign.merging import STATE, state_of
from flctl.campaign.workspace import Workspace
from flctl.errors import AggregationRefused, ConfigurationError
from flctl.records import FileEntry, Order, Run, SiteMerge, folder_sha256

if TYPE_CHECKING:
    from flctl.model.state import Layout

STATE_RECORD_MOST = 16 << 20
"""Bytes of state.json, which names the state's files."""


def asked_of(order: Order) -> SiteMerge:
    if order.merge is None:
        raise ValueError(f"the order for model {order.round} at {order.site} is no merge")
    return order.merge


def state_name(version: int) -> str:
    """What the folder of a rule's state is called among the models of a site."""
    return f"{version:04d}-state"


def state_files(workspace: Workspace, version: int) -> tuple[FileEntry, ...]:
    """The files of what a rule left beside a model version, state.json among them; none if it left nothing."""
    from flctl.model.manifest import hash_file
    from flctl.model.state import RECORD

    state = state_of(workspace, version)
    return (*state.files, hash_file(state.folder, RECORD)) if state else ()


def allowed(workspace: Workspace, run: Run, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
    """The files to fetch: weights and state, of exactly the sizes they must have. Index, config, tokenizer and the like
    are the base's own, so they need not travel. AggregationRefused if one is missing or of another size."""
    sizes = sizes_of(workspace, run.order)
    record = _state_record() if any(path.startswith(f"{STATE}/") for path in sizes) else None
    chosen = tuple(entry for entry in files if entry.path in sizes or entry.path == record)
    found = {entry.path: entry.size for entry in chosen}
    if record:
        sizes[record] = min(found.get(record, 1), STATE_RECORD_MOST)
    for path, size in sizes.items():
        if found.get(path) != size:
            what = f"{found[path]:,} bytes of {path} instead of {size:,}" if path in found else f"no {path}"
            raise _refused(run, f"the merge wrote {what}")
    return chosen


def sizes_of(workspace: Workspace, order: Order) -> dict[str, int]:
    """The bytes of every file of weights and state that the order makes, by path; state.json, whose size only the merge
    knows, left out."""
    sizes: dict[str, int] = {}
    for layout in _layouts(workspace, order):
        sizes |= {layout.path(file): size for file, size in layout.sizes.items()}
        if layout.index:
            sizes[layout.path(layout.index[0])] = len(layout.index[1])
    return sizes


def own_files(files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
    """The model's among the files of a fetched merge."""
    return tuple(entry for entry in files if not entry.path.startswith(f"{STATE}/"))


def check_made(workspace: Workspace, run: Run, folder: Path, files: tuple[FileEntry, ...]) -> None:
    """AggregationRefused unless every file's tensors lie where this merge puts them, and the state is the one that its
    rule leaves beside this very model."""
    layouts = _layouts(workspace, run.order)
    for layout in layouts:
        for file, begin in (*layout.headers.items(), *([layout.index] if layout.index else ())):
            with (folder / layout.path(file)).open("rb") as stream:
                if stream.read(len(begin)) != begin:
                    raise _refused(run, f"{layout.path(file)} does not tell of the tensors that it must")
    if len(layouts) > 1:
        _check_state(workspace, run, folder, files)


def _check_state(workspace: Workspace, run: Run, folder: Path, files: tuple[FileEntry, ...]) -> None:
    from flctl.model.state import read_state

    try:
        made = read_state(folder / STATE)
    except ConfigurationError as error:
        raise _refused(run, error.message) from error
    if made is None:
        raise _refused(run, "the merge left no state")
    before, asked = state_of(workspace, run.order.base), asked_of(run.order)
    step = before.step + 1 if before and before.rule == asked.rule else 1
    there = {e.path: e.sha256 for e in files if e.path.startswith(f"{STATE}/") and e.path != _state_record()}
    if (made.rule, made.step) != (asked.rule, step):
        raise _refused(run, f"the state is step {made.step} of {made.rule}, not step {step} of {asked.rule}")
    if made.model != folder_sha256(own_files(files)):
        raise _refused(run, "the state belongs to another model")
    if {f"{STATE}/{entry.path}": entry.sha256 for entry in made.files} != there:
        raise _refused(run, f"{_state_record()} names other files than there are")


def _layouts(workspace: Workspace, order: Order) -> "list[Layout]":
    """Where the tensors of the model and of each state will lie."""
    from flctl.model.header import MASTER
    from flctl.model.rules import find_rule, options_of
    from flctl.model.shards import open_shards
    from flctl.model.state import model_layout, state_layout

    asked = asked_of(order)
    ours = open_shards(workspace.model_folder(order.base))
    rule = find_rule(asked.rule).with_options(options_of(asked.rule, asked.options))
    outputs = (*rule.state, *([MASTER] if asked.master else ()))
    return [model_layout(ours), *(state_layout(ours, name) for name in outputs)]


def _state_record() -> str:
    from flctl.model.state import RECORD

    return f"{STATE}/{RECORD}"


def _refused(run: Run, reason: str) -> AggregationRefused:
    return AggregationRefused(reason, hint=f"flctl log {run.site}, then flctl retry {run.site}", site=run.site)
