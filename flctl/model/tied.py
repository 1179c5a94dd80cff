"""Tied tensors: one tensor under several names, of which some writers write one and others each.

`tie_word_embeddings` in config.json makes the output layer the input embedding. transformers' save_pretrained then
leaves `lm_head.weight` out (modeling_utils.py: `_tied_weights_keys`, remove_tied_weights_from_state_dict), safetensors'
save_file writes both, and its save_model whichever name sorts first, with a note of the names it stands for. All of
these are the same model, and transformers opens each of them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from flctl.errors import AggregationRefused
from flctl.model.header import ITEMSIZE, Tensor, json_table
from flctl.model.shards import Reader, Shards, small_file

MOST = 64  # a model has a few tied tensors; where more names differ, it is another model
SHOWN = 3  # names in a message
BLOCK = 1 << 20
HEAD = 1 << 10
CONFIG_LIMIT = 1 << 20


def under_the_names_of(ours: Shards, theirs: Shards) -> Shards:
    """`theirs` with exactly the names of `ours`: a tied tensor that is missing is read from its twin, one that is
    stored twice is passed over. AggregationRefused where tying does not explain a name, saying why not."""
    missing = [tensor for name, tensor in ours.tensors.items() if name not in theirs.tensors]
    extra = [tensor for name, tensor in theirs.tensors.items() if name not in ours.tensors]
    if not missing and not extra:
        return theirs
    what = "missing" if missing else "not in the base"
    config = ours.folder / "config.json"
    if len(missing) + len(extra) > MOST or not config.is_file():
        raise _refused(theirs, missing or extra, what)
    if reason := _not_tied(config):
        raise _refused(theirs, missing or extra, f"{what} and not tied: {reason}")
    tensors = {name: tensor for name, tensor in theirs.tensors.items() if name in ours.tensors}
    twins = _twins(missing, ours, theirs)
    used = {(twin.file, twin.begin, twin.end) for twin in twins}
    spare = [tensor for tensor in extra if (tensor.file, tensor.begin, tensor.end) not in used]
    alike = _alike(theirs, spare, [*tensors.values(), *twins])
    if strangers := [tensor for tensor in spare if not alike[tensor.name]]:
        raise _refused(theirs, strangers, "not in the base and not tied: no other tensor there has the same values")
    return replace(theirs, tensors={**tensors, **{twin.name: twin for twin in twins}})


def _twins(missing: Sequence[Tensor], ours: Shards, theirs: Shards) -> list[Tensor]:
    """Where `theirs` has each missing tensor, under its name. What tells: a note in either header, or that the base
    holds the same values under a name that they have."""
    noted = {name: tensor for tensor in theirs.tensors.values() for name in tensor.stands_for}
    alike = _alike(ours, [tensor for tensor in missing if tensor.name not in noted], ours.tensors.values())
    found, lost = [], []
    for tensor in missing:
        names = [*tensor.stands_for, *(other.name for other in alike.get(tensor.name, ()))]
        there = (theirs.tensors[name] for name in names if name in theirs.tensors)
        if twin := noted.get(tensor.name) or next(there, None):
            found.append(replace(twin, name=tensor.name))
        elif names:
            raise _refused(theirs, [tensor], f"missing, and so is {names[0]!r}, which it is tied to")
        else:
            lost.append(tensor)
    if lost:
        raise _refused(theirs, lost, "missing and not tied: no other tensor of the base has the same values")
    return found


def _alike(shards: Shards, wanted: Sequence[Tensor], among: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """For each tensor wanted, by name, the others with the same dtype, shape and bytes. None for one that holds a
    single value throughout: fresh biases and norms are alike without being tied."""
    with Reader(shards) as reader:
        heads = {_head(reader, tensor) for tensor in wanted}
        groups: dict[Any, list[Tensor]] = defaultdict(list)
        for tensor in among if heads else ():
            if (head := _head(reader, tensor)) in heads:
                groups[head, _digest(reader, tensor)].append(tensor)
        found = {}
        for tensor in wanted:
            digest = _digest(reader, tensor)
            group = groups[_head(reader, tensor), digest] if digest else []
            found[tensor.name] = [other for other in group if other.name != tensor.name]
    return found


def _head(reader: Reader, tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """What two tensors that are alike have in common at first sight."""
    head = bytearray(min(HEAD, tensor.end - tensor.begin))
    reader.read(tensor, 0, memoryview(head))
    return tensor.dtype, tensor.shape, bytes(head)


def _digest(reader: Reader, tensor: Tensor) -> bytes | None:
    """Of a tensor's bytes; None if all its elements are the same."""
    size = ITEMSIZE[tensor.dtype]
    digest, first, varied = sha256(), b"", False
    buffer = memoryview(bytearray(BLOCK))
    for start, count in tensor.pieces(BLOCK // size):
        block = buffer[: count * size]
        reader.read(tensor, start, block)
        digest.update(block)
        first = first or bytes(block[:size])
        varied = varied or block != first * count
    return digest.digest() if varied else None


def _not_tied(path: Path) -> str:
    """Why a model's tensors cannot be tied, as its config.json says; nothing if they can."""
    try:
        config = json_table(small_file(path, limit=CONFIG_LIMIT, site=None))
    except ValueError as error:
        return f"config.json cannot be read: {error}"
    # transformers before 5 leaves out what is the default, true, and ties the embeddings of an encoder and a decoder
    # whatever the switch says. Models of several kinds of data have a table for each.
    tables = [config, *(value for value in config.values() if isinstance(value, dict))]
    told = [table["tie_word_embeddings"] for table in tables if "tie_word_embeddings" in table]
    if not told or True in told or config.get("is_encoder_decoder") is True:
        return ""
    return "config.json says tie_word_embeddings = false"


def _refused(theirs: Shards, tensors: Sequence[Tensor], what: str) -> AggregationRefused:
    names = ", ".join(repr(tensor.name) for tensor in tensors[:SHOWN])
    more = f" and {len(tensors) - SHOWN} more" if len(tensors) > SHOWN else ""
    subject = f"tensor {names} is" if len(tensors) == 1 else f"tensors {names}{more} are"
    return AggregationRefused(f"{theirs.folder}: {subject} {what}", site=theirs.site)
