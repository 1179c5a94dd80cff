"""Owns the matrix of what each version of the model scored on each site's own data; of the records alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from flctl.campaign.workspace import Workspace
from flctl.policy.scores import Scores, best_of, means_of, scores_of, trained_of
from flctl.records import Model, Plan, Run, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What each version scored on each site's own data. `sites`: those whose plain mean is taken, in `means` by version
    (a version that lacks one has none); `trained`: each site's own model, by the version it was trained for."""

    models: tuple[Model, ...]
    scores: Scores
    trained: Scores
    sites: tuple[str, ...]
    means: dict[int, float]
    best: int | None

    @property
    def columns(self) -> list[str]:
        """Every site that measured anything, or is to."""
        rows = (*self.scores.values(), *self.trained.values())
        return sorted({*self.sites, *(site for row in rows for site in row)})

    @property
    def lacking(self) -> list[str]:
        """The sites that have not measured the newest model."""
        return [site for site in self.sites if site not in self.scores[self.models[-1].version]]


def history_of(workspace: Workspace) -> History:
    """What the records tell now."""
    models, runs = workspace.models(), workspace.runs()
    scores, sites = scores_of(runs, models), sites_of(workspace.plan(), runs)
    means = means_of(scores, sites)
    return History(
        models=models, scores=scores, trained=trained_of(runs), sites=sites, means=means, best=best_of(means)
    )


def sites_of(plan: Plan | None, runs: Sequence[Run]) -> tuple[str, ...]:
    """The sites that train: of the plan, or of the last one that was to make models."""
    if plan is not None and plan.evaluates is None:
        return plan.sites
    trains = [run for run in runs if run.order.work == Work.TRAIN]
    last = max((run.order.plan for run in trains), default=0)
    return tuple(sorted({run.site for run in trains if run.order.plan == last} or {run.site for run in runs}))
