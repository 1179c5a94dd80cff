"""The row "hostile files": none is accepted, none takes much memory; its time `python -m tests.chaos` measures."""

import math

from tests.chaos import hostile_files

TELLING = ("checkpoint: another shape of the same size", "checkpoint: a NaN", "file: a pickle under a further name")


def test_nothing_hostile_is_accepted() -> None:
    """Every sixth case, and what costs most."""
    large = [name for name in hostile_files.CASES if "MB" in name or "million" in name]
    found = hostile_files.measured(list(dict.fromkeys([*TELLING, *large, *list(hostile_files.CASES)[::6]])))
    assert len(hostile_files.CASES) >= 2 * 60 and len(found) > 25
    assert hostile_files.faults(found, seconds=math.inf) == []
    assert not hostile_files.TRAP.exists()
    outcomes = {name: words for name, words, _, _ in found}
    assert "shape" in outcomes["checkpoint: another shape of the same size"]
    assert "NaN" in outcomes["checkpoint: a NaN"]
    assert "which no index names" in outcomes["file: a pickle under a further name"]


def test_what_is_accepted_or_costs_much_is_a_fault() -> None:
    right = ("", "fetched", 0.1, 1.0)
    assert hostile_files.faults([right, ("a", "AggregationRefused: no", 0.1, 1.0)]) == []
    for wrong in (
        ("a", "fetched", 0.1, 1.0),
        ("a", "DEFECT KeyError: 'x'", 0.1, 1.0),
        ("a", "AggregationRefused: no", 2.1, 1.0),
        ("a", "AggregationRefused: no", 0.1, 257.0),
    ):
        assert len(hostile_files.faults([right, wrong])) == 1
    assert len(hostile_files.faults([("", "AggregationRefused: no", 0.1, 1.0)])) == 1
