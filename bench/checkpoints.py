"""Model folders of random bf16 weights. Written block by block: the memory of the process that measures must stay
small, for the kernel counts it into the peak of every program which that process starts."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

BLOCK = 4 << 20
BLOCKS = 8
SPREAD = 0.02  # of the weights: that of real ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama model's shape; attention heads are 64 wide up to a hidden size of 2048, then 128."""

    hidden: int
    intermediate: int
    layers: int
    kv_heads: int
    vocabulary: int = 32000

    @property
    def head(self) -> int:
        return 64 if self.hidden <= 2048 else 128

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(elements(shape) * 2 for _, shape in self.tensors())

    @property
    def billions(self) -> str:
        return f"{self.size / 2e9:.2f}"

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, narrow = self.hidden, self.kv_heads * self.head
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            for name, shape in (
                ("input_layernorm", (hidden,)),
                ("mlp.down_proj", (hidden, self.intermediate)),
                ("mlp.gate_proj", (self.intermediate, hidden)),
                ("mlp.up_proj", (self.intermediate, hidden)),
                ("post_attention_layernorm", (hidden,)),
                ("self_attn.k_proj", (narrow, hidden)),
                ("self_attn.o_proj", (hidden, hidden)),
                ("self_attn.q_proj", (hidden, hidden)),
                ("self_attn.v_proj", (narrow, hidden)),
            ):
                yield f"model.layers.{layer}.{name}.weight", shape
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // self.head,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


TINYLLAMA = Shape(hidden=2048, intermediate=5632, layers=22, kv_heads=4)
SMALL = Shape(hidden=1024, intermediate=2816, layers=18, kv_heads=4)


def elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def checkpoint(folder: Path, shape: Shape, *, seed: int, shards: int) -> Path:
    """A new model folder, or the one that an earlier call made: the name stands only when all is written."""
    if folder.exists():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(parents=True)
    try:
        _fill(part, shape, seed, shards)
    except BaseException:
        shutil.rmtree(part)
        raise
    return part.rename(folder)


def linked(folder: Path, original: Path) -> Path:
    """A second name for a model's files, where a further copy would not fit on the disk."""
    if not folder.exists():
        folder.mkdir()
        for file in original.iterdir():
            (folder / file.name).hardlink_to(file)
    return folder


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def size_of(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _fill(part: Path, shape: Shape, seed: int, shards: int) -> None:
    blocks = _random_blocks(seed)
    weight_map: dict[str, str] = {}
    groups = _split(list(shape.tensors()), shards)
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        _write(part / name, group, blocks)
        weight_map |= {tensor: name for tensor, _ in group}
    if shards > 1:
        index = {"metadata": {"total_size": shape.size}, "weight_map": weight_map}
        (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (part / "config.json").write_text(json.dumps(shape.config(), indent=1))


def _random_blocks(seed: int) -> list[bytes]:
    """A few blocks of finite bf16 values: the upper halves of float32 ones."""
    random = np.random.default_rng(seed)
    blocks = []
    for _ in range(BLOCKS):
        values = random.standard_normal(BLOCK // 2, dtype=np.float32) * np.float32(SPREAD)
        blocks.append((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return blocks


def _split(tensors: list[tuple[str, tuple[int, ...]]], shards: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """In as many groups, of about as many bytes each."""
    ends = np.cumsum([elements(shape) for _, shape in tensors])
    cuts = [0, *(int(np.searchsorted(ends, ends[-1] * k / shards)) for k in range(1, shards)), len(tensors)]
    return [tensors[begin:end] for begin, end in pairwise(cuts)]


def _write(path: Path, tensors: list[tuple[str, tuple[int, ...]]], blocks: list[bytes]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + elements(shape) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        written = 0
        while written < end:
            block = blocks[written // BLOCK % BLOCKS]
            written += os.write(file.fileno(), memoryview(block)[: end - written])
