"""A small sample of the row "power cuts", and that it would see a folder that is not flushed."""

import pytest

from tests.chaos import power_cuts


def test_nothing_acknowledged_is_lost_in_a_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power_cuts, "ROUNDS", 2)
    result = power_cuts.run(seed=5, trials=2)
    assert (result.trials, result.failures) == (2, 0), result.notes
    assert result.figures["acknowledged"] > 20


def test_a_folder_that_is_not_flushed_is_found() -> None:
    """The same program with the flush of folders taken out: sooner or later what it said is not there."""
    result = power_cuts.run(seed=6, trials=25, planted=True)
    assert result.failures > 0
    assert "acknowledged was" in " ".join(result.notes) or "not there" in " ".join(result.notes)
