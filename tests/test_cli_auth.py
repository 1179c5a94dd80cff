"""`flctl auth test | store`: one login is shown as it was, masked; a secret is stored where the rules allow it."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flctl.facility.codes import parse_secret
from flctl.facility.profile import Totp
from flctl.facility.references import read_reference
from tests.campaigns import make_model
from tests.ssh_sites import Watch, another_secret, early_in_a_step, keygen, secret_file
from tests.terminals import Terminal
from tests.testbed.facility import toml
from tests.testbed.sshd import Sshd

ADDRESS, USER = "127.0.0.79", "flctl-auth"
RULES = "ticket 4711"


@pytest.fixture(scope="module")
def server() -> Iterator[Sshd]:
    with Sshd(
        name="auth-cli", address=ADDRESS, port=2740, user=USER, kind="password+totp", host_certificate=True
    ) as started:
        yield started


class Desk:
    """A campaign of one site, and what its user types."""

    def __init__(self, root: Path, server: Sshd, **login: Any) -> None:
        self.root, self.place, self.server = root, root / "camp", server
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(root),
            "XDG_STATE_HOME": str(root / "state"),
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        (root / ".ssh").mkdir()
        (root / ".ssh" / "known_hosts").write_text(server.known_hosts_line)
        make_model(root / "start")
        self.write(root, **login)
        made = self.flctl("init", str(self.place), "--sites", str(root / "home.toml"), "--model", str(root / "start"))
        assert made.returncode == 0, made.stderr

    def write(self, folder: Path | None = None, **login: Any) -> None:
        server = self.server
        table = {"host": server.address, "port": server.port, "user": server.user, "kind": server.kind, **login}
        profile = {
            "schema": 1,
            "name": "home",
            "login": table,
            "scheduler": {"kind": "local"},
            "shapes": {"prod": {}},
            "storage": {"work": "~/work", "data": "~/data"},
        }
        ((folder or self.place / "sites") / "home.toml").write_text(toml(profile))

    def words(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "flctl.cli.main", *arguments]

    def flctl(self, *arguments: str, typed: str | None = None) -> subprocess.CompletedProcess[str]:
        """Without a terminal; `typed` comes on stdin."""
        return subprocess.run(
            self.words(*arguments),
            cwd=self.place if self.place.exists() else self.root,
            env=self.environment,
            input=typed or "",
            capture_output=True,
            text=True,
            timeout=120,
            start_new_session=True,
        )

    def terminal(self, *arguments: str) -> Terminal:
        return Terminal(self.words(*arguments), cwd=self.place, env=self.environment)

    @property
    def stored(self) -> Path:
        return self.root / ".config" / "flctl" / "home.totp"


def secrets_of(server: Sshd, folder: Path) -> dict[str, Any]:
    """The tables of a profile with fresh secrets of the server's, none of whose codes is used."""
    early_in_a_step(room=12.0)
    (folder / "p").mkdir()
    totp = {"automation": "permitted", "permission": RULES, "secret": secret_file(folder, server.reset_codes())}
    return {"totp": totp, "password": {"secret": secret_file(folder / "p", server.reset_password())}}


# auth test


def test_a_login_is_shown_with_its_answers_masked(server: Sshd, tmp_path: Path) -> None:
    desk = Desk(tmp_path, server, **secrets_of(server, tmp_path))
    (tmp_path / ".ssh" / "known_hosts").write_text(server.host_authority_line)
    secret, since = server.totp_secret, server.mark()
    with Watch(server.password, secret) as watch:
        ran = desk.flctl("auth", "test", "home")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        f"home: {USER}@[{ADDRESS}]:2740, password+totp",
        f"  host key  ssh-ed25519 {server.host_key_fingerprint}, trusted by a certificate of the authority "
        f"ssh-ed25519 {fingerprint(server._host_authority)}",
        "  asked     Password: ********",
        f"  asked     One-time password (OATH) for `{USER}': ******",
        "  result    logged in; 1 login used",
    ]
    assert watch.found == [] and not {server.password, secret} & set((ran.stdout + ran.stderr).split())
    assert (server.attempts(since).connections, server.attempts(since).logins) == (1, 1)
    journal = [json.loads(line) for line in (desk.place / "journal.jsonl").read_text().splitlines()]
    assert [(entry["count"], entry["why"]) for entry in journal if entry["event"] == "login"] == [(1, "test")]


def fingerprint(key: Path) -> str:
    return subprocess.run(
        ["ssh-keygen", "-l", "-f", str(key)], check=True, capture_output=True, text=True
    ).stdout.split()[1]


