"""The synchronous policy: one merge waits for one run of each planned site (FedAvg's round, McMahan et al. 2017)."""

from flctl.policy.evaluating import CANCELLED, better, order_of, stopping
from flctl.policy.view import Decision, View, weight_of
from flctl.records import CLOSED, Merge, Model, Order, Run, Stage, Work


def decide(view: View, now: float) -> Decision:
    """What to do next. `now` is not looked at: rounds end by events, never by time."""
    newest = view.models[-1]
    evaluations = _evaluations(view, newest)
    busy = frozenset(run.site for run in view.runs if run.open)
    if newest.version >= view.plan.target:
        return _end(view, newest, evaluations, busy)
    version = newest.version + 1
    if version < view.plan.first:
        return again(view)
    sites = [site for site in view.plan.sites if site not in view.plan.skips(version)]
    runs = [run for site in sites if (run := view.train_run(site, version)) is not None]
    if len(runs) == len(sites) and all(run.stage in CLOSED for run in runs):
        return _close(view, newest, runs)
    if not runs and view.patience:  # what may end the plan is awaited
        if not all(_is_over(view, order) for order in evaluations):
            return Decision(orders=_free(evaluations, busy, view))
        if reason := stopping(view):
            return Decision(stop=reason)
    training = [_training(view, newest, site) for site in sites if view.train_run(site, version) is None]
    return Decision(orders=_first_of_each(_free(evaluations, busy, view), training, busy))


def _end(view: View, newest: Model, evaluations: list[Order], busy: frozenset[str]) -> Decision:
    """The last model is made: what is to be evaluated of it is, then the best version is gone back to."""
    if busy or any(view.evaluate_run(order.site, newest.version) is None for order in evaluations):
        return Decision(orders=_free(evaluations, busy, view))
    if view.plan.ended != CANCELLED and (best := better(view)) is not None:
        return Decision(roll_back=best)
    return Decision(done=True)


def _is_over(view: View, order: Order) -> bool:
    run = view.evaluate_run(order.site, order.round)
    return run is not None and not run.open


def again(view: View) -> Decision:
    """The next model was made before this plan, and is gone: made once more of what was fetched for it then."""
    newest = view.models[-1]
    version = newest.version + 1
    ended = [run for run in view.runs if (run.order.work, run.order.round) == (Work.TRAIN, version)]
    runs = {run.site: run for run in sorted(ended, key=lambda run: run.number) if run.stage in CLOSED}
    if any(run.stage == Stage.FETCHED for run in runs.values()):
        return _close(view, newest, list(runs.values()))
    return Decision(lacking=f"model {version:04d} is gone, and nothing is here to make it of again: restore it")


def _close(view: View, newest: Model, runs: list[Run]) -> Decision:
    """Every run of the round has ended: merge, if enough of them brought something."""
    given = sorted((run for run in runs if run.stage == Stage.FETCHED), key=lambda run: (run.site, run.number))
    needed = max(1, min(view.plan.min_sites, len(runs)))
    if len(given) < needed:
        failed = ", ".join(sorted(run.site for run in runs if run.stage != Stage.FETCHED)) or "every site"
        return Decision(
            lacking=f"model {newest.version + 1:04d} needs contributions of {needed} sites and has {len(given)}: "
            f"{failed} failed or left out"
        )
    merge = Merge(
        version=newest.version + 1,
        base=newest.version,
        runs=tuple((run.site, run.number) for run in given),
        weights=tuple(weight_of(run, view.weights) for run in given),
    )
    return Decision(merge=merge)


def _training(view: View, newest: Model, site: str) -> Order:
    remaining = view.plan.target - newest.version
    return Order(
        site=site,
        work=Work.TRAIN,
        plan=view.plan.number,
        base=newest.version,
        round=newest.version + 1,
        steps=view.plan.steps,
        global_step=newest.steps,
        total_steps=newest.steps + remaining * view.plan.steps,
    )


def _evaluations(view: View, newest: Model) -> list[Order]:
    """For each planned site: evaluate the newest model, and what the other sites contributed to it; or, where the best
    version is gone back to, the last model, which no training run looks at."""
    last = view.roll_back and newest.version >= view.plan.target
    if newest.version < view.plan.first or newest.rolled_back_to is not None or view.plan.ended == CANCELLED:
        return []
    if not view.cross_evaluation:
        return [order_of(view, site, newest) for site in view.plan.sites] if last else []
    contributed = {(run.site, run.number): run for run in view.runs if run.contribution is not None}
    given = [contributed[key] for key in newest.merged if key in contributed]
    return [order_of(view, site, newest, [run for run in given if run.site != site]) for site in view.plan.sites]


def _free(orders: list[Order], busy: frozenset[str], view: View) -> tuple[Order, ...]:
    """The evaluations not yet ordered, for sites without an open run."""
    return tuple(
        order for order in orders if order.site not in busy and view.evaluate_run(order.site, order.round) is None
    )


def _first_of_each(evaluating: tuple[Order, ...], training: list[Order], busy: frozenset[str]) -> tuple[Order, ...]:
    """One open run per site: the evaluation first, the training once that is over."""
    taken = busy | {order.site for order in evaluating}
    return evaluating + tuple(order for order in training if order.site not in taken)
