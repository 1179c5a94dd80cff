"""What all flctl processes of a user know of each other's logins: how many a day, spread, paused, released; and which
codes are used, whatever the clock does."""

import itertools
import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flctl.errors import (
    CodeSpent,
    ConfigurationError,
    FlctlError,
    HostKeyRefused,
    LoginNeeded,
    LoginPaused,
    LoginTooSoon,
    SiteUnreachable,
)
from flctl.facility import allowance, ledger
from flctl.facility.allowance import DAY, HOUR, WINDOW
from flctl.facility.codes import Answers
from flctl.facility.openssh import login_place
from flctl.facility.profile import Login, Scheduler, Shape, Site, Totp
from flctl.facility.table import load_table
from tests.ssh_sites import another_secret, early_in_a_step
from tests.ssh_sites import secret_file as code_file

NOW = 1e9


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "flctl"


class Clock:
    """The time that flctl reads, for those who set it."""

    def __init__(self) -> None:
        self.now = NOW


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("flctl.facility.allowance.time.time", lambda: clock.now)
    return clock


def a_site(name: str = "pisa", **login: object) -> Site:
    fields = {"host": f"{name}.example", "user": "me", "kind": "key+totp", **login}
    return Site(
        schema=1,
        name=name,
        login=Login(**fields),  # type: ignore[arg-type]
        scheduler=Scheduler(kind="slurm"),
        shapes={"prod": Shape()},
    )


def take(site: Site, now: float) -> None:
    allowance.take(site, login_place(site), now=now)


def tried(site: Site, *, error: FlctlError | None = None, met: bool = True) -> None:
    """One login that ends so."""
    allowance.take(site, login_place(site))
    with allowance.outcome(site, login_place(site)) as attempt:
        attempt.met = met
        if error is not None:
            raise error


def refused(site: Site) -> None:
    with pytest.raises(LoginNeeded, match="refused the code"):
        tried(site, error=LoginNeeded("refused the code"))


def not_asked(site: Site) -> LoginPaused:
    with pytest.raises(LoginPaused) as caught:
        tried(site, error=allowance.unasked(site, login_place(site)))
    return caught.value


# How many a day


def test_no_more_logins_than_the_days_are_tried_within_24_hours() -> None:
    site = a_site(per_day=3)
    for hour in (0, 5, 10):
        take(site, NOW + hour * HOUR)
    with pytest.raises(
        LoginPaused, match=r"the day's 3 logins as me@pisa\.example are used up \(login\.per_day\)"
    ) as no:
        take(site, NOW + 11 * HOUR)
    assert no.value.until == NOW + WINDOW, "until the oldest is a day old"
    assert (no.value.attempted, no.value.exit_code, no.value.code) == (False, 4, "login_paused")
    take(site, NOW + WINDOW + 1)
    with pytest.raises(LoginPaused) as no:
        take(site, NOW + WINDOW + 2)
    assert no.value.until == NOW + 5 * HOUR + WINDOW


def test_every_campaign_and_site_of_the_same_user_and_host_shares_them() -> None:
    one, other = a_site(per_day=2), replace(a_site(per_day=2), name="pisa-again")
    take(one, NOW)
    take(other, NOW)
    for site in (one, other):
        with pytest.raises(LoginPaused):
            take(site, NOW + 1)
    take(a_site("brno", per_day=2), NOW + 1)
    take(a_site(user="another", per_day=2), NOW + 1)


def test_a_jump_hosts_logins_are_counted_as_its_own() -> None:
    one, other = (a_site(name, proxy_jump="gate.example", per_day=2) for name in ("pisa", "brno"))
    take(one, NOW)
    take(other, NOW)
    with pytest.raises(LoginPaused, match=r"as me@gate\.example"):
        take(one, NOW + 1)
    assert allowance.used(one, NOW + 1) == 2


