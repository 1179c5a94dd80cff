"""Certificates that live for hours, of a real authority: their dates, the agent's, their renewal; the least interval
between two logins."""

import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flctl.errors import ConfigurationError, Interrupted, LoginNeeded, LoginTooSoon
from flctl.facility import allowance, renewal
from flctl.facility.certificates import FOREVER, dates_in_file, rank
from flctl.facility.connection import connect
from flctl.facility.keys import certificate_dates
from flctl.facility.openssh import login_place
from flctl.facility.profile import Password, Site, Transfer
from tests.ssh_sites import agent, connected, keygen, road_to, site_of
from tests.testbed.sshd import Sshd

USER = "flctl-cert"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder and a home of this test's own, and no agent."""
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return tmp_path / "state" / "flctl"


@pytest.fixture(scope="module")
def server() -> Iterator[Sshd]:
    with Sshd(name="cert-door", address="127.0.0.70", port=2700, user=USER, kind="certificate") as server:
        yield server


class Authority:
    """A user's authority, his key, and programs that get him a certificate."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key, self.ca = folder, keygen(folder / "key"), keygen(folder / "ca")
        self.certificate = folder / "key-cert.pub"

    def words(self, validity: str, *, users: str = USER, key: Path | None = None) -> list[str]:
        public = f"{key or self.key}.pub"
        return ["ssh-keygen", "-q", "-s", str(self.ca), "-I", "x", "-n", users, "-V", validity, public]

    def sign(self, validity: str, **fields: str) -> None:
        subprocess.run(self.words(validity, **fields), check=True)

    def program(self, body: str) -> str:
        """A renew command that runs a shell script; SIGN in it gets a certificate of an hour."""
        path = self.folder / "renew"
        path.write_text("#!/bin/sh\n" + body.replace("SIGN", " ".join(self.words("-1m:+1h"))) + "\n")
        path.chmod(0o700)
        return str(path)

    def site(self, renew: str = "", **login: object) -> Site:
        fields = {"kind": "certificate", "key": str(self.key), "user": USER, "renew": renew, "host": "site.example"}
        blank = Sshd(name="cert-none", address="127.0.0.71", port=2701, user=USER)
        return site_of(blank, **(fields | login))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


# Dates


@pytest.mark.parametrize(
    ("validity", "until"),
    [("-1m:+1h", 3600.0), ("-2h:-1h", None), ("+1h:+2h", None), ("always:forever", FOREVER), ("-1m:+3s", None)],
)
def test_the_end_of_a_certificate_is_that_of_the_file_if_it_is_valid(
    authority: Authority, validity: str, until: float | None
) -> None:
    """One with three seconds left is not: the login would not be through."""
    authority.sign(validity)
    found = renewal.certificate_until(authority.site())
    assert (found is None) == (until is None)
    if found is not None and until is not None:
        assert found == FOREVER if until == FOREVER else abs(found - time.time() - until) < 5


def test_what_is_wrong_with_a_certificate_is_said_with_what_to_type(authority: Authority) -> None:
    site = authority.site(renew="step ssh login me")
    cases = {"": "there is no certificate", "-2h:-1h": "the certificate ended at ", "+1h:+2h": "is valid only from "}
    for validity, words in cases.items():
        if validity:
            authority.sign(validity)
        with pytest.raises(LoginNeeded, match=words) as caught:
            renewal.check(site)
        assert caught.value.hint == f"flctl login {site.name}"
        assert not caught.value.attempted
    authority.certificate.write_text((authority.folder / "key.pub").read_text())
    with pytest.raises(ConfigurationError, match="no certificate"):
        renewal.check(site)


def test_a_login_without_certificates_needs_none() -> None:
    plain = Sshd(name="cert-none", address="127.0.0.71", port=2701, user=USER)
    site = site_of(plain)
    assert renewal.certificate_until(site) is None
    assert not renewal.is_time(site)
    renewal.check(site)


def test_it_is_time_for_a_new_one_when_little_is_left(authority: Authority) -> None:
    site, due = authority.site(), {}
    for validity in ("-1h:+6m", "-1h:+4m", "-2h:-1h", "-30s:+30s", "-50s:+10s"):
        authority.sign(validity)
        due[validity] = renewal.is_time(site)
    assert due == {
        "-1h:+6m": False,
        "-1h:+4m": True,
        "-2h:-1h": True,
        "-30s:+30s": False,  # a short-lived one is not renewed over and over
        "-50s:+10s": True,
    }


def test_the_agents_certificate_is_the_one_for_this_user_that_lasts_longest(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []
    for name, validity, users in (
        ("short", "-1m:+1h", USER),
        ("long", "-1m:+2h", USER),
        ("another's", "-1m:+9h", "somebody"),
        ("ended", "-2h:-1h", USER),
    ):
        key = keygen(authority.folder / name)
        authority.sign(validity, users=users, key=key)  # type: ignore[arg-type]
        keys.append(key)
    site = authority.site(key="agent")
    with pytest.raises(LoginNeeded, match="no ssh-agent that can be reached holds a certificate"):
        renewal.check(site)
    with agent(*keys, certificates=True) as address:
        monkeypatch.setenv("SSH_AUTH_SOCK", address)
        until = renewal.certificate_until(site)
        dates = certificate_dates(site)
    long = dates_in_file(authority.folder / "long-cert.pub", site)
    assert dates == long
    assert until is not None
    assert abs(until - time.time() - 7200) < 5


def test_of_certificates_that_have_all_ended_the_last_is_told(authority: Authority) -> None:
    ends = []
    for validity in ("-3h:-2h", "-3h:-1h"):
        authority.sign(validity)
        ends.append(dates_in_file(authority.certificate, authority.site()))
    assert max((dates for dates in ends if dates), key=lambda dates: rank(dates, USER)) == ends[1]


def test_an_agent_whose_certificate_has_ended_sends_nothing(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, since = keygen(tmp_path / "key"), server.mark()
    server.certify(tmp_path / "key.pub", validity="-2h:-1h")
    with agent(key, certificates=True) as address:
        monkeypatch.setenv("SSH_AUTH_SOCK", address)
        with pytest.raises(LoginNeeded, match="the certificate ended at"):
            connect(site_of(server, key="agent"), road_to(tmp_path, server))
        assert server.attempts(since).connections == 0
        server.certify(tmp_path / "key.pub")
        subprocess.run(["ssh-add", str(key)], check=True, capture_output=True)
        with connected(site_of(server, key="agent"), road_to(tmp_path, server)) as connection:
            assert connection.run("true").status == 0
    assert server.attempts(since).failed_keys == 0


def test_files_are_not_sent_with_a_certificate_that_has_ended_meanwhile(server: Sshd, tmp_path: Path) -> None:
    """rsync logs in by itself, later than we did."""
    key = keygen(tmp_path / "key")
    server.certify(tmp_path / "key.pub")
    (tmp_path / "file").write_text("x")
    with connected(site_of(server, key=str(key)), road_to(tmp_path, server)) as connection:
        server.certify(tmp_path / "key.pub", validity="-2h:-1h")
        since = server.mark()
        with pytest.raises(LoginNeeded, match="the certificate ended at") as caught:
            connection.push(tmp_path, ["file"], server.account.home / "in")
        assert not caught.value.attempted
        assert server.attempts(since).connections == 0


def test_neither_we_nor_ssh_offer_what_the_agent_holds_besides(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Path
) -> None:
    """Its plain keys, and certificates that have ended, would be refused logins to a site that counts them."""
    old, key = keygen(tmp_path / "old"), keygen(tmp_path / "key")
    server.certify(tmp_path / "old.pub", validity="-2h:-1h")
    server.certify(tmp_path / "key.pub")
    (tmp_path / "file").write_text("x")
    since = server.mark()
    with agent(old, key, certificates=True) as address:
        monkeypatch.setenv("SSH_AUTH_SOCK", address)
        with connected(site_of(server, key="agent"), road_to(tmp_path, server)) as connection:
            connection.push(tmp_path, ["file"], server.account.home / "in")
            assert connection.logins == 2
    assert server.attempts(since).logins == 2
    assert server.attempts(since).failed_keys == 0
    (kept,) = (state / "public").iterdir()
    assert kept.read_text().split()[1] == (tmp_path / "key-cert.pub").read_text().split()[1]
    assert kept.stat().st_mode & 0o022 == 0


# Renewal


def test_a_program_that_asks_nobody_gets_a_new_certificate(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the user's environment, but no input, no terminal, and no secret of the profile."""
    monkeypatch.setenv("MY_TOTP", "canary")
    monkeypatch.setenv("MY_PASSWORD", "canary")
    monkeypatch.setenv("MY_CA", "https://ca.example")
    facts = authority.folder / "facts"
    renew = authority.program(f"{{ env; wc -c; tty; (: </dev/tty) 2>&1 || echo no terminal; }} >{facts} 2>&1\nSIGN")
    site = authority.site(renew, totp={"secret": "env:MY_TOTP"}, password=Password(secret="env:MY_PASSWORD"))
    assert renewal.is_time(site)
    until = renewal.renew(site, interactive=False)
    assert abs(until - time.time() - 3600) < 5
    assert not renewal.is_time(site)
    told = facts.read_text()
    assert "MY_CA=https://ca.example" in told
    assert "canary" not in told
    assert "\n0\n" in told
    assert "no terminal" in told


