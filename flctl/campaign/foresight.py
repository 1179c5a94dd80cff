"""Owns what is found out when a plan is made, and not after a night in the queue: whether it can work at all."""

from pathlib import Path
from typing import Any

from flctl.campaign import shipped
from flctl.campaign.config import Configuration, load_profile
from flctl.campaign.privacy import check_plan
from flctl.campaign.remote_merge import check_place
from flctl.campaign.workspace import Workspace
from flctl.errors import ConfigurationError
from flctl.facility.table import nearest
from flctl.model.rules import find_rule, options_of
from flctl.model.rules.averaging import convex, final


def foresee(
    workspace: Workspace, configuration: Configuration, sites: tuple[str, ...], least: int, models: int
) -> None:
    """ConfigurationError or BudgetRefused if so many more models by these sites, each of `least` contributions or more,
    cannot be made with flctl.toml and the profiles as they are."""
    check_train(workspace, sites, configuration.train)
    check_rule(workspace, configuration, len(sites), least)
    check_place(workspace, configuration)
    check_plan(workspace, configuration, workspace.newest_model().version, models)


def check_train(workspace: Workspace, sites: tuple[str, ...], train: dict[str, Any]) -> None:
    """ConfigurationError if [train] holds a key that train.py does not know. A site with a trainer of its own may
    have others."""
    known = shipped.trainer_options()
    for name in sites:
        profile = load_profile(workspace, name)
        if profile.environment.trainer:
            continue
        for file, table in (("flctl.toml", train), (f"sites/{name}.toml", profile.train)):
            for key in table:
                if key not in known:
                    close = nearest(key, known)
                    advice = f"did you mean train.{close}?" if close else f"train.py knows: {', '.join(known)}"
                    raise ConfigurationError(
                        f"{workspace.root / file}: train.{key}: train.py has no such option; {advice}",
                        hint=f"correct {workspace.root / file}",
                    )


def check_rule(workspace: Workspace, configuration: Configuration, sites: int, least: int) -> None:
    """ConfigurationError if the rule cannot make a model of `sites` contributions, or of any number down to `least`."""
    table, policy, file = configuration.aggregation, configuration.policy.name, workspace.root / "flctl.toml"
    try:
        rule = find_rule(table.rule)
    except ConfigurationError as error:
        raise _wrong(file, "aggregation.rule", error.message) from error
    try:
        options = options_of(table.rule, table.options)
    except ConfigurationError as error:
        raise _wrong(file, "aggregation.options", error.message) from error
    if policy == "sync" and rule.coefficients in (final, convex):
        reason = f"{table.rule} needs the coefficients of an asynchronous policy, and {policy} has none to give"
        raise _wrong(file, "aggregation.rule", f"{reason}; where all train from one model, fedavg does what it does")
    for count in range(sites, least - 1, -1):
        if reason := rule.refusal(count, options):
            found = f"{table.rule} cannot merge the contributions of {count} site{'s' if count > 1 else ''}: {reason}"
            if count == sites:
                raise _wrong(file, "aggregation.rule", found)
            raise _wrong(file, "campaign.min_sites", f"{least} lets a model be made of so few: {found}")


def _wrong(file: Path, key: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{file}: {key}: {reason}", hint=f"correct {file}")