def test_a_refused_login_is_shown_as_far_as_it_came_and_holds_the_site(server: Sshd, tmp_path: Path) -> None:
    desk = Desk(tmp_path, server, **secrets_of(server, tmp_path))
    secret_file(tmp_path, another_secret())
    ran = desk.flctl("auth", "test", "home", "--json")
    answer = json.loads(ran.stdout)
    assert (ran.returncode, answer["command"], answer["status"], answer["exit_code"]) == (4, "auth test", "error", 4)
    assert answer["data"]["dialogue"] == [
        {"question": "Password:", "given": ["password"]},
        {"question": f"One-time password (OATH) for `{USER}':", "given": ["code"]},
    ]
    assert (answer["data"]["logins"], answer["data"]["trust"]) == (0, "your own known_hosts")
    assert "refused the password and one-time code" in answer["errors"][0]["message"]
    since = server.mark()
    again = desk.flctl("auth", "test", "home")
    assert again.returncode == 4 and "the site is held" in again.stderr
    assert server.attempts(since).connections == 0


def test_keys_and_certificates_are_shown_with_their_end(tmp_path: Path) -> None:
    with Sshd(name="auth-cert", address=ADDRESS, port=2741, user=USER, kind="certificate") as server:
        key = keygen(tmp_path / "key")
        server.certify(tmp_path / "key.pub")
        desk = Desk(tmp_path, server, key=str(key))
        ran = desk.flctl("auth", "test", "home")
        assert ran.returncode == 0, ran.stderr
        (line,) = [line for line in ran.stdout.splitlines() if "offered" in line]
        assert line.startswith(f"  offered   ssh-ed25519-cert-v01@openssh.com {fingerprint(key)}, good until ")
        assert line.endswith(": accepted")
        answer = json.loads(desk.flctl("auth", "test", "home", "--json").stdout)
        (offer,) = answer["data"]["offers"]
        assert (offer["accepted"], offer["fingerprint"]) == (True, fingerprint(key)) and offer["until"] > 1e9


def test_what_the_profile_leaves_open_comes_from_the_users_ssh_config(server: Sshd, tmp_path: Path) -> None:
    tables = secrets_of(server, tmp_path)
    desk = Desk(tmp_path, server, host="short", port=22, user="", **tables)
    refused = desk.flctl("auth", "test", "home")
    assert refused.returncode == 3 and "still lacks: login.user" in refused.stderr
    config = tmp_path / ".ssh" / "config"
    config.write_text(f"Host short\n HostName {ADDRESS}\n Port 2740\n User {USER}\n")
    ran = desk.flctl("auth", "test", "home")
    assert ran.returncode == 0 and ran.stdout.startswith(f"home: {USER}@[{ADDRESS}]:2740, "), ran.stderr


def test_an_untrusted_host_is_shown_and_nothing_is_offered(server: Sshd, tmp_path: Path) -> None:
    desk = Desk(tmp_path, server, **secrets_of(server, tmp_path))
    (tmp_path / ".ssh" / "known_hosts").write_text("")
    ran = desk.flctl("auth", "test", "home")
    assert ran.returncode == 12
    assert f"  host key  ssh-ed25519 {server.host_key_fingerprint}, not trusted" in ran.stdout
    assert "asked" not in ran.stdout and "flctl site trust home" in ran.stderr


def test_a_person_who_must_answer_is_sent_to_flctl_login(server: Sshd, tmp_path: Path) -> None:
    desk, since = Desk(tmp_path, server, kind="attended", hold="01:00:00"), server.mark()
    ran = desk.flctl("auth", "test", "home")
    assert ran.returncode == 4 and "-> flctl login home" in ran.stderr
    assert server.attempts(since).connections == 0
    assert "held" not in desk.flctl("auth", "test", "home").stderr


# auth store


def lines_of(text: str) -> dict[str, str]:
    """The table that was printed for the profile."""
    table: dict[str, str] = tomllib.loads(text[text.index("[login.totp]") :])["login"]["totp"]
    return table


def test_a_typed_secret_is_stored_after_a_yes_and_never_shown(server: Sshd, tmp_path: Path) -> None:
    desk, secret = Desk(tmp_path, server), another_secret()
    with Watch(secret) as watch, desk.terminal("auth", "store", "home") as terminal:
        terminal.expect("Type yes or no: ")
        terminal.type("yes")
        terminal.expect("Where do they say so")
        terminal.type('the "rules", § 3')
        terminal.expect("The secret")
        terminal.type(secret)
        assert terminal.end() == 0
    assert secret not in terminal.screen and watch.found == []
    assert desk.stored.read_text() == secret + "\n" and desk.stored.stat().st_mode & 0o777 == 0o600
    table = lines_of(terminal.screen)
    assert table == {"automation": "permitted", "permission": 'the "rules", § 3', "secret": f"file:{desk.stored}"}
    assert parse_secret(read_reference(table["secret"]), Totp()).key
    assert [path.name for path in desk.stored.parent.iterdir()] == ["home.totp"]


