"""The text of a safetensors header and of an index, checked before anything else believes it; functions over bytes.

The format: 8 bytes little-endian N, N bytes of JSON, then the tensors' bytes, without holes, whatever the order of the
names (https://huggingface.co/docs/safetensors, "Format"). What cannot be believed raises ValueError with the reason."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# The format allows 100 MB, with which a hostile file costs its usual reader seconds and gigabytes. JSON of empty lists
# takes twenty times its length in memory: so what may make a value of its own is counted before anything is parsed.
HEADER_LIMIT = 8 << 20
INDEX_LIMIT = 16 << 20
WIDE_LIMIT = 2 << 20  # bytes of text beyond ASCII, which may take four times its length
VALUE_LIMIT = 800_000
TENSOR_LIMIT = 50_000
RANK_LIMIT = 64
NUMBER_LIMIT = (1 << 63) - 1
NAME_LIMIT = 1024

CHUNK = 1 << 19  # elements
FLOAT_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
OTHER_SIZES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
MASTER = "master"  # the name of the float32 weights kept beside a model of less precision
ITEMSIZE = {**FLOAT_SIZES, **OTHER_SIZES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor; `begin` and `end` are byte offsets in its file (not, as in the header, in the file's data).
    `stands_for`: other names of the same tensor, as its file tells."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int
    stands_for: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return (self.end - self.begin) // ITEMSIZE[self.dtype]

    @property
    def averaged(self) -> bool:
        """Whether a merge averages it; integers and bools are carried from the base."""
        return self.dtype in FLOAT_SIZES

    def pieces(self, chunk: int) -> Iterator[tuple[int, int]]:
        """(first element, elements) of consecutive chunks; none for an empty tensor."""
        for start in range(0, self.count, chunk):
            yield start, min(chunk, self.count - start)


def tensors_of(text: bytes, *, file: str, size: int) -> tuple[Tensor, ...]:
    """The tensors of a file of `size` bytes with the header `text`, in the order of their bytes, which follow each
    other from the header's end to the file's end without overlap or hole."""
    if not text.startswith(b"{"):
        raise ValueError("the header is no JSON object")
    header = json_table(text)
    names = _names(header.pop("__metadata__", {}), header)
    data = 8 + len(text)
    found = [_tensor(name, header.pop(name), file, data, tuple(names.get(name, ()))) for name in list(header)]
    found.sort(key=lambda tensor: (tensor.begin, tensor.end))
    expected = data
    for tensor in found:
        if tensor.begin != expected:
            what = "overlaps the tensor before it" if tensor.begin < expected else "leaves a hole before it"
            raise ValueError(f"tensor {tensor.name!r} {what} (begins at {tensor.begin - data}, not {expected - data})")
        expected = tensor.end
    if expected != size:
        how = "truncated" if expected > size else "longer than its header says"
        raise ValueError(f"{how}: the tensors end at byte {expected}, the file at {size}")
    return tuple(found)


def packed(wanted: Iterable[tuple[str, str, tuple[int, ...]]], *, file: str) -> tuple[bytes, tuple[Tensor, ...]]:
    """The length and header of a new file with these tensors (name, dtype, shape), one after the other, and where each
    will lie. The header is padded to a multiple of 8 bytes, as the format advises."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = [], 0
    for name, dtype, shape in wanted:
        begin, end = end, end + math.prod(shape) * ITEMSIZE[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        places.append((name, dtype, shape, begin, end))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    tensors = tuple(
        Tensor(name=name, dtype=dtype, shape=shape, file=file, begin=data + begin, end=data + end)
        for name, dtype, shape, begin, end in places
    )
    return len(text).to_bytes(8, "little") + text, tensors


def weight_map_of(text: bytes) -> dict[str, str]:
    """The tensors' files by tensor name, as an index tells them; each a plain name of a safetensors file."""
    files = json_table(text).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError("no weight_map")
    for name, file in files.items():
        _check_name(name)
        if not isinstance(file, str) or not _plain(file) or not file.endswith(".safetensors"):
            raise ValueError(f"tensor {name!r} lies in {str(file)[:80]!r}, which is no safetensors file of this folder")
    return files


def _plain(file: str) -> bool:
    """Whether it is the bare name of a file, the same on every system."""
    return file.isprintable() and not file.startswith(".") and "/" not in file and "\\" not in file and len(file) < 256


def _names(metadata: Any, header: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names that safetensors' save_model left out because another tensor of the file, the key, is the same one."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not a table of strings")
    names: dict[str, list[str]] = {}
    for name, value in metadata.items():
        if not (_unicode(name) and _unicode(value)):
            raise ValueError("__metadata__ is not Unicode")
        if value in header and name not in header:
            names.setdefault(value, []).append(name)
    return names


def _tensor(name: str, entry: Any, file: str, data: int, stands_for: tuple[str, ...]) -> Tensor:
    _check_name(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise ValueError(f"tensor {name!r} has dtype {_short(dtype)}, not one of {', '.join(ITEMSIZE)}")
    if not _counts(shape) or len(shape) > RANK_LIMIT:
        raise ValueError(f"tensor {name!r} has no possible shape: {_short(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r} has no possible data_offsets: {_short(offsets)}")
    begin, end = offsets
    size = ITEMSIZE[dtype]
    for length in shape:  # a factor of 0 at the end does not excuse a product that others cannot hold
        size *= length
        if size > NUMBER_LIMIT:
            raise ValueError(f"tensor {name!r} needs more than {NUMBER_LIMIT} bytes: its shape is {_short(shape)}")
    if end - begin != size:
        raise ValueError(f"tensor {name!r} needs {size} bytes and has {end - begin}")
    return Tensor(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        file=file,
        begin=data + begin,
        end=data + end,
        stands_for=stands_for,
    )


def _check_name(name: str) -> None:
    if not name or len(name) > NAME_LIMIT or not name.isprintable():
        raise ValueError(f"{name[:80]!r} cannot be a tensor's name")


def _counts(value: Any) -> bool:
    """Whether it is a list of whole numbers that a file offset can be; JSON's `true` is no number here."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= NUMBER_LIMIT for item in value)


def _whole(digits: str) -> int | float:
    """What no reader of the format takes for a whole number, as -0, is none."""
    return float(digits) if digits == "-0" or len(digits) > 19 else int(digits)


def _short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return "..."
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unicode(text: str) -> bool:
    """JSON can write half a character, which most readers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_table(text: bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys: JSON leaves their meaning open, and two readers may differ."""
    if text.count(b"[") + text.count(b"{") + text.count(b",") + 2 * text.count(b":") > VALUE_LIMIT:
        raise ValueError(f"too many values (limit {VALUE_LIMIT})")
    if len(text) > WIDE_LIMIT and not text.isascii():
        raise ValueError(f"{len(text)} bytes with letters beyond ASCII are too many (limit {WIDE_LIMIT})")
    tables = 0

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal tables
        tables += 1
        if tables > TENSOR_LIMIT:
            raise ValueError(f"more than {TENSOR_LIMIT} tensors in one file")
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key[:80]!r} appears twice")
            found[key] = value
        return found

    try:
        data = json.loads(text.decode(), object_pairs_hook=table, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    return data
