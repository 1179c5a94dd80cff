"""The tiny model is a real Hugging Face folder, and its tokenizer loses nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flctl.campaign.corpora import write_corpus
from flctl.model.tiny import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny_model(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_opens_as_a_llama_of_a_few_hundred_thousand_parameters(folder):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, LlamaForCausalLM)
    assert 50_000 < model.num_parameters() < 500_000


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(folder, tmp_path):
    write_tiny_model(tmp_path / "again", seed=1)
    write_tiny_model(tmp_path / "other", seed=2)
    assert contents(tmp_path / "again") == contents(folder)
    assert contents(tmp_path / "other")["model.safetensors"] != contents(folder)["model.safetensors"]


def test_making_it_leaves_the_random_numbers_of_the_caller_alone(tmp_path):
    import torch

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    write_tiny_model(tmp_path / "model", seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_a_small_shard_size_gives_several_shards_in_the_dtype_asked_for(folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    write_tiny_model(tmp_path / "model", seed=1, shard_size=100_000, dtype="bfloat16", tied=False)
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 1
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_makes_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("language", ["italian", "czech"])
def test_italian_and_czech_make_the_round_trip_one_token_per_byte(tokenizer, tmp_path, language):
    write_corpus(language, tmp_path, seed=1)
    text = next(tmp_path.iterdir()).read_text(encoding="utf-8")
    ids = tokenizer(text, verbose=False).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_importing_it_loads_no_heavy_library():
    code = "import sys, flctl.model.tiny; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
