"""When a site is contacted next: by what a login costs, by its jobs, by what was ordered, and by its troubles."""

import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flctl.campaign import contacts, deciding
from flctl.campaign.engine import Engine
from flctl.campaign.rounds import UNREACHABLE_PATIENCE, _stuck
from flctl.campaign.workspace import Workspace
from flctl.errors import LoginNeeded, LoginPaused, LoginTooSoon, SiteUnreachable, TransferFailed
from flctl.facility.profile import Login, Poll, Scheduler, Shape, Site
from flctl.records import Contact, Held, Job, Order, Run, Stage, Work
from tests.campaigns import Campaign

NOW = 10_000.0


def a_site(kind: str, per_day: int = 1440) -> Site:
    return Site(
        schema=1,
        name="pisa",
        login=Login(host="h", user="u", kind=kind, per_day=per_day),  # type: ignore[arg-type]
        scheduler=Scheduler(kind="slurm", shape="s"),
        shapes={"s": Shape(walltime=86_400)},
        poll=Poll(every=60, login_every=3600, absence=30),
    )


def a_run(stage: Stage = Stage.RUNNING, **job: float) -> Run:
    order = Order(site="pisa", work=Work.TRAIN, base=0, round=1, steps=1)
    return Run(number=1, order=order, stage=stage, job=Job(token="f", **job), created_at=NOW, changed_at=NOW)


def due(kind: str, run: Run, *, stays: bool = False) -> float:
    return contacts.next_due(a_site(kind), [run], NOW, stays=stays) - NOW


def test_where_a_login_costs_a_code_ticks_come_hours_apart_and_a_round_does_not() -> None:
    assert due("key", a_run()) == 60
    assert due("key+totp", a_run()) == 3600
    assert due("key+totp", a_run(), stays=True) == 60


def test_looks_of_ticks_are_as_far_apart_as_the_days_logins_allow() -> None:
    for kind, per_day, seconds in (("key", 12, 7200), ("key+totp", 12, 7200), ("key+totp", 96, 3600)):
        site = a_site(kind, per_day)
        assert contacts.next_due(site, [a_run()], NOW, stays=False) - NOW == seconds
        assert contacts.next_due(site, [a_run()], NOW, stays=True) - NOW == 60, "who stays logs in once"
        ending = a_run(expected_end=NOW + 100)
        assert contacts.next_due(site, [ending], NOW, stays=False) - NOW == 100 + contacts.SETTLING
    home = replace(a_site("key", 12), connection="local")
    assert contacts.next_due(home, [a_run()], NOW, stays=False) - NOW == 60


@pytest.mark.parametrize("stage", [Stage.QUEUED, Stage.RUNNING])
def test_a_job_whose_end_no_scheduler_foretells_is_looked_at_when_its_walltime_may_be_over(stage: Stage) -> None:
    site = a_site("key", 12)
    for job, seconds in (
        (Job(token="f", walltime=600), 600),
        (Job(token="f", walltime=600, started_at=NOW - 100), 500),
        (Job(token="f", walltime=600, expected_start=NOW - 200), 400),
        (Job(token="f", walltime=600, expected_end=NOW + 50), 50),
        (Job(token="f", walltime=600, started_at=NOW - 1000), 7200),
    ):
        due = contacts.next_due(site, [replace(a_run(stage), job=job)], NOW, stays=False) - NOW
        assert due == seconds + (contacts.SETTLING if seconds < 7200 else 0), job


@pytest.mark.parametrize("name", ["expected_start", "expected_end"])
def test_expected_starts_and_ends_are_looked_at(name: str) -> None:
    assert due("key+totp", a_run(**{name: NOW + 900})) == 900 + contacts.SETTLING
    assert due("key+totp", a_run(**{name: NOW - 900})) == 3600, "what is past is no reason"


def test_the_second_look_at_a_job_that_is_gone_comes_in_time() -> None:
    assert due("key", a_run(absent_at=NOW)) == 30


def test_so_does_the_one_at_a_job_that_can_never_run() -> None:
    assert due("key", a_run(Stage.QUEUED, never_at=NOW)) == 30


