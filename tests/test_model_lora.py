"""Adapters to begin with and to end with: a fresh one is what peft would save, and a merged model what peft merges."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from flctl.errors import ConfigurationError, Interrupted, UsageError
from flctl.model.adapter_config import facts_of
from flctl.model.lora import Lora, check_adapter, parsed, write_fresh_adapter
from flctl.model.manifest import hash_folder
from flctl.model.merged import write_merged

TOKENS = torch.arange(12).reshape(1, 12)


def llama(dtype: torch.dtype = torch.float32) -> Any:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **small)).to(dtype)


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=4))


def neox() -> Any:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 16}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, num_hidden_layers=2, **small))


BASES: dict[str, tuple[Callable[[], Any], str, Any]] = {
    "llama": (llama, "q_proj+v_proj", ["q_proj", "v_proj"]),
    "llama, all linear": (llama, "all-linear", "all-linear"),
    "gpt2": (gpt2, "c_attn+c_proj", ["c_attn", "c_proj"]),
    "gpt2, peft's own targets": (gpt2, "", None),
    "gpt-neox": (neox, "query_key_value+dense", ["query_key_value", "dense"]),
}


def write_base(folder: Path, make: Callable[[], Any], **options: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make().save_pretrained(folder, **options)
    return folder


def wrapped(base: Path, targets: Any, **options: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "task_type": "CAUSAL_LM", **options}
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=targets, **settings))


def trained(base: Path, targets: Any, folder: Path, **options: Any) -> Path:
    """An adapter whose factors are all random, as peft saves it."""
    model = wrapped(base, targets, **options)
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "lora_" in name:
                values.normal_(0.0, 0.1, generator=dice)
    model.save_pretrained(folder)
    return folder


def settings_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "adapter_config.json").read_text())
    targets = found["target_modules"]
    return {**found, "target_modules": sorted(targets), "base_model_name_or_path": ""}


@pytest.mark.parametrize("case", BASES)
def test_a_fresh_adapter_has_the_names_the_shapes_and_the_config_that_peft_saves(case: str, tmp_path: Path) -> None:
    make, targets, as_peft = BASES[case]
    base = write_base(tmp_path / "base", make)
    wrapped(base, as_peft).save_pretrained(tmp_path / "peft")
    lora = parsed(f"r=4,alpha=8,dropout=0.1{',targets=' + targets if targets else ''}")
    write_fresh_adapter(base, lora, tmp_path / "ours", seed=3)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert settings_of(tmp_path / "ours") == settings_of(tmp_path / "peft")
    for name, values in ours.items():
        bound = values.shape[1] ** -0.5
        if "lora_B" in name:
            assert not values.any()
        else:
            assert 0.8 * bound < values.abs().max() <= bound
            assert abs(values.std() - bound / 3**0.5) < 0.2 * bound
            assert theirs[name].abs().max() <= bound
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    before = model(TOKENS).logits
    assert torch.equal(PeftModel.from_pretrained(model, tmp_path / "ours").eval()(TOKENS).logits, before)


def test_a_fresh_adapter_follows_from_the_seed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", llama)
    made = []
    for place, seed in enumerate((1, 1, 2)):
        write_fresh_adapter(base, parsed("targets=q_proj"), tmp_path / str(place), seed=seed)
        made.append((tmp_path / str(place) / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]


def test_a_fresh_adapter_needs_the_config_of_the_base_alone(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", llama)
    (base / "model.safetensors").unlink()
    facts = facts_of(write_fresh_adapter(base, parsed("r=2,targets=q_proj"), tmp_path / "a", seed=1))
    assert facts == {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}


def test_the_option_says_what_pefts_config_says() -> None:
    assert parsed("r=16,alpha=32,targets=q_proj+v_proj,dropout=0.05") == Lora(
        rank=16, alpha=32, dropout=0.05, targets=("q_proj", "v_proj")
    )
    assert parsed("") == Lora(rank=8, alpha=8, dropout=0.0, targets=())
    assert isinstance(parsed("alpha=32").alpha, int) and parsed("alpha=0.5").alpha == 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("r=0", "r = '0' is no whole number"),
        ("r=2.5", "no whole number"),
        ("rank=8", "did you mean r?"),
        ("target=q", "did you mean targets?"),
        ("r", "no KEY=VALUE"),
        ("r=1,r=2", "twice"),
        ("alpha=-1", "alpha"),
        ("dropout=1", "dropout"),
        ("targets=.*", "no name of a module"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("?", r"\?")) as caught:
        parsed(text)
    assert "r=8,alpha=32" in caught.value.hint


@pytest.mark.parametrize(
    ("targets", "words"), [("q_prj", "q_prj.* not found"), ("embed_tokens", "no linear layer"), ("norm", "RMSNorm")]
)
def test_targets_that_are_no_linear_layers_of_the_base_are_refused(targets: str, words: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", llama)
    with pytest.raises(ConfigurationError, match=words) as caught:
        write_fresh_adapter(base, parsed(f"targets={targets}"), tmp_path / "a", seed=1)
    assert "all-linear" in caught.value.hint and not (tmp_path / "a").exists()


def test_without_peft_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", llama)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigurationError, match="peft, which is not installed") as caught:
        write_fresh_adapter(base, parsed(""), tmp_path / "a", seed=1)
    assert caught.value.hint == "pip install 'flctl[lora]'"


def test_an_adapter_that_peft_saved_for_the_base_is_taken(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", llama)
    given = trained(base, ["q_proj"], tmp_path / "given", rank_pattern={"layers.1.self_attn.q_proj": 2})
    assert facts_of(check_adapter(given, base))["r"] == 4


def spoil(folder: Path, how: str) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    if how == "a config of another rank":
        config["r"] = 2
    elif how == "a missing tensor":
        del tensors[first]
    elif how == "one more tensor":
        tensors["more"] = torch.zeros(1)
    elif how == "no LoRA":
        config["peft_type"] = "IA3"
    elif how == "changes the base":
        config["init_lora_weights"] = "pissa"
    elif how == "no config":
        (folder / "adapter_config.json").unlink()
        return
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("a config of another rank", "has shape"),
        ("a missing tensor", "there is no tensor"),
        ("one more tensor", "no place for tensor 'more'"),
        ("no LoRA", "IA3"),
        ("changes the base", "pissa"),
        ("no config", "adapter_config.json"),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused(how: str, words: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", llama)
    given = trained(base, ["q_proj"], tmp_path / "given")
    spoil(given, how)
    with pytest.raises(ConfigurationError, match=words):
        check_adapter(given, base)


MERGES: dict[str, tuple[Callable[[], Any], Any, dict[str, Any], float]] = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"], {}, 1e-6),
    "llama in shards": (llama, "all-linear", {"max_shard_size": "20KB"}, 1e-6),
    "gpt2": (gpt2, ["c_attn", "c_proj"], {}, 1e-6),
    "gpt-neox": (neox, ["query_key_value"], {}, 1e-6),
    "bfloat16": (lambda: llama(torch.bfloat16), ["q_proj"], {}, 2**-8),
    "float64": (lambda: llama(torch.float64), ["q_proj"], {}, 1e-6),
}


@pytest.mark.parametrize("case", MERGES)
def test_a_merged_model_is_the_one_that_peft_merges(case: str, tmp_path: Path) -> None:
    make, targets, options, tolerance = MERGES[case]
    base = write_base(tmp_path / "base", make, **options)
    adapter = trained(base, targets, tmp_path / "adapter", use_rslora=case == "llama")
    told: list[tuple[int, int]] = []
    files = write_merged(
        base, hash_folder(base), adapter, tmp_path / "out", progress=lambda done, total: told.append((done, total))
    )
    assert files == hash_folder(tmp_path / "out")
    assert {entry.path for entry in files} == {entry.path for entry in hash_folder(base)}
    assert told[-1][0] == told[-1][1] == sum(path.stat().st_size for path in base.glob("*.safetensors"))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    theirs = loaded.merge_and_unload().eval()
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = 0
    for (name, mine), (other, values) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other and mine.dtype == values.dtype
        assert torch.allclose(mine.double(), values.double(), rtol=tolerance, atol=1e-6), name
        changed += not torch.equal(mine, plain[name])
    assert changed
    assert torch.allclose(ours(TOKENS).logits, theirs(TOKENS).logits, atol=10 * tolerance, rtol=10 * tolerance)


def test_a_base_whose_file_leaves_out_the_models_prefix_is_merged_all_the_same(tmp_path: Path) -> None:
    """As the hub's own file of GPT-2 does."""
    base = write_base(tmp_path / "base", gpt2)
    adapter = trained(base, ["c_attn"], tmp_path / "adapter")
    write_merged(base, hash_folder(base), adapter, tmp_path / "long")
    tensors = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): values for name, values in tensors.items()}
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    write_merged(base, hash_folder(base), adapter, tmp_path / "short")
    long = load_file(tmp_path / "long" / "model.safetensors")
    for name, values in load_file(tmp_path / "short" / "model.safetensors").items():
        assert torch.equal(values, long[f"transformer.{name}"])


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_that_does_more_than_add_products_is_left_to_peft(options: dict[str, Any], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", llama)
    adapter = trained(base, ["q_proj"], tmp_path / "adapter", **options)
    with pytest.raises(ConfigurationError) as caught:
        write_merged(base, hash_folder(base), adapter, tmp_path / "out")
    assert "merge_and_unload" in caught.value.hint and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_base_that_is_not_what_it_was_is_not_merged(name: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", llama)
    adapter, files = trained(base, ["q_proj"], tmp_path / "adapter"), hash_folder(base)
    content = bytearray((base / name).read_bytes())
    content[-3] ^= 1
    (base / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"{name} is not what the campaign began with"):
        write_merged(base, files, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stop_leaves_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", llama)
    adapter = trained(base, ["q_proj"], tmp_path / "adapter")
    with pytest.raises(Interrupted):
        write_merged(base, hash_folder(base), adapter, tmp_path / "out", stop=lambda: True)
    assert not (tmp_path / "out").exists()
