"""`flctl login`, `flctl logout`: a person logs in once, ticks go on from there; real sshds, codes and terminals."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flctl.facility.codes import parse_secret
from flctl.facility.profile import Totp
from tests import facilities_page
from tests.campaigns import make_model
from tests.ssh_sites import early_in_a_step
from tests.terminals import Terminal
from tests.testbed.facility import toml
from tests.testbed.sshd import Sshd

ADDRESS = "127.0.0.83"
LOGINS = facilities_page.logins()

TRAINER = """\
import json, os, shutil, sys, time
print("trainer: begins", flush=True)
time.sleep(json.load(open(os.environ["FLCTL_ORDER"]))["train"].get("seconds", 0))
model, out = os.environ["FLCTL_MODEL"], os.environ["FLCTL_OUT"]
shutil.copy(model + "/model.safetensors", out + "/model.safetensors")
with open(out + "/metrics.json", "w") as stream:
    json.dump({"steps": int(os.environ["FLCTL_STEPS"]), "samples": 10, "tokens": 50}, stream)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Sshd]:
    with Sshd(name="hold-cli", address=ADDRESS, port=2810, user="flctl-hold", kind="key+totp") as started:
        yield started


class Place:
    """A campaign of one site behind a login that a person must answer, and the commands on it."""

    def __init__(self, root: Path, state: Path, server: Sshd, **login: Any) -> None:
        self.root, self.place, self.server = root, root / "camp", server
        account = server.account
        account.folder(account.home / "data")
        account.file(account.home / "data" / "text", "words\n")
        trainer = account.file(account.home / "trainer.py", TRAINER)
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(root), "XDG_STATE_HOME": str(state)}
        self.profile: dict[str, Any] = {
            "schema": 1,
            "name": "delta",
            "login": {
                "host": server.address,
                "port": server.port,
                "user": server.user,
                "kind": server.kind,
                "key": str(server.client_key),
                "host_keys": [server.host_key_fingerprint],
                **login,
            },
            "scheduler": {"kind": "local", "shape": "small"},
            "shapes": {"small": {"walltime": "00:10:00"}},
            "storage": {"work": str(account.home / f"work-{root.name}"), "data": str(account.home / "data")},
            "environment": {"python": "/usr/bin/python3", "seal_python": "/usr/bin/python3"},
            "train": {"command": str(trainer)},
            "poll": {"every": 1, "absence": 1},  # login_every, an hour, is not for a connection that is kept
        }
        (root / "delta.toml").write_text(toml(self.profile))
        make_model(root / "start")
        made = self.flctl(
            "init", str(self.place), "--sites", str(root / "delta.toml"), "--model", str(root / "start"), at=root
        )
        assert made.returncode == 0, made.stderr

    def words(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "flctl.cli.main", *arguments]

    def flctl(self, *arguments: str, at: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(*arguments),
            env=self.environment,
            cwd=at or self.place,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def json(self, *arguments: str, code: int | None = 0) -> dict[str, Any]:
        ran = self.flctl(*arguments, "--json")
        answer: dict[str, Any] = json.loads(ran.stdout)
        assert answer["exit_code"] == ran.returncode and code in (None, ran.returncode), ran.stdout + ran.stderr
        return answer

    def terminal(self, *arguments: str) -> Terminal:
        return Terminal(self.words(*arguments), cwd=self.place, env=self.environment)

    def login(self, *arguments: str) -> str:
        """A person logs in; what the screen showed."""
        with self.terminal("login", "delta", *arguments) as terminal:
            terminal.expect("One-time password")
            terminal.type(code_of(self.server))
            assert terminal.end() == 0, terminal.screen
            return terminal.screen

    def tick_until(self, condition: Any, limit: float = 300.0) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline, self.flctl("status").stdout
            ran = self.flctl("campaign", "tick")
            assert ran.returncode == 0, ran.stdout + ran.stderr
            time.sleep(0.2)

    def journal(self, event: str) -> list[dict[str, Any]]:
        lines = (self.place / "journal.jsonl").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def code_of(server: Sshd) -> str:
    """The code of the moment of a secret that is new."""
    early_in_a_step(room=5.0)
    return parse_secret(server.reset_codes(period=30), Totp()).code(time.time())


@pytest.fixture
def state() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="flctl-test-") as folder:
        yield Path(folder)