def test_words_of_the_program_are_words_and_no_shell_reads_them(authority: Authority) -> None:
    renew = authority.program(f'printf "%s|" "$@" >{authority.folder}/words\nSIGN')
    home = Path.home()
    renewal.renew(authority.site(f"{renew} 'two words' $HOME ~/key ; true"), interactive=False)
    assert (authority.folder / "words").read_text() == f"two words|$HOME|{home}/key|;|true|"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("printf 'the \\033[31mserver\\033[0m says no' >&2; exit 3", "ended with exit status 3: the server says no"),
        ("true", "brought no valid certificate"),
        ("SIGN; exit 1", "ended with exit status 1"),
        (None, "cannot be run: No such file"),
    ],
)
def test_a_renewal_that_fails_says_why(authority: Authority, body: str | None, words: str) -> None:
    renew = authority.program(body) if body else "/no/such/program"
    site = authority.site(renew)
    with pytest.raises(LoginNeeded, match=words) as caught:
        renewal.renew(site, interactive=False)
    assert not caught.value.attempted
    assert caught.value.hint == f"flctl login {site.name}"
    assert caught.value.site == site.name


def test_what_a_renewal_gives_is_in_no_error(authority: Authority) -> None:
    site = authority.site(authority.program("echo canary; echo 'no such user' >&2; exit 1"))
    with pytest.raises(LoginNeeded, match=r"exit status 1: no such user$") as caught:
        renewal.renew(site, interactive=False)
    assert "canary" not in str(caught.value)