@pytest.mark.parametrize(
    ("quiet", "seconds"), [(0, 60), (600, 60), (601, 60.1), (3000, 300), (6000, 600), (1e6, 600), (-50, 60)]
)
def test_looks_grow_apart_while_nothing_changes_up_to_a_limit(quiet: float, seconds: float) -> None:
    """-50: somebody set the clock back."""
    assert contacts.pace(a_site("key"), quiet) == pytest.approx(seconds)
    waiting = replace(a_run(Stage.QUEUED), changed_at=NOW - quiet)
    assert due("key", waiting) == pytest.approx(seconds)


def test_the_youngest_change_at_a_site_counts() -> None:
    old, young = (replace(a_run(), changed_at=NOW - quiet) for quiet in (5000, 100))
    assert contacts.next_due(a_site("key"), [old, young], NOW, stays=False) - NOW == 60
    assert contacts.next_due(a_site("key"), [old], NOW, stays=False) - NOW == 500


def test_an_expected_end_is_looked_at_however_long_nothing_changed() -> None:
    run = replace(a_run(expected_end=NOW + 100), changed_at=NOW - 50_000)
    assert due("key", run) == 100 + contacts.SETTLING


def test_a_limit_below_the_first_interval_is_that_interval() -> None:
    site = replace(a_site("key"), poll=Poll(every=60, most=10))
    assert [contacts.pace(site, quiet) for quiet in (0, 1e6)] == [60, 60]


def test_an_order_given_after_the_time_was_set_makes_the_site_due() -> None:
    later = Contact(due=NOW + 600, known_at=NOW - 1)
    assert contacts.is_due(later, [a_run(Stage.ORDERED)], NOW)
    assert not contacts.is_due(replace(later, known_at=NOW + 1), [a_run(Stage.ORDERED)], NOW)
    assert not contacts.is_due(later, [a_run()], NOW)
    assert not contacts.is_due(Contact(held=Held(reason="r", since=0)), [a_run(Stage.ORDERED)], NOW)
    assert not contacts.is_due(Contact(), [], NOW)


def test_pauses_grow_with_each_failure_up_to_a_limit() -> None:
    contact, pauses = Contact(), []
    for _ in range(200):
        contact = contacts.failed(contact, SiteUnreachable("no route"), NOW)
        pauses.append(contact.due - NOW)
    assert 8 <= pauses[0] <= 12
    assert min(pauses) >= 8
    assert max(pauses) == contacts.BACKOFF_MOST, "it grows up to the limit"
    assert len(set(pauses)) > 20, "no two sites come back together"
    assert contacts.reached(contact, a_site("key"), NOW, NOW + 60).failures == 0


def test_only_a_login_that_was_tried_holds_the_site() -> None:
    refused, untried = LoginNeeded("refused"), LoginNeeded("no agent")
    untried.attempted = False
    assert contacts.failed(Contact(), refused, NOW).held is not None
    assert contacts.failed(Contact(), untried, NOW).held is None


def test_round_waits_for_a_site_it_had_reached_and_not_for_one_it_never_did() -> None:
    now = time.time()
    lost = contacts.failed(Contact(reached_at=now - 100), SiteUnreachable("reset"), now)
    assert not _stuck(a_run(), lost)
    assert _stuck(a_run(), replace(lost, unreachable_since=now - UNREACHABLE_PATIENCE - 1))
    assert _stuck(a_run(), contacts.failed(Contact(), SiteUnreachable("refused"), now))


def test_round_gives_a_transfer_three_tries() -> None:
    contact = Contact(reached_at=NOW)
    stuck = []
    for _ in range(3):
        contact = contacts.failed(contact, TransferFailed("hash"), NOW)
        stuck.append(_stuck(a_run(), contact))
    assert stuck == [False, False, True]


def test_a_login_that_may_not_be_tried_yet_is_no_trouble_unless_it_is_long() -> None:
    contact = contacts.postponed(Contact(), LoginTooSoon("20 s ago", until=NOW + 40), NOW)
    assert (contact.due, contact.trouble, contact.held) == (NOW + 40.5, None, None)
    contact = contacts.postponed(Contact(), LoginPaused("used up", until=NOW + 4000), NOW)
    assert contact.trouble is not None
    assert (contact.trouble.code, contact.due) == ("login_paused", NOW + 4000.5)
    assert contacts.hold_of(contact) is None, "it needs no person"
    assert not _stuck(a_run(), replace(contact, failures=9)), "round waits"
    assert contacts.postponed(Contact(), LoginPaused("x", until=NOW - 9), NOW).due > NOW


