"""Tied tensors: however a site or the base was written, one model is one model, and nothing else passes for it."""

import json
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file, save_model

from flctl.errors import AggregationRefused
from flctl.model.merge import Source, merge
from flctl.model.shards import open_shards
from flctl.model.verify import check, match
from flctl.payload import train
from tests.checkpoints import Tensors, raw_file, read_weights, reference_fedavg, same_bits, write_weights

SMALL = {"vocab_size": 64, "dtype": "bfloat16"}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, **SMALL}
BART = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in (("layers", 1), ("ffn_dim", 32))}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(tie_word_embeddings=True, **LLAMA),
    "llama-untied": lambda: transformers.LlamaConfig(tie_word_embeddings=False, **LLAMA),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0, **SMALL
    ),
    "t5": lambda: transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, **SMALL),
    "bart": lambda: transformers.BartConfig(
        d_model=32, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32, **BART, **SMALL
    ),
}
CLASSES = {
    "llama": transformers.AutoModelForCausalLM,
    "llama-untied": transformers.AutoModelForCausalLM,
    "gpt2": transformers.AutoModelForCausalLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "bart": transformers.AutoModelForSeq2SeqLM,
}
WRITERS = ("transformers", "every name", "first name")
SITES = ("brno", "karolina")


def save(model: Any, folder: Path, writer: str) -> None:
    """As transformers does; as a program that stores every name of a tied tensor; as safetensors' save_model, which
    stores the first name."""
    model.save_pretrained(folder, max_shard_size="8KB" if writer == "transformers" else "5GB")
    if writer != "transformers":
        for path in folder.glob("*.safetensors*"):
            path.unlink()
    if writer == "every name":
        tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if writer == "first name":
        save_model(model, str(folder / "model.safetensors"), {"format": "pt"})


