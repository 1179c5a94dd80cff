"""Owns hostile checkpoints: each writes, in place of a right safetensors file, one that must not be accepted."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy

Spoil = Callable[[Path], None]


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def _write(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _header(change: Callable[[dict[str, Any], str], object]) -> Spoil:
    """A changed header before the same data; the change is told the name of the first tensor."""

    def spoil(path: Path) -> None:
        header, data = _read(path)
        first = min((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
        change(header, first)
        _write(path, header, data)

    return spoil


def _text(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(path: Path) -> None:
        header, data = _read(path)
        _write(path, change(json.dumps(header).encode()), data)

    return spoil


def _raw(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def _values(value: float, *, everywhere: bool = False) -> Spoil:
    """A value in the data, which is float32 throughout."""

    def spoil(path: Path) -> None:
        header, data = _read(path)
        values = numpy.frombuffer(data, dtype="<f4").copy()
        values[slice(None) if everywhere else slice(-1, None)] = value
        _write(path, header, values.tobytes())

    return spoil


def _renamed(old: str, new: str) -> Callable[[dict[str, Any], str], None]:
    def change(header: dict[str, Any], first: str) -> None:
        header[new] = header.pop(old or first)

    return change


def _more(name: str, dtype: str = "F32", shape: tuple[int, ...] = (0,)) -> Callable[[dict[str, Any], str], None]:
    """A further tensor, without data."""

    def change(header: dict[str, Any], first: str) -> None:
        end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end]}

    return change


def _dropped(header: dict[str, Any], first: str) -> None:
    """A tensor less, its bytes given to the one behind it: the file is whole."""
    begin, end = header.pop(first)["data_offsets"]
    behind = next(entry for key, entry in header.items() if key != "__metadata__" and entry["data_offsets"][0] == end)
    behind["data_offsets"][0] = begin
    behind["shape"] = [(behind["data_offsets"][1] - begin) // 4]


def _flood(path: Path) -> None:
    """The 70 MB header with 1.2 million empty tensors: the safetensors library takes 10 s and 2.3 GB for it."""
    entries = ",".join(f'"{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(1_200_000))
    _write(path, b"{" + entries.encode() + b"}", b"")


def _within_limit(path: Path) -> None:
    """As many tensors as fit into 8 MB."""
    entries = ",".join(f'"{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(130_000))
    _write(path, b"{" + entries.encode()[: (8 << 20) - 64].rpartition(b",")[0] + b"}", b"")


TRAP = Path("/tmp/flctl-unpickled")
"""Appears where one of the pickles is read as such."""


class _Trap:
    def __reduce__(self) -> Any:
        return Path.touch, (TRAP,)


def _torch_zip(path: Path) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Trap()))
        archive.writestr("archive/version", "3")
    path.write_bytes(made.getvalue())


def _swapped(header: dict[str, Any], first: str) -> None:
    shape = header[first]["shape"]
    header[first]["shape"] = [*shape[::-1]] if shape[::-1] != shape else [*shape, 1]


def _at(place: int, value: Any) -> Callable[[dict[str, Any], str], None]:
    return lambda header, first: header[first]["data_offsets"].__setitem__(place, value)


def _shifted(header: dict[str, Any], first: str) -> None:
    begin, end = header[first]["data_offsets"]
    header[first]["data_offsets"] = [begin + 4, end + 4]


CHECKPOINTS: dict[str, Spoil] = {
    "nothing": lambda path: path.write_bytes(b"") and None,
    "seven bytes": lambda path: path.write_bytes(b"\0" * 7) and None,
    "a length alone": _raw(lambda raw: raw[:8]),
    "a length of zero": _raw(lambda raw: bytes(8) + raw[8:]),
    "a length beyond the file": _raw(lambda raw: struct.pack("<Q", len(raw)) + raw[8:]),
    "a length one too great": _raw(lambda raw: struct.pack("<Q", int.from_bytes(raw[:8], "little") + 1) + raw[8:]),
    "a length one too small": _raw(lambda raw: struct.pack("<Q", int.from_bytes(raw[:8], "little") - 1) + raw[8:]),
    "a length of 2^63": _raw(lambda raw: struct.pack("<Q", 1 << 63) + raw[8:]),
    "a length of 2^64 - 1": _raw(lambda raw: b"\xff" * 8 + raw[8:]),
    "the length of the other byte order": _raw(lambda raw: raw[7::-1] + raw[8:]),
    "one byte less": _raw(lambda raw: raw[:-1]),
    "half of it": _raw(lambda raw: raw[: len(raw) // 2]),
    "one byte more": _raw(lambda raw: raw + b"\0"),
    "a second file behind it": _raw(lambda raw: raw + raw),
    "70 MB of header, 1.2 million tensors": _flood,
    "8 MB of header, 120,000 tensors": _within_limit,
    "8 MB of empty lists": lambda path: _write(path, b'{"a":[' + b"[]," * ((8 << 20) // 3 - 10) + b"[]]}", b""),
    "8 MB of brackets": lambda path: _write(path, b'{"a":' + b"[" * ((8 << 20) - 64), b""),
    "8 MB of blanks": lambda path: _write(path, b"{" + b" " * ((8 << 20) - 64) + b"}", b""),
    "a name of 7 MB": lambda path: _write(path, b'{"' + b"a" * (7 << 20) + b'":1}', b""),
    "JSON nested without end": lambda path: _write(path, b'{"a":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, b""),
    "an empty table": _text(lambda text: b"{}"),
    "an array": _text(lambda text: b"[" + text + b"]"),
    "no JSON": _text(lambda text: text[:-1]),
    "something behind the JSON": _text(lambda text: text + b"x"),
    "a second JSON behind it": _text(lambda text: text + text),
    "a byte order mark": _text(lambda text: b"\xef\xbb\xbf" + text),
    "UTF-16": _text(lambda text: text.decode().encode("utf-16")),
    "broken UTF-8": _text(lambda text: text.replace(b'"dtype"', b'"dtype\xff"', 1)),
    "a tensor twice": _text(lambda text: b"{" + text[1:-1] + b"," + text[1:-1] + b"}"),
    "a key of a tensor twice": _text(
        lambda text: text.replace(b'"dtype": "F32"', b'"dtype": "F32", "dtype": "I32"', 1)
    ),
    "metadata of numbers": _header(lambda header, first: header.update(__metadata__={"a": 1})),
    "metadata that is a tensor": _header(lambda header, first: header.update(__metadata__=header[first])),
    "half a character in metadata": _text(lambda text: b'{"__metadata__":{"\\ud800":"x"},' + text.split(b"},", 1)[1]),
    "a tensor without a dtype": _header(lambda header, first: header[first].pop("dtype")),
    "a tensor with more keys": _header(lambda header, first: header[first].update(code="x")),
    "a tensor that is a list": _header(lambda header, first: header.update({first: [1]})),
    "a dtype that nobody has": _header(lambda header, first: header[first].update(dtype="F128")),
    "a dtype in small letters": _header(lambda header, first: header[first].update(dtype="f32")),
    "another dtype of the same size": _header(lambda header, first: header[first].update(dtype="I32")),
    "a wider dtype": _header(lambda header, first: header[first].update(dtype="F64")),
    "a narrower dtype": _header(lambda header, first: header[first].update(dtype="BF16")),
    "another shape of the same size": _header(_swapped),
    "a shape below zero": _header(lambda header, first: header[first].update(shape=[-1, -1])),
    "a shape of fractions": _header(lambda header, first: header[first].update(shape=[1.5])),
    "a shape of words": _header(lambda header, first: header[first].update(shape=["1"])),
    "a shape of truths": _header(lambda header, first: header[first].update(shape=[True])),
    "a shape of 100,000 dimensions": _header(lambda header, first: header[first].update(shape=[1] * 100_000)),
    "a shape that overflows": _header(lambda header, first: header[first].update(shape=[1 << 62, 1 << 62])),
    "a shape that overflows to nothing": _header(lambda header, first: header[first].update(shape=[1 << 62, 4, 0])),
    "a shape of 4000 digits": _header(lambda header, first: header[first].update(shape=[10**4000])),
    "a begin below zero": _header(_at(0, -8)),
    "a begin in the header": _header(_at(0, -1)),
    "an end beyond the file": _header(_at(1, 1 << 40)),
    "an end of 2^64": _header(_at(1, 1 << 64)),
    "an end before the begin": _header(lambda header, first: header[first].update(data_offsets=[8, 0])),
    "offsets of fractions": _header(_at(0, 0.5)),
    "three offsets": _header(lambda header, first: header[first].update(data_offsets=[0, 4, 8])),
    "tensors that overlap": _header(
        lambda header, first: header[first].update(data_offsets=[4, header[first]["data_offsets"][1] + 4])
    ),
    "a hole before the first": _header(lambda header, first: header.pop(first)),
    "a tensor less": _header(_dropped),
    "a tensor more": _header(_more("more")),
    "a tensor more, of no dtype that is averaged": _header(_more("more", "I64")),
    "a tensor of another name": _header(_renamed("", "model.embed.weight")),
    "a name in capitals": _header(lambda header, first: header.update({first.upper(): header.pop(first)})),
    "a name with a line end": _header(lambda header, first: header.update({first + "\n": header.pop(first)})),
    "a name with an escape sequence": _header(lambda header, first: header.update({"\x1b[2J": header.pop(first)})),
    "a name that leads up": _header(lambda header, first: header.update({"../../x": header.pop(first)})),
    "no name": _header(lambda header, first: header.update({"": header.pop(first)})),
    "a NaN": _values(float("nan")),
    "an Inf": _values(float("inf")),
    "an Inf below zero": _values(float("-inf")),
    "NaN everywhere": _values(float("nan"), everywhere=True),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(_Trap())) and None,
    "a pickle of protocol 0": lambda path: path.write_bytes(pickle.dumps(_Trap(), protocol=0)) and None,
    "torch's zip of a pickle": _torch_zip,
    "a numpy file of objects": lambda path: numpy.save(path.open("wb"), numpy.array([_Trap()], dtype=object)),
    "a pickle with a length before it": lambda path: _write(path, pickle.dumps(_Trap()), b""),
    "a GGUF": lambda path: path.write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\xff" * 64) and None,
    "an ELF program": lambda path: path.write_bytes(Path("/bin/true").read_bytes()) and None,
    "a zip bomb": lambda path: path.write_bytes(_bomb()) and None,
    "a text": lambda path: path.write_text("Nel mezzo del cammin di nostra vita\n" * 100) and None,
}
"""By what each is, or does."""


def _bomb() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", bytes(64 << 20))
    return made.getvalue()
