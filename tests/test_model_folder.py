"""Which folders are models; and the commands that flctl names for other kinds do what they promise."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from flctl.errors import ConfigurationError
from flctl.model.folder import check_model
from flctl.model.tiny import write_tiny_model
from tests.checkpoints import read_weights, same_bits, write_weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(folder, seed=1)
    return folder


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    folder = tmp_path / "it's a model"
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def refusal_of(folder: Path) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as refusal:
        check_model(folder)
    assert str(folder) in refusal.value.message
    assert refusal.value.exit_code == 3
    return refusal.value


def run_hint(hint: str) -> None:
    """Types the command that ends the hint into a shell."""
    command = hint[hint.index("python -c") :].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(["/bin/sh", "-c", command], check=True, capture_output=True, env={"HF_HUB_OFFLINE": "1"})


def with_weights_as(folder: Path, name: str) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()


def test_a_folder_that_save_pretrained_wrote_is_a_model(model: Path) -> None:
    check_model(model)


def test_a_model_in_shards_is_a_model(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "sharded", seed=1, shard_size="100KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    check_model(tmp_path / "sharded")


def test_a_model_of_links_into_a_hubs_cache_is_a_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for path in model.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    check_model(tmp_path / "snapshot")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.ckpt"])
def test_pickled_weights_are_refused_and_the_named_command_converts_them(name: str, model: Path, tiny: Path) -> None:
    with_weights_as(model, name)
    error = refusal_of(model)
    assert name in error.message
    run_hint(error.hint)
    converted = model.with_name(model.name + "-safetensors")
    check_model(converted)
    assert same_bits(read_weights(converted), read_weights(tiny))


@pytest.mark.parametrize(
    ("name", "option", "needs"),
    [
        ("model-Q8_0.gguf", 'gguf_file="model-Q8_0.gguf"', "pip install gguf"),
        ("tf_model.h5", "from_tf=True", "tensorflow"),
        ("flax_model.msgpack", "from_flax=True", "flax"),
    ],
)
def test_other_kinds_are_refused_with_the_command_for_them(name: str, option: str, needs: str, model: Path) -> None:
    (model / "model.safetensors").rename(model / name)
    error = refusal_of(model)
    assert name in error.message
    assert needs in error.hint
    words = shlex.split(error.hint[error.hint.index("python -c") :])
    assert option in words[2]
    assert "save_pretrained(t, safe_serialization=True)" in words[2]
    compile(words[2], "hint", "exec")


def test_a_missing_tokenizer_is_refused_and_the_named_command_adds_it(model: Path, tiny: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    error = refusal_of(model)
    assert "no tokenizer" in error.message
    run_hint(error.hint.replace("NAME OR FOLDER", str(tiny)))
    check_model(model)


def test_a_name_on_the_hub_is_refused_with_the_command_that_downloads_it() -> None:
    error = refusal_of(Path("some-org/Some-Model-1.0"))
    words = shlex.split(error.hint[error.hint.index("python -c") :])
    assert 's, t = "some-org/Some-Model-1.0", "Some-Model-1.0"' in words[2]
    compile(words[2], "hint", "exec")


def spoil_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(100))


def no_floats(folder: Path) -> None:
    write_weights(folder, {"w": ("I8", np.zeros(4, np.int8))})


def quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))


def adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").rename(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "names no model_type"),
        (lambda folder: (folder / "config.json").write_text("{}"), "names no model_type"),
        (lambda folder: (folder / "config.json").write_text(" " * (2 << 20)), "longer than"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (spoil_header, "no JSON object"),
        (no_floats, "nothing to average"),
        (quantised, "quantised"),
        (adapter, "an adapter"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_with_the_reason(
    spoil: Callable[[Path], object], reason: str, model: Path
) -> None:
    spoil(model)
    assert reason in refusal_of(model).message


def test_a_file_or_nothing_is_refused(model: Path) -> None:
    assert f"give the folder it is in: {model}" in refusal_of(model / "model.safetensors").hint
    assert "no such folder" in refusal_of(model / "none").message