@pytest.fixture
def place(tmp_path: Path, state: Path, server: Sshd) -> Iterator[Place]:
    made = Place(tmp_path, state, server, hold="08:00:00")
    yield made
    made.flctl("logout")


def test_a_campaign_of_two_models_costs_one_login_by_a_person(place: Place) -> None:
    """Ticks say HELD and leave the site alone; after the login they go on by themselves, each a process of its own."""
    since = place.server.mark()
    assert place.flctl("campaign", "start", "--rounds", "2").returncode == 0
    answer = place.json("campaign", "tick", code=4)
    assert answer["errors"][0]["hint"] == "flctl login delta"
    assert "HELD: a person must log in" in place.flctl("status").stdout
    assert "flctl login delta" in place.flctl("status").stdout
    again = place.json("campaign", "tick")
    assert "HELD" in again["errors"][0]["message"] and again["errors"][0]["hint"] == "flctl login delta"
    assert place.server.attempts(since).connections == 0

    screen = place.login()
    assert re.search(r"delta: the connection to flctl-hold@\S+ is kept until \S+", screen)
    place.tick_until(lambda: (place.place / "models" / "0002" / "flctl.json").exists())
    seen = place.server.attempts(since)
    assert (seen.codes, seen.failed_codes) == (1, 0)
    assert (seen.logins, len(place.journal("login")) - seen.logins) == LOGINS["any, kept by `flctl login`"]
    (entry,) = place.journal("login")
    assert (entry["site"], entry["count"], entry["why"]) == ("delta", 1, "kept")
    status = place.flctl("status").stdout
    assert "logins so far: delta 1" in status and "logged in until" in status
    assert place.json("status")["data"]["logins"]["delta"]["until"] > time.time() + 7 * 3600


def test_what_is_kept_is_shown_and_closed(place: Place, tmp_path: Path) -> None:
    assert place.flctl("login", "--status").stdout == "no connection is kept\n"
    began = time.time()
    place.login("--for", "30m")
    (row,) = place.json("login", "--status")["data"]["connections"]
    assert (row["site"], row["host"], row["alive"]) == ("delta", f"flctl-hold@[{ADDRESS}]:2810", True)
    assert began <= row["since"] <= time.time() and row["until"] - row["since"] == pytest.approx(1800, abs=1)
    assert re.search(r"delta +flctl-hold@\S+ +[0-9: -]+ +open", place.flctl("login", "--status", at=tmp_path).stdout)

    since = place.server.mark()
    with place.terminal("login", "delta") as terminal:
        assert terminal.end() == 0
    assert "is open already, until" in terminal.screen and "One-time" not in terminal.screen
    assert place.server.attempts(since).connections == 0 and len(place.journal("login")) == 1

    assert place.flctl("logout", "other").stdout == "other: no connection is kept\n"
    assert place.json("login", "--status")["data"]["connections"]
    assert "is closed" in place.flctl("logout", "delta").stdout
    assert place.json("login", "--status")["data"]["connections"] == []
    assert place.json("status")["data"]["logins"]["delta"]["until"] is None
    assert len(place.journal("logout")) == 1
    assert place.flctl("logout").stdout == "no connection is kept\n"


def test_no_longer_than_the_profile_allows(place: Place) -> None:
    place.login("--for", "2d")
    (row,) = place.json("login", "--status")["data"]["connections"]
    assert row["until"] - row["since"] == pytest.approx(8 * 3600, abs=1)


