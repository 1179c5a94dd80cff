"""Adapters: what peft saves at the sites is averaged as said, and what comes out is what peft then loads."""

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from flctl.errors import AggregationRefused, ConfigurationError, FlctlError, Interrupted
from flctl.model.adapter_config import AdapterConfig, with_ranks
from flctl.model.adapters import is_adapter, merge_adapters, read_config
from flctl.model.job import Recipe, Source
from flctl.model.manifest import hash_folder
from tests.checkpoints import reference_fedavg

SITES = ("brno", "karolina", "leonardo")
WEIGHTS = (5.0, 2.0, 1.0)
SHARES = tuple(weight / sum(WEIGHTS) for weight in WEIGHTS)
QV = ["q_proj", "v_proj"]
TOKENS = torch.arange(12).reshape(1, 12)

Adapter = dict[str, torch.Tensor]


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=4)).eval()


class Pictures(torch.nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.wide = torch.nn.Conv2d(4, 8, 3, groups=groups)
            self.flat = torch.nn.Conv2d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.flat(self.wide(x))


def save_adapter(folder: Path, seed: int, model: Callable[[], Any] = llama, dtype: Any = None, **settings: Any) -> Path:
    """What peft writes at a site after some training: every factor and everything else it saves has moved."""
    kind = settings.pop("kind", LoraConfig)
    settings = {"target_modules": QV, **({"r": 4, "lora_alpha": 8} if kind is LoraConfig else {}), **settings}
    base = model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = get_peft_model(base, kind(**settings))
        if dtype:
            trained.to(dtype)
        random = torch.Generator().manual_seed(seed)
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data += (0.3 * torch.randn(parameter.shape, generator=random)).to(parameter.dtype)
        trained.save_pretrained(folder)
    return folder


def sites(root: Path, settings: Sequence[Mapping[str, Any]]) -> list[Source]:
    return [
        Source(
            site=site,
            number=place + 1,
            folder=save_adapter(root / site, seed=place + 1, **one),
            weight=weight,
        )
        for place, (site, weight, one) in enumerate(zip(SITES, WEIGHTS, settings, strict=False))
    ]


def load(folder: Path, model: Callable[[], Any] = llama) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model(), str(folder)).eval()


def deltas(folder: Path, model: Callable[[], Any] = llama) -> Adapter:
    """What peft adds to each weight."""
    loaded = load(folder, model)
    with torch.no_grad():
        return {
            name: module.get_delta_weight("default")
            for name, module in loaded.named_modules()
            if hasattr(module, "get_delta_weight") and "default" in module.scaling
        }


def expected_deltas(given: Sequence[Source], model: Callable[[], Any] = llama) -> Adapter:
    """sum_k p_k s_k B_k A_k, each s_k B_k A_k by peft."""
    parts = [deltas(source.folder, model) for source in given]
    total = sum(source.weight for source in given)
    return {
        name: sum(source.weight / total * part[name].double() for source, part in zip(given, parts, strict=True))
        for name in parts[0]
    }


