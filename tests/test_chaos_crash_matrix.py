"""The row "crash matrix" of the chaos harness: a small seeded sample of its kills, on real Slurm."""

from tests.chaos import crash_matrix
from tests.chaos.driven import normal
from tests.testbed import Testbed


def test_a_campaign_killed_at_points_and_calls_trains_once_and_makes_the_same_model(testbed: Testbed) -> None:
    result = crash_matrix.run(seed=1, trials=10, bed=testbed)
    assert result.notes == ()
    assert (result.failures, result.trials >= 10) == (0, True)
    assert result.figures["points"] and result.figures["calls"]


def test_a_system_call_is_named_without_what_differs_from_run_to_run() -> None:
    words = '4</home/u/camp/runs/karolina/0001/.run.json.24044.140438529761344>, "{\\n \\"a\\"", 20'
    assert normal(words).startswith("/home/u/camp/runs/karolina/0001/.run.json, ")
    assert normal("3<socket:[3096920]>, {sa_family=AF_INET}") == ", {sa_family=AF_INET}"
