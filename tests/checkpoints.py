"""Checkpoints written byte by byte, and FedAvg in numpy: independent of what they test, without torch or safetensors.

A tensor is (dtype, array); a BF16 array holds the bits, as uint16."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
SIGNED = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8}
UNSIGNED = {"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8}
NUMPY = {**FLOATS, **SIGNED, **UNSIGNED, "BOOL": np.bool_}
BITS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
EXPONENT = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}
MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}

Tensors = Mapping[str, tuple[str, np.ndarray]]


def header_of(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, begin + array.nbytes]}
        begin += array.nbytes
    return header


def raw_file(header: bytes | str | Mapping[str, Any], data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def data_of(tensors: Tensors) -> bytes:
    return b"".join(array.tobytes() for _, array in tensors.values())


def write_weights(folder: Path, tensors: Tensors, files: Mapping[str, str] | None = None) -> Path:
    """`files`: the shard (any key) each tensor goes to; without it all go to model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}
    if not files:
        (folder / "model.safetensors").write_bytes(raw_file(header_of(tensors, metadata), data_of(tensors)))
        return folder
    weight_map = {}
    for shard in sorted(set(files.values())):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == shard}
        (folder / f"model-{shard}.safetensors").write_bytes(raw_file(header_of(part, metadata), data_of(part)))
        weight_map.update(dict.fromkeys(part, f"model-{shard}.safetensors"))
    index = {"metadata": {"total_size": len(data_of(tensors))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_weights(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """All tensors of a folder's model*.safetensors files."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        content = path.read_bytes()
        data = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:data])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            array = np.frombuffer(content[data + begin : data + end], dtype=NUMPY[entry["dtype"]])
            found[name] = (entry["dtype"], array.reshape(entry["shape"]))
    return found


def random_values(dtype: str, shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Any finite bit pattern (so subnormals, -0.0 and the largest values come up), and in half of the cases the small
    values that weights have."""
    if dtype == "BOOL":
        return rng.integers(0, 2, shape).astype(np.bool_)
    if dtype not in FLOATS:
        return rng.integers(0, 100, shape).astype(NUMPY[dtype])
    if rng.integers(2):
        values = rng.normal(0, 0.02, shape)
        return to_bf16(values.astype(np.float32)) if dtype == "BF16" else values.astype(NUMPY[dtype])
    bits = rng.integers(0, np.iinfo(BITS[dtype]).max, shape, dtype=BITS[dtype], endpoint=True)
    exponent = BITS[dtype](EXPONENT[dtype])
    tame = bits & ~BITS[dtype](1 << MANTISSA[dtype])  # an exponent of all ones would be an Inf or a NaN
    bits = np.where((bits & exponent) == exponent, tame, bits)
    bits = np.where(rng.random(shape) < 0.1, bits & ~exponent, bits)  # subnormal or zero
    bits = np.where(rng.random(shape) < 0.05, BITS[dtype](1) << BITS[dtype](bits.itemsize * 8 - 1), bits)  # -0.0
    return np.asarray(bits, dtype=BITS[dtype]).view(NUMPY[dtype])


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16: nearest, ties to even, by adding half of the last place to the bits."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def reference_fedavg(
    base: Tensors, contributions: Sequence[tuple[float, Tensors]]
) -> dict[str, tuple[str, np.ndarray]]:
    """The design's formula; `contributions` (weight, tensors) by site and run number. The sum of the weights is the
    correctly rounded one."""
    total = np.float64(math.fsum(weight for weight, _ in contributions))
    shares = [np.float64(weight) / total for weight, _ in contributions]
    merged = {}
    for name, (dtype, array) in base.items():
        arrays = [tensors[name][1] for _, tensors in contributions]
        merged[name] = (dtype, _average(dtype, arrays, shares) if dtype in FLOATS else array)
    return merged


def _average(dtype: str, arrays: Sequence[np.ndarray], shares: Sequence[np.float64]) -> np.ndarray:
    precision = np.float64 if dtype == "F64" else np.float32
    result = np.zeros(arrays[0].shape, precision)
    with np.errstate(all="ignore"):
        for array, share in zip(arrays, shares, strict=True):
            x = from_bf16(array) if dtype == "BF16" else array.astype(precision)
            product = np.multiply(precision(share), x, dtype=precision)
            result = np.add(result, product, dtype=precision)
        return to_bf16(result) if dtype == "BF16" else result.astype(NUMPY[dtype])


def is_finite(tensors: Tensors) -> bool:
    return all(
        bool(np.isfinite(from_bf16(array) if dtype == "BF16" else array).all())
        for dtype, array in tensors.values()
        if dtype in FLOATS
    )


def same_bits(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        one[name][0] == other[name][0]
        and one[name][1].shape == other[name][1].shape
        and one[name][1].tobytes() == other[name][1].tobytes()
        for name in one
    )
