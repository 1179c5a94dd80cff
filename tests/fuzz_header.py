"""Inputs without end for the readers of safetensors headers and of indexes.

    python -m tests.fuzz_header [SECONDS [SEED]]

By a mutator of our own, and for four fifths of the time by atheris (libFuzzer, led by coverage) where it is installed.
Whatever comes in, a reader raises ValueError or AggregationRefused, or says what the safetensors library says: names,
dtypes, shapes and bytes. It takes at most SLOWEST seconds and LARGEST bytes. An input that breaks this is kept as a
file, and the exit status is 1."""

import contextlib
import json
import os
import random
import re
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import safetensors

from flctl.errors import AggregationRefused
from flctl.model.header import HEADER_LIMIT, ITEMSIZE, Tensor, tensors_of, weight_map_of
from flctl.model.shards import Reader, open_shards
from tests.checkpoints import raw_file

SLOWEST = 1.0  # seconds of this process
LARGEST = 100_000_000  # bytes, of which a header of 8 MiB has 16 MiB as itself
LONG = 1 << 16
COMPARED = 1 << 20  # larger files are not built
ENTRY = '"%s":{"dtype":"%s","shape":%s,"data_offsets":[%d,%d]}'
TOKENS = [
    *(b"0 1 -0 -1 8 1e2 1.0 NaN Infinity true null 4294967296 9223372036854775807 18446744073709551616").split(),
    *(b'[ ] { } : , " \\ [] {} [0] [[ }} "" \\u0000 \\ud800 \\u00e9 \x00 \xff \xc3\xa9 \xf0\x9f\x98\x80').split(),
    *(b'"dtype" "shape" "data_offsets" "__metadata__" "a" "b" "F32" "BF16" "F8_E4M3" "I64" "BOOL" "F4" "C64"').split(),
    *(b'"weight_map" "model.safetensors" "../model.safetensors" "/etc/passwd" "model-1.safetensors" ".."').split(),
    *(b" ", b"\n", b"9" * 5000, b"[" * 500, b'{"a":' * 500),
]
WHOLE, FITTED, INDEX, FOLDER = range(4)  # the first byte of an input, modulo 4


class Broken(Exception):
    """A reader did what it must not."""


def valid() -> list[bytes]:
    """Inputs that are accepted."""
    one = "{" + ENTRY % ("a", "F32", "[2,3]", 0, 24) + "," + ENTRY % ("b", "BF16", "[4]", 24, 32) + "}"
    dtypes, end = [], 0
    for dtype, size in ITEMSIZE.items():
        dtypes.append(ENTRY % (dtype, dtype, "[]", end, end := end + size))
    headers = [
        one,
        "{" + ",".join(dtypes) + "}",
        '{"__metadata__":{"format":"pt","b":"a"},' + ENTRY % ("a", "U8", "[0,4294967296]", 0, 0) + "}   ",
        "{" + ENTRY % ("a", "U8", "[2147483648,2147483648,0]", 0, 0) + "}",
        "{}",
    ]
    index = '{"metadata":{"total_size":32},"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}'
    files = [raw_file(header, bytes(range(256))[: size_of(header.encode())]) for header in headers]
    return [
        *(bytes([WHOLE]) + file for file in files),
        *(bytes([FITTED]) + header.encode() for header in headers),
        *(bytes([kind]) + index.encode() for kind in (INDEX, FOLDER)),
    ]


# The judge


def judge(data: bytes) -> str:
    """What a reader makes of an input: a word, or the reason for which it was refused. Broken if that is wrong."""
    kind, text = (data[0] % 4, data[1:]) if data else (WHOLE, b"")
    reader = {WHOLE: _whole, FITTED: _fitted, INDEX: _index, FOLDER: _folder}[kind]
    try:
        with _measured(len(text)):
            found = reader(text)
    except (ValueError, AggregationRefused) as error:
        if isinstance(error, UnicodeError) or len(str(error)) > 2000:
            raise Broken(f"{type(error).__name__}: {str(error)[:200]}") from error
        reason = re.sub(r"^/\S+: ", "", str(error))
        return re.sub(r"(?<=not JSON).*|'.*'|\".*\"|/\S+|-?\d+|\[.*\]", "~", reason)[:80]
    found()
    return ("file accepted", "header accepted", "index accepted", "folder accepted")[kind]


Check = Callable[[], None]


def _whole(content: bytes) -> Check:
    with _written({"model.safetensors": content}) as folder:
        tensors = open_shards(folder).tensors
        read = {name: _read(folder, tensor) for name, tensor in tensors.items()}
    return lambda: _same(tensors, read, content)


