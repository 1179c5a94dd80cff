"""A folder's manifest: every plain file, nothing but plain files; and which files belong to a model."""

import json
import os
import socket
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from flctl.campaign.creation import adopt_model
from flctl.errors import ConfigurationError
from flctl.model.manifest import BLOCK, carried_files, hash_file, hash_folder, model_files
from flctl.model.shards import open_shards
from flctl.records import folder_sha256
from tests.checkpoints import write_weights


def test_every_file_is_listed_by_path_and_flctl_json_is_not(tmp_path: Path) -> None:
    contents = {"b": b"2", "a/c": b"", "a.json": bytes(range(256)) * (BLOCK // 100), ".hidden": b"h"}
    for name, content in {**contents, "flctl.json": b"{}"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    entries = hash_folder(tmp_path)
    assert [entry.path for entry in entries] == sorted(contents)
    for entry in entries:
        content = contents[entry.path]
        assert (entry.size, entry.sha256) == (len(content), sha256(content).hexdigest())


def test_the_folders_hash_is_that_of_sha256sum(tmp_path: Path) -> None:
    for name in ("b", "a", "c d"):
        (tmp_path / name).write_text(name)
    lines = "".join(sorted(f"{sha256(name.encode()).hexdigest()}  {name}\n" for name in ("b", "a", "c d")))
    assert folder_sha256(hash_folder(tmp_path)) == sha256(lines.encode()).hexdigest()


def test_links_pipes_and_sockets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    socket_file = socket.socket(socket.AF_UNIX)
    for name, make in {
        "link": lambda path: path.symlink_to(tmp_path / "file"),
        "dangling": lambda path: path.symlink_to("nowhere"),
        "folder-link": lambda path: path.symlink_to("/etc"),
        "pipe": os.mkfifo,
        "socket": lambda path: socket_file.bind(str(path)),
    }.items():
        make(tmp_path / name)
        with pytest.raises(ConfigurationError, match=f"{name}: (a link|neither)"):
            hash_folder(tmp_path)
        (tmp_path / name).unlink()
    socket_file.close()
    assert len(hash_folder(tmp_path)) == 1


def test_a_name_that_would_break_the_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a\nb").write_text("x")
    with pytest.raises(ConfigurationError, match="cannot be the name"):
        hash_folder(tmp_path)


def test_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        hash_folder(tmp_path / "none")


def test_a_model_is_its_shards_and_what_is_no_weights(tmp_path: Path) -> None:
    """The links are those of a hub's cache: snapshots/<commit>/<file> -> blobs/<sha256>."""
    tensors = {"a": ("U8", np.zeros(1, np.uint8)), "b": ("U8", np.zeros(1, np.uint8))}
    folder = write_weights(tmp_path / "model", tensors, {"a": "1", "b": "2"})
    (tmp_path / "blob").write_text("{}")
    (folder / "config.json").symlink_to(tmp_path / "blob")
    for name in ("tokenizer.json", "flctl.json", "model-old.safetensors", "training_args.bin", "rng.pth", ".git"):
        (folder / name).write_text("x")
    assert model_files(open_shards(folder)) == (
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    )


def test_what_a_rule_left_is_no_part_of_a_model(tmp_path: Path) -> None:
    """`flctl init` with a version of another campaign takes the model and leaves its state and record behind."""
    folder = write_weights(tmp_path / "model", {"a": ("F32", np.zeros(1, np.float32))})
    write_weights(folder / "state" / "momentum", {"a": ("F32", np.zeros(1, np.float32))})
    for name in ("state/state.json", "flctl.json", "sub/state"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert carried_files(open_shards(folder)) == ("sub/state",)
    adopt_model(folder, tmp_path / "0000")
    taken = [path.relative_to(tmp_path / "0000").as_posix() for path in sorted((tmp_path / "0000").rglob("*"))]
    assert taken == ["flctl.json", "model.safetensors", "sub", "sub/state"]
    assert json.loads((tmp_path / "0000" / "flctl.json").read_text())["contributions"] == []


def test_who_waits_for_a_hash_is_told_how_far_it_is_and_may_end_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(BLOCK + 5))
    heard: list[int] = []
    assert hash_file(tmp_path, "file", heard.append).size == heard[-1] == BLOCK + 5
    with pytest.raises(ZeroDivisionError):
        hash_file(tmp_path, "file", lambda size: 1 // 0)
