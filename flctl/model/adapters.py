"""LoRA adapters, as folders that peft wrote, made into one: by the plain mean, or exactly.

A module adds s B A to a weight. `mean` averages the factors apart (FedIT, Zhang et al. 2023, arXiv:2305.05644), which
is not the average of what they add: with equal shares of two sites, (B1 + B2)/2 (A1 + A2)/2 holds B1 A2 and B2 A1,
which nobody trained, and a quarter of B1 A1 and B2 A2 in place of a half. It keeps the rank, and any rule and any kind
of adapter will do. The exact methods average the products, whatever each site's rank and alpha:

`stack` sets the factors one beside the other (FLoRA, arXiv:2409.05976): nothing is lost but one rounding to the
adapters' dtype, and the rank is the sum of the sites' ranks; so it suits a last merge, or one into the base's weights.
`svd` makes of that the nearest product of a given rank, which is the base's unless said (FlexLoRA, arXiv:2402.11505),
so that training goes on as before; the report says which share of the update was lost.

What is no factor (modules_to_save, biases, trained tokens) enters as in FedAvg. The bits of `mean` and `stack` are the
same everywhere; those of `svd` for any order of arrival, but another machine's linear algebra may differ in the last
ones."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import torch

from flctl.errors import AggregationRefused, ConfigurationError, Interrupted
from flctl.model.adapter_config import CONFIG, WEIGHTS, compare, config_text, is_adapter, read_config
from flctl.model.adapter_factors import Module, Part, Product, bias_of, refactored, stacked
from flctl.model.adapter_job import STACK, SVD, AdapterJob, compared, prepared_adapters
from flctl.model.adapter_values import Values
from flctl.model.chunks import steady_arithmetic
from flctl.model.draft import DraftFile, fresh_draft
from flctl.model.header import packed
from flctl.model.job import Recipe, Source
from flctl.model.manifest import carried_files
from flctl.model.merge import PLAIN, Made, merge
from flctl.model.shards import Tensor
from flctl.model.state import State

__all__ = ["METHODS", "AdapterReport", "compare", "is_adapter", "merge_adapters", "read_config"]

MEAN = "mean"
METHODS = (MEAN, STACK, SVD)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """What became of the update: the new `ranks` by module (none for `mean`); for `svd` the share of the squared
    Frobenius norm of sum_k p_k s_k B_k A_k that was lost, over all modules and in each."""

    method: str
    ranks: Mapping[str, int] = field(default_factory=dict)
    lost: float | None = None
    lost_of: Mapping[str, float] = field(default_factory=dict)


def merge_adapters(
    contributions: Sequence[Source],
    draft: Path,
    *,
    method: str,
    rank: int | None = None,
    base: Path | None = None,
    recipe: Recipe = PLAIN,
    state: State | None = None,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Made, AdapterReport]:
    """Write the adapter made of the contributions into the new folder `draft`; whole or not at all, as `merge` does.

    `rank` is for `svd`. `base` is the adapter that the sites started from; it gives names, config and other files
    (None: the first contribution does, by site and number). `recipe` and `state` are for `mean`: the exact methods know
    FedAvg only. `progress` is told the bytes that are done of the weights of the base (or of that contribution).
    Raises AggregationRefused naming site and reason, ConfigurationError, BudgetRefused, Interrupted."""
    _check_wishes(method, rank, recipe, state)
    if method == MEAN:
        _, before, _ = compared(contributions, base, exact=False)
        made = merge(before.folder, contributions, draft, recipe=recipe, state=state, stop=stop, progress=progress)
        return made, AdapterReport(method=method)
    with steady_arithmetic():
        job = prepared_adapters(contributions, base, method=method, rank=rank)
        return _written(job, draft, method, stop or (lambda: False), progress or (lambda done: None))


def _check_wishes(method: str, rank: int | None, recipe: Recipe, state: State | None) -> None:
    if method not in METHODS:
        close = get_close_matches(method, METHODS, 1)
        advice = f"did you mean {close[0]}?" if close else f"there are: {', '.join(METHODS)}"
        raise ConfigurationError(f"no method for adapters is called {method!r}; {advice}")
    if rank is not None and (method != SVD or rank < 1):
        raise ConfigurationError(f"no rank of {rank} for {method}", hint="svd takes a rank of at least 1")
    if method != MEAN and (recipe != PLAIN or state is not None):
        raise ConfigurationError(
            f"{method} averages products of factors, which only fedavg can, without state, master weights or privacy",
            hint="use the method mean, which takes every rule",
        )


def _written(
    job: AdapterJob, folder: Path, method: str, stop: Callable[[], bool], progress: Callable[[int], None]
) -> tuple[Made, AdapterReport]:
    header, places = packed(job.tensors, file=WEIGHTS)
    text = config_text(job.config) if job.rewritten else b""
    carried = [path for path in carried_files(job.ours) if path not in (job.ours.index, CONFIG if text else None)]
    needed = sum((job.ours.folder / path).stat().st_size for path in carried) + places[-1].end + len(text)
    with fresh_draft(folder, needed=needed) as draft:
        with draft.file(WEIGHTS) as file:
            file.write(header)
            report = _write_weights(job, places, file, method, stop, progress)
        for path in carried:
            draft.copy(job.ours.folder, path)
        if text:
            with draft.file(CONFIG) as file:
                file.write(text)
    coefficients = {(s.site, s.number): share for s, share in zip(job.sources, job.shares, strict=True)}
    files = tuple(sorted(draft.entries, key=lambda entry: entry.path))
    return Made(files=files, state=None, coefficients=coefficients), report


def _write_weights(
    job: AdapterJob,
    places: Sequence[Tensor],
    file: DraftFile,
    method: str,
    stop: Callable[[], bool],
    progress: Callable[[int], None],
) -> AdapterReport:
    targets = {tensor.name: tensor for tensor in places}
    done = sum(shard.data for shard in job.ours.files)
    energy: dict[str, float] = {}
    lost: dict[str, float] = {}
    with ExitStack() as stack:
        values = Values(job.ours, job.theirs, stack)
        for module in job.modules:
            _go_on(done, stop, progress)
            product, bias = _averaged(job, module, method, values)
            energy[module.name], lost[module.name] = product.energy, product.lost
            for name, made in zip(module.tensors, (product.a, product.b, bias), strict=False):
                for data in values.rounded(made, targets[name]):
                    file.write(data)
                done += job.ours.tensors[name].end - job.ours.tensors[name].begin
        for tensor in job.plain:
            for data in values.means(tensor, job.shares):
                _go_on(done, stop, progress)
                file.write(data)
                done += len(data)
        progress(done)
    return _report(job, method, energy, lost)


def _averaged(job: AdapterJob, module: Module, method: str, values: Values) -> tuple[Product, torch.Tensor]:
    """The product of one module, and its bias (empty if it has none)."""
    parts = []
    for place, (share, config) in enumerate(zip(job.shares, job.configs, strict=True)):
        a, b = values.whole(place, module.a).flatten(1), values.whole(place, module.b).flatten(1)
        bias = values.whole(place, module.bias) if module.bias else torch.empty(0)
        parts.append(Part(share=share * config.scaling(module.name), a=a, b=b, bias=bias))
    scaling, rank = job.config.scaling(module.name), job.ranks[module.name]
    try:
        product = stacked(parts, scaling) if method == STACK else refactored(parts, scaling, rank)
    except OverflowError as error:
        raise AggregationRefused(f"the product of the factors of {module.name} is too large for float64") from error
    return product, bias_of(parts, scaling)


def _report(job: AdapterJob, method: str, energy: Mapping[str, float], lost: Mapping[str, float]) -> AdapterReport:
    if method == STACK:
        return AdapterReport(method=method, ranks=job.ranks)
    return AdapterReport(
        method=method,
        ranks=job.ranks,
        lost=_share(math.fsum(lost.values()), math.fsum(energy.values())),
        lost_of={name: _share(lost[name], energy[name]) for name in lost},
    )


def _share(lost: float, energy: float) -> float:
    return lost / energy if energy else 0.0


def _go_on(done: int, stop: Callable[[], bool], progress: Callable[[int], None]) -> None:
    progress(done)
    if stop():
        raise Interrupted("stopped while merging; the draft is removed")
