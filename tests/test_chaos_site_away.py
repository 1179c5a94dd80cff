"""A seeded sample of the chaos row "site away"; `python -m tests.chaos "site away"` runs its full aim."""

from tests.chaos import site_away
from tests.testbed import Testbed


def test_site_away(testbed: Testbed) -> None:
    result = site_away.run(seed=1, trials=1, bed=testbed)
    assert (result.failures, result.notes) == (0, []), result
