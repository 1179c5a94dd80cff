"""The making of the next model: contributions streamed through a rule into a draft, chunk by chunk."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from flctl.errors import Interrupted
from flctl.model.chunks import single_threaded, steady_arithmetic
from flctl.model.draft import Draft, fresh_draft
from flctl.model.job import Job, Recipe, Source, prepared
from flctl.model.manifest import hash_folder
from flctl.model.pipeline import SPARE, default_threads, in_order
from flctl.model.shards import CHUNK, Shard
from flctl.model.state import State, write_state
from flctl.model.worker import Piece, Worker
from flctl.records import FileEntry, folder_sha256

__all__ = ["Made", "Recipe", "Source", "hash_folder", "merge"]

PLAIN = Recipe()


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A finished draft: the model's files, the rule's state beside it (in `state/`), and for each contribution, by
    (site, number), the coefficient it entered with."""

    files: tuple[FileEntry, ...]
    state: State | None
    coefficients: Mapping[tuple[str, int], float]


def merge(
    base: Path,
    contributions: Sequence[Source],
    draft: Path,
    *,
    recipe: Recipe = PLAIN,
    state: State | None = None,
    progress: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    chunk: int = CHUNK,
    threads: int | None = None,
) -> Made:
    """Write the model that `recipe` makes of the contributions into the new folder `draft`.

    Files, headers and everything but the values of float tensors are the base's. All is on the disk for good when this
    returns; the caller adds flctl.json and renames. `state` is what lies beside the base (None: the rule begins).
    `progress` is told the bytes of weights written so far (of `open_shards(base).size`); `stop` is asked between
    chunks, and yes raises Interrupted. The bits depend neither on the order of `contributions` nor on `chunk`
    (elements) nor on `threads`. Whatever is raised (AggregationRefused, BudgetRefused, ConfigurationError,
    Interrupted), the draft is gone and nothing else was touched."""
    with ExitStack() as stack:
        stack.enter_context(steady_arithmetic())
        job = prepared(base, contributions, recipe, state, chunk)
        made = stack.enter_context(fresh_draft(draft, needed=job.needed))
        _write(made, job, threads or default_threads(), progress or _silent, stop or _never, stack)
        for path in job.carried:
            made.copy(base, path)
        files = tuple(sorted(made.entries, key=lambda entry: entry.path))
        own = tuple(entry for entry in files if not entry.path.startswith("state/"))
        after = None
        if job.outputs:
            after = write_state(made, rule=recipe.rule, step=job.given.step, model=folder_sha256(own))
    return Made(files=own, state=after, coefficients=job.coefficients)


def _write(
    made: Draft,
    job: Job,
    threads: int,
    progress: Callable[[int], None],
    stop: Callable[[], bool],
    stack: ExitStack,
) -> None:
    workers = [Worker(job.given, job.rule, job.options, job.outputs, job.chunk, stack) for _ in range(threads + SPARE)]
    pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="merge", initializer=single_threaded))
    written = 0
    for shard in job.given.ours.files:
        with ExitStack() as files:
            layouts = [layout if shard.name in layout.sizes else None for layout in job.layouts]
            targets = [
                files.enter_context(made.file(layout.path(shard.name))) if layout else None for layout in layouts
            ]
            for layout, target in zip(layouts, targets, strict=True):
                if layout and target:
                    target.write(layout.headers[shard.name])
            written += shard.data
            for results in in_order(_pieces(shard, job.chunk, stop), workers, Worker.make, pool):
                for target, data in zip(targets, results, strict=True):
                    if target:
                        target.write(data)
                written += len(results[0])
                progress(written)
    for layout in job.layouts:
        if layout.index:
            with made.file(layout.path(layout.index[0])) as file:
                file.write(layout.index[1])


def _pieces(shard: Shard, chunk: int, stop: Callable[[], bool]) -> Iterator[Piece]:
    for tensor in shard.tensors:
        for start, count in tensor.pieces(chunk):
            if stop():
                raise Interrupted("stopped while merging; the draft is removed")
            yield Piece(tensor=tensor, start=start, count=count)


def _silent(_: int) -> None:
    pass


def _never() -> bool:
    return False
