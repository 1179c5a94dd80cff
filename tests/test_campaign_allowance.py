"""Campaigns over real sshds that check codes: one failed login per incident on every road, a rate limit that is waited
for, the day's logins, clocks that differ, and the environments that cron and others give."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flctl import faults
from flctl.campaign.engine import Engine
from flctl.campaign.workspace import Workspace
from tests.chaos.proxy import Proxy
from tests.ssh_campaigns import SshCampaign
from tests.ssh_sites import another_secret, early_in_a_step, keygen
from tests.ssh_sites import secret_file as code_file
from tests.testbed.sshd import Sshd

ADDRESS, USER = "127.0.94.1", "flctl-allow"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return tmp_path / "state" / "flctl" / "logins.json"


@pytest.fixture(scope="module")
def coded() -> Iterator[Sshd]:
    with Sshd(name="allow-oath", address=ADDRESS, port=24400, user=USER, kind="key+totp") as server:
        yield server


@pytest.fixture(scope="module")
def google() -> Iterator[Sshd]:
    """pam_google_authenticator with its usual limit."""
    server = Sshd(
        name="allow-google", address=ADDRESS, port=24401, user=f"{USER}-g", kind="key+totp", rate_limit="3 30"
    )
    with server:
        yield server


@pytest.fixture(scope="module")
def keyed() -> Iterator[Sshd]:
    with Sshd(name="allow-key", address=ADDRESS, port=24402, user=f"{USER}-k") as server:
        yield server


class Coded(SshCampaign):
    """A campaign of one site whose logins cost codes; early in a time step, none of whose codes is used."""

    def __init__(self, root: Path, server: Sshd, **login: Any) -> None:
        early_in_a_step()
        totp = {"automation": "permitted", "permission": "by the test", "period": server.period}
        totp["secret"] = code_file(root, server.reset_codes())
        super().__init__(root, server, totp_=totp, **login)
        self.server, self.name = server, server.name
        self.since = server.mark()

    def profile(self, name: str, **fields: Any) -> None:
        """[login.totp] is a table of its own."""
        totp = fields.pop("totp_", None) or self.login.pop("totp_", None)
        super().profile(name, **fields)
        path = (self.place / "sites" if self.place.exists() else self.root) / f"{name}.toml"
        if totp:
            lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in totp.items())
            path.write_text(path.read_text().replace("[scheduler]", f"[login.totp]\n{lines}\n[scheduler]", 1))

    def contact(self) -> dict[str, Any]:
        return dict(json.loads((self.place / "runs" / self.name / "contact.json").read_text()))

    def tick(self, code: int | None = None) -> dict[str, Any]:
        return self.json("campaign", "tick", code=code)

    def hurry(self) -> None:
        """The next tick finds the site due; its record is one that no checksum vouches for."""
        path = self.place / "runs" / self.name / "contact.json"
        if path.exists():
            record = {key: value for key, value in self.contact().items() if key != "check"}
            path.write_text(json.dumps(record | {"due": 0.0}))

    def tick_until_in(self) -> None:
        """Tick until the site was reached and has its order. A busy machine may miss the end of a time step."""

        def reached() -> bool:
            early_in_a_step()
            self.tick()
            return bool(self.run(self.name)["stage"] != "ordered")

        self.wait(reached, limit=240, what="the site is reached")

    def refused(self) -> str:
        """Tick until a login was tried, which the site refuses; what flctl says. A busy machine may miss the end of a
        time step: then none is tried."""
        told: list[str] = []

        def refused() -> bool:
            early_in_a_step()
            self.hurry()
            told.extend(error["message"] for error in self.tick()["errors"])
            return bool(told)

        self.wait(refused, what="a login is tried")
        return told[0]

    def failed(self) -> int:
        """Failed codes and keys that the server has seen since the campaign was made."""
        seen = self.server.attempts(self.since)
        return seen.failed_codes + seen.failed_keys


# One failed login per incident


def test_whatever_is_typed_after_a_refused_code_nothing_more_is_sent(coded: Sshd, tmp_path: Path) -> None:
    camp = Coded(tmp_path, coded)
    code_file(tmp_path, another_secret())
    camp.flctl("campaign", "start", "--rounds", "1")
    assert "refused the one-time code" in camp.refused()
    assert camp.failed() == 1
    for words in (
        ("campaign", "tick"),
        ("round", "--wait", "1"),
        ("auth", "test", camp.name),
        ("site", "test", camp.name),
        ("log", camp.name),
        ("plan",),
    ):
        camp.hurry()
        assert camp.flctl(*words).returncode in (0, 3, 4), words
    assert camp.failed() == 1
    assert camp.server.attempts(camp.since).connections == 1
    assert f"{camp.name} is HELD" in camp.flctl("status").stdout

    (tmp_path / "other").mkdir()
    other = SshCampaign(tmp_path / "other", coded)
    profile = camp.place / "sites" / f"{camp.name}.toml"
    (other.place / "sites" / f"{camp.name}.toml").write_text(profile.read_text())
    told = other.json("auth", "test", camp.name, code=4)["errors"][0]
    assert "none is tried until a person has looked at it" in told["message"]
    assert camp.failed() == 1, "nor by another campaign"

    # A new incident, with the cause put right.
    early_in_a_step()
    code_file(tmp_path, coded.totp_secret)
    assert camp.flctl("release").returncode == 0
    camp.tick_until_in()
    assert camp.failed() == 1
    camp.flctl("cancel")
    camp.clear()


def test_a_second_refusal_right_after_a_release_is_followed_by_an_hour_without_any(coded: Sshd, tmp_path: Path) -> None:
    camp = Coded(tmp_path, coded)
    code_file(tmp_path, another_secret())
    camp.flctl("campaign", "start", "--rounds", "1")
    camp.refused()
    camp.flctl("release")
    camp.refused()
    assert camp.failed() == 2
    assert camp.flctl("release").returncode == 0
    for _ in range(2):
        camp.tick(0)
        camp.hurry()
    assert camp.failed() == 2
    assert "2 logins in a row were refused; none is tried before" in camp.flctl("status").stdout
    told = camp.json("auth", "test", camp.name, code=4)["errors"][0]["message"]
    assert "2 logins in a row were refused" in told
    camp.flctl("cancel")


def test_files_that_go_by_a_login_of_their_own_are_held_as_well(coded: Sshd, tmp_path: Path) -> None:
    """The transfer host is another address of the same machine; its codes are refused, the login host's are not."""
    mover = Sshd(name="allow-files", address="127.0.94.2", port=24403, user=USER, kind="key+totp", period=20)
    with mover:
        camp = Coded(tmp_path, coded)
        mover.authorize(camp.server.client_key.with_suffix(".pub").read_text())
        path = camp.place / "sites" / f"{camp.name}.toml"
        transfer = f'[transfer]\nhost = "{mover.address}"\nport = {mover.port}\n'
        transfer += f'host_keys = ["{mover.host_key_fingerprint}"]\n\n[scheduler]'
        path.write_text(path.read_text().replace("[scheduler]", transfer, 1))
        since = mover.mark()
        camp.flctl("campaign", "start", "--rounds", "1")
        assert "refused" in camp.refused()
        for _ in range(2):
            camp.hurry()
            camp.tick()
        assert mover.attempts(since).failed_codes == 1
        assert camp.failed() == 0
        camp.flctl("cancel")


