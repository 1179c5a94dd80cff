"""Owns deciding for the campaign: ask the policy, make the models that it names, give its orders."""

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from flctl import faults
from flctl.campaign import gates, remote_merge, rolling_back
from flctl.campaign.collected import collected_on
from flctl.campaign.config import Configuration, load_configuration
from flctl.campaign.contacts import failure_of
from flctl.campaign.merging import merge_model
from flctl.campaign.workspace import Workspace
from flctl.errors import FlctlError, Interrupted
from flctl.policy import Decision, View
from flctl.policy import decide as asked
from flctl.records import Job, Merge, Order, Plan, RollBack, Run, Stage, Work, token_of

if TYPE_CHECKING:
    from flctl.campaign.engine import Engine


def decide(engine: "Engine") -> Decision | None:
    """Ask the policy and act until it has nothing more to say, under the campaign's lock. None without a plan."""
    configuration = load_configuration(engine.workspace)
    while True:
        engine.check_stop()
        view = view_of(engine.workspace, configuration)
        if view is None:
            return None
        decision = asked(configuration.policy.name, view, time.time())
        if decision.stop:
            _stop(engine, view.plan, decision.stop)
            continue
        if decision.roll_back is not None:
            lacking = _roll_back(engine, view.plan, decision.roll_back)
            if lacking is None:
                continue
            decision = lacking
        if decision.merge is not None:
            awaited = _merge(engine, decision.merge, configuration, view.plan)
            if awaited is None:
                continue
            decision = awaited
        for order in decision.orders:
            give(engine, order)
        if not decision.orders:
            return decision


def _merge(engine: "Engine", merge: Merge, configuration: Configuration, plan: Plan) -> Decision | None:
    """Make a model, here or of what a site makes; what is to be ordered, awaited or is lacking, if that cannot be
    done now. A spoilt contribution fails its run, so that its site can train again."""
    engine.note("", f"merging model {merge.version:04d}")
    try:
        if configuration.aggregation.aggregate_at:
            awaited = remote_merge.proceed(
                engine.workspace, merge, configuration, plan.number, record=engine.record, stop=engine.stop.is_set
            )
            if awaited is not None:
                return awaited
        else:
            merge_model(engine.workspace, merge, configuration, stop=engine.stop.is_set)
    except Interrupted:
        raise
    except FlctlError as error:
        engine.errors.append((error.site or "", failure_of(error)))
        spoilt = [engine.workspace.run(*key) for key in merge.runs if key[0] == error.site]
        for run in spoilt:
            engine.record(run, replace(run, stage=Stage.FAILED, failure=failure_of(error)))
        return Decision(lacking=error.message)
    finally:
        engine.doing.pop("", None)
    engine.tell(f"model {merge.version:04d} is made of {len(merge.runs)} contributions")
    for warning in gates.warnings_of(engine.workspace.model_record(merge.version)):
        engine.tell(f"model {merge.version:04d} has a warning: {warning}")
    return None


def _stop(engine: "Engine", plan: Plan, reason: str) -> None:
    """The plan ends at the newest model."""
    newest = engine.workspace.newest_model().version
    faults.point("stop", str(newest))
    engine.workspace.save_plan(replace(plan, target=newest, ended=reason))
    faults.point("stop-recorded", str(newest))
    engine.workspace.journal.append("plan stopped", target=newest, reason=reason)
    engine.tell(f"the plan ends at model {newest:04d}: {reason}")


def _roll_back(engine: "Engine", plan: Plan, back: RollBack) -> Decision | None:
    """Make a version with the weights of an earlier one; what is lacking if that cannot be done. The plan says it
    first, so that the same is done once more should the version be lost."""
    workspace = engine.workspace
    engine.note("", f"rolling back to model {back.source:04d}")
    try:
        if back not in plan.rolled_back:
            faults.point("roll-back", f"{back.version:04d}")
            workspace.save_plan(replace(plan, rolled_back=(*plan.rolled_back, back)))
            faults.point("roll-back-recorded", f"{back.version:04d}")
        rolling_back.make(workspace, back)
    except Interrupted:
        raise
    except FlctlError as error:
        engine.errors.append(("", failure_of(error)))
        return Decision(lacking=error.message)
    finally:
        engine.doing.pop("", None)
    engine.tell(f"model {back.version:04d} has the weights of model {back.source:04d} again, the best so far")
    return None


def give(engine: "Engine", order: Order) -> Run:
    """Write an order as a new run, due at once."""
    runs = engine.workspace.runs(order.site)
    number = max((run.number for run in runs), default=0) + 1
    now = time.time()
    if order.work == Work.TRAIN:
        order = replace(order, continues=last_fetched(runs))
    job = Job(token=token_of(engine.workspace.id, order.site, number, 1))
    run = Run(number=number, order=order, job=job, created_at=now, changed_at=now)
    faults.point("order", f"{order.site}/{number}")
    engine.workspace.save_run(run)
    faults.point("order-recorded", f"{order.site}/{number}")
    engine.workspace.journal.append(
        "order", site=order.site, number=number, work=order.work, base=order.base, round=order.round
    )
    faults.point("ordered", f"{order.site}/{number}")
    return run


def last_fetched(runs: Iterable[Run]) -> int | None:
    """The number of a site's last training that is here: what failed, was refused or left out is gone on from by none.
    Written into the order once, so every attempt at it goes on from the same."""
    good = [run for run in runs if run.order.work == Work.TRAIN and run.stage == Stage.FETCHED and not run.skipped]
    return max((run.number for run in good), default=None)


def view_of(workspace: Workspace, configuration: Configuration) -> View | None:
    """What the policy sees; None without a plan."""
    plan = workspace.plan()
    if plan is None:
        return None
    return View(
        plan=plan,
        models=workspace.models(),
        runs=workspace.runs(),
        weights=configuration.aggregation.weights,
        cross_evaluation=configuration.evaluation.cross,
        patience=configuration.evaluation.patience,
        min_delta=configuration.evaluation.min_delta,
        roll_back=configuration.evaluation.roll_back,
        collected=_collected(workspace) if configuration.evaluation.roll_back else frozenset(),
    )


def _collected(workspace: Workspace) -> frozenset[int]:
    """The versions whose files gc took."""
    versions = [model.version for model in workspace.models()]
    return frozenset(version for version in versions if collected_on(workspace.model_folder(version)))