def _fitted(text: bytes) -> Check:
    """A header with a file of the size it asks for."""
    size = 8 + len(text) + size_of(text)
    tensors = {tensor.name: tensor for tensor in tensors_of(text, file="model.safetensors", size=size)}
    if size > COMPARED:
        return lambda: None
    content = raw_file(text, bytes(place * 7 % 251 for place in range(size - 8 - len(text))))
    return lambda: _same(tensors, {name: content[t.begin : t.end] for name, t in tensors.items()}, content)


def _index(text: bytes) -> Check:
    found = weight_map_of(text)

    def check() -> None:
        if found != _weight_map(text) or any(Path(file).name != file for file in found.values()):
            raise Broken(f"the index says {str(found)[:200]}")

    return check


def _weight_map(text: bytes) -> Any:
    return json.loads(text, parse_int=str)["weight_map"]


def _folder(text: bytes) -> Check:
    """An index over two files that are what they should be."""
    files = {f"model-{place}.safetensors": raw_file("{" + ENTRY % (name, "U8", "[1]", 0, 1) + "}", b"x")
             for place, name in enumerate("ab", start=1)}  # fmt: skip
    with _written({**files, "model.safetensors.index.json": text}) as folder:
        found = open_shards(folder)
    told = {name: tensor.file for name, tensor in found.tensors.items()}

    def check() -> None:
        if told != _weight_map(text):
            raise Broken(f"the index says something else than {told}")

    return check


def size_of(text: bytes) -> int:
    """The last end of a header's offsets, if it can be told, and cheaply: our own reader is what is measured."""
    if len(text) > LONG:
        return 0
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(text).items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0
    return max((end for end in ends if isinstance(end, int) and 0 <= end < 1 << 60), default=0)


def _same(tensors: dict[str, Tensor], read: dict[str, bytes], content: bytes) -> None:
    """Is it what the safetensors library sees in the file?"""
    try:
        theirs: dict[str, dict[str, Any]] = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError as error:
        raise Broken(f"accepted by us, not by safetensors: {error}") from error
    ours = {name: (t.dtype, list(t.shape), read[name]) for name, t in tensors.items()}
    if ours != {name: (t["dtype"], list(t["shape"]), bytes(t["data"])) for name, t in theirs.items()}:
        raise Broken("safetensors reads something else")


def _read(folder: Path, tensor: Tensor) -> bytes:
    buffer = bytearray(tensor.end - tensor.begin)
    with Reader(open_shards(folder)) as reader:
        reader.read(tensor, 0, memoryview(buffer))
    return bytes(buffer)


