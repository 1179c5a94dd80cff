"""What an exact merge of adapters is to do: configs, tensors and ranks, all checked before the first value is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flctl.errors import AggregationRefused, ConfigurationError
from flctl.model.adapter_config import AdapterConfig, compare, read_config, with_rank, with_ranks
from flctl.model.adapter_factors import Module, check_factors, modules_of, ranked
from flctl.model.job import Source, ordered
from flctl.model.rules.averaging import shares
from flctl.model.shards import Shards, Tensor, open_shards
from flctl.model.verify import match

STACK, SVD = "stack", "svd"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterJob:
    """`ours` gives names, dtypes and other files: the base's weights, or those of the first contribution. `config` is
    what the new adapter gets; `rewritten`: it is not the one of `ours`. `ranks` are the new ones, by module."""

    sources: tuple[Source, ...]
    shares: tuple[float, ...]
    ours: Shards
    theirs: tuple[Shards, ...]
    configs: tuple[AdapterConfig, ...]
    modules: tuple[Module, ...]
    ranks: Mapping[str, int]
    config: AdapterConfig
    rewritten: bool

    @property
    def plain(self) -> tuple[Tensor, ...]:
        """The tensors that are no module's."""
        factors = {name for module in self.modules for name in module.tensors}
        return tuple(tensor for name, tensor in self.ours.tensors.items() if name not in factors)

    @property
    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of the new adapter's tensors, in the order in which they are made."""
        made = [(module, self.ours.tensors[name]) for module in self.modules for name in module.tensors]
        factors = [(t.name, t.dtype, ranked(t, module, self.ranks[module.name])) for module, t in made]
        return [*factors, *((tensor.name, tensor.dtype, tensor.shape) for tensor in self.plain)]


def compared(
    contributions: Sequence[Source], base: Path | None, *, exact: bool
) -> tuple[list[Source], AdapterConfig, list[AdapterConfig]]:
    """(the contributions by site and run number, the config of the base or of the first of them, their own configs),
    once the configs agree."""
    sources = ordered(contributions)
    configs = [read_config(source.folder, site=source.site) for source in sources]
    before = read_config(base) if base else configs[0]
    compare([before, *configs], exact=exact)
    return sources, before, configs


def prepared_adapters(
    contributions: Sequence[Source], base: Path | None, *, method: str, rank: int | None
) -> AdapterJob:
    sources, before, configs = compared(contributions, base, exact=True)
    ours = open_shards(before.folder, site=before.site)
    modules = modules_of(ours)
    check_factors(ours, modules, before)
    theirs = []
    for source, config in zip(sources, configs, strict=True):
        if source.base not in (None, base):
            raise AggregationRefused(f"it was trained from another adapter, {source.base}", site=source.site)
        given = open_shards(source.folder, site=source.site)
        theirs.append(match(given, _at_ranks_of(given, ours, modules)))
        check_factors(given, modules, config)
    together = {module.name: sum(config.rank(module.name) for config in configs) for module in modules}
    config = with_ranks(before, together) if method == STACK else _at_rank(rank, before, configs, together)
    return AdapterJob(
        sources=tuple(sources),
        shares=shares([source.weight for source in sources]),
        ours=ours,
        theirs=tuple(theirs),
        configs=tuple(configs),
        modules=modules,
        ranks={name: config.rank(name) for name in together},
        config=config,
        rewritten=config is not before,
    )


def _at_ranks_of(theirs: Shards, ours: Shards, modules: Sequence[Module]) -> Shards:
    """Ours, had the factors the ranks of theirs: nothing else may differ."""
    tensors = dict(ours.tensors)
    for module in modules:
        shape = theirs.tensors[module.a].shape if module.a in theirs.tensors else ()
        for name in module.tensors if shape else ():
            tensors[name] = replace(tensors[name], shape=ranked(tensors[name], module, shape[0]))
    return replace(ours, tensors=tensors)


def _at_rank(
    rank: int | None, before: AdapterConfig, configs: Sequence[AdapterConfig], together: Mapping[str, int]
) -> AdapterConfig:
    """The config of what a re-factoring makes: the base's, at the rank asked for."""
    most = max(together.values())
    if rank is None:
        if before.site and any(config.rank(name) != before.rank(name) for config in configs for name in together):
            raise ConfigurationError("the contributions differ in rank, and there is no base", hint="say which: --rank")
        return before
    if rank > most:
        raise ConfigurationError(f"all contributions together have rank {most}, so rank {rank} gains nothing")
    return with_rank(before, rank)