def off(one: Adapter, other: Adapter) -> float:
    """The largest relative difference in Frobenius norm."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).norm() / other[name].norm()) for name in one)


def sha256s(folder: Path) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in hash_folder(folder)}


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def spoilt(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return spoil


Q = "base_model.model.model.layers.0.self_attn.q_proj"

CASES: dict[str, tuple[Callable[[], Any], list[dict[str, Any]]]] = {
    "the same settings": (llama, [{}] * 3),
    "one site": (llama, [{}]),
    "rsLoRA": (llama, [{"use_rslora": True, "r": 3}] * 3),
    "ranks and alphas of their own": (llama, [{"r": 2, "lora_alpha": 3}, {"r": 5}, {"r": 3, "use_rslora": True}]),
    "patterns": (
        llama,
        [
            {"rank_pattern": {"layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 5}},
            {"rank_pattern": {r"layers\.\d+\.self_attn\.v_proj": 2}, "alpha_pattern": {"^model.layers.0.*": 1.5}},
            {"use_rslora": True, "alpha_pattern": {"(q|k)_proj": 2}},
        ],
    ),
    "every linear layer": (llama, [{"target_modules": "all-linear"}] * 2),
    "an embedding": (llama, [{"target_modules": ["embed_tokens", "o_proj"]}] * 2),
    "Conv1D": (gpt2, [{"target_modules": ["c_attn"], "fan_in_fan_out": True}] * 2),
    "convolutions": (Pictures, [{"target_modules": ["wide", "flat"]}, {"target_modules": ["wide", "flat"], "r": 2}]),
}


@pytest.mark.parametrize("method", ["stack", "svd"])
@pytest.mark.parametrize("case", CASES)
def test_the_exact_methods_add_the_average_of_what_the_sites_add(case: str, method: str, tmp_path: Path) -> None:
    model, settings = CASES[case]
    given = sites(tmp_path, [{"model": model, **one} for one in settings])
    together = max(sum(read_config(s.folder).rank(name) for s in given) for name in modules(given[0].folder))
    made, report = merge_adapters(given, tmp_path / "out", method=method, rank=together if method == "svd" else None)
    assert off(deltas(tmp_path / "out", model), expected_deltas(given, model)) < 2e-6
    assert made.files == hash_folder(tmp_path / "out")
    assert [report.ranks[name] for name in report.ranks] == [
        read_config(tmp_path / "out").rank(name) for name in modules(tmp_path / "out")
    ]
    assert report.lost is None if method == "stack" else report.lost < 1e-28


def modules(folder: Path) -> list[str]:
    names = load_file(folder / "adapter_model.safetensors")
    return [name.rsplit(".lora_", 1)[0] for name in names if ".lora_A." in name or name.endswith("lora_embedding_A")]


@pytest.mark.parametrize("method", ["stack", "svd"])
def test_the_model_with_the_new_adapter_answers_like_one_with_all_deltas(method: str, tmp_path: Path) -> None:
    given = sites(tmp_path, [{"lora_alpha": 16}, {"r": 2}, {"use_rslora": True}])
    merge_adapters(given, tmp_path / "out", method=method, rank=10 if method == "svd" else None)
    whole = llama()
    weights = dict(whole.named_parameters())
    with torch.no_grad():
        for name, delta in expected_deltas(given).items():
            weights[name.removeprefix("base_model.model.") + ".weight"] += delta
        expected = whole(TOKENS).logits
        assert (expected - llama()(TOKENS).logits).abs().max() > 0.1
        assert torch.allclose(load(tmp_path / "out")(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_mean_of_the_factors_is_not_the_mean_of_the_products(tmp_path: Path) -> None:
    given = sites(tmp_path, [{}] * 3)
    _, report = merge_adapters(given, tmp_path / "out", method="mean")
    assert off(deltas(tmp_path / "out"), expected_deltas(given)) > 0.3
    assert report.lost is None and not report.ranks


def test_the_mean_has_the_bits_of_fedavg_and_carries_config_and_card(tmp_path: Path) -> None:
    given = sites(tmp_path, [{"modules_to_save": ["lm_head"]}] * 3)
    base = save_adapter(tmp_path / "base", seed=9, modules_to_save=["lm_head"])
    made, _ = merge_adapters(given, tmp_path / "out", method="mean", base=base)
    tensors = [
        {name: ("F32", value.numpy()) for name, value in load_file(folder / "adapter_model.safetensors").items()}
        for folder in (base, *(source.folder for source in given))
    ]
    expected = reference_fedavg(tensors[0], list(zip(WEIGHTS, tensors[1:], strict=True)))
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[name].numpy().tobytes() == expected[name][1].tobytes() for name in found)
    assert [entry.path for entry in made.files] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert (tmp_path / "out/adapter_config.json").read_bytes() == (base / "adapter_config.json").read_bytes()
    load(tmp_path / "out")


def test_the_mean_takes_any_rule_and_the_exact_methods_none(tmp_path: Path) -> None:
    given = sites(tmp_path, [{}] * 2)
    base = save_adapter(tmp_path / "base", seed=9)
    recipe = Recipe(rule="fedbuff")
    merge_adapters(given, tmp_path / "out", method="mean", base=base, recipe=recipe)
    w, x, y = (load_file(f / "adapter_model.safetensors") for f in (base, given[0].folder, given[1].folder))
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    for name, values in found.items():
        expected = w[name] + WEIGHTS[0] * (x[name] - w[name]) + WEIGHTS[1] * (y[name] - w[name])
        assert torch.allclose(values, expected, atol=1e-5)
    for method in ("stack", "svd"):
        with pytest.raises(ConfigurationError, match="averages products of factors"):
            merge_adapters(given, tmp_path / "never", method=method, base=base, recipe=recipe)


@pytest.mark.parametrize("rank", [1, 2, 4, 7, 9])
def test_a_truncated_svd_is_the_best_product_of_its_rank_and_says_what_it_lost(rank: int, tmp_path: Path) -> None:
    given = sites(tmp_path, [{"r": 2}, {}, {"r": 3}])
    _, report = merge_adapters(given, tmp_path / "out", method="svd", rank=rank)
    assert set(report.ranks.values()) == {rank}
    parts = [load_file(source.folder / "adapter_model.safetensors") for source in given]
    found, energy, lost = deltas(tmp_path / "out"), 0.0, 0.0
    for name, delta in found.items():
        factors = [(part[f"{name}.lora_B.weight"].double(), part[f"{name}.lora_A.weight"].double()) for part in parts]
        whole = sum(p * 8 / len(a) * (b @ a) for p, (b, a) in zip(SHARES, factors, strict=True))
        u, values, vt = torch.linalg.svd(whole)
        assert torch.allclose(delta.double(), (u[:, :rank] * values[:rank]) @ vt[:rank], atol=1e-5)
        of_all, of_rest = float((values**2).sum()), float((values[rank:] ** 2).sum())
        assert report.lost_of[name] == pytest.approx(of_rest / of_all, rel=1e-12, abs=1e-24)
        assert report.lost_of[name] == pytest.approx(float((delta - whole).norm() ** 2) / of_all, abs=1e-6)
        energy, lost = energy + of_all, lost + of_rest
    assert report.lost == pytest.approx(lost / energy, rel=1e-12, abs=1e-24)


def test_svd_keeps_the_bases_rank_and_config_so_that_training_goes_on(tmp_path: Path) -> None:
    settings = {"r": 3, "use_rslora": True, "rank_pattern": {"v_proj": 5}, "lora_dropout": 0.1}
    base = save_adapter(tmp_path / "base", seed=9, **settings)
    given = sites(tmp_path, [settings, {"r": 7}])
    _, report = merge_adapters(given, tmp_path / "out", method="svd", base=base)
    assert (tmp_path / "out/adapter_config.json").read_bytes() == (base / "adapter_config.json").read_bytes()
    assert {name.rsplit(".", 1)[1]: rank for name, rank in report.ranks.items()} == {"q_proj": 3, "v_proj": 5}
    assert report.lost is not None and 0 < report.lost < 1
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    for name in modules(tmp_path / "out"):
        a = tensors[f"{name}.lora_A.weight"]
        assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-6)
        assert (a.gather(1, a.abs().argmax(dim=1, keepdim=True)) > 0).all()
    load(tmp_path / "out")


def test_svd_to_more_than_there_is_leaves_room_that_can_be_trained(tmp_path: Path) -> None:
    base = save_adapter(tmp_path / "base", seed=9, r=20)
    given = sites(tmp_path, [{"r": 4}])
    _, report = merge_adapters(given, tmp_path / "out", method="svd", base=base)
    assert report.lost == pytest.approx(0, abs=1e-28)
    assert off(deltas(tmp_path / "out"), expected_deltas(given)) < 2e-6
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    a, b = tensors[f"{Q}.lora_A.weight"], tensors[f"{Q}.lora_B.weight"]
    assert torch.allclose(a @ a.T, torch.eye(20), atol=1e-6)
    assert not b[:, 4:].any() and b[:, :4].any()
    with pytest.raises(ConfigurationError, match="have rank 4, so rank 5 gains nothing"):
        merge_adapters(given, tmp_path / "never", method="svd", rank=5)


def test_an_adapter_that_was_never_trained_stays_nothing(tmp_path: Path) -> None:
    given = sites(tmp_path, [{}] * 2)
    for source in given:
        for name in modules(source.folder):
            change_tensor(source.folder, f"{name}.lora_B.weight", torch.zeros_like)
    _, report = merge_adapters(given, tmp_path / "out", method="svd")
    assert report.lost == 0.0
    assert not any(delta.any() for delta in deltas(tmp_path / "out").values())


def test_stack_gets_a_scaling_of_exactly_one_from_peft(tmp_path: Path) -> None:
    given = sites(tmp_path, [{"use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 7}}, {"r": 3}])
    _, report = merge_adapters(given, tmp_path / "out", method="stack")
    loaded = {n: m for n, m in load(tmp_path / "out").named_modules() if hasattr(m, "get_delta_weight")}
    assert {module.scaling["default"] for module in loaded.values()} == {1.0}
    assert {name: module.r["default"] for name, module in loaded.items()} == report.ranks
    assert sorted(report.ranks.values()) == [7, 7, 7, 10]


@pytest.mark.parametrize(
    "names",
    [
        ["layers.1.q", "encoder.layers.1.q", "xlayers.1.q", "layers.10.q"],
        ["a.b", "a_b", "b", "c.a.b"],
        ["w+", "w(1)", "ww"],
    ],
)
def test_every_module_gets_its_rank_from_pefts_own_lookup(names: list[str]) -> None:
    ranks = {f"base_model.model.{name}": place + 1 for place, name in enumerate(names)}
    values = with_ranks(AdapterConfig(folder=Path("x"), site=None, values={"peft_type": "LORA"}), ranks).values
    for _ in range(2):  # as made, and as written, which sorts the patterns
        patterns, alphas = values["rank_pattern"], values["alpha_pattern"]
        for name, rank in zip(names, ranks.values(), strict=True):
            assert patterns.get(get_pattern_key(patterns, name), values["r"]) == rank
            assert alphas.get(get_pattern_key(alphas, name), values["lora_alpha"]) == rank
        values = json.loads(json.dumps(values, sort_keys=True))


@pytest.mark.parametrize("method", ["mean", "stack", "svd"])
def test_the_order_of_arrival_changes_no_byte(method: str, tmp_path: Path) -> None:
    given = sites(tmp_path, [{"modules_to_save": ["lm_head"]}] * 3)
    found = []
    for place, order in enumerate([(0, 1, 2), (2, 0, 1), (1, 2, 0)]):
        out = tmp_path / f"out-{place}"
        made, _ = merge_adapters([given[number] for number in order], out, method=method)
        assert made.coefficients == {(s.site, s.number): p for s, p in zip(given, SHARES, strict=True)}
        found.append(sha256s(out))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("method", ["stack", "svd"])
def test_what_is_no_factor_has_the_bits_of_fedavg(method: str, tmp_path: Path) -> None:
    settings = {"modules_to_save": ["embed_tokens"], "target_modules": ["c_attn"], "bias": "all"}
    given = sites(tmp_path, [{"model": gpt2, **settings, "modules_to_save": ["wpe"]}] * 3)
    merge_adapters(given, tmp_path / "exact", method=method)
    merge_adapters(given, tmp_path / "mean", method="mean")
    exact, mean = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("exact", "mean"))
    plain = [name for name in mean if ".lora_" not in name]
    assert sum(name.endswith("bias") for name in plain) > 4 and sum("wpe" in name for name in plain) == 1
    assert all(torch.equal(exact[name], mean[name]) for name in plain)


@pytest.mark.parametrize("method", ["stack", "svd"])
def test_lora_biases_are_averaged_with_their_scaling(method: str, tmp_path: Path) -> None:
    shared = {"model": gpt2, "target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}
    given = sites(tmp_path, [{**shared, "lora_alpha": 16}, {**shared, "r": 2}])
    merge_adapters(given, tmp_path / "out", method=method, rank=6 if method == "svd" else None)

    def bias(folder: Path) -> torch.Tensor:
        layer = next(m for _, m in load(folder, gpt2).named_modules() if hasattr(m, "get_delta_weight"))
        return layer.lora_B["default"].bias.detach().double() * layer.scaling["default"]

    expected = (5 * bias(given[0].folder) + 2 * bias(given[1].folder)) / 7
    assert torch.allclose(bias(tmp_path / "out"), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["stack", "svd"])
def test_bfloat16_factors_are_computed_in_float64_and_rounded_once(method: str, tmp_path: Path) -> None:
    given = sites(tmp_path, [{"dtype": torch.bfloat16}] * 2)
    wide = []
    for source in given:
        folder = tmp_path / f"wide-{source.site}"
        folder.mkdir()
        tensors = load_file(source.folder / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        save_file({name: tensor.double() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_bytes((source.folder / "adapter_config.json").read_bytes())
        wide.append(Source(site=source.site, number=1, folder=folder, weight=source.weight))
    merge_adapters(given, tmp_path / "out", method=method)
    merge_adapters(wide, tmp_path / "wide", method=method)
    narrow, exact = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "wide"))
    assert all(torch.equal(narrow[name], exact[name].bfloat16()) for name in exact)
    p, a = 5 / 7, load_file(wide[0].folder / "adapter_model.safetensors")[f"{Q}.lora_A.weight"].numpy()
    if method == "stack":
        assert np.array_equal(exact[f"{Q}.lora_A.weight"].numpy()[:4], a * np.float64(p * 2.0))


@pytest.mark.parametrize(
    ("method", "theirs", "words"),
    [
        ("mean", {"r": 6}, "r is 6, brno's is 4"),
        ("mean", {"lora_alpha": 9}, "lora_alpha is 9, brno's is 8"),
        ("mean", {"use_rslora": True}, "use_rslora is true, brno's is false"),
        ("mean", {"alpha_pattern": {"q_proj": 3}}, 'alpha_pattern is {"q_proj": 3}, brno\'s is {}'),
        ("svd", {"target_modules": ["q_proj", "k_proj"]}, "target_modules is ["),
        ("svd", {"target_modules": "(q|v)_proj"}, 'target_modules is "(q|v)_proj", brno\'s is ['),
        ("stack", {"bias": "all"}, 'bias is "all", brno\'s is "none"'),
        ("stack", {"fan_in_fan_out": True}, "fan_in_fan_out is true, brno's is false"),
        ("mean", {"modules_to_save": ["lm_head"]}, 'modules_to_save is ["lm_head"], brno\'s is null'),
        ("mean", {"layers_to_transform": 0}, "layers_to_transform is 0, brno's is null"),
        ("mean", {"use_dora": True}, "use_dora is true, brno's is false"),
        ("mean", {"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa", brno\'s is true'),
        ("mean", {"revision": "v2"}, 'revision is "v2", brno\'s is "v1"'),
        ("mean", {"use_something_new": True}, "use_something_new is true, brno's is null"),
        ("mean", {"peft_type": "IA3"}, 'peft_type is "IA3", brno\'s is "LORA"'),
    ],
)
def test_configs_that_differ_in_the_arithmetic_are_refused(
    method: str, theirs: dict[str, Any], words: str, tmp_path: Path
) -> None:
    given = sites(tmp_path, [{}] * 2)
    change_config(given[0].folder, revision="v1")
    change_config(given[1].folder, **theirs)
    with pytest.raises(AggregationRefused) as refused:
        merge_adapters(given, tmp_path / "out", method=method)
    assert refused.value.site == "karolina"
    assert words in refused.value.message and "karolina/adapter_config.json" in refused.value.message
    assert ("stack and svd" in refused.value.hint) == (
        next(iter(theirs)) in ("r", "lora_alpha", "use_rslora", "alpha_pattern")
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["mean", "stack", "svd"])
def test_configs_may_differ_in_what_the_factors_do_not_feel(method: str, tmp_path: Path) -> None:
    given = sites(tmp_path, [{}, {"target_modules": list(reversed(QV)), "lora_dropout": 0.2}, {}])
    change_config(
        given[1].folder,
        base_model_name_or_path="/scratch/elsewhere",
        peft_version="0.9.0",
        revision="main",
        inference_mode=False,
        task_type="CAUSAL_LM",
        init_lora_weights="gaussian",
        auto_mapping=None,
        layers_pattern=[],
    )
    path = given[2].folder / "adapter_config.json"  # an older peft wrote fewer keys
    kept = ("peft_type", "r", "lora_alpha", "target_modules")
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key in kept}))
    merge_adapters(given, tmp_path / "out", method=method)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora is true: DoRA gives every output"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which changes the base's weights too"),
        ({"kind": IA3Config, "feedforward_modules": []}, 'peft_type is "IA3"; only LORA'),
    ],
)
def test_adapters_that_add_no_product_have_a_mean_but_no_exact_average(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    given = sites(tmp_path, [settings] * 2)
    for method in ("stack", "svd"):
        with pytest.raises(AggregationRefused) as refused:
            merge_adapters(given, tmp_path / "out", method=method)
        assert words in refused.value.message and "use the method mean" in refused.value.hint
        assert refused.value.site == "brno"
    merge_adapters(given, tmp_path / "out", method="mean")
    load(tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("ensure_weight_tying", True, "share factors"),
        ("target_parameters", ["mlp.experts.up"], "experts lie interleaved"),
        ("use_qalora", True, "pools the inputs"),
        ("use_something_new", {"size": 3}, 'is {"size": 3}: flctl does not know'),
    ],
)
def test_settings_that_change_what_a_module_adds_are_refused_for_the_exact_methods(
    key: str, value: Any, words: str, tmp_path: Path
) -> None:
    given = sites(tmp_path, [{}] * 2)
    for source in given:
        change_config(source.folder, **{key: value})
    with pytest.raises(AggregationRefused, match=key) as refused:
        merge_adapters(given, tmp_path / "out", method="stack")
    assert words in refused.value.message
    merge_adapters(given, tmp_path / "out", method="mean")


def test_peft_knows_no_setting_that_flctl_has_not_looked_at(tmp_path: Path) -> None:
    """Every key that peft writes, at its default, passes; so a new one shows up here before a user meets it."""
    from flctl.model import adapter_config as known

    written = json.loads((save_adapter(tmp_path / "a", seed=1) / "adapter_config.json").read_text())
    unusual = set(known.REASONS) | {"arrow_config", "kasa_config", "monteclora_config", "use_bdlora"}
    assert set(written) <= known.HARMLESS | known.LINEAR | unusual, peft.__version__


@pytest.mark.parametrize("method", ["mean", "stack", "svd"])
@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (-math.inf, "Inf")])
@pytest.mark.parametrize("name", [f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", "base_model.model.lm_head.weight"])
def test_values_that_are_no_numbers_are_refused_by_site_and_tensor(
    method: str, value: float, word: str, name: str, tmp_path: Path
) -> None:
    given = sites(tmp_path, [{"modules_to_save": ["lm_head"]}] * 2)
    change_tensor(given[1].folder, name, spoilt(value))
    with pytest.raises(AggregationRefused) as refused:
        merge_adapters(given, tmp_path / "out", method=method)
    assert refused.value.site == "karolina" and f"tensor '{name}' holds {word}" in refused.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["stack", "svd"])
def test_a_product_too_large_for_the_dtype_is_refused(method: str, tmp_path: Path) -> None:
    given = sites(tmp_path, [{"dtype": torch.float16, "lora_alpha": 4000}] * 2)
    for source in given:
        change_tensor(source.folder, f"{Q}.lora_A.weight", spoilt(6e4))
        change_tensor(source.folder, f"{Q}.lora_B.weight", lambda tensor: torch.full_like(tensor, 6e4))
    with pytest.raises(AggregationRefused, match=r"q_proj.lora_. *.*too large for F16"):
        merge_adapters(given, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


def test_values_at_the_end_of_float64_are_refused_not_wrong(tmp_path: Path) -> None:
    given = sites(tmp_path, [{"dtype": torch.float64}] * 2)
    for source in given:
        for letter in "AB":
            change_tensor(source.folder, f"{Q}.lora_{letter}.weight", lambda tensor: torch.full_like(tensor, 1e200))
    with pytest.raises(AggregationRefused, match="too large"):
        merge_adapters(given, tmp_path / "out", method="svd")


@pytest.mark.parametrize("method", ["mean", "stack", "svd"])
def test_a_stop_leaves_no_draft_and_progress_ends_at_the_size(method: str, tmp_path: Path) -> None:
    given = sites(tmp_path, [{"modules_to_save": ["lm_head"]}] * 2)
    seen: list[int] = []
    merge_adapters(given, tmp_path / "out", method=method, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == (given[0].folder / "adapter_model.safetensors").stat().st_size
    with pytest.raises(Interrupted):
        merge_adapters(given, tmp_path / "never", method=method, stop=lambda: True)
    assert not (tmp_path / "never").exists()


def damage_missing(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: t for name, t in tensors.items() if "layers.0" in name}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_missing, "are missing"),
        (lambda folder: change_config(folder, r=5), "has rank 4, adapter_config.json says 5"),
        (lambda folder: change_config(folder, rank_pattern={"q_proj": 5}), "has rank 4, adapter_config.json says 5"),
        (lambda folder: change_tensor(folder, f"{Q}.lora_A.weight", lambda t: t[:, :5].clone()), "has shape [4, 5]"),
        (lambda folder: change_tensor(folder, f"{Q}.lora_B.weight", lambda t: t[:, :3].clone()), "has shape [32, 3]"),
        (lambda folder: change_tensor(folder, f"{Q}.lora_A.weight", lambda t: t[0].clone()), "has shape [32]"),
        (lambda folder: change_tensor(folder, f"{Q}.lora_A.weight", lambda t: t.double()), "is F64, the base's is F32"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "No such file"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read: not JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"a": 1, "a": 2}'), "appears twice"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "cannot be read: not a JSON object"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"config": 1}'), "names no peft_type"),
        (
            lambda folder: (folder / "adapter_config.json").write_text('{"a": ' + "[" * 20 + "]" * 20 + "}"),
            "more than 16 levels",
        ),
        (lambda folder: (folder / "adapter_config.json").write_bytes(b" " * (1 << 20) + b"{}"), "too many"),
        (lambda folder: change_config(folder, r=0), "the rank r = 0"),
        (lambda folder: change_config(folder, r=True), "the rank r = true"),
        (lambda folder: change_config(folder, lora_alpha=math.nan), "the alpha lora_alpha = NaN"),
        (lambda folder: change_config(folder, alpha_pattern={"q": 0}), "the alpha q = 0"),
        (lambda folder: change_config(folder, rank_pattern=["q"]), 'rank_pattern is ["q"], not a table'),
        (lambda folder: change_config(folder, rank_pattern={"[": 4}), "no regular expression"),
    ],
)
def test_a_damaged_adapter_is_refused_by_site(damage: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    given = sites(tmp_path, [{}] * 2)
    damage(given[1].folder)
    with pytest.raises(AggregationRefused) as refused:
        merge_adapters(given, tmp_path / "out", method="svd", base=given[0].folder)
    assert words in refused.value.message and refused.value.site == "karolina"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)(a|a)(a|a)(a|a)(a|a)$", ".*.*.*.*x", "a" * 300, "(x+x+)+y"])
def test_a_sites_expression_cannot_keep_flctl_busy(pattern: str, tmp_path: Path) -> None:
    given = sites(tmp_path, [{}] * 2)
    change_config(given[1].folder, rank_pattern={pattern: 4})
    with pytest.raises(AggregationRefused, match="too intricate") as refused:
        merge_adapters(given, tmp_path / "out", method="stack")
    assert refused.value.site == "karolina"


@pytest.mark.parametrize("pattern", ["a*a*a*!", "(" + "a|" * 30 + "a)" + "(" + "a|" * 30 + "a)" + ".*.*.*!", ".+.+.+!"])
def test_the_expressions_that_flctl_takes_are_quick(pattern: str, tmp_path: Path) -> None:
    given = sites(tmp_path, [{}] * 2)
    change_config(given[1].folder, alpha_pattern={pattern: 4})
    began = time.monotonic()
    merge_adapters(given, tmp_path / "out", method="stack")
    assert time.monotonic() - began < 5


def test_grouped_convolutions_have_no_exact_average(tmp_path: Path) -> None:
    settings = {"model": lambda: Pictures(groups=2), "target_modules": ["wide"]}
    given = sites(tmp_path, [settings] * 2)
    with pytest.raises(AggregationRefused, match="grouped convolutions"):
        merge_adapters(given, tmp_path / "out", method="stack")
    merge_adapters(given, tmp_path / "out", method="mean")


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"method": "svdd"}, "did you mean svd"),
        ({"method": "flora"}, "there are: mean, stack, svd"),
        ({"method": "stack", "rank": 4}, "no rank of 4 for stack"),
        ({"method": "mean", "rank": 4}, "no rank of 4 for mean"),
        ({"method": "svd", "rank": 0}, "no rank of 0 for svd"),
        ({"method": "svd"}, "the contributions differ in rank"),
    ],
)
def test_a_wish_that_cannot_be_meant_is_refused(wish: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = sites(tmp_path, [{"r": 2}, {"r": 3}])
    with pytest.raises(FlctlError) as refused:
        merge_adapters(given, tmp_path / "out", **wish)
    assert isinstance(refused.value, ConfigurationError) and words in refused.value.message


def test_an_adapter_may_lie_in_several_files(tmp_path: Path) -> None:
    given = sites(tmp_path, [{}] * 2)
    merge_adapters(given, tmp_path / "whole", method="stack")
    for source in given:
        tensors = list(load_file(source.folder / "adapter_model.safetensors").items())
        (source.folder / "adapter_model.safetensors").unlink()
        files = {f"adapter_model-{place}.safetensors": dict(tensors[place::2]) for place in (0, 1)}
        for file, part in files.items():
            save_file(part, source.folder / file)
        weight_map = {name: file for file, part in files.items() for name in part}
        index = source.folder / "adapter_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    merge_adapters(given, tmp_path / "out", method="stack")
    whole, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == found.keys() and all(torch.equal(whole[name], found[name]) for name in whole)
    load(tmp_path / "out")


def test_an_update_from_another_base_has_no_exact_average(tmp_path: Path) -> None:
    given = sites(tmp_path, [{}] * 2)
    stale = Source(site="leonardo", number=1, folder=given[1].folder, weight=1.0, base=given[0].folder)
    with pytest.raises(AggregationRefused, match="leonardo: it was trained from another adapter"):
        merge_adapters([given[0], stale], tmp_path / "out", method="stack")


def test_folders_know_whether_they_are_adapters(tmp_path: Path) -> None:
    assert is_adapter(save_adapter(tmp_path / "adapter", seed=1))
    llama().save_pretrained(tmp_path / "model")
    assert not is_adapter(tmp_path / "model")
