"""What follows from the sites' losses: means, the best version, early stop, the way back; of records alone."""

import math
from dataclasses import replace

import pytest

from flctl.policy import Decision, View, decide
from flctl.policy.evaluating import CANCELLED
from flctl.policy.scores import best_of, means_of, perplexity_of, score_of, scores_of, trained_of, without_gain
from flctl.records import Contribution, Job, Model, Order, Plan, RollBack, Run, Stage, Work

SITES = ("a", "b")
PLAN = Plan(sites=SITES, first=1, target=9, steps=10, min_sites=2)


def a_run(order: Order, number: int, evaluation: object, stage: Stage = Stage.FETCHED) -> Run:
    metrics = {"evaluation": evaluation}
    given = Contribution(steps=10, samples=10, tokens=10, sha256="c", files=(), metrics=metrics)
    return Run(
        number=number,
        order=order,
        stage=stage,
        job=Job(token="f"),
        contribution=given if stage == Stage.FETCHED else None,
        created_at=0.0,
        changed_at=0.0,
    )


def training(site: str, version: int, loss: float, plan: int = 1) -> Run:
    """The run of a site that began with `version`, whose loss it measured."""
    order = Order(site=site, work=Work.TRAIN, base=version, round=version + 1, plan=plan)
    return a_run(order, version + 1, {"base": {"loss": loss}, "trained": {"loss": loss - 1}})


def evaluation(site: str, version: int, loss: float, plan: int = 1, stage: Stage = Stage.FETCHED) -> Run:
    order = Order(site=site, work=Work.EVALUATE, base=version, round=version, plan=plan)
    return a_run(order, 100 + version, {f"{version:04d}": {"loss": loss}}, stage)


def models(newest: int) -> tuple[Model, ...]:
    return tuple(Model(version=version, sha256=f"m{version}", steps=10 * version) for version in range(newest + 1))


def after(*losses: float, plan: Plan = PLAN, **settings: object) -> View:
    """A campaign whose versions had these losses at both sites; the newest was measured by nobody."""
    runs = tuple(training(site, version, loss) for version, loss in enumerate(losses) for site in SITES)
    return View(plan=plan, models=models(len(losses)), runs=runs, **settings)  # type: ignore[arg-type]


def evaluated(view: View, loss: float) -> View:
    newest = view.models[-1].version
    return replace(view, runs=view.runs + tuple(evaluation(site, newest, loss) for site in view.plan.sites))


def said(view: View) -> Decision:
    return decide("sync", view, 0.0)


# Scores


def test_a_version_is_measured_by_the_runs_that_began_with_it_and_by_evaluations_the_newest_counts() -> None:
    runs = (training("a", 0, 3.0), training("b", 0, 5.0), evaluation("a", 0, 2.5), training("a", 1, 2.0))
    scores = scores_of(runs, models(2))
    assert {v: {s: score.loss for s, score in row.items()} for v, row in scores.items()} == {
        0: {"a": 2.5, "b": 5.0},
        1: {"a": 2.0},
        2: {},
    }
    assert {v: row["a"].loss for v, row in trained_of(runs).items()} == {1: 2.0, 2: 1.0}
    assert means_of(scores, SITES) == {0: 3.75}
    assert means_of(scores, ("a",)) == {0: 2.5, 1: 2.0}
    assert means_of(scores, ()) == {}


@pytest.mark.parametrize(
    "wild",
    [None, 3, [], {"base": 4}, {"base": {}}, {"base": {"loss": "x"}}, {"base": {"loss": True}}]
    + [{"base": {"loss": value}} for value in (math.nan, math.inf, -math.inf, None)],
)
def test_what_is_no_loss_is_a_hole(wild: object) -> None:
    run = a_run(Order(site="a", work=Work.TRAIN, base=0, round=1), 1, wild)
    assert score_of(run, "base") is None
    assert scores_of((run,), models(0)) == {0: {}}


def test_a_run_that_failed_measured_nothing() -> None:
    assert scores_of((evaluation("a", 0, 1.0, stage=Stage.FAILED),), models(0)) == {0: {}}


def test_a_perplexity_that_is_not_told_is_the_exponential_and_always_a_number() -> None:
    order = Order(site="a", work=Work.TRAIN, base=0, round=1)
    told = score_of(a_run(order, 1, {"base": {"loss": 1.0, "perplexity": 2.0, "tokens": 7}}), "base")
    assert told is not None
    assert (told.perplexity, told.tokens) == (2.0, 7)
    untold = score_of(a_run(order, 1, {"base": {"loss": 1.0, "perplexity": math.nan}}), "base")
    assert untold is not None
    assert untold.perplexity == math.e
    assert math.isfinite(perplexity_of(1e9))


