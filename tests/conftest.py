"""What tests share."""

from collections.abc import Iterator

import pytest

from tests.testbed import Testbed


@pytest.fixture(scope="session")
def testbed() -> Iterator[Testbed]:
    """The testbed for this test run alone, brought up anew (homes of its accounts emptied), taken down at the end."""
    bed = Testbed()
    bed.lock(wait=1800)
    try:
        yield bed.up(fresh=True)
    finally:
        bed.down()
        bed.unlock()
