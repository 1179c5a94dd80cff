"""adapter_config.json of a peft folder: read, compared between sites, and what it means for a LoRA module's rank and
scaling; without torch.

The facts are peft's: LoraConfig, `get_pattern_key` (utils/other.py) and LoraLayer.update_layer
(https://github.com/huggingface/peft, 0.21)."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flctl.errors import AggregationRefused
from flctl.model.header import json_table
from flctl.model.shards import small_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FACTS = ("r", "lora_alpha", "target_modules")
LIMIT = 1 << 20
DEPTH = 16
PREFIX = "base_model.model."
SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")

# Where the sites found the base, and how they trained: the saved factors mean the same whatever these say.
HARMLESS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "runtime_config", "task_type"),
        *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
        *("megatron_config", "megatron_core"),
    }
)
SETS = frozenset(
    {
        *("target_modules", "exclude_modules", "modules_to_save", "target_parameters"),
        *("layers_to_transform", "layers_pattern"),
    }
)
# What peft takes for a key that an older version did not write; for all others: nothing.
DEFAULTS = {"r": 8, "lora_alpha": 8, "bias": "none", "qalora_group_size": 16}
# The initialisations that also change the base's weights, each time the adapter is loaded.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# With these set, a module still adds scaling * B A to its weight.
LINEAR = frozenset(
    {
        *("peft_type", "revision", "bias", "lora_bias", "fan_in_fan_out", "init_lora_weights", "layer_replication"),
        *("trainable_token_indices", "alora_invocation_tokens", "qalora_group_size"),
        *(*SCALING, *(SETS - {"target_parameters"})),
    }
)
REASONS = {
    "use_dora": "DoRA gives every output of W + B A a learnt norm, so what a site adds to W is not its B A",
    "ensure_weight_tying": "it makes two modules share factors, which would be made anew for each",
    "target_parameters": "the factors of several experts lie interleaved in one tensor",
    "use_qalora": "QA-LoRA pools the inputs of A",
}
UNKNOWN = "flctl does not know that a module then still adds B A to its weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The settings of the adapter in `folder`; `site` whose they are (None: our own), for the errors."""

    folder: Path
    site: str | None
    values: Mapping[str, Any]

    def setting(self, key: str) -> Any:
        return self.values.get(key, DEFAULTS.get(key))

    # Both match patterns with the module's name: after compare(..., exact=True), which bounds the time of that.

    def rank(self, module: str) -> int:
        return int(self._of(module, "rank_pattern", "r"))

    def scaling(self, module: str) -> float:
        """What B A of the module is multiplied by: alpha / r, with rsLoRA alpha / sqrt(r) (arXiv:2312.03732)."""
        rank, alpha = self.rank(module), float(self._of(module, "alpha_pattern", "lora_alpha"))
        return alpha / math.sqrt(rank) if self.setting("use_rslora") else alpha / rank

    def refused(self, reason: str, *, hint: str = "") -> AggregationRefused:
        return AggregationRefused(f"{self.folder / CONFIG}: {reason}", site=self.site, hint=hint)

    def _of(self, module: str, patterns: str, key: str) -> Any:
        name = module.removeprefix(PREFIX)
        for pattern, value in (self.setting(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        return self.setting(key)


def is_adapter(folder: Path) -> bool:
    """Whether the folder means to be an adapter; what is wrong with it comes out when it is read."""
    return any((folder / name).exists() for name in (CONFIG, WEIGHTS, f"{WEIGHTS}.index.json"))


def read_config(folder: Path, *, site: str | None = None) -> AdapterConfig:
    """The checked adapter_config.json of a folder. Raises AggregationRefused naming file, reason and site."""
    text = small_file(folder / CONFIG, limit=LIMIT, site=site)
    config = AdapterConfig(folder=folder, site=site, values={})
    try:
        config = replace(config, values=json_table(text))
    except ValueError as error:
        raise config.refused(f"cannot be read: {error}") from error
    if not _shallow(config.values):
        raise config.refused(f"more than {DEPTH} levels of lists and tables")
    if not isinstance(config.values.get("peft_type"), str):
        raise config.refused("it names no peft_type")
    if config.values["peft_type"] == "LORA":
        _check_scaling(config)
    return config


def compare(configs: Sequence[AdapterConfig], *, exact: bool) -> None:
    """Whether the adapters can be averaged: everything must agree with the first config's that is not known to be
    harmless. For the exact methods rank and scaling may differ, and a module must add scaling * B A to its weight,
    nothing else. Raises AggregationRefused naming site, key and both values."""
    first = configs[0]
    for config in configs:
        if exact:
            _check_linear(config)
            _check_patterns(config)
        for key in sorted(first.values.keys() | config.values.keys()):
            if key in HARMLESS or (exact and key in SCALING) or _agree(key, first, config):
                continue
            whose = f"{first.site}'s" if first.site else "the base's"
            ours, theirs = _shown(first.setting(key)), _shown(config.setting(key))
            hint = "the methods stack and svd allow it" if key in SCALING else ""
            raise config.refused(f"{key} is {theirs}, {whose} is {ours}", hint=hint)


def with_rank(config: AdapterConfig, rank: int) -> AdapterConfig:
    """The same rank for every module; alpha, and with it the scaling's rule, as it was."""
    return _changed(config, r=rank, rank_pattern={})


def with_ranks(config: AdapterConfig, ranks: Mapping[str, int]) -> AdapterConfig:
    """A rank for each module, and a scaling of exactly 1."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name.removeprefix(PREFIX): rank for name, rank in ranks.items() if rank != usual}
    one = {"r": usual, "lora_alpha": usual, "use_rslora": False}
    made = _changed(config, **one, rank_pattern=others, alpha_pattern=others)
    if all(made.rank(module) == rank for module, rank in ranks.items()):
        return made  # every version of peft understands whole names
    anchored = {f"^{re.escape(name)}": rank for name, rank in others.items()}
    return _changed(config, **one, rank_pattern=anchored, alpha_pattern=anchored)


def facts_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader wants to know of an adapter, of its config."""
    return {key: values[key] for key in FACTS if key in values}


def config_text(config: AdapterConfig) -> bytes:
    """As peft writes it."""
    return json.dumps(config.values, indent=2, sort_keys=True).encode()


def _changed(config: AdapterConfig, **values: Any) -> AdapterConfig:
    return replace(config, values={**config.values, **values})


def _shallow(value: Any, levels: int = DEPTH) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return parts is None or (levels > 0 and all(_shallow(part, levels - 1) for part in parts))


def _check_scaling(config: AdapterConfig) -> None:
    ranks = {"r": config.setting("r"), **_pattern(config, "rank_pattern")}
    alphas = {"lora_alpha": config.setting("lora_alpha"), **_pattern(config, "alpha_pattern")}
    for key, rank in ranks.items():
        if type(rank) is not int or not 0 < rank < 1 << 31:
            raise config.refused(f"the rank {key} = {_shown(rank)} is no possible number")
    for key, alpha in alphas.items():
        if type(alpha) not in (int, float) or not 0 < alpha < 1e30:
            raise config.refused(f"the alpha {key} = {_shown(alpha)} is no possible number")


def _pattern(config: AdapterConfig, key: str) -> dict[str, Any]:
    patterns = config.setting(key) or {}
    if not isinstance(patterns, dict):
        raise config.refused(f"{key} is {_shown(patterns)}, not a table")
    return patterns


def _check_patterns(config: AdapterConfig) -> None:
    for pattern in [pattern for key in ("rank_pattern", "alpha_pattern") for pattern in _pattern(config, key)]:
        if not _tame(pattern):
            raise config.refused(
                f"the pattern {_shown(pattern)} is too intricate; flctl takes four groups and three repetitions",
                hint="use several shorter ones, or the method mean",
            )
        try:
            re.compile(pattern)
        except (re.error, OverflowError) as error:
            raise config.refused(f"the pattern {_shown(pattern)} is no regular expression: {error}") from error


def _tame(pattern: str) -> bool:
    """Whether matching it against a module's name takes little time: a site may send any expression, and nested or
    many repetitions or groups take Python exponential time."""
    repetitions = sum(pattern.count(letter) for letter in "*+?{")
    repeated_group = re.search(r"\)[*+?{]", pattern)
    return len(pattern) <= 256 and repetitions <= 3 and pattern.count("(") <= 4 and not repeated_group


def _check_linear(config: AdapterConfig) -> None:
    if config.values["peft_type"] != "LORA":
        kind = _shown(config.values["peft_type"])
        raise config.refused(f"peft_type is {kind}; only LORA's products can be averaged", hint="use the method mean")
    for key in sorted(config.values.keys() - HARMLESS - LINEAR):
        if _plain(key, config.values[key]) is not None:
            value, reason = _shown(config.values[key]), REASONS.get(key, UNKNOWN)
            raise config.refused(f"{key} is {value}: {reason}", hint="use the method mean")
    if change := _plain("init_lora_weights", config.setting("init_lora_weights")):
        raise config.refused(
            f"init_lora_weights is {change}, which changes the base's weights too, by an amount that depends on r",
            hint="save the adapters with peft's path_initial_model_for_weight_conversion, or use the method mean",
        )


def _agree(key: str, one: AdapterConfig, other: AdapterConfig) -> bool:
    ours, theirs = _plain(key, one.setting(key)), _plain(key, other.setting(key))
    if key == "revision" and None in (ours, theirs):
        return True  # a site that has the base as a folder knows of none
    return bool(ours == theirs)


def _plain(key: str, value: Any) -> Any:
    """A form in which two values that mean the same are equal; None for nothing, in whichever form."""
    if key == "init_lora_weights":
        return value if isinstance(value, str) and value.lower().startswith(CHANGES_BASE) else None
    if key in SETS and type(value) in (int, list):
        value = frozenset(_shown(item) for item in (value if isinstance(value, list) else [value]))
    return value or None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
