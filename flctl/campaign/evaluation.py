"""Owns `flctl evaluate`: a plan that only evaluates one version of the model."""

from flctl.campaign import budget, driver
from flctl.campaign.config import load_configuration
from flctl.campaign.foresight import check_limits, check_train, check_validation
from flctl.campaign.planning import chosen_sites, is_open, next_number, written
from flctl.campaign.rebuilding import known_version, whole_version
from flctl.campaign.workspace import Workspace
from flctl.errors import UsageError
from flctl.records import Plan, Work


def open_evaluation(workspace: Workspace, names: list[str], version: int | None) -> Plan:
    """The plan to evaluate a version (None: the newest) at these sites: the open one, if it is this, else a new one,
    written. UsageError while models are being made, or if another evaluation is under way."""
    driver.ours(workspace)
    with workspace.lock_campaign():
        current = workspace.plan()
        if current is not None and is_open(workspace, current) and _agrees(workspace, current, names, version):
            return current
        return written(workspace, proposed_evaluation(workspace, names, version))


def proposed_evaluation(workspace: Workspace, names: list[str], version: int | None) -> Plan:
    """The plan to evaluate a version at these sites, which nothing that is known speaks against."""
    configuration, last = load_configuration(workspace), workspace.plan()
    sites, newest = chosen_sites(workspace, names), workspace.newest_model().version
    version = whole_version(workspace, version)
    check_limits(workspace, sites)
    check_train(workspace, sites, configuration)
    check_validation(workspace, configuration, sites)
    budget.check_jobs(workspace, configuration, sites)
    return Plan(
        number=next_number(workspace),
        sites=sites,
        first=newest + 1,
        target=newest,
        steps=configuration.steps,
        min_sites=len(sites),
        evaluates=version,
        rolled_back=last.rolled_back if last else (),
    )


def _agrees(workspace: Workspace, plan: Plan, names: list[str], version: int | None) -> bool:
    """Whether the open plan is the evaluation that is asked for; False if nothing is open but evaluations that were
    taken back from the sites (a folder that was put back). UsageError if it is something else."""
    if plan.evaluates is None:
        under_way = [run for run in workspace.runs() if run.open]
        strange = all(run.order.work == Work.EVALUATE and run.order.plan != plan.number for run in under_way)
        if under_way and strange and workspace.newest_model().version >= plan.target:
            return False
        raise UsageError(
            f"a plan is under way to model {plan.target:04d} by {', '.join(plan.sites)}; nothing is evaluated besides",
            hint="flctl round goes on with it, and each of its runs evaluates its base (flctl history); "
            "flctl cancel ends it",
        )
    sites = plan.sites if not names else tuple(sorted(workspace.profiles if names == ["all"] else set(names)))
    asked = plan.evaluates if version is None and not names else known_version(workspace, version)
    if (sites, asked) == (plan.sites, plan.evaluates):
        return True
    raise UsageError(
        f"model {plan.evaluates:04d} is being evaluated at {', '.join(plan.sites)}, and this asks for model "
        f"{asked:04d} at {', '.join(sites)}",
        hint=f"flctl evaluate {' '.join(plan.sites)} --model {plan.evaluates} goes on with it; flctl cancel ends it",
    )
