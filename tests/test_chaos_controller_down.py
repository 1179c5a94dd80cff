"""A seeded sample of the chaos row "controller down"; `python -m tests.chaos "controller down"` runs its full aim."""

from tests.chaos import controller_down
from tests.testbed import Testbed


def test_controller_down(testbed: Testbed) -> None:
    result = controller_down.run(seed=1, trials=1, bed=testbed)
    assert (result.failures, result.notes) == (0, []), result
