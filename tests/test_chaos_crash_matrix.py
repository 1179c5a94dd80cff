"""The row "crash matrix" of the chaos harness: a small seeded sample of its kills, on real Slurm."""

from pathlib import Path

import pytest

from tests.chaos import crash_matrix, progress, results
from tests.chaos.driven import normal
from tests.testbed import Testbed


def test_a_campaign_killed_at_points_and_calls_trains_once_and_makes_the_same_model(testbed: Testbed) -> None:
    result = crash_matrix.run(seed=1, trials=4, rounds=2, bed=testbed)
    assert result.notes == ()
    assert (result.failures, result.trials >= 4) == (0, True)
    assert result.figures["points"] and result.figures["calls"]


def test_a_run_that_was_ended_goes_on_after_its_last_finished_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLCTL_CHAOS_RESULTS", str(tmp_path / "results.jsonl"))
    monkeypatch.setattr(results, "commit", lambda: "abc1234")
    first = progress.of("crash matrix", seed=2, trials=9)
    assert first.once("one", lambda: {"hit": ["a"]}) == {"hit": ["a"]}
    with (tmp_path / "results-crash-matrix-2-9.jsonl").open("a") as file:
        file.write('\n{"commit": "abc1234", "step": "two", "ca')
    again = progress.of("crash matrix", seed=2, trials=9)
    assert again.once("one", lambda: {"hit": ["b"]}) == {"hit": ["a"]}
    assert again.once("two", lambda: {"hit": ["b"]}) == {"hit": ["b"]}
    assert progress.of("crash matrix", seed=3, trials=9).once("one", lambda: {"hit": ["c"]}) == {"hit": ["c"]}
    for other in ("def5678", "abc1234+"):
        monkeypatch.setattr(results, "commit", lambda: other)  # noqa: B023
        assert progress.of("crash matrix", seed=2, trials=9).once("one", dict) == {}
    again.over()
    assert not (tmp_path / "results-crash-matrix-2-9.jsonl").exists()


def test_a_system_call_is_named_without_what_differs_from_run_to_run() -> None:
    words = '4</home/u/camp/runs/karolina/0001/.run.json.24044.140438529761344>, "{\\n \\"a\\"", 20'
    assert normal(words).startswith("/home/u/camp/runs/karolina/0001/.run.json, ")
    assert normal("3<socket:[3096920]>, {sa_family=AF_INET}") == ", {sa_family=AF_INET}"
