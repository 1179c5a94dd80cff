"""Owns what a campaign's models tell of its sites' contributions: the (epsilon, delta) spent so far, and its limit.

dp-accounting is needed only to plan and to make models with noise, not to look at them."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flctl.campaign.workspace import Workspace
from flctl.errors import BudgetRefused, ConfigurationError
from flctl.model.privacy import Privacy, new_seed, unbounded

if TYPE_CHECKING:
    from flctl.campaign.config import Configuration, PrivacyTable

RELATION = "zero-out"
MOST = 1 << 20  # merges that are looked ahead
LEAST_NOISE = 1e-3  # one merge spends an epsilon of half a million


def check_privacy(configuration: "Configuration", file: Path) -> None:
    """ConfigurationError if [privacy] contradicts itself or the rest of `file`."""
    if reason := _contradiction(configuration.privacy) or _betrayal(configuration):
        raise ConfigurationError(f"{file}: {reason}", hint=f"correct {file}")


def _contradiction(table: "PrivacyTable") -> str:
    if 0 < table.noise_multiplier < LEAST_NOISE:
        return f"privacy.noise_multiplier of {table.noise_multiplier:g} hides nothing; set {LEAST_NOISE:g} or more"
    if not table.clip:
        given = [key for key in ("noise_multiplier", "epsilon") if getattr(table, key)]
        return f"privacy.{given[0]} means nothing without privacy.clip" if given else ""
    if table.epsilon and not table.noise_multiplier:
        return "privacy.epsilon cannot be kept without noise: set privacy.noise_multiplier, or remove the limit"
    if not 0 < table.delta < 1:
        return f"privacy.delta must lie between 0 and 1, and is {table.delta:g}"
    return ""


def _betrayal(configuration: "Configuration") -> str:
    """What would tell of a contribution beside the model, or change the model by more than its clipped update."""
    if not configuration.privacy.noise_multiplier:
        return ""
    for key in ("patience", "roll_back"):
        if getattr(configuration.evaluation, key):
            return (
                f"evaluation.{key} lets the losses on the sites' data decide which model stays, which no epsilon covers"
            )
    if configuration.evaluation.cross:
        return "evaluation.cross sends each contribution to the other sites as it is, which no noise on the model hides"
    for gate in ("norm", "cosine"):
        if getattr(configuration.gates, gate) == "refuse":
            return (
                f'gates.{gate} = "refuse" lets one contribution decide whether another is merged, '
                'which no epsilon covers; use "warn"'
            )
    return ""


def check_plan(workspace: Workspace, configuration: "Configuration", base: int, merges: int) -> None:
    """BudgetRefused if so many merges on top of model `base` would spend more than [privacy] allows; ConfigurationError
    if the rule or this installation cannot make private ones."""
    from flctl.model.rules import find_rule

    table, rule = configuration.privacy, configuration.aggregation.rule
    if table.clip and not find_rule(rule).bounded:
        raise unbounded(rule)
    if table.noise_multiplier:
        _epsilon_gaussian()
    if table.epsilon and merges:
        _check_limit(workspace, table, base, merges)


def _check_limit(workspace: Workspace, table: "PrivacyTable", base: int, merges: int) -> None:
    before = multipliers(workspace, base)
    bare = [version for version, multiplier in before.items() if not multiplier]
    if bare:
        raise BudgetRefused(
            f"model {bare[0]:04d} was made without noise, or nobody knows with which (flctl adopt), "
            f"so no epsilon can be stated for its successors, "
            f"and privacy.epsilon is {table.epsilon:g}",
            hint="remove privacy.epsilon, or begin a new campaign from a model that may be known",
        )
    total = epsilon((*before.values(), *[table.noise_multiplier] * merges), table.delta)
    if total > table.epsilon:
        left = allowed(before.values(), table)
        rounds = f"flctl round --rounds {left}, or " if left else ""
        raise BudgetRefused(
            f"{_models(merges)} would bring epsilon to {total:.4g} at delta {table.delta:g}; "
            f"privacy.epsilon is {table.epsilon:g} and allows {_models(left)}",
            hint=f"{rounds}raise privacy.noise_multiplier or privacy.epsilon in flctl.toml",
        )


def privacy_settings(workspace: Workspace, base: int, configuration: "Configuration") -> dict[str, Any] | None:
    """How the next model, made from `base`, is to be private, and what is spent with it, as its flctl.json records it;
    None if it is not. The seed is new with each call. BudgetRefused over the limit."""
    check_plan(workspace, configuration, base, 1)
    told = outlook(workspace, configuration, base, 1)
    return told and {**told, "seed": new_seed() if told["noise_multiplier"] else ""}


def outlook(workspace: Workspace, configuration: "Configuration", base: int, merges: int) -> dict[str, Any] | None:
    """How a model that so many merges make from `base` is to be private, and what is spent by then; None if it is not.
    No epsilon: there is no guarantee, as one merge was without noise."""
    table = configuration.privacy
    if not table.clip:
        return None
    spent = [*multipliers(workspace, base).values(), *[table.noise_multiplier] * merges]
    return {
        "clip": table.clip,
        "noise_multiplier": table.noise_multiplier,
        "relation": RELATION,
        "delta": table.delta,
        "epsilon": epsilon(spent, table.delta) if all(spent) else None,
        "limit": table.epsilon or None,
        "allows": allowed(spent, table) if table.epsilon else None,
    }


def privacy_of(settings: Mapping[str, Any] | None) -> Privacy | None:
    """What a merge is told, from such settings, which may be those of a flctl.json."""
    if not settings:
        return None
    return Privacy(clip=settings["clip"], noise_multiplier=settings["noise_multiplier"], seed=settings["seed"])


def multipliers(workspace: Workspace, version: int) -> dict[int, float]:
    """The noise multiplier of each merge behind a model version, its own included; 0 where there was no noise, and for
    an adopted model, of which nobody knows any more."""
    found: dict[int, float] = {}
    ahead = [version]
    while ahead:
        record = workspace.model_record(number := ahead.pop())
        if number not in found and (record.get("contributions") or (number and record.get("adopted"))):
            found[number] = (record.get("privacy") or {}).get("noise_multiplier", 0.0)
            ahead += [parent["version"] for parent in record.get("parents", [])]
        if record.get("rolled_back_to") is not None:  # the versions in between were seen, too
            ahead.append(number - 1)
    return dict(sorted(found.items()))


def epsilon(spent: Iterable[float], delta: float) -> float:
    """The epsilon of merges with these noise multipliers, every site taking part in each. Gaussian mechanisms, each
    chosen in sight of what came before, are together as private as one with the multiplier (sum z^-2)^-1/2 (Dong et al.
    2022, arXiv:1905.02383, section 3), whose epsilon is known exactly (Balle and Wang 2018, arXiv:1805.06530)."""
    precision = math.fsum(multiplier**-2 for multiplier in spent)
    return _epsilon_gaussian()(precision**-0.5, delta) if precision else 0.0


def allowed(spent: Iterable[float], table: "PrivacyTable") -> int:
    """How many more merges the limit allows; at most MOST are looked for."""
    before = math.fsum(multiplier**-2 for multiplier in spent)

    def total(merges: int) -> float:
        return _epsilon_gaussian()((before + merges * table.noise_multiplier**-2) ** -0.5, table.delta)

    return bisect_right(range(1, MOST), table.epsilon, key=total)


def _epsilon_gaussian() -> Callable[[float, float], float]:
    try:
        from dp_accounting import get_epsilon_gaussian
    except ImportError as error:
        raise ConfigurationError(
            f"privacy.noise_multiplier needs the package dp-accounting to state an epsilon: {error}",
            hint="pip install 'flctl[privacy]'",
        ) from error
    found: Callable[[float, float], float] = get_epsilon_gaussian
    return found


def shown(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What may be told of a model's privacy: all but the seed. None where updates were not even clipped."""
    settings = record.get("privacy")
    return {key: value for key, value in settings.items() if key != "seed"} if settings else None


def line(told: Mapping[str, Any]) -> str:
    """What `shown` or `outlook` gives, as a line of text."""
    if not told["noise_multiplier"]:
        return f"updates are clipped to {told['clip']:g} without noise: no privacy guarantee"
    if told["epsilon"] is None:
        return "a model behind this one was made without noise: no privacy guarantee"
    text = f"epsilon {told['epsilon']:.4g} at delta {told['delta']:g}"
    if told["limit"] is None:
        return text
    return f"{text}; the limit of {told['limit']:g} allows {_models(told['allows'])}"


def _models(count: int) -> str:
    return f"{count or 'no'} more model{'' if count == 1 else 's'}"
