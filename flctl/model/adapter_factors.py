"""The two factors of LoRA modules: which tensors belong together, and the average of their products.

A module adds s B A to a weight of m x n values: A is r x n, B is m x r, s its scaling. What is averaged exactly is the
product, sum_k p_k s_k B_k A_k, and it needs no m x n values: it equals (c_1 B_1 ... c_K B_K) (A_1; ...; A_K), the
factors one beside the other, of rank r_1 + ... + r_K."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from flctl.errors import AggregationRefused
from flctl.model.adapter_config import AdapterConfig
from flctl.model.header import FLOAT_SIZES
from flctl.model.shards import Shards, Tensor

PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
BIAS = ".lora_B.bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """The names of one module's tensors. `bias` (peft's lora_bias) is scaled like B A; "": it has none."""

    name: str
    a: str
    b: str
    bias: str = ""

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.a, self.b, self.bias) if self.bias else (self.a, self.b)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One contribution to a module, in float64: p_k s_k, both factors as matrices, and the bias (empty: none)."""

    share: float
    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Both factors as they are to be saved; the squared Frobenius norm of sum_k p_k s_k B_k A_k, and how much of it B A
    lacks."""

    a: torch.Tensor
    b: torch.Tensor
    energy: float = 0.0
    lost: float = 0.0


def modules_of(shards: Shards) -> tuple[Module, ...]:
    """In the order of the weights. AggregationRefused if a tensor of LoRA's is neither factor nor bias, as of DoRA."""
    found = []
    for name in shards.tensors:
        for first, second in PAIRS.items():
            if name.endswith(first):
                module = name.removesuffix(first)
                bias = module + BIAS if module + BIAS in shards.tensors else ""
                found.append(Module(name=module, a=name, b=module + second, bias=bias))
    known = {name for module in found for name in module.tensors}
    for name in sorted(known - shards.tensors.keys()):
        raise _refused(shards, f"tensor {name!r} is missing")
    for name in shards.tensors:
        if ".lora_" in name and name not in known:
            raise _refused(shards, f"tensor {name!r} is no factor of a product", hint="use the method mean")
    if not found:
        raise _refused(shards, "it holds no LoRA factors")
    return tuple(found)


def check_factors(shards: Shards, modules: Sequence[Module], config: AdapterConfig) -> None:
    """Whether the shapes are those of factors of the ranks that the config tells."""
    for module in modules:
        a, b = shards.tensors[module.a], shards.tensors[module.b]
        for tensor in (a, b):
            if len(tensor.shape) < 2 or tensor.dtype not in FLOAT_SIZES:
                raise _refused(shards, f"tensor {tensor.name!r} is no matrix of floats: {tensor.dtype} {tensor.shape}")
        rank = config.rank(module.name)
        if a.shape[0] != rank:
            raise _refused(shards, f"tensor {a.name!r} has rank {a.shape[0]}, adapter_config.json says {rank}")
        if b.shape[1:] != (rank, *(1 for _ in b.shape[2:])):
            reason = f"tensor {b.name!r} of shape {list(b.shape)} does not fit a first factor of rank {rank}"
            raise _refused(shards, f"{reason}; grouped convolutions have no exact average", hint="use the method mean")


def ranked(tensor: Tensor, module: Module, rank: int) -> tuple[int, ...]:
    """The shape that one of the module's tensors has at another rank."""
    if tensor.name == module.a:
        return (rank, *tensor.shape[1:])
    return (tensor.shape[0], rank, *tensor.shape[2:]) if tensor.name == module.b else tensor.shape


def stacked(parts: Sequence[Part], scaling: float) -> Product:
    """The factors one beside the other (FLoRA, Wang et al. 2024, arXiv:2409.05976): exact, of rank
    r_1 + ... + r_K. Each A carries its p_k s_k, over the scaling that the product will get."""
    a = torch.cat([part.a * (part.share / scaling) for part in parts])
    return Product(a=a, b=torch.cat([part.b for part in parts], dim=1))


def refactored(parts: Sequence[Part], scaling: float, rank: int) -> Product:
    """The nearest product of that rank (Eckart-Young), as in FlexLoRA (Bai et al. 2024, arXiv:2402.11505):
    B = U S over the scaling, A = V^T of the singular value decomposition.

    QR of both stacked factors leaves a core of at most (r_1 + ... + r_K)^2 values to decompose. Of each pair of
    vectors, the largest value in A's is positive. Where the rank is more than the product has, A goes on with
    orthonormal rows and B with zeros, like a fresh adapter, so that training can take these directions up.
    Raises OverflowError if float64 cannot hold the product's energy."""
    whole = stacked(parts, 1.0)
    left, upper = torch.linalg.qr(whole.b)
    right, lower = torch.linalg.qr(whole.a.T.contiguous())
    core = upper @ lower.T
    if not (core * core).sum().isfinite():
        raise OverflowError
    u, values, vt = torch.linalg.svd(core, full_matrices=False)
    squares = (values * values).tolist()
    b, a = (left @ u) * values, vt @ right.T
    signs = torch.where(a.gather(1, a.abs().argmax(dim=1, keepdim=True)) < 0, -1.0, 1.0).to(a.dtype)
    a, b = (a * signs)[:rank], (b * signs.T)[:, :rank] / scaling
    lost = math.fsum(squares[rank:])
    return Product(a=_prolonged(a, rank), b=_widened(b, rank), energy=math.fsum(squares), lost=lost)


def bias_of(parts: Sequence[Part], scaling: float) -> torch.Tensor:
    """sum_k p_k s_k bias_k, over the scaling that it will get."""
    return reduce(torch.add, [part.bias * part.share for part in parts]) / scaling


def _prolonged(a: torch.Tensor, rank: int) -> torch.Tensor:
    """`a` with orthonormal rows appended up to `rank`, or zeros once its rows span all there is."""
    missing = min(rank, a.shape[1]) - a.shape[0]
    if missing > 0:
        noise = torch.randn(a.shape[1], missing, dtype=a.dtype, generator=torch.Generator().manual_seed(0))
        more = torch.linalg.qr(torch.cat([a.T, noise], dim=1))[0].T[a.shape[0] :]
        a = torch.cat([a, more])
    return torch.cat([a, a.new_zeros(rank - a.shape[0], a.shape[1])])


def _widened(b: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.cat([b, b.new_zeros(b.shape[0], rank - b.shape[1])], dim=1)


def _refused(shards: Shards, reason: str, *, hint: str = "") -> AggregationRefused:
    return AggregationRefused(f"{shards.folder}: {reason}", site=shards.site, hint=hint)