def test_a_version_with_the_weights_of_another_has_its_scores_until_it_has_its_own() -> None:
    both = (*models(1), Model(version=2, sha256="m0", rolled_back_to=0))
    runs = (training("a", 0, 3.0), training("b", 0, 4.0), evaluation("b", 2, 4.5))
    row = scores_of(runs, both)[2]
    assert [(row[s].loss, row[s].inherited) for s in SITES] == [(3.0, True), (4.5, False)]


def test_the_best_is_the_lowest_and_the_oldest_of_equals() -> None:
    assert best_of({3: 2.0, 1: 2.0, 0: 2.5}) == 1
    assert best_of({}) is None


def test_only_a_fall_by_more_than_min_delta_is_a_gain() -> None:
    assert without_gain({0: 3.0, 1: 2.0, 2: 2.0, 3: 2.5}, 0.0) == (2, 1)
    assert without_gain({0: 3.0, 1: 2.95, 2: 2.9}, 0.1) == (2, 0)
    assert without_gain({0: 3.0, 1: 2.95, 2: 2.85}, 0.1) == (0, 2)
    assert without_gain({}, 0.0) == (0, -1)


# Early stop


def test_a_plan_ends_when_so_many_versions_brought_no_gain_one_round_after_the_last_of_them() -> None:
    assert said(after(3.0, 2.0, 2.1, patience=2)).orders  # of 0002 alone nothing follows
    decision = said(after(3.0, 2.0, 2.1, 2.2, patience=2))
    assert "has not improved in 2 versions since model 0001 (2.0000)" in decision.stop
    assert not decision.orders
    assert said(after(3.0, 2.0, 2.1, 2.2, patience=0)).orders
    assert said(after(3.0, 2.0, 2.1, 1.9, patience=2)).orders


def test_small_gains_are_none() -> None:
    assert said(after(3.0, 2.99, 2.98, patience=2, min_delta=0.1)).stop
    assert said(after(3.0, 2.8, 2.79, patience=2, min_delta=0.1)).orders


def test_a_version_that_a_site_has_not_measured_counts_neither_way() -> None:
    view = after(3.0, 2.0, 2.1, 2.2, patience=2)
    holed = replace(view, runs=tuple(run for run in view.runs if (run.site, run.order.base) != ("b", 3)))
    assert said(holed).orders


def test_patience_begins_anew_with_each_plan() -> None:
    view = after(3.0, 2.0, 2.1, 2.2, patience=2, plan=replace(PLAN, number=2, first=5))
    assert said(view).orders


def test_what_has_begun_is_not_stopped() -> None:
    view = after(3.0, 2.0, 2.1, 2.2, patience=2)
    begun = a_run(Order(site="a", work=Work.TRAIN, base=4, round=5, plan=1), 5, {}, Stage.QUEUED)
    assert not said(replace(view, runs=(*view.runs, begun))).stop


def test_where_all_evaluate_each_model_the_plan_ends_at_once_and_waits_for_them() -> None:
    view = after(3.0, 2.0, 2.1, patience=2, cross_evaluation=True)
    view = replace(view, runs=view.runs + tuple(evaluation(s, v, 9.0) for v in (1, 2) for s in SITES))
    view = replace(view, runs=tuple(run for run in view.runs if run.order.work == Work.TRAIN))
    decision = said(view)
    assert [(order.work, order.round) for order in decision.orders] == [(Work.EVALUATE, 3)] * 2
    one = replace(view, runs=(*view.runs, evaluation("a", 3, 2.2)))
    assert [(order.site, order.work) for order in said(one).orders] == [("b", Work.EVALUATE)]
    assert said(evaluated(view, 2.2)).stop
    assert {order.work for order in said(evaluated(view, 1.0)).orders} == {Work.TRAIN}


# The way back


def ended(*losses: float, **settings: object) -> View:
    return after(*losses, plan=replace(PLAN, target=len(losses)), roll_back=True, **settings)


