"""What tests share."""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest

from tests.testbed import Testbed
from tests.testbed.sshd import Sshd


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """What runs side by side in `make test`: the tests of the testbed one after another, those with sshds of their own
    one after another (they share accounts), the others a module at a time."""
    fixtures: dict[str, set[str]] = {}
    for item in items:
        fixtures.setdefault(item.module.__name__, set()).update(item.fixturenames)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item.module, fixtures[item.module.__name__])))


def _group(module: Any, fixtures: set[str]) -> str:
    if "testbed" in fixtures or "Testbed" in vars(module):
        return "testbed"
    shares = any(_sshd_of(value) for value in vars(module).values())
    return "sshd" if shares else module.__name__


def _sshd_of(value: Any) -> bool:
    """Whether a name of a module stands for the sshd, for what starts one, or for a module that does."""
    if isinstance(value, ModuleType):
        return value.__name__.startswith("tests.chaos.") and "Sshd" in vars(value)
    return value is Sshd or getattr(value, "__module__", "") in _SSHDS


_SSHDS = {"tests.doors", "tests.ssh_sites", "tests.ssh_campaigns", "tests.chaos.hostile_sender"}


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
