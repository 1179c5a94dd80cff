"""Where each tensor of a model folder lies, and reads of its bytes into given buffers.

Files are read with pread: mapped pages would count as memory. Nothing is unpickled, and torch is not needed."""

import errno
import os
import stat
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from flctl.errors import AggregationRefused, ConfigurationError
from flctl.model.header import CHUNK, HEADER_LIMIT, INDEX_LIMIT, ITEMSIZE, Tensor, tensors_of, weight_map_of

__all__ = ["CHUNK", "Reader", "Shard", "Shards", "Tensor", "open_shards"]

AHEAD = 8 << 20  # bytes
KINDS = ("model", "adapter_model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One safetensors file: its size, when it was modified (ns), where its data begins, and its tensors in the order of
    their bytes."""

    name: str
    size: int
    modified: int
    data: int
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """The weights of one model folder. `index` names the index file, if there is one; `site` whose weights they are
    (None: our own), for the errors."""

    folder: Path
    site: str | None
    index: str | None
    files: tuple[Shard, ...]
    tensors: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.files)

    def compact(self, like: Mapping[str, Tensor], places: Mapping[str, int]) -> "Shards":
        """The same weights, to be read by the names in `places`, which have the dtypes and shapes of `like`."""
        files = tuple(replace(shard, tensors=()) for shard in self.files)
        return replace(self, files=files, tensors=Places(like, places, self.tensors))


def open_shards(folder: Path, *, site: str | None = None) -> Shards:
    """The checked headers of a folder's weights. Raises AggregationRefused naming file, reason and site."""
    index = _weights_of(folder, site)
    weight_map: dict[str, str] = {}
    names = [index]
    if index.endswith(".json"):
        weight_map = _weight_map(folder / index, site)
        names = sorted(set(weight_map.values()))
    files = tuple(_shard(folder / name, site) for name in names)
    tensors: dict[str, Tensor] = {}
    for shard in files:
        for tensor in shard.tensors:
            if tensor.name in tensors:
                there = tensors[tensor.name].file
                raise _refused(folder / shard.name, f"tensor {tensor.name!r} is in {there} as well", site)
            tensors[tensor.name] = tensor
    if weight_map:
        _agree(folder / index, weight_map, tensors, site)
    return Shards(folder=folder, site=site, index=index if weight_map else None, files=files, tensors=tensors)


class Places(Mapping[str, Tensor]):
    """The tensors of a model that has the names, dtypes and shapes of another, in some 10 bytes for each: of a model of
    many tensors, a merge holds those of many contributions. `places` numbers the names."""

    def __init__(self, like: Mapping[str, Tensor], places: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        self._like, self._places = like, places
        self._files = sorted({tensors[name].file for name in places})
        numbers = {file: number for number, file in enumerate(self._files)}
        self._file = array("I", (numbers[tensors[name].file] for name in places))
        self._begin = array("Q", (tensors[name].begin for name in places))

    def __getitem__(self, name: str) -> Tensor:
        place, like = self._places[name], self._like[name]
        begin = self._begin[place]
        end = begin + like.count * ITEMSIZE[like.dtype]
        file = self._files[self._file[place]]
        return Tensor(name=like.name, dtype=like.dtype, shape=like.shape, file=file, begin=begin, end=end)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Reader:
    """Reads chunks of one model's tensors into given buffers. At most one file is open at a time, so that shards do not
    count against the limit of open files (256 on macOS). A file that is no longer what
    `open_shards` saw, by size and time of modification, is refused: at the latest when the block ends."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._seen = {shard.name: (shard.size, shard.modified) for shard in shards.files}
        self._file = ""
        self._descriptor = -1
        self._asked = 0

    @property
    def folder(self) -> Path:
        return self._shards.folder

    def read(self, tensor: Tensor, start: int, into: memoryview) -> None:
        """Fills `into` with the tensor's bytes from element `start` on."""
        self._fill(tensor.file, tensor.begin + start * ITEMSIZE[tensor.dtype], into)

    def header(self, shard: Shard) -> bytes:
        """The bytes of a shard before its data, as they are."""
        text = bytearray(shard.data)
        self._fill(shard.name, 0, memoryview(text))
        return bytes(text)

    def _fill(self, file: str, offset: int, into: memoryview) -> None:
        path = self._shards.folder / file
        if file != self._file:
            self._check()
            self.close()
            self._descriptor, _ = _open(path, self._shards.site)
            self._file = file
            self._check()
        _fill(self._descriptor, offset, into, path, self._shards.site)
        self._ask_ahead(offset + len(into))

    def _ask_ahead(self, end: int) -> None:
        """The disk fetches what will be read next while this is computed with."""
        start = self._asked if end <= self._asked <= end + AHEAD else end
        if hasattr(os, "posix_fadvise") and start <= end + AHEAD // 2:
            os.posix_fadvise(self._descriptor, start, end + AHEAD - start, os.POSIX_FADV_WILLNEED)
            self._asked = end + AHEAD

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._file, self._descriptor = "", -1

    def _check(self) -> None:
        if self._descriptor < 0:
            return
        file, status = self._file, os.fstat(self._descriptor)
        size, modified = self._seen[file]
        if (status.st_size, status.st_mtime_ns) != (size, modified):
            self.close()
            what = "truncated" if status.st_size < size else "changed"
            raise _refused(self._shards.folder / file, f"{what} while it was in use", self._shards.site)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._check()
        finally:
            self.close()


def small_file(path: Path, *, limit: int, site: str | None) -> bytes:
    """The bytes of a file of text. Raises AggregationRefused for one that is too long."""
    descriptor, status = _open(path, site)
    try:
        if status.st_size > limit:
            raise _refused(path, f"{status.st_size} bytes are too many (limit {limit})", site)
        return _bytes(descriptor, 0, status.st_size, path, site)
    finally:
        os.close(descriptor)


def _refused(path: Path, reason: str, site: str | None) -> AggregationRefused:
    return AggregationRefused(f"{path}: {reason}", site=site)


def _weights_of(folder: Path, site: str | None) -> str:
    """The one file to begin with: the only shard, or the index of several."""
    choices = [f"{kind}.safetensors{suffix}" for kind in KINDS for suffix in ("", ".index.json")]
    found = [name for name in choices if (folder / name).exists()]
    if not found:
        raise _refused(folder, "no model.safetensors and no model.safetensors.index.json", site)
    if len(found) > 1:
        raise _refused(folder, f"{' and '.join(found)} exclude each other; one must go", site)
    return found[0]


def _weight_map(path: Path, site: str | None) -> dict[str, str]:
    text = small_file(path, limit=INDEX_LIMIT, site=site)
    try:
        return weight_map_of(text)
    except ValueError as error:
        raise _refused(path, str(error), site) from error


def _agree(path: Path, weight_map: dict[str, str], tensors: dict[str, Tensor], site: str | None) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise _refused(path, f"tensor {name!r} is not in {file}", site)
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise _refused(path, f"tensor {name!r} of {tensor.file} is not listed", site)


def _shard(path: Path, site: str | None) -> Shard:
    descriptor, status = _open(path, site)
    size = status.st_size
    try:
        if size < 8:
            raise _refused(path, f"truncated: {size} bytes hold no header", site)
        length = int.from_bytes(_bytes(descriptor, 0, 8, path, site), "little")
        if length > HEADER_LIMIT:
            raise _refused(path, f"a header of {length} bytes is too long (limit {HEADER_LIMIT})", site)
        if 8 + length > size:
            raise _refused(path, f"truncated: the header ends at byte {8 + length}, the file at {size}", site)
        tensors = tensors_of(_bytes(descriptor, 8, length, path, site), file=path.name, size=size)
    except ValueError as error:
        raise _refused(path, str(error), site) from error
    finally:
        os.close(descriptor)
    return Shard(name=path.name, size=size, modified=status.st_mtime_ns, data=8 + length, tensors=tensors)


def _open(path: Path, site: str | None) -> tuple[int, os.stat_result]:
    """A descriptor of a regular file, and its status; a FIFO or a device must not hold us up."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # no site's fault
            raise ConfigurationError(
                f"{path}: {os.strerror(error.errno)}", hint="allow this process more open files: ulimit -n"
            ) from error
        raise _refused(path, os.strerror(error.errno or 0), site) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise _refused(path, "not a regular file", site)
    return descriptor, status


def _bytes(descriptor: int, offset: int, size: int, path: Path, site: str | None) -> bytes:
    buffer = bytearray(size)
    _fill(descriptor, offset, memoryview(buffer), path, site)
    return bytes(buffer)


def _fill(descriptor: int, offset: int, into: memoryview, path: Path, site: str | None) -> None:
    done = 0
    while done < len(into):
        try:
            count = os.preadv(descriptor, [into[done:]], offset + done)
        except OSError as error:
            raise _refused(path, os.strerror(error.errno or 0), site) from error
        if count == 0:
            raise _refused(path, f"truncated: it ends before byte {offset + len(into)}", site)
        done += count
