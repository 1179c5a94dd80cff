"""Whole campaigns over a real sshd that takes certificates of hours, shortened to seconds: renewed by a program, by a
person, or by nobody; and what each kind of site costs in logins."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flctl.campaign import contacts
from flctl.campaign.access import RSYNCS, expected_logins
from flctl.campaign.report import state_of
from flctl.errors import LoginNeeded
from flctl.facility.certificates import dates_in_file
from flctl.facility.openssh import login_place, transfer_place
from flctl.facility.profile import Login, Scheduler, Shape, Site, Totp, Transfer
from flctl.records import Contact, Held, Job, Order, Run, Stage, Work
from tests import facilities_page
from tests.ssh_campaigns import SshCampaign
from tests.ssh_sites import agent, keygen
from tests.terminals import Terminal
from tests.testbed.sshd import Sshd

USER = "flctl-cert-round"
LOGINS = facilities_page.logins()
SHORT, LONG, PAST = "-1s:+30s", "-1m:+10m", "-2h:-1s"
"""Validities: long enough for one tick on a busy machine; so long that nobody renews it yet; over."""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state folder and a home of this test's own, and no agent."""
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture(scope="module")
def certified() -> Iterator[Sshd]:
    with Sshd(name="cert-round", address="127.0.0.73", port=2703, user=USER, kind="certificate") as server:
        yield server


@pytest.fixture(scope="module")
def keyed() -> Iterator[Sshd]:
    with Sshd(name="cert-key", address="127.0.0.73", port=2704, user="flctl-cert-key") as server:
        yield server


@pytest.fixture(scope="module")
def mover() -> Iterator[Sshd]:
    """Another host with the same account's files."""
    with Sshd(name="cert-files", address="127.0.0.74", port=2705, user="flctl-cert-key") as server:
        yield server


class Certified:
    """A campaign at the site that takes certificates, with a key of this test's own and ways to certify it."""

    def __init__(self, root: Path, server: Sshd, seconds: float, **login: Any) -> None:
        self.root, self.server, self.name = root, server, server.name
        self.key = keygen(root / "key")
        self.renewals = root / "renewals"
        self.camp = SshCampaign(root, server, train={"seconds": seconds}, key=str(self.key), **login)
        self.since = server.mark()

    def certify(self, validity: str) -> None:
        self.server.certify(self.root / "key.pub", validity=validity)

    def program(self, asks: str = "", after: str = "") -> str:
        """A program that gets a certificate of an hour, and notes that it was run."""
        words = ["ssh-keygen", "-q", "-s", str(self.server.folder / "user_ca"), "-I", USER, "-n", USER]
        words += ["-V", "-1m:+1h", f"{self.key}.pub"]
        path = self.root / "renew"
        path.write_text(f"#!/bin/sh\necho run >>{self.renewals}\n{asks}\n{' '.join(words)}\n{after}\n")
        path.chmod(0o700)
        return str(path)

    def renewed(self) -> int:
        return len(self.renewals.read_text().splitlines()) if self.renewals.exists() else 0

    def outlive(self) -> None:
        """Wait until the certificate that there is has ended."""
        dates = dates_in_file(self.root / "key-cert.pub", A_SITE)
        assert dates is not None
        time.sleep(max(0.0, dates.before - time.time() + 0.1))

    def end_certificate(self) -> None:
        """Put one that has ended in the place of the one that there is, also in an agent."""
        self.certify(PAST)
        if "SSH_AUTH_SOCK" in os.environ:
            for words in (["-D"], [str(self.key)]):
                subprocess.run(["ssh-add", "-q", *words], check=True, capture_output=True)

    def tick_until(self, what: str) -> None:
        """Tick like cron, often, until the site's run is there."""

        def there() -> bool:
            self.camp.json("campaign", "tick", code=None)
            return bool(self.camp.run(self.name)["stage"] == what)

        self.camp.wait(there, limit=300, what=what)

    def hurry(self) -> None:
        """The next tick finds the site due; its record is one that no checksum vouches for."""
        path = self.camp.place / "runs" / self.name / "contact.json"
        record = {key: value for key, value in self.contact().items() if key != "check"}
        path.write_text(json.dumps(record | {"due": 0.0}))

    def contact(self) -> dict[str, Any]:
        return dict(json.loads((self.camp.place / "runs" / self.name / "contact.json").read_text()))