@pytest.fixture(scope="module", params=CONFIGS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(kind, a folder with <writer>/<number> for 3 models of that kind)"""
    root = tmp_path_factory.mktemp("tied")
    for number in range(3):
        torch.manual_seed(number)
        model = CLASSES[request.param].from_config(CONFIGS[request.param]()).to(torch.bfloat16)
        for writer in WRITERS:
            save(model, root / writer / str(number), writer)
    return request.param, root


def test_transformers_leaves_out_what_is_tied_and_other_writers_do_not(written: tuple[str, Path]) -> None:
    kind, root = written
    names = {writer: set(read_weights(root / writer / "0")) for writer in WRITERS}
    tied = {"llama": 1, "llama-untied": 0, "gpt2": 1, "t5": 3, "bart": 3}[kind]
    assert [len(names["every name"] - names[writer]) for writer in WRITERS] == [tied, 0, tied]
    assert (names["transformers"] == names["first name"]) is (tied == 0)


def test_models_of_all_writers_merge_and_transformers_opens_what_they_make(
    written: tuple[str, Path], tmp_path: Path
) -> None:
    kind, root = written
    whole = [read_weights(root / "every name" / str(number)) for number in range(3)]
    expected = reference_fedavg(whole[0], [(3, whole[1]), (2, whole[2])])
    for place, (ours, *theirs) in enumerate(product(WRITERS, repeat=3)):
        base, draft = root / ours / "0", tmp_path / str(place)
        sources = [
            Source(site=site, number=1, folder=root / writer / str(number), weight=weight)
            for site, writer, number, weight in zip(SITES, theirs, (1, 2), (3, 2), strict=True)
        ]
        merge(base, sources, draft, chunk=500)
        made = read_weights(draft)
        assert same_bits(made, {name: expected[name] for name in read_weights(base)}), (ours, *theirs)
        for source in sources:
            assert check(source.folder, base, site=source.site).tensors == len(made)
        model, seen = CLASSES[kind].from_pretrained(draft, output_loading_info=True)
        assert not any(seen.values()), (ours, *theirs, seen)
        state = model.state_dict()
        assert state.keys() == expected.keys()
        for name, (_, bits) in expected.items():
            assert state[name].view(torch.int16).numpy().tobytes() == bits.tobytes()


@pytest.mark.parametrize("written", ["llama", "llama-untied", "gpt2"], indirect=True)
def test_what_the_trainer_saves_passes_the_gates_of_every_base(written: tuple[str, Path], tmp_path: Path) -> None:
    """Of those that it trains: causal language models."""
    _, root = written
    for writer in WRITERS:
        base, out = root / writer / "0", tmp_path / writer
        out.mkdir()
        world = train.World()
        train.save(train.load(str(base), train.read_options({}), world), out, world)
        assert check(out, base, site="brno").update_norm == 0.0


def test_the_trainer_still_refuses_a_base_with_tensors_that_are_not_the_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CLASSES["llama"].from_config(CONFIGS["llama"]())
    save(model, tmp_path / "base", "every name")
    loaded, world = train.load(str(tmp_path / "base"), train.read_options({}), train.World()), train.World()
    loaded.stored["rotary.inv_freq"] = torch.float32
    (tmp_path / "out").mkdir()
    with pytest.raises(train.Refused, match=r"other tensors than the base holds \(rotary.inv_freq\)"):
        train.save(loaded, tmp_path / "out", world)


# What is tied, and what is not

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
RNG = np.random.default_rng(1)
VALUES = ("F32", RNG.normal(size=(40, 30)).astype(np.float32))
OTHERS = ("F32", RNG.normal(size=(40, 30)).astype(np.float32))
ONES = ("F32", np.ones((40, 30), np.float32))
TIED = {"tie_word_embeddings": True}


def folder(path: Path, tensors: Tensors, config: Mapping[str, Any] | str | None = None) -> Path:
    write_weights(path, tensors)
    if config is not None:
        (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def matched(path: Path, base: Tensors, theirs: Tensors, config: Mapping[str, Any] | str | None) -> Any:
    ours = open_shards(folder(path / "base", base, config))
    return match(open_shards(folder(path / "out", theirs), site="brno"), ours)


@pytest.mark.parametrize(
    "config",
    [
        TIED,
        {},
        {"tie_word_embeddings": False, "is_encoder_decoder": True},
        {"tie_word_embeddings": False, "text_config": TIED},
        {"text_config": TIED},
    ],
)
def test_a_config_may_say_that_tensors_are_tied_in_several_ways(config: Mapping[str, Any], tmp_path: Path) -> None:
    found = matched(tmp_path, {EMBED: VALUES, HEAD: VALUES}, {EMBED: OTHERS}, config)
    assert found.tensors[HEAD].begin == found.tensors[EMBED].begin
    assert found.tensors[HEAD].name == HEAD


BAD: dict[str, tuple[Tensors, Tensors, Mapping[str, Any] | str | None, str]] = {
    "untied_by_config": (
        {EMBED: VALUES, HEAD: VALUES},
        {EMBED: OTHERS},
        {"tie_word_embeddings": False},
        r"'lm_head.weight' is missing and not tied: config.json says tie_word_embeddings = false",
    ),
    "untied_in_the_text": (
        {EMBED: VALUES, HEAD: VALUES},
        {EMBED: OTHERS},
        {"text_config": {"tie_word_embeddings": False}},
        "tie_word_embeddings = false",
    ),
    "extra_and_untied": (
        {EMBED: VALUES},
        {EMBED: OTHERS, HEAD: OTHERS},
        {"tie_word_embeddings": False},
        r"'lm_head.weight' is not in the base and not tied: config.json says tie_word_embeddings = false",
    ),
    "other_values_in_the_base": (
        {EMBED: VALUES, HEAD: OTHERS},
        {EMBED: OTHERS},
        TIED,
        "is missing and not tied: no other tensor of the base has the same values",
    ),
    "other_values_in_the_last_place": (
        {EMBED: VALUES, HEAD: ("F32", np.where(np.arange(1200).reshape(40, 30) == 1199, 5, VALUES[1]).astype("f4"))},
        {EMBED: OTHERS},
        TIED,
        "no other tensor of the base",
    ),
    "extra_with_other_values": (
        {EMBED: VALUES},
        {EMBED: VALUES, HEAD: OTHERS},
        TIED,
        "not in the base and not tied: no other tensor there has the same values",
    ),
    "same_bytes_of_another_dtype": (
        {EMBED: VALUES, HEAD: ("I32", VALUES[1].view(np.int32))},
        {EMBED: OTHERS},
        TIED,
        "no other tensor of the base",
    ),
    "same_bytes_of_another_shape": (
        {EMBED: VALUES, HEAD: ("F32", VALUES[1].reshape(30, 40))},
        {EMBED: OTHERS},
        TIED,
        "no other tensor of the base",
    ),
    "all_names_missing": (
        {EMBED: VALUES, HEAD: VALUES, "norm": OTHERS},
        {"norm": OTHERS},
        TIED,
        f"'{EMBED}' is missing, and so is '{HEAD}', which it is tied to",
    ),
    "fresh_norms_are_alike_and_not_tied": ({"a.norm": ONES, "b.norm": ONES}, {"a.norm": OTHERS}, TIED, "missing"),
    "empty_tensors_are_alike_and_not_tied": (
        {"a": ("F32", np.zeros((0, 4), np.float32)), "b": ("F32", np.zeros((0, 4), np.float32))},
        {"a": ("F32", np.zeros((0, 4), np.float32))},
        TIED,
        "'b' is missing",
    ),
    "no_config": ({EMBED: VALUES, HEAD: VALUES}, {EMBED: OTHERS}, None, "'lm_head.weight' is missing$"),
    "broken_config": ({EMBED: VALUES, HEAD: VALUES}, {EMBED: OTHERS}, "{", "config.json cannot be read: not JSON"),
    "config_is_a_list": ({EMBED: VALUES, HEAD: VALUES}, {EMBED: OTHERS}, "[]", "config.json cannot be read"),
    "many": (
        {EMBED: VALUES},
        {EMBED: VALUES, **{f"copy.{number}": VALUES for number in range(65)}},
        TIED,
        "'copy.0', 'copy.1', 'copy.2' and 62 more are not in the base",
    ),
    "both": ({EMBED: VALUES}, {HEAD: VALUES}, TIED, f"'{EMBED}' is missing and not tied"),
    "shape_of_the_twin": (
        {EMBED: VALUES, HEAD: VALUES},
        {EMBED: ("F32", OTHERS[1].reshape(30, 40))},
        TIED,
        r"has shape \[30, 40\], the base's has \[40, 30\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_tying_does_not_explain_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    base, theirs, config, reason = BAD[case]
    with pytest.raises(AggregationRefused, match=reason) as refusal:
        matched(tmp_path, base, theirs, config)
    assert refusal.value.site == "brno"
    assert str(tmp_path / "out") in refusal.value.message


def test_a_note_in_the_header_does_not_make_one_tensor_pass_for_another_shape(tmp_path: Path) -> None:
    ours = open_shards(folder(tmp_path / "base", {EMBED: VALUES}, TIED))
    header = {
        "__metadata__": {EMBED: HEAD, "nothing": "nowhere"},
        HEAD: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(raw_file(header, bytes(8)))
    theirs = open_shards(tmp_path / "out", site="brno")
    assert theirs.tensors[HEAD].stands_for == (EMBED,)
    with pytest.raises(AggregationRefused, match=r"has shape \[2\], the base's has \[40, 30\]"):
        match(theirs, ours)


def test_a_base_of_another_writer_is_what_an_update_may_start_from(tmp_path: Path) -> None:
    """An asynchronous contribution is compared with a base of its own, written by whoever."""
    base = folder(tmp_path / "base", {EMBED: VALUES, HEAD: VALUES}, TIED)
    older = folder(tmp_path / "older", {EMBED: VALUES}, TIED)
    given = folder(tmp_path / "out", {EMBED: OTHERS}, TIED)
    merge(base, [Source(site="brno", number=1, folder=given, weight=1, base=older)], tmp_path / "draft")
    made = read_weights(tmp_path / "draft")
    assert made[EMBED][1].tobytes() == made[HEAD][1].tobytes()
