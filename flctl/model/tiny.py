"""The tiny model of the demo and the tests: a real LlamaForCausalLM made from a config, with a byte-level tokenizer."""

from pathlib import Path
from typing import Any

END = "<|end|>"
PAD = "<|pad|>"
LONGEST = 1024  # positions, the longest sequence the model accepts; a token is a byte
# The usual 0.02 is meant for widths in the thousands; at width 64 it leaves the logits flat for hundreds of steps.
INITIALIZER_RANGE = 0.08


def write_tiny_model(
    folder: Path,
    *,
    seed: int,
    dtype: str = "float32",
    shard_size: int | str = "5GB",
    tied: bool = True,
    width: int = 64,
    layers: int = 2,
) -> None:
    """Write a randomly initialised model and its tokenizer as a Hugging Face folder with safetensors weights.

    The same seed gives the same bytes. `shard_size` (bytes, or as transformers spells it) splits the weights into
    shards; `tied=False` gives the output layer a tensor `lm_head.weight` of its own. `width` is a multiple of 16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # the caller says what is written
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)


def _byte_tokenizer() -> Any:
    """One token per UTF-8 byte and no merges, so that any text makes the round trip and nothing has to be trained."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=LONGEST,
        clean_up_tokenization_spaces=False,
    )