def test_a_host_that_is_out_of_reach_after_a_refused_login_is_left_alone_for_an_hour(tmp_path: Path) -> None:
    """As after a ban: whoever goes on knocking may prolong it."""
    with Sshd(name="allow-ban", address=ADDRESS, port=24404, user=f"{USER}-b") as server:
        camp = SshCampaign(tmp_path, server, key=str(keygen(tmp_path / "stranger")))
        contact = camp.place / "runs" / server.name / "contact.json"
        camp.flctl("campaign", "start", "--rounds", "1")
        assert "refused" in camp.json("campaign", "tick", code=4)["errors"][0]["message"]
        camp.flctl("release")
        server.stop()
        told = camp.json("campaign", "tick", code=5)["errors"][0]["message"]
        assert told.endswith("this looks like a ban: none is tried for an hour")
        server.start()
        since = server.mark()
        camp.flctl("release")
        for words in (("campaign", "tick"), ("round", "--wait", "1"), ("auth", "test", server.name)):
            assert camp.flctl(*words).returncode in (0, 4, 11), words
        assert server.attempts(since).connections == 0
        assert json.loads(contact.read_text())["due"] > time.time() + 3000
        assert "looks like a ban; none is tried before" in camp.flctl("status").stdout
        camp.flctl("cancel")
    camp.clear()


