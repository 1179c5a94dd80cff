"""The state of a rule (momentum, variance, float32 master weights) beside the model version it belongs to.

`state/<name>/` holds one tensor set in safetensors files of the same names as the model's; `state/state.json` says
which rule made it, how many steps it counts, which model it belongs to, and every file's hash."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flctl.codec import from_data, to_data
from flctl.errors import ConfigurationError
from flctl.model.draft import Draft
from flctl.model.header import MASTER, Tensor, packed
from flctl.model.shards import Reader, Shards, open_shards
from flctl.records import FileEntry

FOLDER = "state"
RECORD = "state.json"
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Files to be written, all in `folder` of the draft ("": the model itself): the bytes before each file's data, each
    file's size, where each tensor will lie, and the text of the index, if the model has one."""

    folder: str
    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    index: tuple[str, bytes] | None = None

    def path(self, file: str) -> str:
        return f"{self.folder}/{file}" if self.folder else file

    @property
    def size(self) -> int:
        return sum(self.sizes.values()) + (len(self.index[1]) if self.index else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The state that lies beside a model version. `step`: how often the rule has stepped; `model`: sha256 of the
    model's folder."""

    folder: Path
    rule: str
    step: int
    model: str
    files: tuple[FileEntry, ...]

    def shards(self, name: str) -> Shards:
        return open_shards(self.folder / name)

    def has(self, name: str) -> bool:
        return any(entry.path.startswith(f"{name}/") and entry.path.endswith(".safetensors") for entry in self.files)


def model_layout(ours: Shards) -> Layout:
    """The next model's own files: the base's headers, sizes and places."""
    with Reader(ours) as reader:
        headers = {shard.name: reader.header(shard) for shard in ours.files}
    return Layout(
        folder="", headers=headers, sizes={shard.name: shard.size for shard in ours.files}, tensors=ours.tensors
    )


def state_layout(ours: Shards, name: str) -> Layout:
    """A state tensor of float32 (float64) for each float tensor of the model; master weights only where the model's own
    are less precise."""
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for shard in ours.files:
        wanted = [
            (tensor.name, "F64" if tensor.dtype == "F64" else "F32", tensor.shape)
            for tensor in shard.tensors
            if tensor.averaged and (name != MASTER or tensor.dtype in ("BF16", "F16"))
        ]
        if wanted:
            headers[shard.name], made = packed(wanted, file=shard.name)
            tensors.update({tensor.name: tensor for tensor in made})
            sizes[shard.name] = made[-1].end
    index = None
    if ours.index and tensors:
        data = {
            "metadata": {"total_size": sum(tensor.end - tensor.begin for tensor in tensors.values())},
            "weight_map": {name: tensor.file for name, tensor in tensors.items()},
        }
        index = (ours.index, (json.dumps(data, indent=1) + "\n").encode())
    return Layout(folder=f"{FOLDER}/{name}", headers=headers, sizes=sizes, tensors=tensors, index=index)


def write_state(made: Draft, *, rule: str, step: int, model: str) -> State:
    """The record beside the state's files, which are all in the draft."""
    prefix = f"{FOLDER}/"
    files = tuple(
        replace(entry, path=entry.path.removeprefix(prefix))
        for entry in sorted(made.entries, key=lambda entry: entry.path)
        if entry.path.startswith(prefix)
    )
    data = {"schema": SCHEMA, "rule": rule, "step": step, "model": model, "files": to_data(files)}
    with made.file(prefix + RECORD) as file:
        file.write((json.dumps(data, indent=1) + "\n").encode())
    return State(folder=made.folder / FOLDER, rule=rule, step=step, model=model, files=files)


def read_state(folder: Path) -> State | None:
    """What lies in a state folder; None if there is no such folder. ConfigurationError if it cannot be understood."""
    path = folder / RECORD
    if not folder.exists():
        return None
    try:
        data = json.loads(path.read_bytes())
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']} is not known")
        return State(
            folder=folder,
            rule=str(data["rule"]),
            step=int(data["step"]),
            model=str(data["model"]),
            files=tuple(from_data(FileEntry, entry) for entry in data["files"]),
        )
    except FileNotFoundError as error:
        raise ConfigurationError(f"{folder} holds no {RECORD}, so it is no state of a rule") from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigurationError(
            f"{path} is damaged: {error}", hint="restore it from a backup, or begin anew without it"
        ) from error
