"""The synchronous policy: one merge waits for one run of each planned site (FedAvg's round, McMahan et al. 2017)."""

from flctl.policy.view import Decision, View, weight_of
from flctl.records import CLOSED, Merge, Model, Order, Run, Stage, Subject, Work


def decide(view: View, now: float) -> Decision:
    """What to do next. `now` is not looked at: rounds end by events, never by time."""
    newest = view.models[-1]
    evaluations = _evaluations(view, newest) if view.cross_evaluation else []
    busy = frozenset(run.site for run in view.runs if run.open)
    if newest.version >= view.plan.target:
        done = all(view.evaluate_run(order.site, newest.version) is not None for order in evaluations) and not busy
        return Decision(orders=_free(evaluations, busy, view), done=done)
    version = newest.version + 1
    if version < view.plan.first:
        return _again(view, newest)
    sites = [site for site in view.plan.sites if site not in view.plan.skips(version)]
    runs = [run for site in sites if (run := view.train_run(site, version)) is not None]
    if len(runs) == len(sites) and all(run.stage in CLOSED for run in runs):
        return _close(view, newest, runs)
    training = [_training(view, newest, site) for site in sites if view.train_run(site, version) is None]
    return Decision(orders=_first_of_each(_free(evaluations, busy, view), training, busy))


def _again(view: View, newest: Model) -> Decision:
    """The next model was made before this plan, and is gone: made once more of what was fetched for it then."""
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
    """For each planned site: evaluate the newest model and what the other sites contributed to it."""
    if newest.version < view.plan.first:
        return []
    contributed = {(run.site, run.number): run for run in view.runs if run.contribution is not None}
    orders = []
    for site in view.plan.sites:
        others = [contributed[key] for key in newest.merged if key[0] != site and key in contributed]
        subjects = [Subject(name=f"{newest.version:04d}", sha256=newest.sha256)]
        subjects += [
            Subject(name=contribution_name(run), sha256=run.contribution.sha256)
            for run in others
            if run.contribution is not None
        ]
        orders.append(
            Order(
                site=site,
                work=Work.EVALUATE,
                plan=view.plan.number,
                base=newest.version,
                round=newest.version,
                subjects=tuple(subjects),
            )
        )
    return orders


def contribution_name(run: Run) -> str:
    """The folder name of a site's contribution where it is a model among models: `karolina-0002-1`."""
    return f"{run.site}-{run.number:04d}-{run.attempt}"


def _free(orders: list[Order], busy: frozenset[str], view: View) -> tuple[Order, ...]:
    """The evaluations not yet ordered, for sites without an open run."""
    return tuple(
        order for order in orders if order.site not in busy and view.evaluate_run(order.site, order.round) is None
    )


def _first_of_each(evaluating: tuple[Order, ...], training: list[Order], busy: frozenset[str]) -> tuple[Order, ...]:
    """One open run per site: the evaluation first, the training once that is over."""
    taken = busy | {order.site for order in evaluating}
    return evaluating + tuple(order for order in training if order.site not in taken)
