"""What a merge is to do: contributions, rule, state and layouts, all checked before the first chunk is read."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flctl.errors import AggregationRefused
from flctl.model.chunks import WIDEST
from flctl.model.geometry import gram
from flctl.model.header import MASTER
from flctl.model.inputs import Given
from flctl.model.manifest import carried_files
from flctl.model.privacy import Privacy, unbounded
from flctl.model.rules import Facts, Rule, find_rule, options_of
from flctl.model.shards import Shards, open_shards
from flctl.model.state import Layout, State, model_layout, state_layout
from flctl.model.verify import match

if TYPE_CHECKING:
    from flctl.model.noise import Noise

STACKED = 1 << 20  # elements of all contributions together that a rule gets at once
MEMORY = 64 << 20  # bytes that the buffers of all workers may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One contribution to a merge; `weight` is its n_k before normalisation, or where the rule wants that the final
    coefficient; `steps` its local optimizer steps; `base` what it was trained from, where that is not the base of
    the merge."""

    site: str
    number: int
    folder: Path
    weight: float
    steps: int = 0
    base: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How: the rule's name and options; `master`: keep float32 weights beside a model of less precision; `privacy`:
    clip each update, and add noise."""

    rule: str = "fedavg"
    options: Mapping[str, Any] = field(default_factory=dict)
    master: bool = False
    privacy: Privacy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that is known before the first chunk is read."""

    rule: Rule
    options: Any
    given: Given
    layouts: tuple[Layout, ...]
    """the model's own, then one per output"""
    outputs: tuple[str, ...]
    carried: tuple[str, ...]
    needed: int
    chunk: int
    coefficients: Mapping[tuple[str, int], float]
    scales: Mapping[tuple[str, int], float]
    """what clips each update; empty where none is clipped"""

    @property
    def files(self) -> int:
        """The files that one worker holds open."""
        given = self.given
        return 1 + len(given.theirs) + sum(base is not None for base in given.bases) + len(given.state)

    def within_memory(self, workers: int) -> int:
        """The chunk, made smaller where so many workers' buffers would take more than MEMORY."""
        precise = any(tensor.dtype == "F64" for tensor in self.given.ours.tensors.values())
        # Sums, bases and what the rule makes; and for each output what was, what is and what goes out.
        numbers = 6 + 3 * len(self.outputs)
        return max(1, min(self.chunk, MEMORY // (workers * (2 * WIDEST + (8 if precise else 4) * numbers))))


def prepared(
    base: Path,
    contributions: Sequence[Source],
    recipe: Recipe,
    state: State | None,
    chunk: int,
    stop: Callable[[], bool],
) -> Job:
    """Raises what `merge` does; a rule that compares the updates as a whole reads all files here."""
    ours = open_shards(base)
    carried = carried_files(ours)
    options = options_of(recipe.rule, recipe.options)
    rule = find_rule(recipe.rule).with_options(options)
    sources = ordered(contributions)
    if reason := rule.refusal(len(sources), options):
        raise AggregationRefused(
            f"{recipe.rule}: {reason}", hint="merge more contributions, or choose another rule: docs/aggregation.md"
        )
    if not ours.tensors:
        raise AggregationRefused(f"{base}: no tensor, so nothing to merge")
    places = {name: place for place, name in enumerate(ours.tensors)}
    theirs = [
        match(open_shards(source.folder, site=source.site), ours).compact(ours.tensors, places) for source in sources
    ]
    bases = _bases(sources, ours, places)
    facts = Facts(
        weights=tuple(source.weight for source in sources),
        steps=tuple(source.steps for source in sources),
        gram=lambda: gram(ours, theirs, bases, stop=stop),
    )
    coefficients = rule.coefficients(facts, options)
    used = [place for place, coefficient in enumerate(coefficients) if coefficient]
    scales, noise = _private(recipe, rule, sources, coefficients, facts)
    layouts = {name: state_layout(ours, name) for name in (*rule.state, *([MASTER] if recipe.master else ()))}
    layouts = {name: layout for name, layout in layouts.items() if layout.tensors}
    own = model_layout(ours)
    given = Given(
        ours=ours,
        theirs=tuple(theirs[place] for place in used),
        coefficients=tuple(coefficients[place] for place in used),
        bases=tuple(bases[place] for place in used),
        scales=tuple(scales[place] for place in used) if scales else (1.0,) * len(used),
        noise=noise,
        state=_remembered(state, recipe, layouts),
        step=state.step + 1 if state and state.rule == recipe.rule else 1,
    )
    return Job(
        rule=rule,
        options=options,
        given=given,
        layouts=(own, *layouts.values()),
        outputs=tuple(layouts),
        carried=carried,
        needed=sum(layout.size for layout in (own, *layouts.values()))
        + sum((base / path).stat().st_size for path in carried),
        chunk=max(1, min(chunk, STACKED // len(sources))) if rule.stacked else chunk,
        coefficients={(s.site, s.number): c for s, c in zip(sources, coefficients, strict=True)},
        scales={(s.site, s.number): scale for s, scale in zip(sources, scales, strict=True)} if scales else {},
    )


def _private(
    recipe: Recipe, rule: Rule, sources: Sequence[Source], coefficients: Sequence[float], facts: Facts
) -> tuple[tuple[float, ...], "Noise | None"]:
    """(the factor that clips each update, the noise on their sum); nothing without privacy."""
    privacy = recipe.privacy
    if privacy is None:
        return (), None
    if not rule.bounded:
        raise unbounded(recipe.rule)
    products = facts.gram()
    scales = privacy.scales([math.sqrt(products[place][place]) for place in range(len(sources))])
    deviation = privacy.deviation([source.site for source in sources], coefficients)
    if not deviation:
        return scales, None
    from flctl.model.noise import Noise  # a machine that merges without noise needs no cryptography

    return scales, Noise(seed=privacy.seed, deviation=deviation)


def _bases(sources: Sequence[Source], ours: Shards, places: Mapping[str, int]) -> list[Shards | None]:
    """What each contribution was trained from, opened once per folder; None: the base of the merge."""
    opened: dict[Path, Shards] = {}
    for source in sources:
        if source.base is not None and source.base != ours.folder and source.base not in opened:
            opened[source.base] = match(open_shards(source.base), ours).compact(ours.tensors, places)
    return [opened.get(source.base) if source.base else None for source in sources]


def _remembered(state: State | None, recipe: Recipe, layouts: Mapping[str, Layout]) -> dict[str, Shards]:
    """The state tensors to go on from: the rule's own, if the same rule left them, and the master weights."""
    found: dict[str, Shards] = {}
    for name, layout in layouts.items():
        if state is None or not state.has(name) or (name != MASTER and state.rule != recipe.rule):
            continue
        shards, expected = state.shards(name), layout.tensors
        if shards.tensors.keys() != expected.keys() or any(
            (tensor.dtype, tensor.shape) != (expected[key].dtype, expected[key].shape)
            for key, tensor in shards.tensors.items()
        ):
            raise AggregationRefused(f"{shards.folder}: its tensors are not those of the model")
        found[name] = shards.compact(expected, {key: place for place, key in enumerate(expected)})
    return found


def ordered(contributions: Sequence[Source]) -> list[Source]:
    """By site and run number, whatever the order of arrival: sums of floats depend on it."""
    if not contributions:
        raise AggregationRefused("there is nothing to merge: no contribution")
    (place, times), *_ = Counter((source.site, source.number) for source in contributions).most_common(1)
    if times > 1:
        raise AggregationRefused(f"run {place[1]} is given {times} times", site=place[0])
    return sorted(contributions, key=lambda source: (source.site, source.number))
