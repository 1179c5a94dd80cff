"""Owns the testbeds of the rows: two facilities with real Slurm for this process alone, with the doors a row needs."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.federation import Federation
from tests.testbed import Testbed

UNSPARING: dict[str, Any] = {"login": {"per_day": 10000}}
"""Over a profile: as many logins a day as a row needs that starts hundreds of processes."""


@contextmanager
def made(bed: Testbed | None) -> Iterator[Testbed]:
    """The given testbed, reset; or one of our own, taken down at the end."""
    with ExitStack() as stack:
        if bed is None:
            bed = Testbed()
            bed.lock(wait=1800)
            stack.callback(bed.unlock)
            stack.callback(bed.down)
            bed.up(fresh=True)
        bed.reset()
        yield bed
        bed.user.end_processes()


@contextmanager
def keys_only(bed: Testbed) -> Iterator[Testbed]:
    """Both facilities let the orchestrator in by key alone, so that a process need not wait for the next code."""
    sshd = bed.facilities["leonardo"].sshd
    usual = sshd.kind

    def change(kind: Any) -> None:
        sshd.stop()
        sshd.kind = kind
        sshd.start()

    change("key")
    try:
        yield bed
    finally:
        change(usual)


def federation(bed: Testbed, name: str, **profiles: Mapping[str, Any]) -> Federation:
    """A campaign with the small trainer that may log in as often as it likes."""
    tables = {site: {**UNSPARING, **profiles.get(site, {})} for site in bed.facilities}
    made = Federation(bed, name, **tables)
    made.set("steps = 4", "steps = 2")
    return made