def test_a_login_is_on_disk_before_it_is_tried(state: Path) -> None:
    site = a_site(per_day=1)
    child = multiprocessing.get_context("fork").Process(target=_killed_at_the_door, args=(site,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with pytest.raises(LoginPaused):
        take(site, NOW + 1)
    assert (state / "logins.json").stat().st_mode & 0o077 == 0


def _killed_at_the_door(site: Site) -> None:
    take(site, NOW)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_person_is_held_to_the_interval_only() -> None:
    site = a_site(per_day=1, interval=60)
    for minute in range(3):
        allowance.take(site, login_place(site), person=True, now=NOW + 60 * minute)
    with pytest.raises(LoginTooSoon):
        allowance.take(site, login_place(site), person=True, now=NOW + 130)
    with pytest.raises(LoginPaused):
        take(site, NOW + 200)
    assert allowance.used(site, NOW + 200) == 3, "a person's logins count"


def test_a_login_that_met_nobody_costs_nothing(clock: Clock) -> None:
    site = a_site(per_day=2)
    for error in (SiteUnreachable("no route"), HostKeyRefused("changed")):
        for _ in range(5):
            with pytest.raises(type(error)):
                tried(site, error=error, met=False)
    assert allowance.used(site) == 0
    with pytest.raises(SiteUnreachable):
        tried(site, error=SiteUnreachable("cut in the middle"), met=True)
    assert allowance.used(site) == 1


def test_half_of_the_days_logins_come_as_they_are_needed_and_the_rest_is_spread() -> None:
    assert allowance.spread([], 12, NOW) == NOW
    assert allowance.spread([NOW] * 5, 12, NOW) == NOW
    assert allowance.spread([NOW] * 6, 12, NOW) == pytest.approx(NOW + WINDOW / 7)
    assert allowance.spread([NOW] * 12, 12, NOW) == NOW + WINDOW
    assert allowance.spread([NOW - WINDOW - 1] * 12, 12, NOW) == NOW
    assert allowance.spread([NOW] * 99, 0, NOW) == NOW, "0: a person's"


@pytest.mark.parametrize("per_day", [1, 2, 5, 12, 30])
@pytest.mark.parametrize("wish", [60.0, 600.0, HOUR, 3 * HOUR])
def test_whoever_always_wants_in_never_waits_long_nor_gets_more_than_the_days(per_day: int, wish: float) -> None:
    """Three weeks of connections that are lost every `wish` seconds."""
    tries: list[float] = []
    now = NOW
    while now < NOW + 21 * DAY:
        if allowance.spread(tries, per_day, now) <= now and sum(now - WINDOW < at for at in tries) < per_day:
            tries.append(now)
        now += wish
    for index, at in enumerate(tries):
        assert sum(at <= other < at + DAY for other in tries[index:]) <= per_day
    longest = max((later - earlier for earlier, later in itertools.pairwise(tries)), default=0.0)
    assert longest <= 2 * DAY / per_day + 2 * wish
    assert len(tries) >= min(21 * DAY / wish, 21 * per_day * 0.6)


# What comes after a login that ended badly


def test_after_a_refused_login_none_is_tried_by_anybody_until_the_site_is_released(clock: Clock) -> None:
    site = a_site()
    refused(site)
    clock.now += 2 * DAY
    for other in (site, replace(site, name="pisa-again")):
        with pytest.raises(LoginNeeded, match="none is tried until a person has looked at it") as caught:
            take(other, clock.now)
        assert not caught.value.attempted
        assert caught.value.hint.endswith(f"flctl release {other.name}")
    assert allowance.release(site)
    assert not allowance.release(site)
    tried(site)


def test_a_second_refusal_in_a_row_costs_an_hour_and_each_further_one_twice_as_long(clock: Clock) -> None:
    site = a_site()
    for pause in (0.0, HOUR, 2 * HOUR, 4 * HOUR):
        refused(site)
        assert allowance.release(site)
        if pause:
            with pytest.raises(LoginPaused, match="logins in a row were refused; none is tried before") as caught:
                tried(site)
            assert caught.value.until == pytest.approx(clock.now + pause)
        clock.now += pause
    tried(site)
    refused(site)
    allowance.release(site)
    tried(site)


def test_a_rate_limit_is_waited_for_longer_each_time_and_needs_no_person(clock: Clock) -> None:
    site = a_site(cooldown=900)
    for pause in (900, 1800, 3600, 7200, 14400, 14400):
        error = not_asked(site)
        assert (error.until, error.attempted) == (clock.now + pause, False)
        assert "refused the login without asking for a code; it does that after too many logins" in error.message
        assert "none is tried before" in error.message
        with pytest.raises(LoginPaused):
            take(site, clock.now + pause - 1)
        clock.now += pause
    tried(site)
    assert not_asked(site).until == clock.now + 900


def test_a_host_out_of_reach_after_a_refused_login_is_left_alone_for_an_hour(clock: Clock) -> None:
    site = a_site()
    refused(site)
    allowance.release(site)
    clock.now += 100
    with pytest.raises(SiteUnreachable, match="this looks like a ban"):
        tried(site, error=SiteUnreachable("connection refused"), met=False)
    with pytest.raises(LoginPaused, match="looks like a ban; none is tried before") as caught:
        tried(site)
    assert caught.value.until == clock.now + HOUR
    clock.now += HOUR
    tried(site)
    with pytest.raises(SiteUnreachable) as plain:
        tried(site, error=SiteUnreachable("connection refused"), met=False)
    assert "ban" not in plain.value.message
    tried(site)


def test_a_jump_host_that_refuses_us_is_the_one_that_is_left_alone(clock: Clock) -> None:
    site, beside = a_site(proxy_jump="gate.example"), a_site("brno", proxy_jump="gate.example")
    with pytest.raises(LoginNeeded):
        tried(site, error=LoginNeeded("the jump host does not let us in"), met=False)
    with pytest.raises(LoginNeeded, match=r"me@gate\.example was refused"):
        take(beside, clock.now)
    tried(a_site())


def test_an_old_ledger_of_the_last_logins_is_read(state: Path) -> None:
    site = a_site(interval=60, per_day=1)
    state.mkdir(mode=0o700, parents=True)
    (state / "logins.json").write_text(json.dumps({"me@pisa.example": NOW}))
    with pytest.raises(LoginTooSoon):
        take(site, NOW + 10)
    with pytest.raises(LoginPaused):
        take(site, NOW + 100)


@pytest.mark.parametrize(
    "text", ['{"h": {"tries": 3}}', '{"h": {"moon": 3}}', '{"h": {"refused": "x"}}', "[", '{"h": []}']
)
def test_a_ledger_that_cannot_be_understood_is_said(state: Path, text: str) -> None:
    take(a_site(), NOW)
    (state / "logins.json").write_text(text)
    with pytest.raises(ConfigurationError, match="cannot be understood"):
        take(a_site(), NOW)


# Clocks


def test_a_clock_that_is_set_back_by_a_day_delays_nothing_for_longer_than_the_pause_was(clock: Clock) -> None:
    site = a_site(cooldown=900, per_day=3)
    not_asked(site)
    clock.now -= DAY
    with pytest.raises(LoginPaused) as caught:
        tried(site)
    assert caught.value.until <= clock.now + 900
    clock.now += 901
    tried(site)


def test_a_clock_that_jumps_by_a_day_and_back_forgets_no_login() -> None:
    site = a_site(per_day=3)
    for second in range(3):
        take(site, NOW + second)
    take(site, NOW + WINDOW + 10)
    with pytest.raises(LoginPaused):
        take(site, NOW + 20)


def test_the_code_of_a_clock_that_ran_ahead_is_not_followed_by_one_of_before() -> None:
    """pam_oath moves its window forward with such a code, and refuses every correct one until the clock has caught up;
    a clock that ran ahead by hours is not waited for: no server takes a code that far ahead."""
    key = b"k" * 20
    ledger.spend(key, 30, now=NOW + 90)
    with pytest.raises(CodeSpent) as caught:
        ledger.check(key, 30, now=NOW)
    assert caught.value.until >= NOW + 90
    ledger.spend(key, 30, now=NOW + 121)
    with pytest.raises(CodeSpent) as caught:
        ledger.check(key, 30, now=NOW - DAY)
    assert caught.value.until <= NOW - DAY + 1
    ledger.spend(key, 30, now=NOW - DAY + 35)


def test_no_code_is_made_with_a_clock_that_is_known_to_be_wrong(tmp_path: Path) -> None:
    totp = Totp(automation="permitted", permission="here", secret=code_file(tmp_path, another_secret()))
    site = a_site(totp=totp)
    allowance.note_skew(site, 25.0)
    early_in_a_step()
    Answers(site)
    allowance.note_skew(site, -95.0)
    with pytest.raises(LoginNeeded, match=r"clock was 95 s behind the site's.*no code is made") as caught:
        Answers(site)
    assert not caught.value.attempted
    assert "flctl release pisa" in caught.value.hint
    assert allowance.release(site)
    Answers(site)


def test_a_small_difference_of_clocks_is_not_remembered(state: Path) -> None:
    allowance.note_skew(a_site(), 3.0)
    assert json.loads((state / "logins.json").read_text()) == {}


def test_a_code_is_never_sent_near_the_end_of_its_step() -> None:
    """200 moments around the ends of steps: what is sent has 3 s or more left, at the step that it belongs to."""
    dice = random.Random(1)
    sent = 0
    for number in range(200):
        moment = NOW // 30 * 30 + number * 90 + dice.uniform(20, 40)
        try:
            step = ledger.spend(b"k" * 20, 30, now=moment)
        except CodeSpent as early:
            assert moment < early.until <= moment + 3
            continue
        sent += 1
        assert step * 30 <= moment <= (step + 1) * 30 - 3
    assert 100 < sent < 200


def test_two_sites_that_share_one_secret_share_its_steps(tmp_path: Path) -> None:
    reference = code_file(tmp_path, another_secret())
    totp = Totp(automation="permitted", permission="here", secret=reference, period=3600)
    one, other = a_site("pisa", totp=totp), a_site("brno", totp=totp)
    answers = Answers(one)
    Answers(other)
    assert len(answers.answer("Verification code:")) == 6
    with pytest.raises(CodeSpent) as caught:
        Answers(other)
    assert caught.value.site == "brno"


# Whatever happens


class Host:
    """A simulated account: how it answers logins, and what it saw."""

    def __init__(self) -> None:
        self.logins: list[float] = []
        self.failed: list[float] = []
        self.releases = 0


ENDS: dict[str, Callable[[Site], FlctlError | None]] = {
    "in": lambda site: None,
    "refused": lambda site: LoginNeeded("refused the code"),
    "not asked": lambda site: allowance.unasked(site, login_place(site)),
    "away": lambda site: SiteUnreachable("no route"),
    "cut": lambda site: SiteUnreachable("reset"),
}


@given(ends=st.lists(st.sampled_from(sorted(ENDS)), min_size=1, max_size=30), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=10)
def test_however_logins_end_the_account_is_never_hammered(
    tmp_path_factory: pytest.TempPathFactory, ends: list[str], seed: int
) -> None:
    """Two simulated days of a defect that wants in every few minutes, and of a person who releases the site at random:
    never more than the day's logins, never two refusals without a person between them, never a third within the hour
    after the second."""
    site, dice, host = a_site(per_day=6), random.Random(seed), Host()
    results = itertools.cycle(ends)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        moment = NOW
        patch.setattr("flctl.facility.allowance.time.time", lambda: moment)
        patch.setattr("flctl.facility.ledger.os.fsync", lambda descriptor: None)
        released = True
        while moment < NOW + 2 * DAY:
            moment += dice.choice([60.0, 600.0, 1800.0])
            if not released and dice.random() < 0.05:
                released = allowance.release(site)
            try:
                allowance.take(site, login_place(site))
            except LoginNeeded:
                continue
            assert released, "no login after a refusal that nobody has looked at"
            end = next(results)
            if end != "away":
                host.logins.append(moment)
            try:
                with allowance.outcome(site, login_place(site)) as attempt:
                    attempt.met = end != "away"
                    if (error := ENDS[end](site)) is not None:
                        raise error
                host.failed.clear()
            except FlctlError:
                if end == "refused":
                    host.failed.append(moment)
                    released = False
                    gaps = [later - earlier for earlier, later in itertools.pairwise(host.failed)]
                    assert all(gap >= HOUR for gap in gaps[1:])
            assert sum(moment - DAY < at for at in host.logins) <= 6


# Profiles


SECRETS = (
    "JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP",
    "jbsw y3dp ehpk 3pxp jbsw y3dp ehpk 3pxp",
    "otpauth://totp/me?secret=JBSWY3DPEHPK3PXP",
    "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n-----END OPENSSH PRIVATE KEY-----",
    "env:lower case",
    "hunter2",
)


@pytest.mark.parametrize("key", ["login.totp.secret", "login.password.secret"])
@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_in_a_profile_is_refused_and_not_repeated(tmp_path: Path, key: str, secret: str) -> None:
    table, name = key.rsplit(".", 1)
    kind = "password+totp" if "password" in key else "key+totp"
    text = f'schema = 1\nname = "pisa"\n[login]\nhost = "h"\nuser = "u"\nkind = "{kind}"\n'
    text += f"[{table}]\n{name} = {json.dumps(secret)}\n"
    text += '[scheduler]\nkind = "slurm"\nshape = "s"\n[shapes.s]\nwalltime = "01:00:00"\n'
    (tmp_path / "pisa.toml").write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_table(tmp_path / "pisa.toml", Site)
    assert key in caught.value.message
    assert secret not in f"{caught.value.message} {caught.value.hint}"
    assert all(line not in caught.value.message for line in secret.splitlines())


def test_a_secrets_file_in_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    from flctl.facility.references import read_reference

    folder = tmp_path / "shared"
    folder.mkdir(mode=0o700)
    reference = code_file(folder, another_secret())
    read_reference(reference)
    folder.chmod(0o777)
    with pytest.raises(ConfigurationError, match="may replace the secret's file"):
        read_reference(reference)
    folder.chmod(0o770)
    os.chown(folder, os.geteuid(), 54321)
    with pytest.raises(ConfigurationError, match="may replace the secret's file"):
        read_reference(reference)
    folder.chmod(0o1777)
    read_reference(reference)