def test_a_program_that_a_renewal_leaves_behind_delays_nobody(authority: Authority) -> None:
    pids, began = authority.folder / "pids", time.monotonic()
    renewal.renew(authority.site(authority.program(f"SIGN\nsleep 600 & echo $! >{pids}")), interactive=False)
    assert time.monotonic() - began < 30
    os.kill(int(pids.read_text()), signal.SIGKILL)


def test_a_renewal_that_does_not_end_is_ended_with_all_it_started(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewal, "UNATTENDED_TIMEOUT", 1.0)
    pids = authority.folder / "pids"
    site = authority.site(authority.program(f"sleep 600 & echo $! >{pids}; wait"))
    with pytest.raises(LoginNeeded, match="did not end within 1 s"):
        renewal.renew(site, interactive=False)
    _gone(int(pids.read_text()))
    site = authority.site(authority.program(f"echo $$ >{pids}; exec sleep 600"))
    pids.unlink()
    with pytest.raises(Interrupted):
        renewal.renew(site, interactive=False, stop=lambda: pids.exists() and bool(pids.read_text()))
    _gone(int(pids.read_text()))


def _gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.02)
    raise AssertionError(f"{pid} still runs")


def test_a_profile_without_a_program_says_that_it_needs_one(authority: Authority) -> None:
    with pytest.raises(ConfigurationError, match="does not say which program") as caught:
        renewal.renew(authority.site(), interactive=True)
    assert "login.renew" in caught.value.hint


