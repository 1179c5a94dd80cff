"""Adapters to begin a campaign with: a fresh one as peft makes it, or a given one, checked against the base.

The base's weights are never loaded: its modules are laid out on the meta device, and peft names the adapter's tensors.
Values as peft's (LoraLayer.reset_lora_parameters, 0.21): A Kaiming-uniform with a = sqrt(5), B zero."""

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any

from flctl.errors import AggregationRefused, ConfigurationError, UsageError
from flctl.model.adapter_config import CHANGES_BASE, CONFIG, WEIGHTS, read_config
from flctl.model.header import packed
from flctl.model.shards import Shards, open_shards

HINT = "r=8,alpha=32,targets=q_proj+v_proj; also dropout=0.05, targets=all-linear"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A fresh adapter's rank, alpha, dropout and target modules (none: those that peft takes for the kind of model);
    what is not said is peft's default."""

    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    targets: tuple[str, ...] = ()


def parsed(text: str) -> Lora:
    """`r=8,alpha=32,targets=q_proj+v_proj,dropout=0.05`. UsageError if it says anything else."""
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not value:
            joined = "; several targets are joined with +" if "targets" in found else ""
            raise UsageError(f"--lora: {part!r} is no KEY=VALUE{joined}", hint=HINT)
        if key in found:
            raise UsageError(f"--lora: {key} is there twice", hint=HINT)
        found[key] = value
    keys = {"r", "alpha", "dropout", "targets"}
    if unknown := sorted(found.keys() - keys):
        close = get_close_matches(unknown[0], [*keys, "rank"], 1)
        near = {"rank": "r"}.get(close[0], close[0]) if close else ""
        raise UsageError(f"--lora knows no {unknown[0]!r}" + (f"; did you mean {near}?" if near else ""), hint=HINT)
    targets = tuple(filter(None, found.get("targets", "").split("+")))
    if wrong := [target for target in targets if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", target)]:
        raise UsageError(f"--lora: {wrong[0]!r} is no name of a module", hint=HINT)
    alpha = _number(found.get("alpha", "8"), "alpha", 1e-6, 1e6)
    return Lora(
        rank=int(_number(found.get("r", "8"), "r", 1, 65536, whole=True)),
        alpha=int(alpha) if alpha == int(alpha) else alpha,
        dropout=_number(found.get("dropout", "0"), "dropout", 0.0, 0.999),
        targets=targets,
    )


def _number(text: str, key: str, least: float, most: float, *, whole: bool = False) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        kind = "whole number" if whole else "number"
        raise UsageError(f"--lora: {key} = {text!r} is no {kind} from {least:g} to {most:g}", hint=HINT)
    return value


def write_fresh_adapter(base: Path, lora: Lora, folder: Path, *, seed: int) -> dict[str, Any]:
    """A new adapter for the base in the new folder, which adds nothing yet, as peft's save_pretrained writes it; the
    same seed gives the same bytes. Returns its config."""
    targets: Any = None if not lora.targets else "all-linear" if lora.targets == ("all-linear",) else [*lora.targets]
    config, shapes = _laid_out(
        base,
        {
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
        },
    )
    if odd := [name for name in shapes if not name.endswith((".lora_A.weight", ".lora_B.weight"))]:
        raise ConfigurationError(
            f"--lora: {odd[0]} would be in the adapter: a target is no linear layer",
            hint="leave it out of targets; targets=all-linear takes all that are linear",
        )
    folder.mkdir(mode=0o700)
    header, places = packed([(name, "F32", shapes[name]) for name in sorted(shapes)], file=WEIGHTS)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(header)
        for tensor in places:
            file.write(_values(tensor.name, tensor.shape, seed))
    # Where the base lies is nobody's business at the sites.
    config = {**config, "base_model_name_or_path": base.absolute().name, "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
    return config


def _values(name: str, shape: tuple[int, ...], seed: int) -> bytes:
    import torch

    values = torch.zeros(shape)
    if name.endswith(".lora_A.weight"):
        own = int.from_bytes(sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
        torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=torch.Generator().manual_seed(own))
    return bytes(values.numpy().tobytes())


def check_adapter(folder: Path, base: Path) -> dict[str, Any]:
    """The config of an adapter that peft can load onto the base, every tensor of it; ConfigurationError if it is
    none."""
    hint = "give a folder that peft's save_pretrained() wrote for this base"
    try:
        config, shards = read_config(folder), open_shards(folder)
    except AggregationRefused as error:
        raise ConfigurationError(error.message, hint=hint) from error
    first = str(config.setting("init_lora_weights")).lower()
    if first.startswith(CHANGES_BASE):
        raise ConfigurationError(
            f"{folder}: init_lora_weights is {first}: it changes the base each time that the adapter is loaded",
            hint="save the adapter with peft's path_initial_model_for_weight_conversion",
        )
    if config.values["peft_type"] != "LORA":
        raise ConfigurationError(f"{folder}: peft_type is {config.values['peft_type']}, not LORA", hint=hint)
    shapes = _laid_out(base, dict(config.values))[1]
    if reason := _difference(shards, shapes):
        raise ConfigurationError(f"{folder} does not fit the base {base}: {reason}", hint=hint)
    return dict(config.values)


def _difference(shards: Shards, shapes: Shapes) -> str:
    """Why these are not the tensors that peft expects; nothing, if they are."""
    for name in sorted(shapes.keys() | shards.tensors.keys()):
        if name not in shards.tensors:
            return f"there is no tensor {name!r}"
        if name not in shapes:
            return f"the base has no place for tensor {name!r}"
        if shards.tensors[name].shape != shapes[name]:
            return f"tensor {name!r} has shape {list(shards.tensors[name].shape)}, not {list(shapes[name])}"
    return ""


def _laid_out(base: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Shapes]:
    """peft's config of an adapter for the base, complete, and the shapes of the tensors that it saves; nothing of the
    base but its config is read."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            "a LoRA adapter needs peft, which is not installed", hint="pip install 'flctl[lora]'"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that peft sets fan_in_fan_out for Conv1D by itself
        return _as_peft(base, settings)


def _as_peft(base: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Shapes]:
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {name for name in peft.LoraConfig.__dataclass_fields__ if name not in ("peft_type", "runtime_config")}
    try:
        wanted = peft.LoraConfig(**{key: value for key, value in settings.items() if key in known})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
            wrapped = peft.get_peft_model(model, wanted)
        state = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    except (ValueError, TypeError, KeyError, OSError, NotImplementedError, RuntimeError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0][:300]
        raise ConfigurationError(
            f"peft cannot make this adapter for {base}: {first}",
            hint="targets are names of the model's linear modules, as q_proj+v_proj; or all-linear",
        ) from error
    # Sets have another order each time.
    table = {key: sorted(value) if isinstance(value, set) else value for key, value in wanted.to_dict().items()}
    return table, {name: tuple(tensor.shape) for name, tensor in state.items()}
