"""Which files make up a model folder, and their hashes; streamed, without torch."""

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from flctl.errors import ConfigurationError
from flctl.model.shards import Shards
from flctl.model.state import FOLDER as STATE
from flctl.records import FileEntry

RECORD = "flctl.json"
BLOCK = 1 << 20
# Weights in forms that a merge does not rewrite: carried along, they would be those of an older model.
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".ot", ".npz"),
    *(".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".index.json"),
)


def hash_folder(folder: Path) -> tuple[FileEntry, ...]:
    """Every file below `folder` but flctl.json, by path. Links, sockets and the like raise ConfigurationError: a model
    version is made of plain files. The sha256 of a version leaves out what lies in `state/`, too: it is not its own."""
    return tuple(hash_file(folder, path) for path in _files(folder, strict=True) if path != RECORD)


def check_plain(folder: Path) -> None:
    """ConfigurationError unless all below a version's folder are plain files: what a link in it led to would become a
    part of the next version, and go to the sites."""
    _files(folder, strict=True)


def carried_files(shards: Shards) -> tuple[str, ...]:
    """The paths of what travels with the weights: their index, config, tokenizer, licence and so on; no other weights
    in any form, no flctl.json, no rule's state, nothing hidden."""
    return tuple(path for path in _files(shards.folder, strict=False) if _carried(path, shards.index))


def model_files(shards: Shards) -> tuple[str, ...]:
    """The paths of all files of a model: its weights and what travels with them."""
    return tuple(sorted([*(shard.name for shard in shards.files), *carried_files(shards)]))


def _carried(path: str, index: str | None) -> bool:
    if path == index:
        return True
    return path != RECORD and not path.lower().endswith(WEIGHTS)


def _files(folder: Path, *, strict: bool) -> list[str]:
    """Relative POSIX paths, sorted. Unless `strict`, hidden files and folders and the state of a rule, which belongs to
    one version, are passed over, and a link to a file counts as that file (a hub's cache is made of such links)."""
    found, folders = [], [folder]
    while folders:
        for path in _listed(folders.pop()):
            name = path.relative_to(folder).as_posix()
            if (path.name.startswith(".") or name == STATE) and not strict:
                continue
            if not name.isprintable():
                raise ConfigurationError(f"{folder}: {name!r} cannot be the name of a model's file")
            if path.is_symlink() and (strict or not path.is_file()):
                raise ConfigurationError(f"{path}: a link; a model folder must hold the file itself")
            if path.is_dir():
                folders.append(path)
            elif path.is_file():
                found.append(name)
            else:
                raise ConfigurationError(f"{path}: neither a file nor a folder")
    return sorted(found)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise ConfigurationError(f"{folder}: {os.strerror(error.errno or 0)}") from error


def hash_file(folder: Path, name: str, told: Callable[[int], None] | None = None) -> FileEntry:
    """`told` hears of the bytes read so far, and may raise."""
    digest, size, block = sha256(), 0, memoryview(bytearray(BLOCK))
    try:
        with os.fdopen(os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(block[:count])
                size += count
                if told:
                    told(size)
    except OSError as error:
        raise ConfigurationError(f"{folder / name}: {os.strerror(error.errno or 0)}") from error
    return FileEntry(path=name, size=size, sha256=digest.hexdigest())