def test_a_tick_says_so_when_the_connection_is_gone(place: Place) -> None:
    (place.place / "sites" / "delta.toml").write_text(
        toml(place.profile | {"train": {**place.profile["train"], "seconds": 6}})
    )
    place.login()
    place.flctl("campaign", "start", "--rounds", "1")
    place.tick_until(lambda: {"queued", "running"} & {run["stage"] for run in place.json("status")["data"]["runs"]})
    place.flctl("logout")
    since = place.server.mark()
    while (ran := place.flctl("campaign", "tick")).returncode == 0:  # until the site is due again
        assert place.json("status")["data"]["model"]["version"] == 0
    assert ran.returncode == 4 and "flctl login delta" in ran.stderr
    assert place.server.attempts(since).connections == 0
    place.login()
    place.tick_until(lambda: (place.place / "models" / "0001" / "flctl.json").exists())
    assert [entry["count"] for entry in place.journal("login")] == [1, 2]


def test_a_wrong_code_holds_nothing(place: Place) -> None:
    right = code_of(place.server)
    with place.terminal("login", "delta") as terminal:
        terminal.expect("One-time password")
        terminal.type(f"{(int(right) + 1) % 1_000_000:06d}")
        assert terminal.end() == 4
    assert "did not let you in" in terminal.screen and "Traceback" not in terminal.screen
    assert place.json("login", "--status")["data"]["connections"] == []
    assert "HELD" not in place.flctl("status").stdout
    place.login()


def test_without_a_terminal_nobody_can_answer(place: Place) -> None:
    since = place.server.mark()
    ran = place.flctl("login", "delta")
    assert ran.returncode == 4 and "in a terminal: flctl login delta" in ran.stderr
    assert place.server.attempts(since).connections == 0


def test_a_facility_that_allows_no_kept_connection(tmp_path: Path, state: Path, server: Sshd) -> None:
    place = Place(tmp_path, state, server, kind="attended")
    with place.terminal("login", "delta") as terminal:
        assert terminal.end() == 3
    assert "login.hold" in terminal.screen
    since = server.mark()
    for words in (["plan"], ["plan", "--offline"], ["round"], ["campaign", "start", "--rounds", "1"]):
        ran = place.flctl(*words)
        assert ran.returncode == 3, words
        assert ran.stderr.count("delta: a person must answer each login there") == 1 and "login.hold" in ran.stderr
    assert "PROBLEM     a person must answer" in place.flctl("plan").stdout
    assert not (place.place / "plan.json").exists()
    tried = place.flctl("auth", "test", "delta")
    assert tried.returncode == 3 and "delta: a person must answer each login there" in tried.stderr
    assert server.attempts(since).connections == 0


def test_a_plan_counts_the_logins_that_the_person_must_make(place: Place) -> None:
    def look() -> dict[str, Any]:
        (view,) = place.json("plan", "--offline")["data"]["sites"]
        return dict(view)

    before = look()
    assert (before["logins"], before["login_until"]) == (1, None)
    assert before["notes"] == ["a person must log in first: flctl login delta"]
    asked = place.flctl("plan")
    assert asked.returncode == 0
    assert "not asked: a person must log in: no kept connection is open -> flctl login delta" in asked.stdout
    place.login("--for", "30m")
    after = look()
    assert (after["logins"], after["notes"]) == (0, [])
    assert after["login_until"] == place.json("login", "--status")["data"]["connections"][0]["until"]
    place.flctl("logout")
    assert look()["logins"] == 1


def test_a_site_that_was_renamed_is_logged_out_by_its_new_name(place: Place) -> None:
    place.login()
    old = place.place / "sites" / "delta.toml"
    old.with_name("delta2.toml").write_text(old.read_text().replace('name = "delta"', 'name = "delta2"'))
    old.unlink()
    assert re.match(r"delta2: the connection to \S+ is closed", place.flctl("logout", "delta2").stdout)
    assert place.json("login", "--status")["data"]["connections"] == []


def test_a_hold_that_was_shortened_asks_the_person_again(place: Place) -> None:
    place.login()
    profile = place.place / "sites" / "delta.toml"
    profile.write_text(profile.read_text().replace('hold = "08:00:00"', 'hold = "00:00:01"'))
    time.sleep(1.0)
    assert place.flctl("plan", "--offline").stdout.count("a person must log in first") == 1
    profile.write_text(profile.read_text().replace('hold = "00:00:01"', 'hold = "00:00:04"'))
    time.sleep(3.0)
    assert "is kept until" in place.login()
    (row,) = place.json("login", "--status")["data"]["connections"]
    assert row["until"] - row["since"] == pytest.approx(4, abs=1)


