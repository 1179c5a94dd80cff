"""A site's scheduler is asked once in `poll.every` seconds, whoever asks."""

import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest

from flctl.campaign import etiquette
from flctl.campaign.contacts import next_due
from flctl.facility.profile import Poll, Scheduler, Shape, Site
from flctl.records import Contact, Job, Order, Run, Stage, Work


class Records:
    """The part of a workspace that keeps contacts."""

    def __init__(self) -> None:
        self.kept = Contact()

    def contact(self, site: str) -> Contact:
        return self.kept

    def save_contact(self, site: str, contact: Contact) -> None:
        self.kept = contact


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    moment = SimpleNamespace(now=1_000_000.0)
    monkeypatch.setattr(time, "time", lambda: moment.now)
    return moment


def a_site(kind: str = "slurm") -> Site:
    return Site(schema=1, name="here", scheduler=Scheduler(kind=kind), shapes={"prod": Shape()}, poll=Poll())  # type: ignore[arg-type]


def asker(kind: str = "slurm") -> Callable[..., bool]:
    session = SimpleNamespace(workspace=Records(), site=a_site(kind))
    return lambda queries=1: etiquette.may_ask(session, queries)  # type: ignore[arg-type]


def test_not_twice_within_a_minute(clock: SimpleNamespace) -> None:
    ask = asker()
    assert ask()
    for seconds in (0, 1, 30, 28.9):
        clock.now += seconds
        assert not ask()
    clock.now += 0.2
    assert ask()
    assert not ask()


def test_two_queries_in_one_go_are_paid_for(clock: SimpleNamespace) -> None:
    ask = asker()
    assert ask(2)
    clock.now += 61
    assert not ask()
    clock.now += 60
    assert ask()


def test_a_clock_that_was_set_back_does_not_silence_us(clock: SimpleNamespace) -> None:
    ask = asker()
    assert ask()
    clock.now -= 86400
    assert ask()
    assert not ask()


def test_a_machine_without_a_scheduler_may_be_asked_at_any_time() -> None:
    ask = asker("local")
    assert ask() and ask()


def test_a_job_that_is_absent_for_long_does_not_hurry_us() -> None:
    """Its claim is younger than its window; until then looks come as usual."""
    job = Job(token="fa", absent_at=900.0)
    order = Order(site="here", work=Work.TRAIN, base=0, round=1, plan=1, steps=1, global_step=0, total_steps=1)
    run = Run(number=1, order=order, stage=Stage.QUEUED, job=job, created_at=800.0, changed_at=990.0)
    assert next_due(a_site(), [run], 1000.0, stays=True) == 1060.0
    soon = replace(run, job=replace(job, absent_at=950.0))
    assert next_due(a_site(), [soon], 1000.0, stays=True) == 1010.0
