"""Owns what is found out when a plan is made, and not after a night in the queue: whether it can work at all."""

import time
from collections.abc import Sequence
from pathlib import Path

from flctl.campaign import train_options
from flctl.campaign.config import Configuration, load_profile
from flctl.campaign.frozen import is_there, known, source_of
from flctl.campaign.privacy import check_plan
from flctl.campaign.remote_merge import check_place
from flctl.campaign.trainers import trainer_of
from flctl.campaign.workspace import Workspace
from flctl.errors import ConfigurationError, FlctlError
from flctl.facility import holding, limits
from flctl.facility.profile import Site
from flctl.facility.table import nearest
from flctl.model.rules import find_rule, options_of
from flctl.model.rules.averaging import convex, final
from flctl.records import Failure, Plan, Stage, Work

FEW = 10
"""Local steps, and batches in a run."""


def foresee(
    workspace: Workspace, configuration: Configuration, sites: tuple[str, ...], least: int, models: int
) -> None:
    """ConfigurationError or BudgetRefused if so many more models by these sites, each of `least` contributions or more,
    cannot be made with flctl.toml and the profiles as they are."""
    place = configuration.aggregation.aggregate_at
    merges_besides = place in workspace.profiles and place not in sites
    check_limits(workspace, (*sites, place) if merges_besides else sites)
    check_models(workspace, configuration, sites, least, models)


def check_models(
    workspace: Workspace, configuration: Configuration, sites: tuple[str, ...], least: int, models: int
) -> None:
    """The same, but for the limits of the sites' queues."""
    check_train(workspace, sites, configuration)
    if configuration.evaluation.patience or configuration.evaluation.roll_back:
        check_validation(workspace, configuration, sites)
    check_rule(workspace, configuration, len(sites), least)
    check_place(workspace, configuration)
    check_plan(workspace, configuration, workspace.newest_model().version, models)
    check_adapters(workspace, configuration)
    check_frozen(workspace, configuration, sites)


def limits_broken(workspace: Workspace, site: Site, now: float) -> list[Failure]:
    """What of the profile's own tables [queues.NAME] a job submitted now breaks."""
    file = workspace.root / "sites" / f"{site.name}.toml"
    hint = f"change [shapes.{site.scheduler.shape}] or [scheduler] in {file}; flctl plan shows the rest"
    reasons = limits.too_much(site, now)
    return [Failure(code="configuration", exit_code=3, message=reason, hint=hint) for reason in reasons]


def way_barred(site: Site) -> FlctlError | None:
    """That nobody can log in to a site in the way that flctl works: each login needs a person, and none is kept."""
    barred = site.connection == "ssh" and site.login.attended and not site.login.hold
    return holding.needed(site) if barred else None


def check_limits(workspace: Workspace, sites: Sequence[str]) -> None:
    """ConfigurationError if nobody can log in to one of these sites, or if jobs are more than their queues allow, with
    all that are. A site that has taken a job already is left alone: what runs there is not to be given up for a profile
    that has changed."""
    now, early = time.time(), (Stage.ORDERED, Stage.DELIVERED)
    taken = {run.site for run in workspace.runs() if run.open and run.stage not in early}
    asked = [load_profile(workspace, name) for name in sites if name not in taken]
    for site in asked:
        if error := way_barred(site):
            raise error
    broken = {site.name: found for site in asked if (found := limits_broken(workspace, site, now))}
    if not broken:
        return
    first = next(iter(broken))
    if len(broken) == 1:
        message = "; ".join(failure.message for failure in broken[first])
        raise ConfigurationError(message, hint=broken[first][0].hint, site=first)
    lines = [f"{name}: {failure.message}" for name, found in broken.items() for failure in found]
    raise ConfigurationError(
        "\n  ".join(["queues do not allow what these sites' shapes ask for:", *lines]),
        hint=f"change [shapes] or [scheduler] in {workspace.root / 'sites'}; flctl plan shows the rest",
    )


def check_train(workspace: Workspace, sites: tuple[str, ...], configuration: Configuration) -> None:
    """ConfigurationError if train.command cannot be run, or if [train] holds what train.py refuses. A trainer of one's
    own may have others."""
    for name in sites:
        profile = load_profile(workspace, name)
        own = f"sites/{name}.toml"
        if "steps" in profile.train:
            reason = "all sites make as many steps: say it in [train] of flctl.toml, or with --steps"
            raise _wrong(workspace.root / own, "train.steps", reason)
        if trainer_of(workspace.root, configuration, profile).words:
            continue
        for file, table in (("flctl.toml", configuration.train), (own, profile.train)):
            for key, value in table.items():
                _check_option(workspace.root / file, key, value)
        shape, given = profile.shape, {**configuration.train, **profile.train}
        given = {key: value for key, value in given.items() if key != "command"}
        frozen = workspace.frozen() is not None
        if reason := train_options.clash(given, shape.nodes * shape.ranks, frozen=frozen):
            raise ConfigurationError(
                f"{name}: {reason}", hint=f"correct [train] of flctl.toml or of {own}, or its shape", site=name
            )


