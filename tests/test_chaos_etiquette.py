"""A seeded sample of the chaos row "etiquette"; `python -m tests.chaos "etiquette"` runs its full aim."""

from tests.chaos import etiquette
from tests.testbed import Testbed


def test_etiquette(testbed: Testbed) -> None:
    result = etiquette.run(seed=1, trials=1, bed=testbed)
    assert (result.failures, result.notes) == (0, []), result
