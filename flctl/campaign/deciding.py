"""Owns deciding for the campaign: ask the policy, make the models that it names, give its orders."""

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from flctl import faults
from flctl.campaign import gates, remote_merge
from flctl.campaign.config import Configuration, load_configuration
from flctl.campaign.contacts import failure_of
from flctl.campaign.merging import merge_model
from flctl.campaign.workspace import Workspace
from flctl.errors import FlctlError, Interrupted
from flctl.policy import POLICIES, Decision, View
from flctl.records import Job, Merge, Order, Plan, Run, Stage, Work, token_of

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
        decision = POLICIES[configuration.policy.name](view, time.time())
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
    )