def _check_option(file: Path, key: str, value: object) -> None:
    known = ("command", *train_options.known())
    if key not in known:
        close = nearest(key, known)
        advice = f"did you mean train.{close}?" if close else f"train.py knows: {', '.join(known)}"
        raise ConfigurationError(f"{file}: train.{key}: train.py has no such option; {advice}", hint=f"correct {file}")
    if key != "command" and (reason := train_options.unfit(key, value)):
        raise ConfigurationError(f"{file}: train.{key} {reason}", hint=f"correct {file}")


def check_validation(workspace: Workspace, configuration: Configuration, sites: Sequence[str]) -> None:
    """ConfigurationError if a site keeps no text for evaluation. A trainer of its own may have options of its own."""
    for name in sites:
        profile = load_profile(workspace, name)
        if (
            not trainer_of(workspace.root, configuration, profile).words
            and {**configuration.train, **profile.train}.get("validation") == 0
        ):
            raise ConfigurationError(
                f"train.validation is 0 at {name}, so that nothing is evaluated there",
                hint=f"set it above 0 in flctl.toml, or in sites/{name}.toml",
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


def check_adapters(workspace: Workspace, configuration: Configuration) -> None:
    """ConfigurationError if adapters cannot be made one in the way that flctl.toml says."""
    table, reason = configuration.aggregation, ""
    if table.adapters == "mean":
        return
    if workspace.frozen() is None:
        reason = "the models of this campaign are no adapters"
    elif table.adapters == "stack":
        reason = "stacking adds up the ranks of all sites in every round; mean and svd keep the rank"
    elif table.rule != "fedavg" or table.options or table.master or configuration.privacy.clip:
        reason = "svd averages products, which only fedavg can, without options, master weights or [privacy]"
    elif table.aggregate_at:
        reason = 'svd is made at home: set aggregate_at = ""'
    if reason:
        raise _wrong(workspace.root / "flctl.toml", "aggregation.adapters", reason)


def check_frozen(workspace: Workspace, configuration: Configuration, sites: Sequence[str]) -> None:
    """ConfigurationError if the frozen base is to be brought to one of these sites and is not here. A folder that was
    rebuilt from its sites names none: they have it."""
    frozen, told = known(workspace), configuration.campaign.frozen
    if frozen and told and any(not is_there(workspace, load_profile(workspace, name)) for name in sites):
        source_of(workspace, configuration, frozen)


def exposed(workspace: Workspace, configuration: Configuration, plan: Plan) -> list[str]:
    """A line for each thing that makes an update easy to work back from: few local steps, or few samples in a site's
    last run. The fewer, the more an update is like one gradient, which can be inverted."""
    why = "the data behind such an update is easier to work back from it (SECURITY.md)"
    if plan.steps < FEW:
        return [f"{plan.steps} local steps, fewer than {FEW}: {why}"]
    found = []
    for name in plan.sites:
        batch = {**configuration.train, **load_profile(workspace, name).train}.get("batch")
        trained = [run for run in workspace.runs(name) if run.contribution and run.order.work == Work.TRAIN]
        samples = trained[-1].contribution.samples if trained and trained[-1].contribution else None
        if samples is not None and isinstance(batch, int) and samples < FEW * batch:
            found.append(f"{name}: {samples} samples in its last run, fewer than {FEW} batches of {batch}: {why}")
    return found


def outdated(workspace: Workspace, sites: Sequence[str]) -> list[str]:
    """A line for each rsync that is known to have holes: ours, and the sites', as far as a transfer has told."""
    from flctl.facility.rsync import holes, rsync_program

    asked = [name for name in sites if load_profile(workspace, name).connection == "ssh"]
    ours = [("here", ".".join(map(str, rsync_program()[1])))] if asked else []
    found = [*ours, *((f"at {name}", workspace.contact(name).rsync or "") for name in asked)]
    return [f"rsync {version} {where}: {holes(version)}" for where, version in found if version and holes(version)]


def _wrong(file: Path, key: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{file}: {key}: {reason}", hint=f"correct {file}")
