"""Aggregation without a campaign: any checkpoint folders, through a rule, into a new folder."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flctl.codec import to_data
from flctl.errors import AggregationRefused, ConfigurationError, Interrupted, UsageError
from flctl.model import apart
from flctl.model.draft import translated
from flctl.model.header import MASTER
from flctl.model.manifest import RECORD
from flctl.model.pipeline import default_threads
from flctl.model.place import alone
from flctl.model.ranks import ALONE, Ranks
from flctl.model.request import Checked, Part, Request, checked
from flctl.model.shards import open_shards
from flctl.model.state import FOLDER, State
from flctl.records import folder_sha256

if TYPE_CHECKING:
    from flctl.model.adapters import AdapterReport
    from flctl.model.merge import Made, Recipe, Source

SCHEMA = 1
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregated:
    """The model made: `bytes` of all its files, `parts` in the order in which they were added, `coefficients` by label.
    `state` is where the rule's state now lies; `notes`: what was decided where nothing was said."""

    folder: Path
    sha256: str
    bytes: int
    seconds: float
    threads: int
    base: Path
    parts: tuple[Part, ...]
    coefficients: dict[str, float]
    state: Path | None
    adapters: "AdapterReport | None"
    notes: tuple[str, ...]


def aggregate(
    request: Request,
    *,
    ranks: Ranks = ALONE,
    progress: Progress = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> Aggregated:
    """Make the model, whole or not at all. `progress` is told the bytes of weights that are done, and of how many.

    Raises what checked(), find_state() and merge() do, and Locked if another process is making the same model."""
    asked = _checked(request, ranks)
    total = ranks.together(lambda: _size(asked.base))
    ranks.together(_loaded)
    with _workplace(asked.out, ranks) as draft:
        began = time.monotonic()
        found = ranks.together(lambda: _state(request, asked, stop) if ranks.first else None)
        state, notes = ranks.shared(found) or (None, ())
        work = _work(request, asked, draft, state, lambda done: progress(done, total), stop)
        made, report = _made(request, asked, work, ranks)
        result = Aggregated(
            folder=asked.out,
            sha256=folder_sha256(made.files),
            bytes=sum(entry.size for entry in made.files),
            seconds=time.monotonic() - began,
            threads=request.threads or default_threads(),
            base=asked.base,
            parts=asked.parts,
            coefficients={label: value for (label, _), value in made.coefficients.items()},
            state=(asked.state or asked.out / FOLDER) if made.state else None,
            adapters=report,
            notes=(*asked.notes, *notes),
        )
        ranks.together(lambda: _finish(request, asked, made, work, result) if ranks.first else None)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    sources: "list[Source]"
    draft: Path
    recipe: "Recipe"
    state: State | None
    progress: Callable[[int], None]
    stop: Callable[[], bool]


def _work(
    request: Request,
    asked: Checked,
    draft: Path,
    state: State | None,
    progress: Callable[[int], None],
    stop: Callable[[], bool],
) -> _Work:
    from flctl.model.merge import Recipe, Source

    sources = [
        Source(site=part.label, number=1, folder=part.folder, weight=part.weight, steps=part.steps, base=part.base)
        for part in asked.parts
    ]
    recipe = Recipe(rule=request.rule, options=request.options, master=request.master)
    return _Work(sources=sources, draft=draft, recipe=recipe, state=state, progress=progress, stop=stop)


def _checked(request: Request, ranks: Ranks) -> Checked:
    """The same for all ranks, or ConfigurationError: relative paths mean what the folder makes of them that each rank
    was started in."""
    asked = ranks.together(lambda: checked(request))
    meant = (asked.out, asked.base, asked.state, [(part.folder, part.base) for part in asked.parts])
    firsts = ranks.shared(meant)

    def compare() -> None:
        if meant != firsts:
            raise ConfigurationError(
                f"rank {ranks.rank} stands in {Path.cwd()}, where the paths name other folders than rank 0's",
                hint="start all ranks in one folder",
            )

    ranks.together(compare)
    return asked


def _loaded() -> None:
    """torch, whose import is not part of the work, and may fail on one machine."""
    import flctl.model.merge  # noqa: F401


def _size(base: Path) -> int:
    """The bytes of the model's weights."""
    shards = open_shards(base)
    if not any(tensor.averaged for tensor in shards.tensors.values()):
        raise AggregationRefused(f"{base}: no tensor of a float dtype, so nothing to average")
    return shards.size


def _made(request: Request, asked: Checked, work: _Work, ranks: Ranks) -> "tuple[Made, AdapterReport | None]":
    if request.adapters == "mean":
        from flctl.model.merge import merge

        made = merge(
            asked.base,
            work.sources,
            work.draft,
            recipe=work.recipe,
            state=work.state,
            progress=work.progress,
            stop=work.stop,
            threads=request.threads,
            ranks=ranks,
        )
        return made, None
    from flctl.model.adapters import merge_adapters

    whole = ranks.together(  # small enough for one
        lambda: (
            merge_adapters(
                work.sources,
                work.draft,
                method=request.adapters,
                rank=request.rank,
                base=request.base and asked.base,
                recipe=work.recipe,
                state=work.state,
                progress=work.progress,
                stop=work.stop,
            )
            if ranks.first
            else None
        )
    )
    return cast("tuple[Made, AdapterReport]", ranks.shared(whole))


@contextmanager
def _workplace(out: Path, ranks: Ranks) -> Iterator[Path]:
    with ExitStack() as stack:
        draft = ranks.together(lambda: stack.enter_context(alone(out)) if ranks.first else None)
        yield cast(Path, ranks.shared(draft))


def _state(request: Request, asked: Checked, stop: Callable[[], bool]) -> tuple[State | None, tuple[str, ...]]:
    """(what the rule goes on from, what the user should know of it)"""
    if not asked.keeps:
        unused = [place for place in (asked.state, asked.base / FOLDER) if place and place.exists()]
        return None, tuple(f"{request.rule} keeps no state: {place} is not used" for place in unused)
    if request.base is None:
        return None, ()
    state = apart.find_state(asked.base, asked.state, stop)
    if state is None:
        return None, _begun(request, asked)
    notes, masters = [], state.has(MASTER)
    if state.rule != request.rule:
        going_on = request.master and masters
        if state.folder == asked.state and not going_on:
            more = "; --master goes on with its master weights" if masters else ""
            raise UsageError(
                f"{state.folder} is the state of the rule {state.rule}, not of {request.rule}",
                hint=f"--rule {state.rule}; to begin anew, give --state an empty folder{more}",
            )
        since = ", from its master weights" if going_on else ""
        notes.append(f"the state in {state.folder} is of {state.rule}: {request.rule} begins anew{since}")
    if masters and not request.master:
        notes.append(f"{state.folder} holds master weights, which are not used without --master")
    return state, tuple(notes)


def _begun(request: Request, asked: Checked) -> tuple[str, ...]:
    """What the user should know where there is no state to go on from. ConfigurationError if there was one and nobody
    said that it is to begin anew."""
    beside = asked.base / FOLDER
    lost = apart.had_state(asked.base, request.rule, master=request.master)
    if asked.state is not None and apart.begins_anew(asked.state):
        unused = f", {beside} is not used" if beside.exists() else ""
        return (f"{asked.state} is empty: {request.rule} begins anew{unused}",) if lost or unused else ()
    if lost:
        places = f"neither {asked.state} nor {beside} is there" if asked.state else f"{beside} is not there"
        raise ConfigurationError(
            f"{asked.base} was made by {lost} with a state, but {places}",
            hint="--state DIR: the folder it is kept in; to begin anew, an empty one: mkdir NEW, then --state NEW",
        )
    return ()


def _finish(request: Request, asked: Checked, made: "Made", work: _Work, result: Aggregated) -> None:
    """The record, then the rename that makes the model, then the state's own place."""
    draft, kept = work.draft, asked.state if made.state else None
    try:
        (draft / RECORD).write_text(json.dumps(_record(request, asked, made, result), indent=1) + "\n")
        apart.sync(draft / RECORD)
        if kept:
            apart.stage(draft / FOLDER, kept)
        apart.sync(draft)
        if work.stop():
            raise Interrupted("stopped before the model was in its place; nothing was made")
        draft.rename(asked.out)
    except BaseException as error:
        if kept:
            apart.unstage(kept)
        if isinstance(error, OSError):
            raise translated(error, asked.out) from error
        raise
    apart.sync(asked.out.parent)
    if kept:
        apart.install(kept)


def _record(request: Request, asked: Checked, made: "Made", result: Aggregated) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "sha256": result.sha256,
        "parents": [_origin(asked.base)],
        "rule": request.rule,
        "options": dataclasses.asdict(asked.options),
        "master": request.master,
        "weights": "given" if request.weights else "equal",
        "contributions": [
            {
                "site": part.label,
                "number": 1,
                **_origin(part.folder),
                "weight": part.weight,
                "coefficient": result.coefficients[part.label],
                "steps": part.steps,
                "base": _origin(part.base) if part.base else None,
            }
            for part in asked.parts
        ],
        "state": {"rule": made.state.rule, "step": made.state.step} if made.state else None,
        "adapters": adapter_data(request, result),
        "seconds": round(result.seconds, 3),
        "created_at": time.time(),
        "files": to_data(made.files),
    }


def adapter_data(request: Request, result: Aggregated) -> dict[str, Any] | None:
    """What an exact method made of adapters: the ranks, and for svd the share of the update that was lost."""
    report = result.adapters
    if report is None:
        return None
    return {"method": report.method, "ranks": sorted({*report.ranks.values()}), "lost": report.lost}


def _origin(folder: Path) -> dict[str, Any]:
    """Where a model is, and what its own flctl.json says it is."""
    try:
        record = apart.own_record(folder)
    except ConfigurationError:
        record = {}
    return {"folder": str(folder), **{key: record[key] for key in ("sha256", "version") if key in record}}
