"""Owns the merge that a site makes (`aggregate_at`): who may make it, its order, and the model of what came back."""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flctl import faults
from flctl.campaign import chain, gates
from flctl.campaign.config import Configuration, load_profile
from flctl.campaign.contacts import failure_of
from flctl.campaign.merge_files import asked_of, own_files, state_files, state_name
from flctl.campaign.merging import STATE, contributions_of, draft_folder, publish, settings_of, sources_of
from flctl.campaign.workspace import Workspace
from flctl.codec import to_data
from flctl.durable import link_files
from flctl.errors import AggregationRefused, ConfigurationError
from flctl.facility.profile import missing
from flctl.policy import Decision
from flctl.policy.evaluating import contribution_name
from flctl.records import Merge, Order, Part, Run, SiteMerge, Stage, Subject, Work, folder_sha256

if TYPE_CHECKING:
    from flctl.model.merge import Made


def check_place(workspace: Workspace, configuration: Configuration) -> None:
    """ConfigurationError if `aggregate_at` names a site that cannot or may not merge."""
    from flctl.model.rules import RULES

    name, rule = configuration.aggregation.aggregate_at, configuration.aggregation.rule
    reason = ""
    if not name:
        return
    if name not in workspace.profiles:
        reason = f"this campaign has no site {name!r}; it has: {', '.join(workspace.profiles) or 'none'}"
    elif empty := missing(load_profile(workspace, name)):
        reason = f"sites/{name}.toml still lacks: {', '.join(empty)}"
    elif configuration.privacy.clip:
        reason = "a private merge is made at home: whoever knows the seed of its noise can take the noise away"
    elif rule not in RULES:
        reason = f"the rule {rule} is not flctl's own, and only those are brought to a site"
    if reason:
        file = workspace.root / "flctl.toml"
        raise ConfigurationError(
            f"{file}: aggregation.aggregate_at: {reason}", hint=f'correct {file}; aggregate_at = "" merges here'
        )


def order_of(workspace: Workspace, merge: Merge, configuration: Configuration, plan: int) -> Order:
    """What the site is asked for. The same merge of the same contributions in the same way is an equal order."""
    check_place(workspace, configuration)
    settings, given = settings_of(configuration), contributions_of(workspace, merge)
    parts = tuple(
        Part(
            name=contribution_name(workspace.run(item["site"], item["number"])),
            **{key: item[key] for key in ("site", "number", "weight", "steps", "base")},
        )
        for item in given
    )
    return Order(
        site=configuration.aggregation.aggregate_at,
        work=Work.MERGE,
        plan=plan,
        base=merge.base,
        round=merge.version,
        subjects=_subjects(workspace, merge.base, parts, [item["sha256"] for item in given]),
        merge=SiteMerge(
            rule=settings["rule"], options=to_data(settings["options"]), master=settings["master"], parts=parts
        ),
    )


def _subjects(workspace: Workspace, base: int, parts: tuple[Part, ...], hashes: list[str]) -> tuple[Subject, ...]:
    """All that the merge reads: models, contributions, the rule's state."""
    versions = dict.fromkeys((base, *(part.base for part in parts)))
    found = [Subject(name=f"{version:04d}", sha256=workspace.model_record(version)["sha256"]) for version in versions]
    found += [Subject(name=part.name, sha256=sha256) for part, sha256 in zip(parts, hashes, strict=True)]
    if files := state_files(workspace, base):
        found.append(Subject(name=state_name(base), sha256=folder_sha256(files)))
    return tuple(found)


def proceed(
    workspace: Workspace,
    merge: Merge,
    configuration: Configuration,
    plan: int,
    *,
    record: Callable[[Run, Run], None],
    stop: Callable[[], bool],
) -> Decision | None:
    """The next thing to be done for this merge: an order, a wait, a person's decision; None once the model is made."""
    order = order_of(workspace, merge, configuration, plan)
    run = run_of(workspace, order)
    if run is not None and run.open:
        return Decision()
    if run is not None and run.stage == Stage.FAILED:
        return Decision(lacking=f"model {merge.version:04d} is not made: its merge at {run.site} failed")
    given = contributions_of(workspace, merge)
    seen = gates.look(workspace, merge, configuration.gates, sources_of(workspace, merge.base, given), stop=stop)
    if run is None:
        return Decision(orders=(order,))
    try:
        made = adopted(workspace, run)
    except AggregationRefused as error:
        record(run, replace(run, stage=Stage.FAILED, failure=failure_of(error)))
        return Decision(lacking=error.message)
    metrics = run.contribution.metrics if run.contribution else {}
    by = {"site": run.site, "number": run.number, **{key: metrics.get(key) for key in ("flctl", "torch")}}
    by["records"] = chain.records_of(workspace, run)
    facts = {**settings_of(configuration), "privacy": None, "gates": seen, "made_by": by}
    publish(workspace, merge, given, made, seconds=_seconds(metrics), **facts)
    return None


def run_of(workspace: Workspace, order: Order) -> Run | None:
    """The newest run that was ordered for exactly this."""
    found = [run for run in workspace.runs(order.site) if run.order == order]
    return max(found, key=lambda run: run.number, default=None)


def adopted(workspace: Workspace, run: Run) -> "Made":
    """A draft of the model out of what was fetched, by hard links where they can be. AggregationRefused if a file is
    not what it was when it was fetched, or if the site did not say what each contribution counted."""
    from flctl.model.draft import translated
    from flctl.model.manifest import hash_folder
    from flctl.model.merge import Made
    from flctl.model.state import read_state

    out, draft = workspace.attempt_folder(run) / "out", draft_folder(workspace, run.order.round)
    try:
        files = hash_folder(out)
    except ConfigurationError:  # gone, or no plain files any more
        files = ()
    if run.contribution is None or files != run.contribution.files:
        raise AggregationRefused(f"{out} is not what was fetched", hint=f"flctl retry {run.site}", site=run.site)
    coefficients = _coefficients(run, run.contribution.metrics)
    shutil.rmtree(draft, ignore_errors=True)
    try:
        link_files(out, [entry.path for entry in files], draft)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise translated(error, draft) from error
    faults.point("merge-adopted", f"{run.order.round:04d}")
    return Made(files=own_files(files), state=read_state(draft / STATE), coefficients=coefficients)


def _coefficients(run: Run, metrics: Mapping[str, Any]) -> dict[tuple[str, int], float]:
    parts, table = asked_of(run.order).parts, metrics.get("coefficients")
    told: dict[Part, Any] = {part: table.get(part.name) for part in parts} if isinstance(table, dict) else {}
    if not told or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in told.values()):
        raise AggregationRefused(
            "the merge did not say what each contribution counted", hint=f"flctl retry {run.site}", site=run.site
        )
    return {(part.site, part.number): float(value) for part, value in told.items()}


def _seconds(metrics: Mapping[str, Any]) -> float:
    """What the merge took, as the site says; 0 where it says something else."""
    told = metrics.get("seconds")
    return float(told) if isinstance(told, int | float) else 0.0