# Clocks that jump


@pytest.mark.parametrize("jump", [86400.0, -86400.0, 9 * 3600.0])
def test_after_a_clock_that_jumps_or_a_sleep_there_is_one_contact_and_no_burst(jump: float) -> None:
    """A day forth, a day back, and nine hours of sleep."""
    site, runs = a_site("key+totp", 12), [a_run()]
    contact = contacts.reached(Contact(), site, NOW, contacts.next_due(site, runs, NOW, stays=False))
    assert not contacts.is_due(contact, runs, NOW + 60)
    then, looks = NOW + jump + 60, 0
    for second in range(0, 7000, 10):
        now = then + second
        if contacts.is_due(contact, runs, now):
            looks += 1
            contact = contacts.reached(contact, site, now, contacts.next_due(site, runs, now, stays=False))
    assert looks == 1


# A defect of ours does not storm


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.05, 1.0, 7.0, 60.0]),
            st.sampled_from(["reached", "failed", "unreachable", "postponed", "forced"]),
        ),
        min_size=1,
        max_size=60,
    ),
    jumps=st.lists(st.tuples(st.integers(0, 3599), st.sampled_from([86400.0, -86400.0, -10.0])), max_size=2),
)
@settings(deadline=None, max_examples=60)
def test_whatever_a_defect_of_ours_does_a_site_is_contacted_at_a_bounded_pace(
    steps: list[tuple[float, str]], jumps: list[tuple[int, float]]
) -> None:
    """The worst that could be: there is always a new order, and the next contact is always due at once. A simulated
    hour, in which the clock may jump."""
    site, contact, made, shift = a_site("key"), Contact(), 0, 0.0
    left, moves = sorted(jumps), itertools.cycle(steps)
    real, tries = 0.0, 0
    while real < 3600 and tries < 20_000:
        tries += 1
        pause, what = next(moves)
        real += max(pause, 0.2)
        while left and left[0][0] <= real:
            shift += left.pop(0)[1]
        now = NOW + 200_000 + real + shift
        run = replace(a_run(Stage.ORDERED), changed_at=now + 1)
        if what == "forced":
            contact = replace(contact, due=0.0, failures=0)  # as flctl round and release do
        if not contacts.is_due(contact, [run], now):
            continue
        made += 1
        if what in ("reached", "forced"):
            contact = contacts.reached(contact, site, now, now)
        elif what == "postponed":
            contact = replace(contacts.postponed(contact, LoginPaused("x", until=now), now), due=now)
        else:
            error = SiteUnreachable("x") if what == "unreachable" else TransferFailed("x")
            contact = replace(contacts.failed(contact, error, now), due=now)
    assert made <= 181 + 62 * len(jumps)


def test_all_jobs_of_a_site_are_asked_for_in_one_query(tmp_path: Path) -> None:
    """The site's Python is a program that writes down what it was asked to do."""
    campaign = Campaign(tmp_path, sites=("brno",))
    log, python = tmp_path / "asked", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >>{log}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    campaign.profile("brno", behave="hang")
    path = campaign.place / "sites" / "brno.toml"
    path.write_text(path.read_text().replace(f'seal_python = "{sys.executable}"', f'seal_python = "{python}"'))
    (tmp_path / "runtime").mkdir()
    engine = Engine(workspace=Workspace(campaign.place), runtime=tmp_path / "runtime")
    try:
        for version in (1, 2, 3):
            deciding.give(engine, Order(site="brno", work=Work.TRAIN, base=0, round=version, steps=1))
        assert engine.advance("brno") and engine.errors == []
        assert [campaign.run("brno", number)["stage"] for number in (1, 2, 3)] == ["queued"] * 3
        log.write_text("")
        contact = engine.workspace.contact("brno")
        engine.workspace.save_contact("brno", replace(contact, due=0.0))
        assert engine.advance("brno")
        asked = log.read_text()
        assert asked.count("batch.py list") == 1, asked
        assert all(campaign.run("brno", number)["job"]["state"] == "RUNNING" for number in (1, 2, 3))
    finally:
        engine.close()
        assert campaign.flctl("cancel").returncode == 0