ASKING = """\
import sys, time
from flctl.facility import renewal
from flctl.facility.profile import load_site
from pathlib import Path
print(renewal.renew(load_site(Path(sys.argv[1])), interactive=True) - time.time() > 3000)
"""

PROFILE = """\
schema = 1
name = "pisa"
[login]
host = "site.example"
user = "{user}"
kind = "certificate"
key = "{key}"
renew = "{renew}"
[scheduler]
kind = "local"
shape = "small"
[shapes.small]
"""


@pytest.mark.parametrize(("typed", "status"), [("sesame\n", 0), ("mistyped\n", 1), ("\x03", -1)])
def test_a_program_that_asks_has_the_terminal_and_leaves_it_as_it_was(
    authority: Authority, typed: str, status: int
) -> None:
    """It turns the echo off as programs do that ask for a password; Ctrl-C in the middle leaves it on all the same.
    What it prints is not our output."""
    asks = 'stty -echo </dev/tty; printf "Password: "; read -r word </dev/tty; test "$word" = sesame || exit 1\nSIGN'
    (authority.folder / "pisa.toml").write_text(
        PROFILE.format(user=USER, key=authority.key, renew=authority.program(asks))
    )
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        ["setsid", "--ctty", "--wait", sys.executable, "-c", ASKING, str(authority.folder / "pisa.toml")],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    shown = b""
    while b"Password: " not in shown:
        shown += os.read(ours, 4096)
    os.write(ours, typed.encode())
    output, _ = child.communicate(timeout=30)
    assert termios.tcgetattr(theirs)[3] & termios.ECHO
    assert (output == "True\n") == (status == 0)
    assert (child.returncode == 0) == (status == 0)
    for end in (ours, theirs):
        os.close(end)
    assert authority.certificate.exists() == (status == 0)


# The interval between two logins


def with_interval(site: Site, seconds: int) -> Site:
    return replace(site, login=replace(site.login, interval=seconds))


def test_two_logins_of_a_user_at_a_host_keep_their_distance(authority: Authority, state: Path) -> None:
    site, now = with_interval(authority.site(), 60), 1e9
    here = login_place(site)
    allowance.take(site, here, now=now)
    with pytest.raises(LoginTooSoon, match=r"20 s ago, and 60 s must lie between") as caught:
        allowance.take(site, here, now=now + 20)
    assert caught.value.until == now + 60
    assert not caught.value.attempted
    other = replace(site, login=replace(site.login, user="another"))
    allowance.take(other, login_place(other), now=now + 20)
    allowance.take(site, replace(here, port=2222), now=now + 20)
    allowance.take(site, here, now=now + 60)
    with pytest.raises(LoginTooSoon):
        allowance.take(site, here, now=now + 119)
    assert (state / "logins.json").stat().st_mode & 0o077 == 0


def test_a_clock_that_was_set_back_costs_one_interval(authority: Authority) -> None:
    site = with_interval(authority.site(), 60)
    allowance.take(site, login_place(site), now=1e9)
    for seconds in (0, 59):
        with pytest.raises(LoginTooSoon) as caught:
            allowance.take(site, login_place(site), now=1e9 - 5000 + seconds)
        assert caught.value.until == 1e9 - 5000 + 60
    allowance.take(site, login_place(site), now=1e9 - 5000 + 60)


