"""The making of the next model: contributions streamed through a rule into a draft, chunk by chunk."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from flctl.errors import Interrupted
from flctl.model.chunks import single_threaded, steady_arithmetic
from flctl.model.draft import Draft, DraftFile, fresh_draft, joined_draft
from flctl.model.header import ITEMSIZE
from flctl.model.job import Job, Recipe, Source, prepared
from flctl.model.manifest import hash_file, hash_folder
from flctl.model.pipeline import SPARE, default_threads, desks_for, in_order
from flctl.model.ranks import ALONE, Ranks
from flctl.model.shards import CHUNK, Shard
from flctl.model.state import FOLDER, Layout, State, write_state
from flctl.model.worker import Piece, Worker
from flctl.records import FileEntry, folder_sha256

__all__ = ["Made", "Recipe", "Source", "hash_folder", "merge"]

PLAIN = Recipe()


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A finished draft: the model's files, the rule's state beside it (in `state/`), and for each contribution, by
    (site, number), the coefficient it entered with and, where updates are clipped, the factor that clips its own."""

    files: tuple[FileEntry, ...]
    state: State | None
    coefficients: Mapping[tuple[str, int], float]
    scales: Mapping[tuple[str, int], float] = field(default_factory=dict)


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
    ranks: Ranks = ALONE,
) -> Made:
    """Write the model that `recipe` makes of the contributions into the new folder `draft`.

    Files, headers and everything but the values of float tensors are the base's. All is on the disk for good when this
    returns; the caller adds flctl.json and renames. `state` is what lies beside the base (None: the rule begins).
    `progress` is told the bytes of weights written so far (of `open_shards(base).size`); `stop` is asked between
    chunks, and yes raises Interrupted. The bits depend neither on the order of `contributions` nor on `chunk`
    (elements) nor on `threads` nor on `ranks`, which share out the work if all of them make this call on one file
    system. Whatever is raised (AggregationRefused, BudgetRefused, ConfigurationError, Interrupted), the draft is gone
    and nothing else was touched."""
    with steady_arithmetic():
        job = ranks.together(lambda: prepared(base, contributions, recipe, state, chunk, stop or _never))
        desks = ranks.together(lambda: desks_for((threads or default_threads()) + SPARE, files=job.files))
        job = replace(job, chunk=min(ranks.gathered(job.within_memory(desks))))
        with _draft(draft, job, ranks) as made:
            ranks.together(lambda: _write(made, job, ranks, desks, progress or _silent, stop or _never))
            if ranks.size > 1:
                _enter_shared(made, job, ranks)
            whole = ranks.together(lambda: _complete(made, base, job, recipe) if ranks.first else None)
            return cast(Made, ranks.shared(whole))


@contextmanager
def _draft(folder: Path, job: Job, ranks: Ranks) -> Iterator[Draft]:
    """The draft, which the first rank makes and, if anything fails, removes."""
    with ExitStack() as stack:
        enter = fresh_draft(folder, needed=job.needed) if ranks.first else joined_draft(folder)
        yield ranks.together(lambda: stack.enter_context(enter))


def _write(
    made: Draft,
    job: Job,
    ranks: Ranks,
    desks: int,
    progress: Callable[[int], None],
    stop: Callable[[], bool],
) -> None:
    """This rank's pieces of all files."""
    with ExitStack() as stack:
        workers = [Worker(job.given, job.rule, job.options, job.outputs, job.chunk, stack) for _ in range(desks)]
        threads = max(1, desks - SPARE)
        pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="merge", initializer=single_threaded))
        done = 0
        for pieces, shard in _shared_out(job, ranks):
            with ExitStack() as files:
                targets = [files.enter_context(_target(made, layout, shard, ranks)) for layout in job.layouts]
                done += shard.data
                for piece, results in in_order(_until(pieces, stop, ranks), workers, _make, pool):
                    for target, data in zip(targets, results, strict=True):
                        target(piece, data)
                    done += len(results[0])
                    progress(min(done * ranks.size, job.given.ours.size))


def _make(worker: Worker, piece: Piece) -> tuple[Piece, list[memoryview]]:
    return piece, worker.make(piece)


def _shared_out(job: Job, ranks: Ranks) -> Iterator[tuple[list[Piece], Shard]]:
    """For each shard the pieces of this rank: of all bytes of the model, a stretch of its own."""
    total = max(1, sum(shard.size - shard.data for shard in job.given.ours.files))
    before = 0
    for shard in job.given.ours.files:
        pieces = []
        for tensor in shard.tensors:
            for start, count in tensor.pieces(job.chunk):
                if before * ranks.size // total == ranks.rank:
                    pieces.append(Piece(tensor=tensor, start=start, count=count))
                before += count * ITEMSIZE[tensor.dtype]
        yield pieces, shard


def _until(pieces: Sequence[Piece], stop: Callable[[], bool], ranks: Ranks) -> Iterator[Piece]:
    for piece in pieces:
        if stop():
            raise Interrupted("stopped while merging; the draft is removed")
        if ranks.troubled():
            return
        yield piece


@contextmanager
def _target(made: Draft, layout: Layout, shard: Shard, ranks: Ranks) -> Iterator[Callable[[Piece, memoryview], None]]:
    """Where the results of a shard go: the layout's file of that name, if it has one, with its header written."""
    if shard.name not in layout.sizes:
        yield lambda piece, data: None
    elif ranks.size == 1:
        with made.file(layout.path(shard.name)) as file:
            file.write(layout.headers[shard.name])
            yield lambda piece, data: file.write(data)
    else:
        with made.shared_file(layout.path(shard.name)) as file:
            if ranks.first:
                file.place(0, layout.headers[shard.name])
            yield lambda piece, data: _place(file, layout, piece, data)


def _place(file: DraftFile, layout: Layout, piece: Piece, data: memoryview) -> None:
    if data:
        tensor = layout.tensors[piece.tensor.name]
        file.place(tensor.begin + piece.start * ITEMSIZE[tensor.dtype], data)


def _enter_shared(made: Draft, job: Job, ranks: Ranks) -> None:
    """Hash the files that all ranks wrote, a rank a file, and enter them in the first rank's draft."""
    paths = [layout.path(name) for layout in job.layouts for name in layout.sizes]
    mine = ranks.together(lambda: [hash_file(made.folder, path) for path in paths[ranks.rank :: ranks.size]])
    for entries in ranks.gathered(mine):
        made.entries += entries


def _complete(made: Draft, base: Path, job: Job, recipe: Recipe) -> Made:
    """The files that are not written by pieces, and the record of the state."""
    for layout in job.layouts:
        if layout.index:
            with made.file(layout.path(layout.index[0])) as file:
                file.write(layout.index[1])
    for path in job.carried:
        made.copy(base, path)
    files = sorted(made.entries, key=lambda entry: entry.path)
    own = tuple(entry for entry in files if not entry.path.startswith(f"{FOLDER}/"))
    state = None
    if job.outputs:
        state = write_state(made, rule=recipe.rule, step=job.given.step, model=folder_sha256(own))
    made.settle()
    return Made(files=own, state=state, coefficients=job.coefficients, scales=job.scales)


def _silent(_: int) -> None:
    pass


def _never() -> bool:
    return False
