"""A base with a LoRA adapter added to its weights: W + s B A, streamed in bounded memory into files like the base's.

Products and sums are in float32 (float64 for float64 weights) and rounded once to the weight's dtype, as peft's
merge_and_unload does but for the order in which a product's terms are summed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

from flctl.errors import AggregationRefused, ConfigurationError, Interrupted
from flctl.model.adapter_config import PREFIX, compare, read_config
from flctl.model.adapter_factors import Module, check_factors, modules_of
from flctl.model.adapter_values import Values
from flctl.model.chunks import DTYPES, Chunk, stays_finite, steady_arithmetic
from flctl.model.draft import Draft, fresh_draft
from flctl.model.shards import CHUNK, Reader, Shard, Shards, Tensor, open_shards
from flctl.records import FileEntry

HINT = "merge it with peft: PeftModel.from_pretrained(base, adapter).merge_and_unload()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What is added to weights of the base, by their names there; `turned`: weights of n x m values, as the Conv1D of
    GPT-2 has them, where A is r x n and B m x r."""

    shards: Shards
    modules: Mapping[str, Module]
    scalings: Mapping[str, float]
    turned: frozenset[str]


def write_merged(
    base: Path,
    files: Iterable[FileEntry],
    adapter: Path,
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[FileEntry, ...]:
    """These files of the base, with the adapter added, in a new folder; whole or not at all. `progress` is told bytes
    of weights, done and in all. ConfigurationError for an adapter that does more than add B A to linear layers, and
    where a file of the base is not what it is said to be."""
    ours, entries = open_shards(base), {entry.path: entry for entry in files}
    added, done = _adapter(adapter, ours), 0
    with steady_arithmetic(), fresh_draft(folder, needed=sum(e.size for e in entries.values())) as draft:
        for path in sorted(entries.keys() - {shard.name for shard in ours.files}):
            draft.copy(base, path)
            _check(base, draft.entries[-1], entries)
        with ExitStack() as stack:
            reader, factors = stack.enter_context(Reader(ours)), Values(added.shards, [added.shards], stack)
            widest = max((ours.tensors[name].shape[1] for name in added.modules), default=0)
            chunk = Chunk(max(CHUNK, widest))
            for shard in ours.files:
                for data in _written(draft, shard, added, reader, factors, chunk, entries):
                    if stop and stop():
                        raise Interrupted("stopped while merging; the draft is removed")
                    done += data
                    if progress:
                        progress(done, ours.size)
    return tuple(sorted(draft.entries, key=lambda entry: entry.path))


def _adapter(folder: Path, ours: Shards) -> Adapter:
    """The checked adapter; ConfigurationError if it is anything but products for linear layers of the base."""
    try:
        config, shards = read_config(folder), open_shards(folder)
        compare([config], exact=True)
        modules = modules_of(shards)
        check_factors(shards, modules, config)
    except AggregationRefused as error:
        raise ConfigurationError(f"this adapter cannot be added: {error.message}", hint=HINT) from error
    if others := shards.tensors.keys() - {name for module in modules for name in (module.a, module.b)}:
        raise ConfigurationError(f"{folder}: {min(others)!r} is no factor of a product", hint=HINT)
    targets = {_target(module, ours): module for module in modules}
    turned = set()
    for name, module in targets.items():
        a, b, weight = shards.tensors[module.a], shards.tensors[module.b], ours.tensors[name]
        if config.setting("fan_in_fan_out") and weight.shape == (a.shape[1], b.shape[0]):
            turned.add(name)
        elif weight.shape != (b.shape[0], a.shape[1]) or weight.dtype not in DTYPES or len(a.shape) != 2:
            shape = f"{weight.dtype} {list(weight.shape)}"
            raise ConfigurationError(f"{folder}: {module.name} does not fit {name!r} of the base: {shape}", hint=HINT)
    scalings = {name: config.scaling(module.name) for name, module in targets.items()}
    return Adapter(shards=shards, modules=targets, scalings=scalings, turned=frozenset(turned))


def _target(module: Module, ours: Shards) -> str:
    """The weight of the base that a module's product is added to: files may be without the model's own prefix."""
    name = f"{module.name.removeprefix(PREFIX)}.weight"
    if name in ours.tensors:
        return name
    found = [known for known in ours.tensors if name.endswith(f".{known}") or known.endswith(f".{name}")]
    if len(found) != 1 or "." not in found[0].removesuffix(".weight"):
        raise ConfigurationError(f"{ours.folder} has no weight {name!r} for the adapter", hint=HINT)
    return found[0]


def _written(
    draft: Draft,
    shard: Shard,
    added: Adapter,
    reader: Reader,
    factors: Values,
    chunk: Chunk,
    entries: Mapping[str, FileEntry],
) -> Iterator[int]:
    """Write one file of weights; yields the bytes of each piece. What was read is hashed on its way."""
    digest = sha256()
    with draft.file(shard.name) as file:
        header = reader.header(shard)
        digest.update(header)
        file.write(header)
        yield len(header)
        for tensor in shard.tensors:
            product = _product(tensor, added, factors) if tensor.name in added.modules else None
            columns = tensor.shape[1] if product else 1
            for start, count in tensor.pieces(max(1, CHUNK // columns) * columns):
                data = chunk.read(reader, tensor, start, count)
                digest.update(data)
                if product:
                    rows = product(start // columns, count // columns)
                    values = chunk.seen(tensor.dtype, count).to(rows.dtype).add_(rows.reshape(-1))
                    if not stays_finite(values, DTYPES[tensor.dtype]):
                        raise ConfigurationError(f"{tensor.name!r} with the adapter is too large for {tensor.dtype}")
                    data = chunk.rounded(values, tensor.dtype)
                file.write(data)
                yield len(data)
    _check(reader.folder, FileEntry(path=shard.name, size=shard.size, sha256=digest.hexdigest()), entries)


def _product(tensor: Tensor, added: Adapter, factors: Values) -> Callable[[int, int], torch.Tensor]:
    """Some rows of s B A, or of its transpose, from the first one on."""
    module, scaling = added.modules[tensor.name], added.scalings[tensor.name]
    a, b = factors.whole(0, module.a), factors.whole(0, module.b)
    left, right = (a.T, b.T) if tensor.name in added.turned else (b, a)
    dtype = torch.float64 if tensor.dtype == "F64" else torch.float32
    left, right = left.to(dtype), right.to(dtype)
    return lambda first, count: left[first : first + count] @ right * scaling


def _check(base: Path, entry: FileEntry, entries: Mapping[str, FileEntry]) -> None:
    if entries.get(entry.path) != entry:
        raise ConfigurationError(
            f"{base / entry.path} is not what the campaign began with",
            hint="restore the frozen base from where it came",
        )
