"""Owns node-hours: what a job costs, what was used and is reserved, and what a budget has no room for.

Used is what jobs ran, as their scheduler counts it, those that failed as well. Reserved is what admitted jobs may
still run until their walltime is over. Both are charged as the profile said when the job was admitted; the campaign's
sum adds up the sites' own figures, whatever a node is there. Records alone are read.
"""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flctl.campaign.workspace import Workspace, lock, read_toml
from flctl.errors import BudgetRefused, ConfigurationError
from flctl.records import Failure, Held, Run

if TYPE_CHECKING:
    from flctl.campaign.config import Configuration
    from flctl.facility.profile import Site

PATIENCE = 30.0
"""Seconds to wait for another flctl that reads the campaign's figures just now."""


def rate(site: "Site") -> float:
    """Node-hours charged for an hour of one job: its nodes, or the part of one that its GPUs are where the site counts
    parts, times the charge of its partition or queue (the dearest, where it may choose) and of its QOS."""
    shape, whole = site.shape, site.budget.gpus_per_node
    part = min(1.0, shape.gpus / whole) if whole and shape.gpus else 1.0
    charge = {name: queue.charge for name, queue in site.queues.items()}
    choice = (shape.partition or shape.queue).split(",")
    qos = charge.get(shape.qos, 1.0) if shape.qos not in choice else 1.0
    return shape.nodes * part * max(charge.get(name, 1.0) for name in choice) * qos


def node_hours(site: "Site", seconds: float | None = None) -> float:
    """What one job of the site's shape costs in so many seconds; by default in its whole walltime."""
    return rate(site) * (site.shape.walltime if seconds is None else seconds) / 3600


def elapsed(run: Run) -> float:
    """Seconds that the run's present attempt ran: the scheduler's count, or what the verdict made of the records
    instead. A job that was cancelled, and whose end nobody told, ran until then (its start is on the site's clock, that
    on ours)."""
    job, known = run.job, run.job.elapsed or 0.0
    if job.started_at is None:
        return known
    if job.ended_at is not None and job.elapsed is None:  # no verdict of this flctl
        return max(0.0, job.ended_at - job.started_at)
    untold = not run.open and job.ended_at is None and job.absent_at is None
    return max(known, run.changed_at - job.started_at) if untold else known


def used_by(run: Run, default: float = 0.0) -> float:
    """Node-hours of all attempts of a run. `default`: the rate where the record has none (an older flctl made it, or it
    was rebuilt from what the site knows)."""
    charged = default if run.job.rate is None else run.job.rate
    return run.spent + charged * elapsed(run) / 3600


def reserved_by(run: Run) -> float:
    """Node-hours that an admitted attempt may still use; 0 once it has ended."""
    job = run.job
    if not run.open or job.ended_at is not None or job.rate is None or job.walltime is None:
        return 0.0
    return job.rate * max(0.0, job.walltime - elapsed(run)) / 3600


def used(workspace: Workspace, site: str | None = None) -> float:
    """Node-hours that the campaign's jobs used at a site, or at all."""
    runs = workspace.runs(site)
    return sum(used_by(run, default_rate(workspace, run)) for run in runs)


def reserved(workspace: Workspace, site: str | None = None) -> float:
    """Node-hours that admitted jobs may still use at a site, or at all."""
    return sum(reserved_by(run) for run in workspace.runs(site))


def would_exceed(workspace: Workspace, configuration: "Configuration", site: "Site", more: float) -> str:
    """Why so many more node-hours at a site have no room in its budget, or in the campaign's; empty if they have."""
    return _no_room(workspace, site.name, site.budget.max_node_hours, more) or _no_room(
        workspace, None, configuration.budget.max_node_hours, more
    )


