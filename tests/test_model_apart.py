"""A state kept apart from its models: which one a base goes on from, whenever its replacement was interrupted."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from flctl.errors import AggregationRefused, ConfigurationError
from flctl.model.apart import find_state, identity, install, own_record, stage
from flctl.model.manifest import hash_folder
from flctl.model.request import Request
from flctl.model.standalone import aggregate
from flctl.model.state import read_state
from flctl.records import folder_sha256
from tests.checkpoints import to_bf16, write_weights


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Model X, and Y made from it with a state in S, and Z made from Y with a state in S2; S belongs to Y, S2 to Z."""
    for name, value in (("X", 1.0), ("A", 2.0)):
        write_weights(tmp_path / name, {"w": ("BF16", to_bf16(np.full(100, value, np.float32)))})
    place = Request(folders=(tmp_path / "A",), out=tmp_path / "Y", base=tmp_path / "X", rule="diloco")
    aggregate(Request(**{**fields(place), "state": tmp_path / "S"}))
    shutil.copytree(tmp_path / "S", tmp_path / "S2")
    aggregate(Request(**{**fields(place), "out": tmp_path / "Z", "base": tmp_path / "Y", "state": tmp_path / "S2"}))
    return tmp_path


def fields(request: Request) -> dict[str, object]:
    return {name: getattr(request, name) for name in Request.__slots__}


def step(state: object) -> int:
    return getattr(state, "step", 0)


def test_the_state_that_belongs_to_the_base_is_found(root: Path) -> None:
    assert step(find_state(root / "Y", root / "S")) == 1
    assert step(find_state(root / "Z", root / "S2")) == 2
    assert find_state(root / "X", root / "S3") is None
    assert find_state(root / "X", None) is None
    with pytest.raises(AggregationRefused, match="another model"):
        find_state(root / "X", root / "S")


def test_beside_the_base_is_looked_where_nothing_is_kept_apart_yet(root: Path) -> None:
    (root / "S").rename(root / "Y" / "state")
    assert step(find_state(root / "Y", root / "new")) == 1


def test_a_replacement_killed_before_its_first_rename_is_finished(root: Path) -> None:
    """The model Z is in place, S is still the state of Y."""
    shutil.move(root / "S2", root / ".S.new")
    assert step(find_state(root / "Z", root / "S")) == 2
    assert step(read_state(root / "S")) == 2
    assert sorted(path.name for path in root.iterdir()) == ["A", "S", "X", "Y", "Z"]


def test_a_replacement_killed_between_its_renames_is_finished_or_undone(root: Path) -> None:
    (root / "S").rename(root / ".S.old")
    shutil.copytree(root / "S2", root / ".S.new")
    assert step(find_state(root / "Y", root / "S")) == 1
    assert step(find_state(root / "Z", root / "S")) == 2
    with pytest.raises(AggregationRefused, match="another model"):
        find_state(root / "Y", root / "S")


def test_a_replacement_killed_before_its_model_was_made_changes_nothing(root: Path) -> None:
    """The staged state is that of a model which does not exist: the same command begins anew."""
    shutil.copytree(root / "S", root / ".new.new")
    assert find_state(root / "X", root / "new") is None
    shutil.copytree(root / "S2", root / ".S.new")
    assert step(find_state(root / "Y", root / "S")) == 1
    stage(root / "S2", root / "S")
    install(root / "S")
    assert step(read_state(root / "S")) == 2
    assert not (root / ".S.old").exists()


def test_an_empty_folder_begins_anew_whatever_lies_beside_the_base(root: Path) -> None:
    (root / "S").rename(root / "Y" / "state")
    (root / "E").mkdir()
    assert find_state(root / "Y", root / "E") is None
    assert step(find_state(root / "Y", root / "new")) == 1


def test_an_empty_folder_is_no_state_yet_and_any_other_is_not_replaced(root: Path) -> None:
    (root / "E").mkdir()
    assert find_state(root / "X", root / "E") is None
    (root / "E" / "letters.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"holds no state\.json"):
        find_state(root / "X", root / "E")


def test_a_base_is_known_by_its_record_or_by_its_files(root: Path) -> None:
    recorded = own_record(root / "Y")["sha256"]
    assert identity(root / "Y") == recorded == folder_sha256(hash_folder(root / "Y"))
    (root / "Y" / "flctl.json").unlink()
    (root / "Y" / "model.safetensors").rename(root / "blob")
    (root / "Y" / "model.safetensors").symlink_to(root / "blob")
    assert identity(root / "Y") == recorded
    (root / "Y" / "flctl.json").write_text("{")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        identity(root / "Y")
