"""Is a folder a model that flctl can use, and if not, the command that makes one of it."""

import json
import re
import shlex
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from flctl.errors import AggregationRefused, ConfigurationError
from flctl.model.shards import open_shards

CONFIG_LIMIT = 1 << 20
TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json"),
    *("vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Weights that are not safetensors: the files' pattern, what they are called, how from_pretrained is told (None: it
    cannot load them; `{file}` stands for the file found) and what must be installed for that."""

    pattern: str
    title: str
    options: str | None
    needs: str = ""


KINDS = (
    Kind(pattern="pytorch_model*.bin", title="PyTorch", options=', dtype="auto"'),
    Kind(pattern="*.gguf", title="GGUF", options=', gguf_file="{file}"', needs="pip install gguf"),
    Kind(
        pattern="tf_model*.h5",
        title="TensorFlow",
        options=", from_tf=True",
        needs="pip install 'transformers<5' tensorflow tf-keras",
    ),
    Kind(
        pattern="flax_model*.msgpack",
        title="Flax",
        options=", from_flax=True",
        needs="pip install 'transformers<5' flax",
    ),
    *(Kind(pattern=pattern, title="bare PyTorch", options=None) for pattern in ("*.pt", "*.pth", "*.ckpt", "*.bin")),
)


def check_model(folder: Path) -> None:
    """Is it a Hugging Face folder with a config, a tokenizer and safetensors weights that can be averaged? If not,
    ConfigurationError, with the command that makes one of it where there is such a command. Does not need torch."""
    _check_files(folder)
    _check_config(folder / "config.json")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ConfigurationError(
            f"{folder}: no tokenizer ({', '.join(TOKENIZERS[:3])}, ...)",
            hint="add it from where the model came from: "
            + _python(f'T.from_pretrained("NAME OR FOLDER").save_pretrained({_text(folder)})'),
        )
    _check_tensors(folder)


def check_weights(folder: Path) -> None:
    """The same of the weights alone: what else a trainer of the user's own needs is its own affair."""
    _check_files(folder)
    _check_tensors(folder)


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise _no_folder(folder)
    if not any((folder / f"model.safetensors{suffix}").exists() for suffix in ("", ".index.json")):
        raise _other_kind(folder)


def _check_tensors(folder: Path) -> None:
    try:
        shards = open_shards(folder)
    except AggregationRefused as error:
        raise ConfigurationError(error.message, hint="copy or download the file again") from error
    if not any(tensor.averaged for tensor in shards.tensors.values()):
        raise ConfigurationError(f"{folder}: no tensor of a float dtype, so nothing to average")


def _no_folder(folder: Path) -> ConfigurationError:
    if folder.exists():
        return ConfigurationError(f"{folder}: a file", hint=f"give the folder it is in: {folder.parent}")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(folder)):
        return ConfigurationError(
            f"{folder}: no such folder; a name on the Hugging Face hub is not downloaded",
            hint=f"download it, then give the folder {folder.name}: {_conversion(str(folder), folder.name)}",
        )
    return ConfigurationError(f"{folder}: no such folder", hint="give a folder that save_pretrained() wrote")


def _check_config(path: Path) -> None:
    try:
        if path.stat().st_size > CONFIG_LIMIT:
            raise ConfigurationError(f"{path}: longer than {CONFIG_LIMIT} bytes")
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{path.parent}: no config.json", hint="give a folder that save_pretrained() wrote"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigurationError(f"{path}: names no model_type")
    if "quantization_config" in config:
        raise ConfigurationError(f"{path.parent}: quantised weights cannot be averaged", hint="give the original model")


def _other_kind(folder: Path) -> ConfigurationError:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if any(name.startswith("adapter_") for name in names):
        hint = "--model BASE --adapter FOLDER goes on with it"
        return ConfigurationError(f"{folder}: an adapter, not a whole model", hint=hint)
    target = f"{folder}-safetensors"
    for kind in KINDS:
        if file := next((name for name in names if fnmatch(name, kind.pattern)), None):
            reason = f"{folder}: {kind.title} weights ({file}), not safetensors"
            needs = f" ({kind.needs})" if kind.needs else ""
            if kind.options is None:
                return ConfigurationError(reason, hint=f"convert them: {_bare_conversion(folder, file, target)}")
            options = kind.options.replace("{file}", file)
            return ConfigurationError(reason, hint=f"convert them{needs}: {_conversion(str(folder), target, options)}")
    return ConfigurationError(
        f"{folder}: no model.safetensors and no model.safetensors.index.json",
        hint="give a folder that save_pretrained() wrote",
    )


def _conversion(source: str, target: str, options: str = ', dtype="auto"', before: str = "") -> str:
    """The command that loads the model and its tokenizer from `source` and saves them as safetensors in `target`."""
    tokenizer = options if "gguf_file" in options else ""
    return _python(
        f"s, t = {_text(source)}, {_text(target)}; {before}"
        f"M.from_pretrained(s{options}).save_pretrained(t, safe_serialization=True); "
        f"T.from_pretrained(s{tokenizer}).save_pretrained(t)"
    )


def _bare_conversion(folder: Path, file: str, target: str) -> str:
    """The same where the file holds a state dict and nothing else: transformers can load it once it is safetensors,
    and then writes only what the architecture needs."""
    before = (
        "import torch; from safetensors.torch import save_file; "
        f'w = torch.load(s + "/" + {_text(file)}, map_location="cpu", weights_only=True); '
        'save_file({k: v.clone() for k, v in w.items()}, s + "/model.safetensors", {"format": "pt"}); '
    )
    return _conversion(str(folder), target, before=before)


def _python(code: str) -> str:
    names = "AutoModelForCausalLM as M, AutoTokenizer as T"
    return f"python -c {shlex.quote(f'from transformers import {names}; {code}')}"


def _text(value: str | Path) -> str:
    """A Python literal in double quotes, which the shell's single quotes then leave alone."""
    return json.dumps(str(value), ensure_ascii=False)