def test_the_interval_counts_for_the_jump_host_too(authority: Authority) -> None:
    site = with_interval(authority.site(proxy_jump="gate.example"), 60)
    other = with_interval(authority.site(proxy_jump="gate.example", host="other.example"), 60)
    allowance.take(site, login_place(site))
    with pytest.raises(LoginTooSoon):
        allowance.take(other, login_place(other))


def test_a_ledger_of_logins_that_cannot_be_read_is_said(authority: Authority, state: Path) -> None:
    site = with_interval(authority.site(), 60)
    allowance.take(site, login_place(site))
    (state / "logins.json").write_text("[1]")
    with pytest.raises(ConfigurationError, match="cannot be understood") as caught:
        allowance.take(site, login_place(site))
    assert caught.value.hint == f"rm {state / 'logins.json'}"


def _take(site: Site, gate: "multiprocessing.synchronize.Barrier", won: "multiprocessing.Queue[bool]") -> None:
    gate.wait()
    try:
        allowance.take(site, login_place(site))
        won.put(True)
    except LoginTooSoon:
        won.put(False)


def test_of_many_processes_one_logs_in(authority: Authority) -> None:
    context = multiprocessing.get_context("fork")
    gate, won = context.Barrier(8), context.Queue()
    site = with_interval(authority.site(), 60)
    children = [context.Process(target=_take, args=(site, gate, won)) for _ in range(8)]
    for child in children:
        child.start()
    results = [won.get(timeout=20) for _ in children]
    for child in children:
        child.join(timeout=20)
    assert sum(results) == 1


def test_a_login_that_comes_too_soon_is_not_made_and_files_need_no_second_one(server: Sshd, tmp_path: Path) -> None:
    site, since = site_of(server, interval=30), server.mark()
    (tmp_path / "file").write_text("x")
    with connected(site, road_to(tmp_path, server)) as connection:
        connection.push(tmp_path, ["file"], server.account.home / "in")
        with pytest.raises(LoginTooSoon):
            connect(site, road_to(tmp_path, server))
        assert connection.logins == 1
    assert server.attempts(since).connections == 1


def test_a_second_login_within_a_contact_waits_for_its_turn(server: Sshd, tmp_path: Path) -> None:
    """A transfer host of its own, which allows one rsync per connection."""
    with Sshd(name="cert-mover", address="127.0.0.72", port=2702, user=USER) as mover:
        mover.authorize(server.client_key.with_suffix(".pub").read_text())
        transfer = Transfer(host=mover.address, port=mover.port)
        site = site_of(server, interval=3, multiplex=False, transfer=transfer)
        (tmp_path / "file").write_text("x")
        told: list[tuple[str, str]] = []
        road = road_to(tmp_path, server, mover, on_login=lambda place, why: told.append((place.host, why)))
        over = threading.Event()
        with connected(site, replace(road, stop=over.is_set)) as connection:
            connection.push(tmp_path, ["file"], server.account.home / "in")
            began = time.monotonic()
            connection.push(tmp_path, ["file"], server.account.home / "in")
            assert time.monotonic() - began > 2
            threading.Timer(0.5, over.set).start()
            with pytest.raises(Interrupted):
                connection.push(tmp_path, ["file"], server.account.home / "in")
        assert told == [(server.address, "commands"), (mover.address, "files"), (mover.address, "files")]
        assert mover.attempts().logins == 2


def test_the_ledger_forgets_what_no_interval_can_ask_for(authority: Authority, state: Path) -> None:
    site = with_interval(authority.site(), 60)
    for hour in range(4):
        place = replace(login_place(site), host=f"h{hour}.example")
        allowance.take(site, place, now=1e9 + hour * (allowance.KEPT + 1))
    assert (state / "logins.json").read_text().count("example") == 1