def test_the_last_model_is_evaluated_and_the_best_one_gone_back_to() -> None:
    view = ended(3.0, 2.0, 2.1)
    orders = said(view).orders
    assert [(order.site, order.work, order.base, order.round) for order in orders] == [
        (site, Work.EVALUATE, 3, 3) for site in SITES
    ]
    assert [subject.name for subject in orders[0].subjects] == ["0003"]
    assert orders[0].global_step == 30
    assert said(evaluated(view, 2.2)).roll_back == RollBack(version=4, source=1)


def test_the_newest_stays_where_it_is_the_best_or_as_good() -> None:
    for loss in (1.9, 2.0):
        decision = said(evaluated(ended(3.0, 2.0, 2.1), loss))
        assert (decision.done, decision.roll_back) == (True, None)


def test_a_newest_that_a_site_could_not_evaluate_stays() -> None:
    view = ended(3.0, 2.0, 2.1)
    failed = (evaluation("a", 3, 9.0), evaluation("b", 3, 9.0, stage=Stage.FAILED))
    decision = said(replace(view, runs=view.runs + failed))
    assert (decision.done, decision.roll_back) == (True, None)


def test_what_gc_took_is_not_gone_back_to() -> None:
    view = evaluated(ended(3.0, 2.0, 2.1, collected=frozenset({1})), 2.2)
    assert said(view).roll_back == RollBack(version=4, source=2)


def test_nothing_is_done_for_a_plan_that_a_person_ended() -> None:
    view = ended(3.0, 2.0, 2.1)
    decision = said(replace(view, plan=replace(view.plan, ended=CANCELLED)))
    assert (decision.done, decision.orders, decision.roll_back) == (True, (), None)


def test_after_the_way_back_the_plan_is_done_and_the_next_one_goes_on_from_there() -> None:
    view = evaluated(ended(3.0, 2.0, 2.1), 2.2)
    back = RollBack(version=4, source=1)
    returned = replace(view, plan=replace(view.plan, rolled_back=(back,)))
    assert said(returned).roll_back == back, "until it is made"
    made = (*view.models, Model(version=4, sha256="m1", steps=10, rolled_back_to=1))
    assert said(replace(returned, models=made)).done
    following = Plan(number=2, sites=SITES, first=5, target=5, steps=10, min_sites=2, rolled_back=(back,))
    order = said(replace(returned, models=made, plan=following)).orders[0]
    assert (order.base, order.round, order.global_step) == (4, 5, 10)


def test_a_version_that_was_gone_back_to_and_is_lost_is_made_again_whatever_is_set_now() -> None:
    back = RollBack(version=4, source=1)
    following = Plan(number=2, sites=SITES, first=5, target=5, steps=10, min_sites=2, rolled_back=(back,))
    assert said(after(3.0, 2.0, 2.1, plan=following)).roll_back == back


# A plan that only evaluates


LOOK = Plan(number=2, sites=SITES, first=4, target=3, steps=10, min_sites=2, evaluates=1)


def test_a_plan_that_evaluates_asks_each_site_once_and_makes_nothing() -> None:
    view = after(3.0, 2.0, 2.1, plan=LOOK, patience=1, roll_back=True, cross_evaluation=True)
    orders = said(view).orders
    assert [(o.site, o.work, o.base, o.round, o.plan, len(o.subjects)) for o in orders] == [
        (site, Work.EVALUATE, 1, 1, 2, 1) for site in SITES
    ]
    one = replace(view, runs=(*view.runs, evaluation("a", 1, 1.0, plan=2)))
    assert [order.site for order in said(one).orders] == ["b"]
    both = replace(one, runs=(*one.runs, evaluation("b", 1, 1.0, plan=2, stage=Stage.FAILED)))
    assert said(both).done
    assert not said(both).orders


def test_a_site_that_is_busy_evaluates_afterwards() -> None:
    view = after(3.0, 2.0, 2.1, plan=LOOK)
    open_ = a_run(Order(site="a", work=Work.EVALUATE, base=3, round=3, plan=1), 9, {}, Stage.RUNNING)
    assert [order.site for order in said(replace(view, runs=(*view.runs, open_))).orders] == ["b"]


def test_a_model_that_is_gone_is_made_again_first_or_said_to_be_gone() -> None:
    lost = after(3.0, 2.0, plan=replace(LOOK, first=4, evaluates=1))
    assert "is gone" in said(lost).lacking, "nothing to make 0003 of"
    gone = replace(after(3.0, 2.0, 2.1, plan=LOOK), models=(models(3)[0], *models(3)[2:]))
    assert "model 0001 is gone" in said(gone).lacking