@pytest.fixture
def made(tmp_path: Path, certified: Sshd) -> Iterator[Any]:
    """Makes a campaign; what it leaves at the site goes away."""
    campaigns: list[Certified] = []

    def make(seconds: float = 0, **login: Any) -> Certified:
        campaigns.append(Certified(tmp_path, certified, seconds, **login))
        return campaigns[-1]

    yield make
    for campaign in campaigns:
        campaign.camp.clear()


# A certificate that ends during a round


@pytest.mark.parametrize("where", ["file", "agent"])
def test_a_certificate_that_ends_while_a_job_runs_is_renewed_by_a_tick(
    where: str, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one in an agent, which goes on holding the one that has ended, and the plain key."""
    one = made(seconds=10, renew="later", renew_unattended=True)
    one.camp.profile(one.name, renew=one.program())
    one.certify(LONG)
    if where == "file":
        _see_it_renewed(one)
        return
    with agent(one.key, certificates=True) as address:
        monkeypatch.setenv("SSH_AUTH_SOCK", address)
        one.camp.profile(one.name, key="agent", renew=one.program(after=f"ssh-add -q {one.key}"))
        _see_it_renewed(one)


def _see_it_renewed(one: Certified) -> None:
    one.camp.flctl("campaign", "start", "--rounds", "1")
    one.camp.json("campaign", "tick", code=None)
    assert one.camp.run(one.name)["stage"] not in ("ordered", "fetched", "failed")
    assert one.renewed() == 0
    first = one.contact()["login_until"]
    one.end_certificate()
    one.tick_until("fetched")
    assert one.renewed() == 1
    assert one.contact()["login_until"] > first + 2400
    assert one.camp.json("campaign", "tick")["data"]["done"]
    assert one.server.attempts(one.since).failed_keys == 0
    assert [entry["event"] for entry in one.camp.journal()].count("renewal") == 1


def test_a_certificate_that_nobody_renews_holds_the_site_until_it_is(made: Any) -> None:
    """Nothing is sent with it; a tick tells it once, and goes on by itself when it is renewed by hand."""
    one = made()
    one.certify(SHORT)
    one.camp.flctl("campaign", "start", "--rounds", "1")
    one.camp.json("campaign", "tick", code=None)
    one.outlive()
    one.hurry()
    since = one.server.mark()
    first = one.camp.json("campaign", "tick", code=4)
    assert "the certificate ended at " in first["errors"][0]["message"]
    assert first["errors"][0]["hint"].startswith(f"flctl login {one.name}")
    one.hurry()
    second = one.camp.json("campaign", "tick", code=0)
    assert second["errors"][0]["message"].startswith("HELD: the certificate ended at ")

    shown = one.camp.flctl("status").stdout
    assert f"{one.name} is HELD: the certificate ended at " in shown
    assert f"-> flctl login {one.name}" in shown
    assert "flctl release" not in shown
    row = one.camp.json("status")["data"]["runs"][0]
    assert row["held"]["reason"].startswith("the certificate ended at ")

    last = one.camp.json("round", code=4)
    assert last["errors"][0]["message"].startswith("HELD: the certificate ended at ")
    assert last["errors"][0]["hint"].startswith(f"flctl login {one.name}")
    assert one.server.attempts(since).connections == 0
    assert [entry["event"] for entry in one.camp.journal()].count("trouble") == 1

    one.certify("-1m:+1h")
    one.hurry()
    one.tick_until("fetched")
    assert "HELD" not in one.camp.flctl("status").stdout
    assert one.camp.json("round", code=None)["data"]["model"]["version"] >= 1
    assert one.server.attempts(one.since).failed_keys == 0


def test_a_program_that_fails_is_run_once_in_a_tick_and_nothing_is_sent(made: Any) -> None:
    one = made(renew="later", renew_unattended=True)
    one.camp.profile(one.name, renew=one.program("echo 'the CA is away' >&2; exit 7"))
    one.certify("-2h:-1h")
    one.camp.flctl("campaign", "start", "--rounds", "1")
    since = one.server.mark()
    answer = one.camp.json("campaign", "tick", code=4)
    assert answer["errors"][0]["message"].endswith("ended with exit status 7: the CA is away")
    assert answer["errors"][0]["hint"] == f"flctl login {one.name}"
    assert one.renewed() == 1
    assert one.server.attempts(since).connections == 0
    assert one.contact()["held"] is None


def test_a_program_that_fails_while_the_certificate_is_good_stops_nothing(made: Any) -> None:
    one = made(renew="later", renew_unattended=True)
    one.camp.profile(one.name, renew=one.program("exit 7"))
    one.certify("-1h:+2m")
    assert one.camp.json("round")["data"]["done"]
    assert one.renewed() == 1
    assert [entry["event"] for entry in one.camp.journal()].count("renewal failed") == 1


def test_a_round_whose_connection_is_lost_after_the_certificate_ended_is_held(made: Any) -> None:
    one = made(seconds=30)
    one.certify(LONG)
    child = one.camp.popen("round", "--json")
    one.camp.wait(lambda: one.camp.run(one.name).get("stage") == "running", what="the job runs")
    one.end_certificate()
    assert child.poll() is None, "what is connected stays so"
    since = one.server.mark()
    one.server.restart()
    output, _ = child.communicate(timeout=240)
    assert child.returncode == 4, output
    assert "HELD: the certificate ended at " in output
    assert one.server.attempts(since).connections == 0


# A person


ASKS = (
    'stty -echo </dev/tty; printf "PIN: "; read -r word </dev/tty; stty echo </dev/tty; test "$word" = 1234 || exit 1'
)


def test_a_person_is_asked_by_the_program_and_a_tick_never_is(made: Any) -> None:
    one = made(renew="later")
    one.camp.profile(one.name, renew=one.program(ASKS))
    one.certify("-2h:-1h")
    one.camp.flctl("campaign", "start", "--rounds", "1")
    for words in (("campaign", "tick"), ("round",)):
        assert one.camp.json(*words, code=4)["errors"]
    one.hurry()
    status, shown = one.camp.on_a_terminal("campaign", "tick")
    assert (status, "PIN" in shown, "HELD" in shown) == (0, False, True)
    assert one.server.attempts(one.since).connections == 0
    assert one.camp.json("site", "test", code=4)["errors"]
    assert one.renewed() == 0

    status, shown = one.camp.on_a_terminal("round", answers={"PIN: ": "1234"})
    assert status == 0, shown
    assert "PIN: " in shown
    assert one.renewed() == 1
    assert one.camp.run(one.name)["stage"] == "fetched"


def test_nobody_is_asked_by_a_round_in_the_background(made: Any) -> None:
    one = made(renew="later")
    one.camp.profile(one.name, renew=one.program(ASKS))
    words = [sys.executable, "-c", BACKGROUND, *one.camp.words("round")]
    with Terminal(words, cwd=one.camp.place) as terminal:
        assert terminal.end() == 4, terminal.screen
    assert one.renewed() == 0


BACKGROUND = """\
import subprocess, sys
sys.exit(subprocess.run(sys.argv[1:], process_group=0).returncode)
"""


def test_flctl_login_gets_a_certificate_and_the_next_tick_goes_on(made: Any) -> None:
    one = made(renew="later")
    one.camp.profile(one.name, renew=one.program(ASKS))
    one.camp.flctl("campaign", "start", "--rounds", "1")
    answer = one.camp.json("campaign", "tick", code=4)
    assert "there is no certificate" in answer["errors"][0]["message"]
    status, shown = one.camp.on_a_terminal("login", one.name, answers={"PIN: ": "1234"})
    assert status == 0, shown
    assert "HELD" not in one.camp.flctl("status").stdout
    one.tick_until("fetched")
    assert one.renewed() == 1


def test_a_person_who_gives_a_wrong_answer_is_asked_once(made: Any) -> None:
    one = made(renew="later")
    one.camp.profile(one.name, renew=one.program(ASKS))
    status, shown = one.camp.on_a_terminal("round", answers={"PIN: ": "4321"})
    assert status == 4, shown
    assert "ended with exit status 1" in shown
    assert one.renewed() == 1
    assert one.server.attempts(one.since).connections == 0
    status, shown = one.camp.on_a_terminal("site", "test", answers={"PIN: ": "1234"})
    assert status == 0, shown
    assert one.renewed() == 2


def test_no_program_inherits_a_secret_that_another_profile_keeps_in_a_variable(
    made: Any, keyed: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made(renew="later", renew_unattended=True)
    one.camp.profile(one.name, renew=one.program(f"env >{one.root}/env"))
    other = one.camp.place / "sites" / "other.toml"
    other.write_text(
        (one.camp.place / "sites" / f"{one.name}.toml")
        .read_text()
        .replace(f'name = "{one.name}"', 'name = "other"')
        .replace('kind = "certificate"', 'kind = "key+totp"')
        .replace("renew_unattended = true\n", "")
        .replace(f'renew = "{one.root}/renew"\n', "")
        .replace(
            "[scheduler]",
            '[login.totp]\nautomation = "permitted"\npermission = "here"\nsecret = "env:OTHERS_SECRET"\n\n[scheduler]',
            1,
        )
    )
    monkeypatch.setenv("OTHERS_SECRET", "canary")
    one.camp.json("site", "test", one.name)
    assert (one.root / "env").read_text()
    assert "canary" not in (one.root / "env").read_text()


def test_a_program_that_gives_one_secret_inherits_no_other(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = made()
    text = (one.camp.place / "sites" / f"{one.name}.toml").read_text()
    seen = one.root / "seen"
    totp = '[login.totp]\nautomation = "permitted"\npermission = "here"\nsecret = "{}"\n\n[scheduler]'
    for name, secret in (("asks", f"command:sh -c 'env >{seen}; exit 1'"), ("keeps", "env:OTHERS_SECRET")):
        coded = text.replace(f'name = "{one.name}"', f'name = "{name}"').replace('"certificate"', '"key+totp"')
        (one.camp.place / "sites" / f"{name}.toml").write_text(coded.replace("[scheduler]", totp.format(secret), 1))
    monkeypatch.setenv("OTHERS_SECRET", "canary")
    one.camp.json("auth", "test", "asks", code=3)
    assert "PATH=" in seen.read_text()
    assert "canary" not in seen.read_text()


# Warnings


def test_a_round_that_outlives_its_certificate_says_so_once(made: Any) -> None:
    one = made(seconds=3)
    one.camp.profile(one.name, walltime="05:00:00")
    one.certify("-1m:+1h")
    ran = one.camp.flctl("round")
    assert ran.returncode == 0, ran.stderr
    words = f"{one.name}: the certificate ends "
    assert ran.stdout.count(words) == 1, ran.stdout

    one.camp.train["seconds"] = 30
    one.camp.profile(one.name, walltime="05:00:00")
    one.camp.flctl("campaign", "start", "--rounds", "1")
    one.camp.json("campaign", "tick", code=None)
    warning = one.camp.json("status")["data"]["logins"][one.name]["warning"]
    assert warning.startswith(words)
    assert warning.endswith(f": flctl login {one.name} then")
    assert words in one.camp.flctl("status").stdout
    one.camp.profile(one.name, walltime="00:10:00")
    assert one.camp.json("status")["data"]["logins"][one.name]["warning"] == ""
    one.camp.flctl("cancel")


NOW = 1e9
A_SITE = Site(
    schema=1,
    name="leonardo",
    login=Login(host="h", user="u", kind="certificate"),
    scheduler=Scheduler(kind="slurm"),
    shapes={"prod": Shape(walltime=3600)},
)


def a_run(stage: Stage = Stage.RUNNING, **job: Any) -> Run:
    order = Order(site="leonardo", work=Work.TRAIN, base=0, round=1, steps=1)
    return Run(number=1, order=order, stage=stage, job=Job(token="f", **job), created_at=NOW, changed_at=NOW)


@pytest.mark.parametrize(
    ("run", "until", "warned"),
    [
        (a_run(expected_end=NOW + 100), 50.0, True),
        (a_run(expected_end=NOW + 100), 150.0, False),
        (a_run(expected_end=NOW + 100), -1.0, False),  # it has ended: that is told as HELD
        (a_run(expected_end=NOW + 100), None, False),
        (a_run(Stage.QUEUED), 3500.0, True),
        (a_run(Stage.QUEUED), 3700.0, False),
        (a_run(Stage.QUEUED, expected_start=NOW + 7200), 3700.0, True),
        (a_run(Stage.ORDERED), 3500.0, True),
        (a_run(started_at=NOW - 3000), 700.0, False),
        (a_run(started_at=NOW - 3000), 500.0, True),
        (a_run(Stage.ENDED), 5.0, False),
        (a_run(Stage.FETCHED), 5.0, False),
    ],
)
def test_who_is_warned_that_a_job_outlives_the_login(run: Run, until: float | None, warned: bool) -> None:
    contact = Contact(login_until=None if until is None else NOW + until)
    assert bool(contacts.outlives(contact, A_SITE, [run], NOW)) == warned


def test_the_warning_says_when_and_what_to_type() -> None:
    until = time.mktime((2026, 11, 21, 22, 10, 0, 0, 0, -1))
    text = contacts.outlives(Contact(login_until=until), A_SITE, [a_run(expected_end=until + 5400)], until - 10)
    assert "the certificate ends" in text
    assert "22:10, before the jobs' expected end" in text
    assert "23:40): flctl login leonardo then" in text
    kept = replace(A_SITE, login=Login(host="h", user="u", kind="attended"))
    text = contacts.outlives(Contact(login_until=until), kept, [a_run(expected_end=until + 5400)], until - 10)
    assert "the connection that is kept ends" in text


def test_nobody_is_warned_where_no_person_is_needed() -> None:
    site = replace(A_SITE, login=replace(A_SITE.login, renew="x", renew_unattended=True))
    assert not contacts.outlives(Contact(login_until=NOW + 5), site, [a_run(expected_end=NOW + 100)], NOW)
    keyed = replace(A_SITE, login=Login(host="h", user="u", kind="key", hold=60))
    assert not contacts.outlives(Contact(login_until=NOW + 5), keyed, [a_run(expected_end=NOW + 100)], NOW)


def test_what_waits_for_a_person_is_held_and_says_how_it_goes_on() -> None:
    untried = LoginNeeded("the certificate ended at 12:10", hint="flctl login leonardo")
    untried.attempted = False
    ended = contacts.failed(Contact(login_until=NOW + 60), untried, NOW)
    refused = contacts.failed(Contact(), LoginNeeded("refused", hint="is it registered?"), NOW)
    assert ended.held is None and ended.login_until is None
    assert ended.due - NOW <= 10, "the next tick looks again"
    assert state_of(a_run(), ended) == "HELD: the certificate ended at 12:10"
    assert contacts.remedy_of("leonardo", ended) == "flctl login leonardo"
    assert contacts.remedy_of("leonardo", refused) == "is it registered?, then flctl release leonardo"
    assert contacts.hold_of(Contact(held=Held(reason="r", since=0))) == Held(reason="r", since=0)
    assert contacts.hold_of(Contact()) is None


# What a round costs in logins


@pytest.mark.parametrize("kind", ["key", "one session", "interval", "transfer host", "transfer host, one session"])
def test_a_round_makes_the_logins_that_were_expected(kind: str, keyed: Sshd, mover: Sshd, tmp_path: Path) -> None:
    login: dict[str, Any] = {"one session": {"multiplex": False}, "interval": {"interval": 3}}.get(kind, {})
    if kind == "transfer host, one session":
        login = {"multiplex": False}
    camp = SshCampaign(tmp_path, keyed, **login)
    site = _site(keyed, Transfer(), login)
    if "transfer" in kind:
        mover.authorize(keyed.client_key.with_suffix(".pub").read_text())
        path = camp.place / "sites" / f"{keyed.name}.toml"
        table = (
            f'[transfer]\nhost = "{mover.address}"\nport = {mover.port}\nhost_keys = ["{mover.host_key_fingerprint}"]\n'
        )
        path.write_text(path.read_text().replace("[scheduler]", f"{table}\n[scheduler]", 1))
        site = _site(keyed, Transfer(host=mover.address, port=mover.port), login)
    marks = [(server, server.mark()) for server in (keyed, mover)]
    try:
        assert camp.json("round")["data"]["done"]
    finally:
        camp.clear()
    made = sum(server.attempts(mark).logins for server, mark in marks)
    assert made == expected_logins(site)
    assert made == {"key": 2, "one session": 1 + RSYNCS, "interval": 1, "transfer host": 2}.get(kind, 1 + RSYNCS)
    assert camp.json("status")["data"]["logins"][keyed.name]["count"] == made
    entries = camp.logins(keyed.name)
    assert [entry["count"] for entry in entries] == list(range(1, made + 1))
    assert {entry["kind"] for entry in entries} == {"key"}
    assert [entry["why"] for entry in entries] == ["commands", *["files"] * (made - 1)]
    assert entries[0]["host"] == f"[{keyed.address}]:{keyed.port}"
    if "transfer" in kind:
        assert entries[1]["host"] == f"[{mover.address}]:{mover.port}"


@pytest.mark.parametrize(
    ("login", "expected"),
    [
        ({"multiplex": False}, LOGINS["key, one session per connection"]),
        ({"interval": 1}, LOGINS["key, with `login.interval`"]),
    ],
)
def test_two_rounds_make_the_logins_of_the_table(
    login: dict[str, Any], expected: tuple[int, int], keyed: Sshd, tmp_path: Path
) -> None:
    camp = SshCampaign(tmp_path, keyed, **login)
    since = keyed.mark()
    try:
        assert camp.json("round", "--rounds", "2")["data"]["done"]
    finally:
        camp.clear()
    seen = keyed.attempts(since).logins
    assert (seen, len(camp.logins(keyed.name)) - seen) == expected


def _site(server: Sshd, transfer: Transfer, login: dict[str, Any]) -> Site:
    return Site(
        schema=1,
        name=server.name,
        login=Login(host=server.address, port=server.port, user=server.user, **login),
        transfer=transfer,
        scheduler=Scheduler(kind="local"),
        shapes={"prod": Shape()},
    )


def test_a_jump_host_and_a_kept_connection_count() -> None:
    site = replace(A_SITE, login=Login(host="h", user="u"))
    jumped = replace(site, login=replace(site.login, proxy_jump="gate"))
    permitted = Totp(automation="permitted", permission="ticket", secret="env:X")
    coded = replace(site, login=replace(site.login, kind="key+totp", totp=permitted))
    mover = replace(coded, transfer=Transfer(host="dm"))
    assert [expected_logins(one) for one in (site, jumped, coded, mover)] == [2, 4, 1, 2]
    there, files = login_place(mover), transfer_place(mover)
    assert [expected_logins(one, {login_place(one)}) for one in (site, coded)] == [0, 0]
    assert [expected_logins(mover, kept) for kept in ({there}, {files}, {there, files})] == [1, 2, 0]


def test_where_a_person_logs_in_each_host_costs_one_login_whatever_the_rsyncs() -> None:
    site = replace(A_SITE, login=Login(host="h", user="u", kind="attended", hold=60, multiplex=False))
    mover = replace(site, transfer=Transfer(host="dm"))
    assert [expected_logins(one) for one in (site, mover)] == [1, 2]
    there, files = login_place(mover), transfer_place(mover)
    assert [expected_logins(mover, kept) for kept in ({there}, {files}, {there, files})] == [1, 1, 0]


def test_this_machine_needs_no_login() -> None:
    site = replace(A_SITE, connection="local", login=Login(host="h", user="u"))
    assert expected_logins(site) == 0


# The interval


def _log_in_now(root: Path) -> None:
    """As if another flctl of this user had just logged in there."""
    path = root / "state" / "flctl" / "logins.json"
    hosts = json.loads(path.read_text())
    for host in hosts.values():
        host["tries"].append(time.time())
    path.write_text(json.dumps(hosts))


def test_a_tick_that_comes_too_soon_after_the_last_login_comes_back(keyed: Sshd, tmp_path: Path) -> None:
    camp = SshCampaign(tmp_path, keyed, interval=15, train={"seconds": 0})
    since = keyed.mark()
    try:
        camp.flctl("campaign", "start", "--rounds", "1")
        camp.json("campaign", "tick", code=None)
        time.sleep(1.2)  # its poll.every
        began = time.monotonic()
        _log_in_now(tmp_path)
        answer = camp.json("campaign", "tick", code=0)
        assert answer["errors"] == []
        assert keyed.attempts(since).connections == 1
        camp.wait(lambda: camp.json("campaign", "tick", code=None)["data"]["done"], limit=180)
        assert time.monotonic() - began > 14
        camp.profile(keyed.name, interval=30)
        _log_in_now(tmp_path)
        ran = camp.flctl("site", "test")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "30 s must lie between two; waiting" in ran.stderr
        times = [entry["at"] for entry in camp.logins(keyed.name)]
        assert min(after - before for before, after in itertools.pairwise(times)) > 14.5
    finally:
        camp.clear()
