"""What tests share."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.testbed import Testbed

SSHDS = r"\bSshd\b|tests\.(doors|ssh_sites|ssh_campaigns)\b|\b(black_holes|hostile_sender|submit_cuts)\b"


def group(path: str) -> str:
    """What runs side by side in `make test`: the tests of the testbed one after another, those with sshds of their own
    one after another (they share accounts), the others a file at a time."""
    text = Path(path).read_text(encoding="utf-8")
    if re.search(r"\bTestbed\b", text):
        return "testbed"
    return "sshd" if re.search(SSHDS, text) else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """pytest-xdist's own groups (3.8) are lost on pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class InTurn(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(str(config.rootpath / nodeid.partition("::")[0]))

    return InTurn(config, log)


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