def admitted(workspace: Workspace, configuration: "Configuration", site: "Site", run: Run) -> Run:
    """The run, with its job's cost reserved, or held if there is no room for it. Under the site's lock; where the
    campaign has a budget, one run at a time."""
    shape_rate, walltime = rate(site), float(site.shape.walltime)
    whole = configuration.budget.max_node_hours
    with lock(workspace.root / "budget.lock", "budget", PATIENCE) if whole else nullcontext():
        already = reserved_by(run)
        reason = would_exceed(workspace, configuration, site, node_hours(site) - already)
        if reason:
            job = replace(run.job, rate=None, walltime=None)
            return replace(run, job=job, held=Held(reason=reason, since=time.time()))
        run = replace(run, job=replace(run.job, rate=shape_rate, walltime=walltime))
        workspace.save_run(run)
    return run


def check_first_round(workspace: Workspace, configuration: "Configuration", sites: Sequence[str]) -> None:
    """BudgetRefused if one job at each of these sites, and the merge where a site makes it, have no room."""
    place = configuration.aggregation.aggregate_at
    check_jobs(workspace, configuration, [*sites, *([place] if place else [])])


def check_jobs(workspace: Workspace, configuration: "Configuration", sites: Sequence[str]) -> None:
    """BudgetRefused if a job at each of these sites, named as often as it has one, has no room."""
    from flctl.campaign.config import load_profile

    asked = Counter(sites)
    profiles = {name: load_profile(workspace, name) for name in asked}
    costs = {name: node_hours(profiles[name]) * count for name, count in asked.items()}
    for name, profile in profiles.items():
        if reason := _no_room(workspace, name, profile.budget.max_node_hours, costs[name]):
            raise BudgetRefused(reason, hint=f"raise budget.max_node_hours in sites/{name}.toml", site=name)
    if reason := _no_room(workspace, None, configuration.budget.max_node_hours, sum(costs.values())):
        raise BudgetRefused(reason, hint="raise budget.max_node_hours in flctl.toml")


def held_by_budget(run: Run) -> Failure:
    """A held run as the error it is."""
    from flctl.campaign.contacts import failure_of

    reason = run.held.reason if run.held else ""
    return failure_of(
        BudgetRefused(f"HELD: {reason}", hint=f"raise budget.max_node_hours there, then flctl release {run.site}")
    )


def standing(workspace: Workspace) -> list[dict[str, Any]]:
    """Node-hours used, reserved and allowed (0: no limit) by site, and by the campaign (site: None), as far as the
    files can be read."""
    rows = []
    for name, path in [*workspace.profiles.items(), (None, workspace.root / "flctl.toml")]:
        most: Any = 0
        try:
            table = read_toml(path).get("budget")
            most = table.get("max_node_hours", 0) if isinstance(table, dict) else 0
            gone = used(workspace, name)
        except ConfigurationError:
            gone = sum(used_by(run) for run in workspace.runs(name))
        row = {"site": name, "used": round(gone, 6), "reserved": round(reserved(workspace, name), 6)}
        rows.append(row | {"max": most if isinstance(most, int | float) else 0})
    return rows


def _no_room(workspace: Workspace, site: str | None, most: float, more: float) -> str:
    """Why so many more node-hours of a site, or of the campaign, are more than it may use."""
    if not most:
        return ""
    gone, promised = used(workspace, site), reserved(workspace, site)
    if gone + promised + more <= most * (1 + 1e-9):
        return ""
    file = f"sites/{site}.toml" if site else "flctl.toml"
    waiting = f", {promised:.4g} more are reserved for jobs under way" if promised else ""
    return (
        f"budget: {gone:.4g} of {most:.4g} node-hours are used{waiting}, and {more:.4g} are asked for "
        f"(budget.max_node_hours in {file})"
    )


def default_rate(workspace: Workspace, run: Run) -> float:
    """The rate of a run whose record has none: what the profile says now; 0 if nothing depends on it."""
    if run.job.rate is not None or not elapsed(run) or run.site not in workspace.profiles:
        return 0.0
    from flctl.facility.profile import load_site

    return rate(load_site(workspace.profiles[run.site]))