def test_a_logout_while_a_tick_works_is_said_by_that_tick(place: Place) -> None:
    account = place.server.account
    account.file(account.home / ".bashrc", "sleep 2\n")
    place.login()
    place.flctl("campaign", "start", "--rounds", "1")
    began = subprocess.Popen(
        place.words("campaign", "tick"), env=place.environment, cwd=place.place, stderr=subprocess.PIPE, text=True
    )
    while not any(path.read_text() for path in Path(f"/proc/{began.pid}/task").glob("*/children")):
        assert began.poll() is None
        time.sleep(0.05)
    assert "is closed" in place.flctl("logout").stdout
    _, said = began.communicate(timeout=240)
    (account.home / ".bashrc").unlink()
    assert began.returncode == 4
    assert "a person must log in: the kept connection has ended\n  -> flctl login delta" in said
    assert place.json("status")["data"]["logins"]["delta"]["until"] is None
    place.login()
    place.tick_until(lambda: (place.place / "models" / "0001" / "flctl.json").exists())


def test_a_key_needs_no_person(tmp_path: Path, state: Path, server: Sshd) -> None:
    place = Place(tmp_path, state, server, kind="key")
    ran = place.flctl("login", "delta")
    assert ran.returncode == 0 and "no person is needed" in ran.stdout


def test_where_a_key_would_do_the_end_of_a_kept_connection_is_no_end_of_the_login(tmp_path: Path, state: Path) -> None:
    with Sshd(name="hold-cli-key", address="127.0.0.96", port=2951, user="flctl-hold") as server:
        place = Place(tmp_path, state, server, kind="key", key=str(server.client_key), hold="00:10:00")
        try:
            with place.terminal("login", "delta") as terminal:
                assert terminal.end() == 0, terminal.screen
            since = server.mark()
            for logins, made in ((0, 0), (2, 1)):
                (view,) = place.json("plan", "--offline")["data"]["sites"]
                assert (view["logins"], view["login_until"], view["notes"]) == (logins, None, [])
                report = place.json("site", "test")["data"]["sites"][0]
                (check,) = [check for check in report["checks"] if check["name"] == "login"]
                assert (check["result"], report["logins"]) == ("ok", made), check
                assert place.json("status")["data"]["logins"]["delta"]["until"] is None
                place.flctl("logout")
            assert server.attempts(since).logins == 1
        finally:
            place.flctl("logout")


def test_a_certificate_is_renewed_on_the_terminal(tmp_path: Path, state: Path) -> None:
    with Sshd(name="hold-cert", address="127.0.0.84", port=2811, user="flctl-hold", kind="certificate") as server:
        key = tmp_path / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        program = tmp_path / "renew"
        sign = f"ssh-keygen -q -s {server.folder}/user_ca -I x -n {server.user} -V -1m:+2h {key}.pub"
        program.write_text(f'#!/bin/sh\nprintf "Passphrase: " >/dev/tty; read -r word </dev/tty\n{sign}\n')
        program.chmod(0o700)
        place = Place(tmp_path, state, server, key=str(key), renew=str(program))
        with place.terminal("login", "delta") as terminal:
            terminal.expect("Passphrase: ")
            terminal.type("open sesame")
            assert terminal.end() == 0, terminal.screen
        assert "the certificate is good until" in terminal.screen
        assert place.json("login", "--status")["data"]["connections"] == []
        until = place.json("status")["data"]["logins"]["delta"]["until"]
        assert 7000 < until - time.time() < 7300
        assert server.attempts().connections == 0


@pytest.mark.parametrize("words", [["login"], ["login", "delta", "--status"], ["login", "delta", "--for", "soon"]])
def test_what_cannot_be_meant_is_a_usage_error(place: Place, words: list[str]) -> None:
    ran = place.flctl(*words)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
