"""The table of the rules. A rule is a pure function on one chunk of one tensor, plus the names of the state tensors
that it wants back next time.

To add one, write the function and its entry below; or register a Rule of your own package under the entry point group
`flctl.rules`. torch is not needed to look a rule up."""

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from flctl.errors import ConfigurationError
from flctl.model.rules import averaging, optimisers, robust
from flctl.model.rules.averaging import NoOptions

if TYPE_CHECKING:
    from torch import Tensor

    from flctl.model.inputs import Inputs

    Step = tuple[Tensor, Mapping[str, Tensor]]
    """The new global model's values, and the new state's, of one chunk."""

__all__ = ["RULES", "Facts", "NoOptions", "Rule", "find_rule", "options_of"]

GROUP = "flctl.rules"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of the contributions, in their order (site name, run number), before any chunk is read: n_k or the
    policy's coefficients, local optimizer steps, and the matrix of the updates' inner products
    sum over all values of (x_i - b_i)(x_j - b_j), in float64; it costs a pass over all files, so ask only for need."""

    weights: tuple[float, ...]
    steps: tuple[int, ...]
    gram: Callable[[], Sequence[Sequence[float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """`step` maps one chunk to the new model's values and the new state. It must not change what it is given, must
    treat every value alike (chunks may be cut anywhere), and may use only what rounds alike on every machine: + - * /
    and comparisons, each on its own; not addcmul or add(alpha=), which fuse, nor torch's sqrt, exp, log or pow.
    `state`: the names of its state tensors; each has the shape of its weight tensor, in float32 (float64 for float64).
    `idle`: those of them that these options never look at again, so that they are neither kept nor read.
    `options`: a frozen dataclass of named options with defaults; ValueError in its __post_init__ is told to the user.
    `coefficients`: one number per contribution; 0 leaves it out, unread.
    `refusal`: why so many contributions cannot be merged by this rule; empty if they can.
    `stacked`: `step` uses Inputs.stack(), so chunks are kept smaller.
    `bounded`: a contribution enters only through its term of x.update() or x.average(), so clipping that bounds it."""

    step: "Callable[[Inputs, Any], Step]"
    state: tuple[str, ...] = ()
    idle: Callable[[Any], tuple[str, ...]] = lambda options: ()
    options: type = NoOptions
    coefficients: Callable[[Facts, Any], tuple[float, ...]] = averaging.normalised
    refusal: Callable[[int, Any], str] = lambda count, options: ""
    stacked: bool = False
    bounded: bool = False

    def with_options(self, options: Any) -> "Rule":
        """The rule without the state tensors that these options leave idle."""
        idle = self.idle(options)
        return dataclasses.replace(self, state=tuple(name for name in self.state if name not in idle))


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "fedavg": Rule(step=averaging.fedavg, bounded=True),
        "fedasync": Rule(step=averaging.fedasync, coefficients=averaging.convex),
        "fedbuff": Rule(step=averaging.fedbuff, coefficients=averaging.final, bounded=True),
        "fednova": Rule(
            step=averaging.fedbuff,
            options=averaging.FedNova,
            coefficients=averaging.fednova_coefficients,
            bounded=True,
        ),
        "fedavgm": Rule(
            step=optimisers.fedavgm,
            state=("momentum",),
            idle=optimisers.idle_momentum,
            options=optimisers.FedAvgM,
            bounded=True,
        ),
        "fedadagrad": Rule(
            step=optimisers.fedadagrad,
            state=("momentum", "variance"),
            idle=optimisers.idle_momentum,
            options=optimisers.FedAdagrad,
            bounded=True,
        ),
        "fedadam": Rule(
            step=optimisers.fedadam,
            state=("momentum", "variance"),
            idle=optimisers.idle_momentum,
            options=optimisers.FedAdam,
            bounded=True,
        ),
        "fedyogi": Rule(
            step=optimisers.fedyogi,
            state=("momentum", "variance"),
            idle=optimisers.idle_momentum,
            options=optimisers.FedYogi,
            bounded=True,
        ),
        "diloco": Rule(
            step=optimisers.diloco,
            state=("momentum",),
            idle=optimisers.idle_momentum,
            options=optimisers.DiLoCo,
            bounded=True,
        ),
        "median": Rule(step=robust.median, coefficients=robust.alike, refusal=robust.too_few, stacked=True),
        "trimmed_mean": Rule(
            step=robust.trimmed_mean,
            options=robust.TrimmedMean,
            coefficients=robust.alike,
            refusal=robust.trims_nothing,
            stacked=True,
        ),
        "krum": Rule(
            step=averaging.fedavg,
            options=robust.Krum,
            coefficients=robust.krum_choice,
            refusal=robust.krum_needs,
        ),
        "multikrum": Rule(
            step=averaging.fedavg,
            options=robust.MultiKrum,
            coefficients=robust.multikrum_choice,
            refusal=robust.krum_needs,
        ),
    }
)


def find_rule(name: str) -> Rule:
    """A rule of the table, or one that an installed package registers. ConfigurationError if there is none."""
    if name in RULES:
        return RULES[name]
    from importlib.metadata import entry_points

    entries = {entry.value: entry for entry in entry_points(group=GROUP, name=name)}
    if len(entries) > 1:
        raise ConfigurationError(f"the rule {name!r} is registered by {' and by '.join(sorted(entries))}; one must go")
    for place, entry in entries.items():
        try:
            rule = entry.load()
        except Exception as error:  # whatever a foreign module raises when it is imported
            raise ConfigurationError(f"the rule {name!r} of {place} cannot be loaded: {error}") from error
        if not isinstance(rule, Rule):
            raise ConfigurationError(f"the rule {name!r} of {place} is no flctl.model.rules.Rule")
        return rule
    known = [*RULES, *entry_points(group=GROUP).names]
    close = get_close_matches(name, known, 1)
    advice = f"did you mean {close[0]}?" if close else f"there are: {', '.join(sorted(known))}"
    raise ConfigurationError(f"no aggregation rule is called {name!r}; {advice}")


def options_of(name: str, given: Mapping[str, Any]) -> Any:
    """The rule's options with what is given filled in. ConfigurationError for an unknown one or an impossible value."""
    kind = find_rule(name).options
    hints = typing.get_type_hints(kind)
    for key, value in given.items():
        if key not in hints:
            close = get_close_matches(key, hints, 1)
            known = f"did you mean {close[0]}?" if close else f"it has: {', '.join(hints) or 'none'}"
            raise ConfigurationError(f"the rule {name} has no option {key!r}; {known}")
        if reason := _mismatch(hints[key], value):
            raise ConfigurationError(f"the rule {name}: option {key} must be {reason}, not {value!r}")
    try:
        return kind(**{key: hints[key](value) if hints[key] is float else value for key, value in given.items()})
    except (ValueError, OverflowError) as error:
        raise ConfigurationError(f"the rule {name}: {error}") from error


def defaults_of(name: str) -> dict[str, Any]:
    """The rule's options and their defaults, for help and documentation."""
    return {field.name: field.default for field in dataclasses.fields(find_rule(name).options)}


def _mismatch(hint: Any, value: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        return "" if value in choices else " or ".join(repr(choice) for choice in choices)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {float: number, int: type(value) is int, str: isinstance(value, str), bool: isinstance(value, bool)}
    names = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
    return "" if fits.get(hint, True) else names[hint]
