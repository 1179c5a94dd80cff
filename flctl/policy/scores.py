"""What the sites measured: the loss of each version of the model on each site's own data, and what follows from it.

The mean over sites is the plain one: each site's data counts alike. `validation_batches` bounds what a site looks at;
weights by evaluated tokens would tell how much was looked at, not how much data there is, and would change where an
evaluation was cut short. A version has a mean only if every one of the sites measured it: others cannot be compared.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flctl.records import Model, Run, Stage, Work

MOST = 700.0
"""The greatest loss whose exponential is a float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Loss (mean per token, nats) and perplexity of one model on one site's validation text, of `tokens` tokens, as
    told by the site's run `number`; `inherited`: of a version with the same weights."""

    loss: float
    perplexity: float
    tokens: int | None
    number: int
    inherited: bool = False


Scores = dict[int, dict[str, Score]]
"""By version and site."""


def score_of(run: Run, name: str) -> Score | None:
    """What a run told of `base`, `trained` or a subject; None where that is no loss: a trainer may write anything."""
    if run.stage != Stage.FETCHED or run.contribution is None:
        return None
    table = run.contribution.metrics.get("evaluation")
    row = table.get(name) if isinstance(table, dict) else None
    if not isinstance(row, dict) or (loss := _finite(row.get("loss"))) is None:
        return None
    told, tokens = _finite(row.get("perplexity")), row.get("tokens")
    return Score(
        loss=loss,
        perplexity=perplexity_of(loss) if told is None else told,
        tokens=tokens if type(tokens) is int else None,
        number=run.number,
    )


def scores_of(runs: Iterable[Run], models: Sequence[Model]) -> Scores:
    """Of each version at each site the newest measurement: by a training run of its base, or by an evaluation. One
    with the weights of an earlier version has that one's, where it has none of its own."""
    found: Scores = {model.version: {} for model in models}
    for run in sorted(runs, key=lambda run: (run.site, run.number)):
        version, name = run.order.base, "base"
        if run.order.work == Work.EVALUATE:
            version, name = run.order.round, f"{run.order.round:04d}"
        score = score_of(run, name) if run.order.work != Work.MERGE else None
        if score is not None and version in found:
            found[version][run.site] = score
    for model in models:
        if model.rolled_back_to is not None:
            for site, score in found.get(model.rolled_back_to, {}).items():
                found[model.version].setdefault(site, replace(score, inherited=True))
    return found


def trained_of(runs: Iterable[Run]) -> Scores:
    """The sites' own models after their training, each on its site's data, by the version they were trained for."""
    found: Scores = {}
    for run in sorted(runs, key=lambda run: (run.site, run.number)):
        if run.order.work == Work.TRAIN and (score := score_of(run, "trained")) is not None:
            found.setdefault(run.order.round, {})[run.site] = score
    return found


def means_of(scores: Mapping[int, Mapping[str, Score]], sites: Sequence[str]) -> dict[int, float]:
    """The mean loss over these sites of each version that all of them measured, oldest first."""
    return {
        version: math.fsum(row[site].loss for site in sites) / len(sites)
        for version, row in sorted(scores.items())
        if sites and all(site in row for site in sites)
    }


def best_of(means: Mapping[int, float]) -> int | None:
    """The version with the least mean loss, the oldest of equals."""
    return min(means, key=lambda version: (means[version], version), default=None)


def without_gain(means: Mapping[int, float], min_delta: float) -> tuple[int, int]:
    """(how many versions in a row, up to the last, brought no mean lower than the lowest before by more than
    `min_delta`; the version with that lowest): the early stopping of Prechelt 1998 and of Keras."""
    lowest, count, version = math.inf, 0, -1
    for number, mean in sorted(means.items()):
        if mean < lowest - min_delta:
            lowest, count, version = mean, 0, number
        else:
            count += 1
    return count, version


def perplexity_of(loss: float) -> float:
    return math.exp(min(loss, MOST))


def _finite(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    return float(value) if known else None