@pytest.mark.parametrize("said", ["no", "y", ""])
def test_without_a_yes_nothing_is_stored(server: Sshd, tmp_path: Path, said: str) -> None:
    desk = Desk(tmp_path, server)
    with desk.terminal("auth", "store", "home", "--permission", RULES) as terminal:
        terminal.expect("Type yes or no: ")
        terminal.type(said)
        assert terminal.end() == 2
    assert "nothing was stored" in terminal.screen and not desk.stored.exists()


def test_without_a_terminal_the_permission_must_be_named(server: Sshd, tmp_path: Path) -> None:
    desk, secret = Desk(tmp_path, server), another_secret()
    refused = desk.flctl("auth", "store", "home", typed=secret + "\n")
    assert refused.returncode == 2 and "--permission" in refused.stderr and not desk.stored.exists()
    ran = desk.flctl("auth", "store", "home", "--permission", RULES, typed=secret + "\n")
    assert ran.returncode == 0, ran.stderr
    assert secret not in ran.stdout + ran.stderr
    assert lines_of(ran.stdout)["permission"] == RULES and desk.stored.read_text() == secret + "\n"


def test_a_stored_secret_is_only_replaced_if_that_is_asked_for(server: Sshd, tmp_path: Path) -> None:
    desk, words = Desk(tmp_path, server), ("auth", "store", "home", "--permission", RULES)
    first, second = another_secret(), another_secret()
    assert desk.flctl(*words, typed=first).returncode == 0
    refused = desk.flctl(*words, typed=second)
    assert refused.returncode == 3 and "--replace" in refused.stderr
    assert desk.stored.read_text() == first + "\n"
    assert desk.flctl(*words, "--replace", typed=second).returncode == 0
    assert desk.stored.read_text() == second + "\n" and desk.stored.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("typed", "code"), [("canary-8901", 3), ("otpauth://hotp/x?secret=GEZDGNBVGY3TQOJQ", 3), ("", 2)]
)
def test_what_is_no_secret_is_not_stored(server: Sshd, tmp_path: Path, typed: str, code: int) -> None:
    desk = Desk(tmp_path, server)
    ran = desk.flctl("auth", "store", "home", "--permission", RULES, typed=typed)
    assert ran.returncode == code and "canary" not in ran.stdout + ran.stderr
    assert not desk.stored.exists()


@pytest.mark.parametrize(("kind", "why"), [("attended", "only a person can answer"), ("key", "no one-time code")])
def test_where_no_program_may_answer_no_secret_is_taken(server: Sshd, tmp_path: Path, kind: str, why: str) -> None:
    desk = Desk(tmp_path, server, kind=kind)
    ran = desk.flctl("auth", "store", "home", "--permission", RULES, typed=another_secret())
    assert ran.returncode == 3 and why in ran.stderr and not desk.stored.exists()


def test_a_keyring_takes_the_secret(server: Sshd, tmp_path: Path) -> None:
    """The keyring package is stood in for by one of the same interface, which keeps a file."""
    desk, secret = Desk(tmp_path, server), another_secret()
    package = tmp_path / "lib" / "keyring"
    package.mkdir(parents=True)
    (package / "errors.py").write_text("class KeyringError(Exception): ...\n")
    (package / "__init__.py").write_text(
        "from pathlib import Path\n"
        f"def file(service, user): return Path({str(tmp_path)!r}) / f'{{service}}-{{user}}'\n"
        "def get_password(*name): return file(*name).read_text() if file(*name).exists() else None\n"
        "def set_password(service, user, value): file(service, user).write_text(value)\n"
    )
    desk.environment["PYTHONPATH"] = f"{package.parent}:{desk.environment['PYTHONPATH']}"
    words = ("auth", "store", "home", "--permission", RULES, "--keyring")
    ran = desk.flctl(*words, typed=secret)
    assert ran.returncode == 0, ran.stderr
    assert lines_of(ran.stdout)["secret"] == "keyring:flctl/home"
    assert (tmp_path / "flctl-home").read_text() == secret and not desk.stored.exists()
    assert desk.flctl(*words, typed=secret).returncode == 3


def test_a_stored_secret_logs_in_without_a_person(server: Sshd, tmp_path: Path) -> None:
    tables = secrets_of(server, tmp_path)
    desk = Desk(tmp_path, server, password=tables["password"])
    ran = desk.flctl("auth", "store", "home", "--permission", RULES, typed=server.totp_secret)
    desk.write(password=tables["password"], totp=lines_of(ran.stdout))
    assert desk.flctl("auth", "test", "home").returncode == 0
