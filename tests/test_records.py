"""The records: what is written can be read, and names that must never change do not."""

import pytest

from flctl.codec import from_data, to_data
from flctl.records import (
    Contribution,
    FileEntry,
    Held,
    Job,
    Order,
    Part,
    Plan,
    Run,
    SiteMerge,
    Stage,
    Subject,
    Work,
    folder_sha256,
    seed_of,
    token_of,
)


def a_run(**changes: object) -> Run:
    order = Order(site="brno", work=Work.EVALUATE, base=2, round=2, subjects=(Subject(name="0002", sha256="ab"),))
    values: dict = {
        "number": 3,
        "order": order,
        "stage": Stage.QUEUED,
        "job": Job(token="fabc", id="17", claimed_at=12.5),
        "held": Held(reason="waits", since=1.0),
        "contribution": Contribution(
            steps=5,
            samples=6,
            tokens=7,
            sha256="cd",
            files=(FileEntry(path="a", size=1, sha256="e"),),
            metrics={"x": [1]},
        ),
        "created_at": 1.0,
        "changed_at": 2.0,
    }
    return Run(**(values | changes))


def test_a_run_survives_json() -> None:
    import json

    run = a_run()
    assert from_data(Run, json.loads(json.dumps(to_data(run)))) == run


def test_a_plan_survives_json() -> None:
    plan = Plan(sites=("a", "b"), first=1, target=3, steps=10, min_sites=2, skipped=((2, "b"),))
    assert from_data(Plan, to_data(plan)) == plan
    assert plan.skips(2) == {"b"}
    assert plan.skips(1) == frozenset()


def test_an_order_to_merge_survives_json_and_stays_equal() -> None:
    import json

    part = Part(name="pisa-0001-1", site="pisa", number=1, weight=0.1 + 0.2, steps=4, base=0)
    merge = SiteMerge(rule="fedadam", options={"lr": 1e-3, "dialect": "paper"}, master=True, parts=(part,))
    order = Order(site="brno", work=Work.MERGE, base=0, round=1, merge=merge)
    assert from_data(Order, json.loads(json.dumps(to_data(order)))) == order


def test_a_run_from_before_there_were_merges_at_sites_can_be_read() -> None:
    data = to_data(a_run())
    del data["order"]["merge"]
    assert from_data(Run, data) == a_run()


def test_keys_of_a_newer_version_are_ignored() -> None:
    assert from_data(Held, {"reason": "r", "since": 1, "mood": "fine"}) == Held(reason="r", since=1.0)


@pytest.mark.parametrize("change", [{"number": "3"}, {"stage": "dancing"}, {"job": {}}, {"order": None}])
def test_a_wrong_record_is_refused(change: dict) -> None:
    with pytest.raises(ValueError):
        from_data(Run, to_data(a_run()) | change)


def test_a_token_is_a_function_of_its_four_values_alone() -> None:
    """A changed token would make a rebuilt campaign submit again: the value is pinned."""
    assert token_of("1f2e3d4c", "leonardo", 7, 1) == "ftbn9ld5x2tjj09"
    others = {token_of("1f2e3d4c", site, n, a) for site in ("leonardo", "karolina") for n in (7, 8) for a in (1, 2)}
    assert len(others) == 8
    for token in others:
        assert len(token) == 15
        assert token[0].isalpha()
        assert token.isalnum()
        assert token == token.lower()


def test_a_seed_depends_on_site_and_number_and_fits_in_31_bits() -> None:
    seeds = {seed_of(seed, site, number) for seed in (0, 1) for site in ("a", "b") for number in (1, 2)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_folders_hash_is_of_its_sorted_lines_without_flctl_json() -> None:
    from hashlib import sha256

    files = [FileEntry(path="b", size=1, sha256="11"), FileEntry(path="a", size=1, sha256="22")]
    expected = sha256(b"11  b\n22  a\n").hexdigest()
    assert folder_sha256(files) == expected
    assert folder_sha256([*reversed(files), FileEntry(path="flctl.json", size=9, sha256="33")]) == expected