def test_a_connection_that_is_cut_between_the_code_and_the_shell_has_used_the_code(
    coded: Sshd, tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site is not held; the next login waits for the next time step, and counts as the day's second."""
    camp = Coded(tmp_path, coded)
    with Proxy(coded.address, coded.port) as road:
        path = camp.place / "sites" / f"{camp.name}.toml"
        text = path.read_text().replace(f'"{coded.address}"', f'"{road.address}"')
        path.write_text(text.replace(f"port = {coded.port}", f"port = {road.port}"))
        camp.flctl("campaign", "start", "--rounds", "1")
        (tmp_path / "run").mkdir(mode=0o700)
        engine = Engine(workspace=Workspace(camp.place), runtime=tmp_path / "run")

        def cut(name: str, subject: str = "") -> None:
            if name == "login-counted":
                road.strike("reset")

        early_in_a_step()
        with monkeypatch.context() as patch:
            patch.setattr(faults, "point", cut)
            engine.tick()
        engine.close()
        contact = camp.contact()
        assert (contact["held"], contact["trouble"]["code"]) == (None, "site_unreachable")
        (used_until,) = json.loads(state.with_name("codes.json").read_text())["used_until"].values()

        road.strike("pass")
        camp.hurry()
        before = road.made
        camp.tick()
        if time.time() < used_until:
            assert road.made == before, "no second connection in this time step"
            assert camp.contact()["due"] > used_until
        camp.tick_until_in()
        assert camp.failed() == 0
        assert camp.server.attempts(camp.since).codes == 2
        assert max(len(host["tries"]) for host in json.loads(state.read_text()).values()) == 2
        camp.flctl("cancel")
    camp.clear()


# A rate limit


def test_a_rate_limit_is_no_bad_code_and_the_campaign_comes_back_by_itself(
    google: Sshd, tmp_path: Path, state: Path
) -> None:
    camp = Coded(tmp_path, google, cooldown=20)
    codes = google.folder / "codes"
    reached = [int(time.time()) - 5 + number for number in range(3)]
    codes.write_text(codes.read_text().replace("RATE_LIMIT 3 30", f"RATE_LIMIT 3 30 {' '.join(map(str, reached))}"))
    camp.flctl("campaign", "start", "--rounds", "1")
    camp.tick(0)
    contact = camp.contact()
    assert contact["held"] is None
    assert "refused the login without asking for a code" in contact["trouble"]["message"]
    assert "none is tried before" in camp.flctl("status").stdout
    assert not state.with_name("codes.json").exists(), "no code was sent, so none is used"
    camp.hurry()
    since = google.mark()
    camp.tick(0)
    assert google.attempts(since).connections == 0, "not before the cool-down is over"

    camp.tick_until_in()
    assert camp.contact()["trouble"] is None
    assert google.attempts(camp.since).codes == 1
    camp.flctl("cancel")
    camp.clear()


# The days' logins


def test_when_the_days_logins_are_used_up_ticks_wait_and_say_so(keyed: Sshd, tmp_path: Path) -> None:
    camp = SshCampaign(tmp_path, keyed, per_day=2)
    camp.flctl("campaign", "start", "--rounds", "1")
    since, name = keyed.mark(), keyed.name
    for _ in range(4):
        camp.json("campaign", "tick", code=None)
        path = camp.place / "runs" / name / "contact.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in record.items() if key != "check"} | {"due": 0.0}))
    assert keyed.attempts(since).logins <= 2
    shown = camp.flctl("status").stdout
    assert "logins" in shown and "login.per_day" in shown
    assert [entry["code"] for entry in camp.journal() if entry["event"] == "trouble"] == ["login_paused"]

    for _ in range(2):
        camp.flctl("auth", "test", name)
    assert camp.flctl("auth", "test", name).returncode == 4
    before = keyed.attempts(since).logins
    status, screen = camp.on_a_terminal("auth", "test", name)
    assert status == 0, screen
    assert "logins are used up (login.per_day); this is one more" in screen
    assert keyed.attempts(since).logins == before + 1
    camp.flctl("cancel")
    camp.clear()


def test_a_person_who_types_a_round_is_not_put_off_and_one_without_a_terminal_is(keyed: Sshd, tmp_path: Path) -> None:
    camp = SshCampaign(tmp_path, keyed, per_day=2)
    since = keyed.mark()
    for logins in (1, 2, 3):
        status, screen = camp.on_a_terminal("round")
        assert status == 0, screen
        assert ("(login.per_day); this is one more" in " ".join(screen.split())) == (logins > 2), screen
        assert keyed.attempts(since).logins == logins
    assert camp.flctl("round", "--wait", "1").returncode == 4
    assert keyed.attempts(since).logins == 3
    camp.flctl("cancel")
    camp.clear()


def test_a_round_whose_rsyncs_each_log_in_ends_although_few_logins_are_left(keyed: Sshd, tmp_path: Path) -> None:
    """Half of the day's logins go as they are needed; after them files go over the connection for commands."""
    camp = SshCampaign(tmp_path, keyed, multiplex=False, per_day=6)
    since = keyed.mark()
    assert camp.json("round", "--rounds", "3", "--wait", "10m")["data"]["done"]
    assert keyed.attempts(since).logins == 3
    camp.clear()


def test_a_plan_says_how_often_ticks_look(keyed: Sshd, tmp_path: Path) -> None:
    camp = SshCampaign(tmp_path, keyed, per_day=12)
    shown = camp.flctl("plan", "--offline").stdout
    words = "2 a round, which stays logged in; or each time a tick looks: every 2:00:00 and when a job is expected to"
    assert words in shown, shown
    assert camp.json("plan", "--offline")["data"]["sites"][0]["look"] == 7200


# Clocks


AHEAD = """\
import time
right = time.time
time.time = lambda: right() + 95
from flctl.cli.main import main
main()
"""
"""flctl with a clock that is 95 s ahead."""


def test_a_clock_that_differs_from_the_sites_is_told_and_no_code_is_made_with_it(keyed: Sshd, tmp_path: Path) -> None:
    camp = SshCampaign(tmp_path, keyed)
    camp.flctl("campaign", "start", "--rounds", "1")
    argv = [sys.executable, "-c", AHEAD, *camp.words("campaign", "tick")[3:]]
    ran = subprocess.run(argv, cwd=camp.place, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    words = "this machine's clock is 95 s ahead of the site's"
    assert words in ran.stdout + ran.stderr
    assert words in camp.flctl("status").stdout
    assert camp.json("status")["data"]["logins"][keyed.name]["skew"] == pytest.approx(95, abs=2)
    kept = json.loads((tmp_path / "state" / "flctl" / "logins.json").read_text())
    assert kept[f"{keyed.user}@[{keyed.address}]:{keyed.port}"]["skew"] == pytest.approx(95, abs=2)
    camp.flctl("cancel")
    camp.clear()


# Where nobody is there


def test_in_cron_s_environment_a_tick_works_and_asks_nobody(coded: Sshd, tmp_path: Path) -> None:
    """No PATH of one's own, no terminal, no agent; standard input is a pipe in which nothing ever comes."""
    camp = Coded(tmp_path, coded)
    camp.flctl("campaign", "start", "--rounds", "1")
    early_in_a_step()
    reader, writer = os.pipe()
    try:
        ran = subprocess.run(
            camp.words("campaign", "tick"),
            env={"HOME": os.environ["HOME"], "XDG_STATE_HOME": os.environ["XDG_STATE_HOME"], "PATH": "/usr/bin:/bin"},
            cwd=camp.place,
            stdin=reader,
            capture_output=True,
            text=True,
            timeout=120,
            start_new_session=True,
        )
    finally:
        os.close(reader)
        os.close(writer)
    assert ran.returncode == 0, ran.stderr
    assert camp.run(camp.name)["stage"] != "ordered"
    camp.flctl("cancel")
    camp.clear()
