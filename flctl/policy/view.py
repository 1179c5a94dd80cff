"""What a policy sees and what it answers."""

from dataclasses import dataclass
from typing import Literal

from flctl.records import Merge, Model, Order, Plan, RollBack, Run, Stage, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The campaign as a policy may see it. `cross_evaluation`: every site is to evaluate each new
    model and what the others contributed to it. `patience`: versions in a row without an improvement of the mean loss
    by more than `min_delta` that end the plan (0: none do); `roll_back`: a plan ends at the best version, unless it is
    among the `collected`, whose files are gone."""

    plan: Plan
    models: tuple[Model, ...]
    runs: tuple[Run, ...]
    weights: Literal["samples", "tokens", "equal"] = "samples"
    cross_evaluation: bool = False
    patience: int = 0
    min_delta: float = 0.0
    roll_back: bool = False
    collected: frozenset[int] = frozenset()

    def train_run(self, site: str, version: int) -> Run | None:
        """The site's newest training run for the model `version`."""
        return self._last(site, Work.TRAIN, version)

    def evaluate_run(self, site: str, version: int) -> Run | None:
        return self._last(site, Work.EVALUATE, version)

    def _last(self, site: str, work: Work, version: int) -> Run | None:
        wanted = (self.plan.number, site, work, version)
        mine = [run for run in self.runs if (run.order.plan, run.site, run.order.work, run.order.round) == wanted]
        return max(mine, key=lambda run: run.number, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A merge, a return to an earlier version, or orders (or nothing: something is awaited). `stop`: why the plan ends
    here, before its target. `done`: the plan is fulfilled. `lacking`: why the round cannot be closed although nothing
    of it is under way; a person decides (retry or skip)."""

    merge: Merge | None = None
    roll_back: RollBack | None = None
    orders: tuple[Order, ...] = ()
    stop: str = ""
    done: bool = False
    lacking: str = ""


def weight_of(run: Run, weights: str) -> float:
    """n_k of a fetched run: its samples, its tokens, or 1."""
    if run.stage != Stage.FETCHED or run.contribution is None:
        raise ValueError(f"run {run.number} of {run.site} has no contribution")
    return {"samples": float(run.contribution.samples), "tokens": float(run.contribution.tokens), "equal": 1.0}[weights]
