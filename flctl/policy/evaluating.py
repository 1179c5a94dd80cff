"""What every policy shares about evaluations: their orders, a plan that only evaluates, early stop and roll back."""

from collections.abc import Iterable

from flctl.policy.scores import best_of, means_of, scores_of, without_gain
from flctl.policy.view import Decision, View
from flctl.records import CLOSED, Model, Order, RollBack, Run, Subject, Work

CANCELLED = "cancelled with flctl cancel"
"""Why a plan ended that a person ended: nothing more is asked for it."""


def order_of(view: View, site: str, model: Model, others: Iterable[Run] = ()) -> Order:
    """Evaluate a version of the model, and what these runs contributed, at a site."""
    subjects = [Subject(name=f"{model.version:04d}", sha256=model.sha256)]
    subjects += [
        Subject(name=contribution_name(run), sha256=run.contribution.sha256)
        for run in others
        if run.contribution is not None
    ]
    return Order(
        site=site,
        work=Work.EVALUATE,
        plan=view.plan.number,
        base=model.version,
        round=model.version,
        global_step=model.steps,
        subjects=tuple(subjects),
    )


def contribution_name(run: Run) -> str:
    """The folder name of a site's contribution where it is a model among models: `karolina-0002-1`."""
    return f"{run.site}-{run.number:04d}-{run.attempt}"


def decide(view: View) -> Decision:
    """What to do next for a plan that only evaluates: one run at each of its sites."""
    version = view.plan.evaluates
    model = next((model for model in view.models if model.version == version), None)
    if model is None:
        return Decision(lacking=f"model {version:04d} is gone: restore it")
    runs = {site: view.evaluate_run(site, model.version) for site in view.plan.sites}
    busy = {run.site for run in view.runs if run.open}
    orders = [order_of(view, site, model) for site, run in runs.items() if run is None and site not in busy]
    ended = all(run is not None and run.stage in CLOSED for run in runs.values())
    return Decision(orders=tuple(orders), done=ended and not busy)


def returning(view: View) -> RollBack | None:
    """The return to an earlier version that was decided, and whose model is not there (yet, or any more)."""
    following = view.models[-1].version + 1
    return next((item for item in view.plan.rolled_back if item.version == following), None)


def stopping(view: View) -> str:
    """Why the plan is to end at the newest version; empty if it is not. Counted from the model that the plan began
    with."""
    if not view.patience:
        return ""
    means = means_of(scores_of(view.runs, view.models), view.plan.sites)
    means = {version: mean for version, mean in means.items() if version >= view.plan.first - 1}
    count, lowest = without_gain(means, view.min_delta)
    if count < view.patience:
        return ""
    return (
        f"the mean loss over {', '.join(view.plan.sites)} has not improved in {count} "
        f"version{'s' if count > 1 else ''} since model {lowest:04d} ({means[lowest]:.4f})"
    )


def better(view: View) -> RollBack | None:
    """The return to the best version at the end of a plan; None if the newest is as good, or was not measured by every
    site."""
    newest = view.models[-1]
    if not view.roll_back or newest.version < view.plan.first or newest.rolled_back_to is not None:
        return None
    means = means_of(scores_of(view.runs, view.models), view.plan.sites)
    best = best_of({version: mean for version, mean in means.items() if version not in view.collected})
    if newest.version not in means or best is None or means[best] >= means[newest.version]:
        return None
    return RollBack(version=newest.version + 1, source=best)
