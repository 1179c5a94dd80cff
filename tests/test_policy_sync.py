"""The synchronous policy: one merge waits for one run of each planned site, and people decide about failures."""

from dataclasses import replace

from flctl.policy import View
from flctl.policy.sync import decide
from flctl.records import Contribution, Job, Model, Order, Plan, Run, Stage, Work

PLAN = Plan(sites=("a", "b", "c"), first=1, target=2, steps=10, min_sites=3)
START = Model(version=0, sha256="m0")


def a_run(order: Order, number: int, stage: Stage, samples: int = 10) -> Run:
    given = Contribution(steps=10, samples=samples, tokens=7 * samples, sha256=f"c{order.site}", files=(), metrics={})
    return Run(
        number=number,
        order=order,
        stage=stage,
        job=Job(token="f"),
        contribution=given if stage == Stage.FETCHED else None,
        created_at=0.0,
        changed_at=0.0,
    )


def after(stages: dict[str, Stage], plan: Plan = PLAN, **changes: object) -> View:
    """The first round with its runs at these stages."""
    orders = {order.site: order for order in decide(View(plan=plan, models=(START,), runs=()), 0.0).orders}
    runs = tuple(a_run(orders[site], 1, stage, samples=10 * (ord(site) - 96)) for site, stage in stages.items())
    return View(plan=plan, models=(START,), runs=runs, **changes)  # type: ignore[arg-type]


def test_every_planned_site_is_asked_once_for_the_next_model() -> None:
    orders = decide(View(plan=PLAN, models=(START,), runs=()), 0.0).orders
    assert [(order.site, order.work, order.base, order.round) for order in orders] == [
        ("a", "train", 0, 1),
        ("b", "train", 0, 1),
        ("c", "train", 0, 1),
    ]
    assert {(order.steps, order.global_step, order.total_steps) for order in orders} == {(10, 0, 20)}


def test_while_a_run_is_open_nothing_is_merged_and_nothing_new_ordered() -> None:
    for stage in (Stage.ORDERED, Stage.CLAIMED, Stage.QUEUED, Stage.RUNNING, Stage.ENDED):
        decision = decide(after({"a": Stage.FETCHED, "b": Stage.FETCHED, "c": stage}), 0.0)
        assert (decision.merge, decision.orders, decision.done) == (None, (), False)


def test_all_fetched_makes_a_merge_ordered_by_site_and_weighted_by_samples() -> None:
    merge = decide(after({"c": Stage.FETCHED, "a": Stage.FETCHED, "b": Stage.FETCHED}), 0.0).merge
    assert merge is not None
    assert (merge.version, merge.base, merge.runs) == (1, 0, (("a", 1), ("b", 1), ("c", 1)))
    assert merge.weights == (10.0, 20.0, 30.0)


def test_weights_may_be_tokens_or_equal() -> None:
    stages = dict.fromkeys("abc", Stage.FETCHED)
    for weights, expected in (("tokens", (70.0, 140.0, 210.0)), ("equal", (1.0, 1.0, 1.0))):
        merge = decide(after(stages, weights=weights), 0.0).merge
        assert merge is not None
        assert merge.weights == expected


def test_a_failed_site_leaves_the_round_open_for_a_person() -> None:
    decision = decide(after({"a": Stage.FETCHED, "b": Stage.FETCHED, "c": Stage.FAILED}), 0.0)
    assert decision.merge is None
    assert not decision.done
    assert "c" in decision.lacking


def test_with_fewer_sites_needed_a_failure_does_not_stop_the_round() -> None:
    stages = {"a": Stage.FETCHED, "b": Stage.FETCHED, "c": Stage.FAILED}
    merge = decide(after(stages, replace(PLAN, min_sites=2)), 0.0).merge
    assert merge is not None
    assert [site for site, _ in merge.runs] == ["a", "b"]


def test_a_skipped_site_is_not_waited_for() -> None:
    view = after({"a": Stage.FETCHED, "b": Stage.FETCHED, "c": Stage.RUNNING})
    skipped = replace(view, plan=replace(PLAN, skipped=((1, "c"),)))
    merge = decide(skipped, 0.0).merge
    assert merge is not None
    assert [site for site, _ in merge.runs] == ["a", "b"]


def test_a_skip_concerns_one_model_only() -> None:
    plan = replace(PLAN, skipped=((1, "c"),))
    made = Model(version=1, sha256="m1", steps=10, merged=(("a", 1), ("b", 1)))
    orders = decide(View(plan=plan, models=(START, made), runs=()), 0.0).orders
    assert [(order.site, order.base, order.global_step) for order in orders] == [
        ("a", 1, 10),
        ("b", 1, 10),
        ("c", 1, 10),
    ]


def test_the_schedule_of_steps_goes_on_over_rounds() -> None:
    """Every run of a plan is told the same total, so that a learning-rate schedule spans the plan."""
    made = Model(version=1, sha256="m1", steps=10)
    first = decide(View(plan=PLAN, models=(START,), runs=()), 0.0).orders
    second = decide(View(plan=PLAN, models=(START, made), runs=()), 0.0).orders
    assert {order.total_steps for order in (*first, *second)} == {20}


def test_a_fulfilled_plan_asks_for_nothing() -> None:
    made = Model(version=2, sha256="m2", steps=20)
    decision = decide(View(plan=PLAN, models=(START, made), runs=()), 0.0)
    assert decision.done
    assert decision.orders == ()


def test_cross_evaluation_comes_before_the_next_training_and_the_end() -> None:
    view = after(dict.fromkeys("abc", Stage.FETCHED), cross_evaluation=True)
    made = Model(version=1, sha256="m1", steps=10, merged=(("a", 1), ("b", 1), ("c", 1)))
    view = replace(view, models=(START, made))
    orders = decide(view, 0.0).orders
    assert [(order.site, order.work) for order in orders] == [(site, Work.EVALUATE) for site in "abc"]
    assert [subject.name for subject in orders[0].subjects] == ["0001", "b-0001-1", "c-0001-1"]
    looked = tuple(a_run(order, 2, Stage.FETCHED) for order in orders)
    assert {order.work for order in decide(replace(view, runs=view.runs + looked), 0.0).orders} == {Work.TRAIN}
    short = replace(view, plan=replace(PLAN, target=1))
    assert not decide(short, 0.0).done
    assert decide(replace(short, runs=view.runs + looked), 0.0).done


def test_a_failed_evaluation_stops_nothing() -> None:
    view = after(dict.fromkeys("abc", Stage.FETCHED), replace(PLAN, target=1), cross_evaluation=True)
    made = Model(version=1, sha256="m1", steps=10, merged=(("a", 1), ("b", 1), ("c", 1)))
    view = replace(view, models=(START, made))
    failed = tuple(a_run(order, 2, Stage.FAILED) for order in decide(view, 0.0).orders)
    assert decide(replace(view, runs=view.runs + failed), 0.0).done


def test_a_model_of_an_earlier_plan_that_is_gone_is_made_again_and_nothing_is_trained_for_it() -> None:
    fetched = after({"a": Stage.FETCHED, "b": Stage.FETCHED, "c": Stage.FETCHED})
    later = replace(fetched, plan=replace(PLAN, number=2, first=2))
    decision = decide(later, 0.0)
    assert decision.merge == decide(fetched, 0.0).merge
    assert decision.merge is not None
    none = decide(replace(later, runs=()), 0.0)
    assert (none.merge, none.orders) == (None, ())
    assert "is gone" in none.lacking