@contextlib.contextmanager
def _written(files: dict[str, bytes]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        for file, content in files.items():
            Path(name, file).write_bytes(content)
        yield Path(name)


@contextlib.contextmanager
def _measured(length: int) -> Iterator[None]:
    before, begun = _memory("VmRSS") if length > LONG else 0, time.process_time()
    try:
        yield
    finally:
        seconds = time.process_time() - begun
        if seconds > SLOWEST:
            raise Broken(f"it took {seconds:.2f} s")
        if before and (grown := _memory("VmHWM") - before) > LARGEST:
            raise Broken(f"it took {grown / 1e6:.0f} MB")


def _memory(name: str) -> int:
    if name == "VmRSS":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


# The mutator


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A relative of an input: some of its bytes or its values changed, or something repeated up to the limit."""
    kind, text = data[0] % 4 if data else WHOLE, data[1:]
    head, text = (text[:8], text[8:]) if kind == WHOLE else (b"", text)
    dice = draw.random()
    if dice < 0.002:
        text = _swollen(text, draw)
    elif dice < 0.5:
        text = _bytes_changed(text, draw)
    else:
        text = _values_changed(text, draw)
    if kind == WHOLE and draw.random() < 0.9:
        tail = size_of(text) if draw.random() < 0.8 else draw.randrange(40)
        head, text = struct.pack("<Q", len(text)), text + bytes(min(tail, COMPARED))
    elif kind == WHOLE:
        head = _bytes_changed(head, draw)[:8]
    return bytes([draw.randrange(4) if draw.random() < 0.02 else kind]) + head + text


def _bytes_changed(text: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        begin = draw.randrange(len(text) + 1)
        end = min(len(text), begin + draw.choice((0, 0, 1, 1, 2, 4, 16, 64)))
        single, number = (
            bytes([draw.randrange(256)]),
            b"%d" % draw.choice((draw.randrange(64), 1 << draw.randrange(66))),
        )
        piece = draw.choice((*[draw.choice(TOKENS)] * 2, single, b"", text[begin:end] * 2, number))
        numbers = list(re.finditer(rb"\d+", text))
        if numbers and draw.random() < 0.3:
            begin, end = draw.choice(numbers).span()
        text = text[:begin] + piece + text[end:]
    return text


def _values_changed(text: bytes, draw: random.Random) -> bytes:
    """The same on the JSON's values, so that it stays JSON."""
    try:
        data = json.loads(text.strip(b"\0"), parse_int=lambda digits: int(digits[:20]))
    except (ValueError, RecursionError):
        return _bytes_changed(text, draw)
    for _ in range(draw.choice((1, 1, 2, 4))):
        places = list(_places(data))
        if not places:
            break
        (table, key), (other, name) = draw.choice(places), draw.choice(places)
        choices = (
            *(0, 1, 2, -1, draw.randrange(64), 1 << draw.randrange(70), 2.0, None, True, [], {}, [1] * 65),
            *(
                deepcopy(other[name]),
                "",
                "b",
                "\x7f",
                "\u00e9",
                "\ud800",
                "model-1.safetensors",
                "..",
                "x" * 1100,
                *ITEMSIZE,
            ),
        )
        if isinstance(table, dict) and draw.random() < 0.3:
            table[draw.choice(("a", "b", "c", "__metadata__", "dtype", "", "x" * 1100, str(key) * 2))] = table.pop(key)
        else:
            table[key] = draw.choice(choices)
    return json.dumps(data, indent=draw.choice((None, None, 1)), ensure_ascii=draw.random() < 0.5).encode(
        errors="surrogatepass"
    )


def _places(data: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    if isinstance(data, (dict, list)) and depth < 9:
        for key in list(data) if isinstance(data, dict) else range(len(data)):
            yield data, key
            yield from _places(data[key], depth + 1)


def _swollen(text: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(text) + 1)
    own = text[begin : begin + draw.randrange(1, 80)] or b" "
    piece = draw.choice((own, b"[],", b"{},", b'"":0,', b'"ab",', b'"\\ud83d\\ude00",', b"1,", b"9"))
    return text[:begin] + piece * draw.randrange(HEADER_LIMIT // len(piece)) + text[begin:]


# The run


class Tally:
    """Counts what happened until the time is over; then prints it and ends the process."""

    def __init__(self, seconds: float, engine: str) -> None:
        self._begun = time.monotonic()
        self._seconds, self._engine = seconds, engine
        self._seen: Counter[str] = Counter()

    def take(self, data: bytes) -> None:
        try:
            self._seen[judge(data)] += 1
        except Exception as error:  # whatever else may leave a reader is what is looked for
            path = Path(f"fuzz-{sha256(data).hexdigest()[:12]}.bin")
            path.write_bytes(data)
            print(f"BROKEN by {path}: {type(error).__name__}: {error}", flush=True)
            self._end(1)
        if time.monotonic() - self._begun > self._seconds:
            self._end(0)

    def _end(self, status: int) -> NoReturn:
        total, seconds = self._seen.total(), time.monotonic() - self._begun
        accepted = sum(count for reason, count in self._seen.items() if reason.endswith(" accepted"))
        print(f"{total} inputs in {seconds:.0f} s by {self._engine}: {accepted} accepted, {total - accepted} refused")
        for reason, count in self._seen.most_common(25):
            print(f"{count:9} {reason}")
        print(f"{len(self._seen)} outcomes; findings: {status}", flush=True)
        os._exit(status)


def main(seconds: float, seed: int) -> None:
    try:
        import atheris
    except ImportError:
        own(Tally(seconds, f"our own mutator, seed {seed}"), random.Random(seed), seconds + 1)
    tally = Tally(seconds, f"our own mutator, then atheris, seed {seed}")
    own(tally, random.Random(seed), seconds / 5)

    def mutator(data: bytes, size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        return mutated(data, draw)[:size] if draw.random() < 0.8 else atheris.Mutate(data, size)

    with tempfile.TemporaryDirectory() as corpus:
        for place, data in enumerate(valid()):
            Path(corpus, str(place)).write_bytes(data)
        for function in (tensors_of, weight_map_of, open_shards):
            atheris.instrument_func(function)
        atheris.Setup([sys.argv[0], corpus, f"-seed={seed}", f"-max_len={LONG}", "-rss_limit_mb=0", "-verbosity=0"],
                      tally.take, custom_mutator=mutator)  # fmt: skip
        atheris.Fuzz()


def own(tally: Tally, draw: random.Random, seconds: float) -> None:
    """Relatives of what is valid, and of what was refused for a new reason; long ones, too."""
    seeds, begun = valid(), time.monotonic()
    known, pool = {judge(data) for data in seeds}, list(seeds)
    while time.monotonic() < begun + seconds:
        data = mutated(draw.choice(pool if draw.random() < 0.4 else seeds), draw)
        tally.take(data)
        if len(data) < LONG and len(known) < 5000 and (outcome := judge(data)) not in known:
            known.add(outcome)
            pool.append(data)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0, int(sys.argv[2]) if len(sys.argv) > 2 else 1)
