"""Logging in to a real sshd with PAM: secrets, codes and their ledger; keys, certificates, agents; host keys."""

import base64
import dataclasses
import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from flctl.errors import CodeSpent, ConfigurationError, HostKeyRefused, LoginNeeded
from flctl.facility import codes, hostcertificates, hostkeys, ledger, references
from flctl.facility.codes import Secret, parse_secret
from flctl.facility.connection import Road, connect, host_key, trust
from flctl.facility.openssh import Place, environment, login_place, ssh
from flctl.facility.over_ssh import OverSsh
from flctl.facility.profile import Login, Password, Scheduler, Site, Totp
from flctl.facility.references import read_reference
from flctl.facility.transfer import push
from tests.ssh_sites import (
    GONE,
    Watch,
    agent,
    another_secret,
    connected,
    early_in_a_step,
    keygen,
    road_to,
    secret_file,
    site_of,
)
from tests.testbed.sshd import Sshd, remove

ADDRESS = "127.0.0.41"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder and a home of this test's own, and no agent."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return tmp_path / "state"


@pytest.fixture(scope="module")
def keyed() -> Iterator[Sshd]:
    with Sshd(name="login-key", address=ADDRESS, port=2241, user="flctl-login") as server:
        yield server


@pytest.fixture(scope="module")
def certified() -> Iterator[Sshd]:
    with Sshd(name="login-cert", address=ADDRESS, port=2242, user="flctl-login", kind="certificate") as server:
        yield server


@pytest.fixture(scope="module")
def coded() -> Iterator[Sshd]:
    with Sshd(name="login-code", address=ADDRESS, port=2243, user="flctl-login", kind="key+totp") as server:
        yield server


@pytest.fixture
def secret(coded: Sshd, tmp_path: Path) -> str:
    """The reference to a fresh secret of the server, none of whose codes is used; not at the end of a time step."""
    early_in_a_step()
    return secret_file(tmp_path, coded.reset_codes(period=30))


# Codes


@pytest.mark.parametrize(
    ("algorithm", "moment", "code"),
    [
        ("SHA1", 59, "94287082"),
        ("SHA256", 59, "46119246"),
        ("SHA512", 59, "90693936"),
        ("SHA1", 1111111109, "07081804"),
        ("SHA256", 1111111109, "68084774"),
        ("SHA512", 1111111109, "25091201"),
        ("SHA1", 1234567890, "89005924"),
        ("SHA256", 1234567890, "91819424"),
        ("SHA512", 1234567890, "93441116"),
        ("SHA1", 20000000000, "65353130"),
        ("SHA256", 20000000000, "77737706"),
        ("SHA512", 20000000000, "47863826"),
    ],
)
def test_codes_are_those_of_rfc_6238(algorithm: str, moment: int, code: str) -> None:
    length = {"SHA1": 20, "SHA256": 32, "SHA512": 64}[algorithm]
    key = (b"1234567890" * 7)[:length]
    assert Secret(key=key, digits=8, algorithm=algorithm).code(moment) == code
    assert Secret(key=key, digits=6, algorithm=algorithm).code(moment) == code[2:]


def test_a_secret_of_80_bits_gives_the_codes_that_oathtool_gives() -> None:
    text = "JBSW Y3DP-ehpk3pxp"
    secret = parse_secret(text, Totp())
    assert len(secret.key) == 10
    argv = ["oathtool", "--totp", "-b", "--now=@1700000000", "JBSWY3DPEHPK3PXP"]
    assert secret.code(1700000000) == subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def test_an_otpauth_address_brings_its_own_parameters() -> None:
    text = "otpauth://totp/Site:me?secret=GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ&algorithm=SHA256&digits=8&period=60&issuer=x"
    secret = parse_secret(text, Totp())
    assert (secret.key, secret.digits, secret.algorithm, secret.period) == (b"1234567890" * 2, 8, "SHA256", 60)


@pytest.mark.parametrize(
    "text",
    ["", "otpauth://hotp/x?secret=GEZDGNBVGY3TQOJQ", "GEZDGNBV", "1234-canary-0189", "otpauth://totp/x?digits=6"],
)
def test_what_is_no_secret_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_secret(text, Totp())
    assert "canary" not in "".join(traceback.format_exception(caught.value))


def test_a_secret_is_not_in_its_repr() -> None:
    assert "123456" not in repr(Secret(key=b"1234567890"))


def private(path: Path, text: str = "GEZDGNBVGY3TQOJQ\n") -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_private_file_is_read(tmp_path: Path) -> None:
    assert read_reference(f"file:{private(tmp_path / 's')}") == "GEZDGNBVGY3TQOJQ"


def readable_by_others(folder: Path) -> Path:
    path = private(folder / "s")
    path.chmod(0o644)
    return path


def somebody_elses(folder: Path) -> Path:
    path = private(folder / "s")
    os.chown(path, 65534, -1)
    return path


def link(folder: Path) -> Path:
    (folder / "link").symlink_to(private(folder / "s"))
    return folder / "link"


def hard_link(folder: Path) -> Path:
    (folder / "link").hardlink_to(private(folder / "s"))
    return folder / "link"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "s", 0o600)
    return folder / "s"


def replaceable(folder: Path) -> Path:
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    return private(folder / "open" / "s")


def missing(folder: Path) -> Path:
    return folder / "s"


def empty(folder: Path) -> Path:
    return private(folder / "s", "\n")


@pytest.mark.parametrize(
    "made", [readable_by_others, somebody_elses, link, hard_link, pipe, replaceable, missing, empty]
)
def test_a_secrets_file_that_others_can_reach_is_refused(tmp_path: Path, made: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_reference(f"file:{made(tmp_path)}")
    assert "GEZDGNBV" not in "".join(traceback.format_exception(caught.value))


def test_a_command_gives_its_first_line_and_its_complaints_are_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    script = "echo canary-on-stderr >&2; printf 'GEZDGNBVGY3TQOJQ\\nlogin: me\\n'"
    assert read_reference(f'command:sh -c "{script}" $HOME') == "GEZDGNBVGY3TQOJQ"
    assert capfd.readouterr() == ("", "")


def test_a_command_is_not_given_to_a_shell(tmp_path: Path) -> None:
    assert read_reference(f"command:echo '$HOME;' > {tmp_path}/x") == f"$HOME; > {tmp_path}/x"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["false", "true", "/does/not/exist", "sh 'unbalanced", "sleep 600"])
def test_a_command_that_gives_nothing_is_refused_in_time(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "COMMAND_TIMEOUT", 0.5)
    began = time.monotonic()
    with pytest.raises(ConfigurationError):
        read_reference(f"command:{command}")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("secret", ["totp", "password"])
def test_the_program_that_gives_one_secret_does_not_inherit_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("FLCTL_TEST_OTHER", "canary of the other secret")
    program = f"command:sh -c 'env >{tmp_path}/env; echo GEZDGNBVGY3TQOJQ'"
    given = {"totp": program, "password": "env:FLCTL_TEST_OTHER"}
    if secret == "password":
        given = {"totp": given["password"], "password": given["totp"]}
    totp = Totp(automation="permitted", permission="by the test", secret=given["totp"])
    login = Login(host="h", kind="password+totp", totp=totp, password=Password(secret=given["password"]))
    site = Site(schema=1, name="s", login=login, scheduler=Scheduler(kind="slurm"), shapes={})
    assert codes.secret_of(site).key if secret == "totp" else codes.password_of(site)
    assert "PATH=" in (tmp_path / "env").read_text()
    assert "canary" not in (tmp_path / "env").read_text()
    assert read_reference("env:FLCTL_TEST_OTHER") == "canary of the other secret"


def test_a_secret_in_the_environment_is_taken_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLCTL_TEST_SECRET", "GEZDGNBVGY3TQOJQ")
    for _ in range(2):
        assert read_reference("env:FLCTL_TEST_SECRET") == "GEZDGNBVGY3TQOJQ"
        assert "FLCTL_TEST_SECRET" not in os.environ
    with pytest.raises(ConfigurationError):
        read_reference("env:FLCTL_TEST_NOT_SET")


def test_a_keyring_is_asked_through_its_package_or_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "lib")
    if not any((Path(folder) / "keyring").is_dir() for folder in sys.path):
        with pytest.raises(ConfigurationError, match="keyring package is not installed"):
            read_reference("keyring:site/me")
    package = tmp_path / "lib" / "keyring"
    package.mkdir()
    (package / "errors.py").write_text("class KeyringError(Exception): ...\n")
    (package / "__init__.py").write_text(
        "def get_password(service, user): return {('a/b', 'me'): 'GEZDGNBV'}.get((service, user))\n"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "keyring"]:
        monkeypatch.delitem(sys.modules, name)
    assert read_reference("keyring:a/b/me") == "GEZDGNBV"
    with pytest.raises(ConfigurationError, match="holds no secret"):
        read_reference("keyring:a/b/you")


# The ledger


def test_a_time_step_is_spent_once_and_the_next_one_is_announced() -> None:
    assert ledger.spend(b"secret" * 3, 30, now=1000.0) == 33
    with pytest.raises(CodeSpent) as caught:
        ledger.spend(b"secret" * 3, 30, now=1010.0)
    assert caught.value.until == 1020.0
    with pytest.raises(CodeSpent):
        ledger.check(b"secret" * 3, 30, now=1000.0)
    assert ledger.spend(b"secret" * 3, 30, now=1020.0) == 34
    assert ledger.spend(b"another" * 3, 30, now=1010.0) == 33


def test_a_code_that_is_about_to_expire_is_not_sent() -> None:
    with pytest.raises(CodeSpent) as caught:
        ledger.spend(b"secret" * 3, 30, now=1017.5)
    assert caught.value.until == 1020.0
    with pytest.raises(CodeSpent):
        ledger.check(b"secret" * 3, 30, now=1016.5)
    ledger.check(b"secret" * 3, 30, now=1014.9)
    assert ledger.spend(b"secret" * 3, 30, now=1016.9) == 33


def test_the_ledger_is_private_and_does_not_hold_the_secret(state: Path) -> None:
    ledger.spend(b"canary-canary", 30, now=1000.0)
    assert (state / "flctl").stat().st_mode & 0o777 == 0o700
    for path in (state / "flctl").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        assert b"canary" not in path.read_bytes() and b"canary".hex().encode() not in path.read_bytes()


def test_a_ledger_that_cannot_be_understood_spends_nothing(state: Path) -> None:
    ledger.spend(b"secret" * 3, 30, now=1000.0)
    (state / "flctl" / "codes.json").write_text('{"salt": "00", "used_un')
    with pytest.raises(ConfigurationError, match="cannot be understood"):
        ledger.spend(b"secret" * 3, 30, now=2000.0)


def test_a_ledger_that_others_can_enter_is_refused(state: Path) -> None:
    ledger.spend(b"secret" * 3, 30, now=1000.0)
    (state / "flctl").chmod(0o755)
    with pytest.raises(ConfigurationError, match="nobody else"):
        ledger.spend(b"secret" * 3, 30, now=2000.0)


def race(start: Any, results: Any) -> None:
    start.wait()
    try:
        results.put(ledger.spend(b"secret" * 3, 30, now=1000.0))
    except CodeSpent:
        results.put(None)


def test_of_many_processes_one_gets_the_code() -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    racers = [context.Process(target=race, args=(start, results)) for _ in range(12)]
    for racer in racers:
        racer.start()
    start.set()
    answers = [results.get(timeout=30) for _ in racers]
    for racer in racers:
        racer.join()
    assert sorted(answers, key=str) == [33, *[None] * 11]


# Keys


def test_a_key_file_lets_in(keyed: Sshd, tmp_path: Path) -> None:
    since = keyed.mark()
    told = []
    with connected(site_of(keyed), road_to(tmp_path, keyed, on_login=lambda *_: told.append(1))) as connection:
        assert connection.run("id -un").stdout == "flctl-login\n"
        assert (connection.logins, told) == (1, [1])
    counted = keyed.attempts(since)
    assert (counted.connections, counted.logins, counted.keys, counted.failed_keys) == (1, 1, 1, 0)


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_keys_of_other_types_let_in(keyed: Sshd, tmp_path: Path, kind: str) -> None:
    key = keygen(tmp_path / "key", kind=kind)
    keyed.authorize((tmp_path / "key.pub").read_text())
    with connected(site_of(keyed, key=str(key)), road_to(tmp_path, keyed)) as connection:
        assert connection.run("true").status == 0


def test_a_refused_key_is_tried_once(keyed: Sshd, tmp_path: Path) -> None:
    since = keyed.mark()
    with pytest.raises(LoginNeeded, match="refused") as caught:
        connect(site_of(keyed, key=str(keygen(tmp_path / "stranger"))), road_to(tmp_path, keyed))
    assert "flctl release" in caught.value.hint
    keyed.wait_for(GONE, since=since)
    counted = keyed.attempts(since)
    assert (counted.connections, counted.keys, counted.failed_keys) == (1, 0, 1)


@pytest.mark.parametrize("mode", [0o644, 0o640])
def test_a_key_that_others_can_read_is_not_used(keyed: Sshd, tmp_path: Path, mode: int) -> None:
    key = keygen(tmp_path / "key")
    key.chmod(mode)
    since = keyed.mark()
    with pytest.raises(ConfigurationError, match="closed to everybody else"):
        connect(site_of(keyed, key=str(key)), road_to(tmp_path, keyed))
    assert keyed.attempts(since).connections == 0


def test_a_missing_key_is_a_mistake_in_the_profile(keyed: Sshd, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        connect(site_of(keyed, key=str(tmp_path / "none")), road_to(tmp_path, keyed))


def test_a_key_with_a_passphrase_needs_the_agent(keyed: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = keygen(tmp_path / "key", passphrase="canary words")
    keyed.authorize((tmp_path / "key.pub").read_text())
    site, road, since = site_of(keyed, key=str(key)), road_to(tmp_path, keyed), keyed.mark()
    with pytest.raises(LoginNeeded) as caught:
        connect(site, road)
    assert caught.value.hint == f"ssh-add {key}"
    assert keyed.attempts(since).connections == 0
    others = [keygen(tmp_path / f"other{n}") for n in range(6)]
    with agent(*others, key, passphrase="canary words") as address:
        monkeypatch.setenv("SSH_AUTH_SOCK", address)
        with connected(site, road) as connection:
            assert connection.run("true").status == 0
    assert keyed.attempts(since).failed_keys == 0


def test_an_agents_key_lets_in(keyed: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = keygen(tmp_path / "key")
    keyed.authorize((tmp_path / "key.pub").read_text())
    with agent(key) as address:
        monkeypatch.setenv("SSH_AUTH_SOCK", address)
        with connected(site_of(keyed, key="agent"), road_to(tmp_path, keyed)) as connection:
            assert connection.run('echo "agent:$SSH_AUTH_SOCK"; tty').stdout == "agent:\nnot a tty\n"


def test_without_an_agent_it_is_said_and_nothing_is_sent(keyed: Sshd, tmp_path: Path) -> None:
    since = keyed.mark()
    with pytest.raises(LoginNeeded, match="holds a key") as caught:
        connect(site_of(keyed, key="agent"), road_to(tmp_path, keyed))
    assert "ssh-add" in caught.value.hint and "SSH_AUTH_SOCK" in caught.value.hint
    assert keyed.attempts(since).connections == 0


def test_an_agent_full_of_keys_does_not_try_them_all(
    keyed: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    since = keyed.mark()
    with agent(*(keygen(tmp_path / f"key{n}") for n in range(7))) as address:
        monkeypatch.setenv("SSH_AUTH_SOCK", address)
        with pytest.raises(ConfigurationError, match="7 keys"):
            connect(site_of(keyed, key="agent"), road_to(tmp_path, keyed))
    assert keyed.attempts(since).connections == 0


def test_certificates_for_other_sites_are_offered_on_neither_road(
    keyed: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With them the agent holds seven keys, and a server hangs up after six."""
    authority, key = keygen(tmp_path / "authority"), keygen(tmp_path / "key")
    keyed.authorize((tmp_path / "key.pub").read_text())
    others = [keygen(tmp_path / f"other{n}") for n in range(3)]
    signed = [f"{other}.pub" for other in others]
    subprocess.run(["ssh-keygen", "-q", "-s", authority, "-I", "me", "-n", "me", "-V", "+1h", *signed], check=True)
    (tmp_path / "file").write_text("x")
    since = keyed.mark()
    with agent(*others, key, certificates=True) as address:
        monkeypatch.setenv("SSH_AUTH_SOCK", address)
        with connected(site_of(keyed, key="agent"), road_to(tmp_path, keyed)) as connection:
            connection.push(tmp_path, ["file"], keyed.account.home / "in")
    seen = keyed.attempts(since)
    assert (seen.connections, seen.logins, seen.failed_keys) == (2, 2, 2 * len(others))


def test_a_certificate_lets_in_and_the_key_alone_does_not(certified: Sshd, tmp_path: Path) -> None:
    with connected(site_of(certified), road_to(tmp_path, certified)) as connection:
        assert connection.run("true").status == 0
    with pytest.raises(LoginNeeded, match="refused"):
        connect(site_of(certified, kind="key"), road_to(tmp_path, certified))


def test_an_expired_certificate_is_not_offered(certified: Sshd, tmp_path: Path) -> None:
    key = keygen(tmp_path / "key")
    certified.certify(tmp_path / "key.pub", validity="-2h:-1h")
    since = certified.mark()
    with pytest.raises(LoginNeeded, match="certificate ended at"):
        connect(site_of(certified, key=str(key)), road_to(tmp_path, certified))
    (tmp_path / "key-cert.pub").unlink()
    with pytest.raises(LoginNeeded, match="there is no certificate"):
        connect(site_of(certified, key=str(key)), road_to(tmp_path, certified))
    assert certified.attempts(since).connections == 0


def test_an_agents_certificate_lets_in(certified: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = keygen(tmp_path / "key")
    certified.certify(tmp_path / "key.pub")
    with agent(key, certificates=True) as address:
        monkeypatch.setenv("SSH_AUTH_SOCK", address)
        with connected(site_of(certified, key="agent"), road_to(tmp_path, certified)) as connection:
            assert connection.run("true").status == 0


def test_a_certificate_of_a_key_with_a_passphrase_is_signed_for_by_the_agent(
    certified: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = keygen(tmp_path / "key", passphrase="canary words")
    certified.certify(tmp_path / "key.pub")
    with agent(key, passphrase="canary words") as address:
        monkeypatch.setenv("SSH_AUTH_SOCK", address)
        with connected(site_of(certified, key=str(key)), road_to(tmp_path, certified)) as connection:
            assert connection.run("true").status == 0


# Host keys


def credentials_sent(server: Sshd, since: int) -> int:
    counted = server.attempts(since)
    return counted.keys + counted.failed_keys + counted.codes + counted.failed_codes


def test_an_unknown_host_key_is_refused_before_anything_is_sent(keyed: Sshd, tmp_path: Path) -> None:
    site, road, since = site_of(keyed), road_to(tmp_path), keyed.mark()
    with pytest.raises(HostKeyRefused) as caught:
        connect(site, road)
    assert keyed.host_key_fingerprint in caught.value.message
    assert f"flctl site trust {site.name} {keyed.host_key_fingerprint}" in caught.value.hint
    keyed.wait_for(GONE, since=since)
    assert credentials_sent(keyed, since) == 0
    assert road.known_hosts.read_text() == ""


def test_trusting_a_fingerprint_lets_in_and_another_one_does_not(keyed: Sshd, tmp_path: Path) -> None:
    site, road, since = site_of(keyed), road_to(tmp_path), keyed.mark()
    with pytest.raises(HostKeyRefused, match="no host of the site shows"):
        trust(site, "SHA256:" + "A" * 43, road.known_hosts)
    assert host_key(site, road.known_hosts).fingerprint == keyed.host_key_fingerprint
    for _ in range(2):
        trust(site, keyed.host_key_fingerprint, road.known_hosts)
    assert credentials_sent(keyed, since) == 0
    assert road.known_hosts.read_text() == keyed.known_hosts_line
    with connected(site, road) as connection:
        assert connection.run("true").status == 0


def test_a_changed_host_key_is_refused_until_it_is_trusted(tmp_path: Path) -> None:
    with Sshd(name="login-new", address=ADDRESS, port=2244, user="flctl-login") as server:
        site, road, before = site_of(server), road_to(tmp_path, server), server.host_key_fingerprint
        server.restart(new_host_key=True)
        with pytest.raises(HostKeyRefused, match="has changed") as caught:
            connect(site, road)
        assert before in caught.value.message and server.host_key_fingerprint in caught.value.message
        assert credentials_sent(server, 0) == 0
        trust(site, server.host_key_fingerprint, road.known_hosts)
        assert road.known_hosts.read_text() == server.known_hosts_line
        with connected(site, road) as connection:
            assert connection.run("true").status == 0


def own_known_hosts(text: str) -> None:
    (Path.home() / ".ssh" / "known_hosts").write_text(text)


def hashed(server: Sshd, tmp_path: Path) -> str:
    path = tmp_path / "hashed"
    path.write_text(server.known_hosts_line)
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(path)], check=True, capture_output=True)
    return path.read_text()


@pytest.mark.parametrize("how", ["plain", "hashed", "wildcard", "without port", "among garbage", "published"])
def test_a_key_known_to_the_user_is_copied_once_into_the_campaigns_file(keyed: Sshd, tmp_path: Path, how: str) -> None:
    fingerprints: tuple[str, ...] = ()
    if how == "published":
        fingerprints = ("SHA256:" + "B" * 43, keyed.host_key_fingerprint)
    own_known_hosts(
        {
            "plain": keyed.known_hosts_line,
            "hashed": hashed(keyed, tmp_path),
            "wildcard": f"[127.0.0.*]:{keyed.port},*.example.org {keyed.host_key_line} a comment\n",
            "without port": f"{keyed.address} {keyed.host_key_line}\n",
            "among garbage": f"\n# a note\n@cert-authority *.x ssh-rsa AAAA\ngarbage\n{keyed.known_hosts_line}@x y\n",
            "published": "",
        }[how]
    )
    site, road = site_of(keyed, host_keys=fingerprints), road_to(tmp_path)
    for _ in range(2):
        with connected(site, road) as connection:
            assert connection.run("true").status == 0
    assert road.known_hosts.read_text() == keyed.known_hosts_line


def test_a_revoked_host_key_is_refused_although_it_is_known(keyed: Sshd, tmp_path: Path) -> None:
    road = road_to(tmp_path, keyed)
    own_known_hosts(f"@revoked * {keyed.host_key_line}\n")
    since = keyed.mark()
    with pytest.raises(HostKeyRefused, match="revoked"):
        connect(site_of(keyed), road)
    assert credentials_sent(keyed, since) == 0


def test_of_several_host_keys_the_known_one_is_asked_for(tmp_path: Path) -> None:
    second = keygen(tmp_path / "second", kind="ecdsa")
    with Sshd(
        name="login-two", address=ADDRESS, port=2245, user="flctl-login", options=(f"HostKey {second}",)
    ) as server:
        road = road_to(tmp_path)
        words = (tmp_path / "second.pub").read_text().split()
        road.known_hosts.write_text(f"[{server.address}]:{server.port} {words[0]} {words[1]}\n")
        with connected(site_of(server), road) as connection:
            assert connection.run("true").status == 0


@pytest.fixture
def vouched() -> Iterator[Sshd]:
    """A server that shows its host key with a certificate."""
    server = Sshd(name="login-hostcert", address=ADDRESS, port=2246, user="flctl-login", host_certificate=True)
    with server:
        yield server
    remove("login-hostcert")


def test_a_host_certificate_is_honoured_while_its_authority_is_known(vouched: Sshd, tmp_path: Path) -> None:
    site, road, since = site_of(vouched), road_to(tmp_path), vouched.mark()
    authority = vouched.host_authority_line.split(maxsplit=2)[2]
    own_known_hosts(f"@cert-authority *.elsewhere.org {authority}")
    with pytest.raises(HostKeyRefused, match="is unknown"):
        connect(site, road)
    assert credentials_sent(vouched, since) == 0
    own_known_hosts(f"@cert-authority [127.0.0.*]:* {authority}")
    with connected(site, road) as connection:
        assert connection.run("true").status == 0
    assert vouched.attempts(since).connections == 2
    assert road.known_hosts.read_text() == vouched.host_authority_line
    own_known_hosts("")
    vouched.restart(new_host_key=True)
    with connected(site, road) as connection:
        assert connection.run("true").status == 0


def test_both_roads_judge_a_host_by_its_certificate(vouched: Sshd, tmp_path: Path) -> None:
    site, road = site_of(vouched), road_to(tmp_path)
    own_known_hosts(vouched.host_authority_line)
    (tmp_path / "note").write_text("hello")
    where = vouched.account.home / "vouched"
    with connected(site, road) as connection:
        connection.push(tmp_path, ["note"], PurePosixPath(where))
        assert connection.run(f"cat {where}/note").stdout == "hello"
    vouched.certify_host(validity="-2h:-1h")
    vouched.restart()
    with connected(replace_keys(site, vouched), road) as connection:
        connection.push(tmp_path, ["note"], PurePosixPath(where))
    vouched.account.empty_home()


def test_a_certificate_that_ends_between_two_transfers_is_named(vouched: Sshd, tmp_path: Path) -> None:
    site, road = site_of(vouched), road_to(tmp_path)
    own_known_hosts(vouched.host_authority_line)
    with connected(site, road):
        pass
    vouched.certify_host(validity="-2h:-1h")
    vouched.restart()
    (tmp_path / "note").write_text("hello")
    since, carrier = vouched.mark(), OverSsh(site, road, lambda place: None)
    with pytest.raises(HostKeyRefused, match="certificate that does not count: it is valid from"):
        push(carrier, tmp_path, ["note"], PurePosixPath("/tmp"))
    carrier.close()
    assert credentials_sent(vouched, since) == 0


def replace_keys(site: Site, server: Sshd) -> Site:
    return dataclasses.replace(site, login=dataclasses.replace(site.login, host_keys=(server.host_key_fingerprint,)))


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ({"validity": "-2h:-1h"}, "it is valid from"),
        ({"validity": "+1h:+2h"}, "it is valid from"),
        ({"principals": "elsewhere.example,127.0.0.4"}, "it is for elsewhere.example, 127.0.0.4"),
    ],
)
def test_a_host_certificate_that_does_not_hold_here_is_refused(
    vouched: Sshd, tmp_path: Path, made: dict[str, str], why: str
) -> None:
    own_known_hosts(vouched.host_authority_line)
    vouched.certify_host(**made)
    vouched.restart()
    since = vouched.mark()
    with pytest.raises(HostKeyRefused, match=why):
        connect(site_of(vouched), road_to(tmp_path))
    assert credentials_sent(vouched, since) == 0
    vouched.certify_host(principals="127.0.0.?*")
    vouched.restart()
    with connected(site_of(vouched), road_to(tmp_path)) as connection:
        assert connection.run("true").status == 0


@pytest.mark.parametrize("which", ["key", "authority", "another authority"])
def test_what_is_revoked_is_refused_whatever_certificate_comes_with_it(
    vouched: Sshd, tmp_path: Path, which: str
) -> None:
    line = vouched.host_authority_line
    revoked = {"key": vouched.host_key_line, "authority": line.split(maxsplit=2)[2]}
    own_known_hosts(line + f"@revoked * {revoked.get(which, '')}\n")
    if which == "another authority":
        keygen(tmp_path / "another")
        own_known_hosts(f"@cert-authority * {(tmp_path / 'another.pub').read_text()}")
    why = {"another authority": "names another authority"}.get(which, "revoked")
    since = vouched.mark()
    with pytest.raises(HostKeyRefused, match=why):
        connect(site_of(vouched), road_to(tmp_path))
    assert credentials_sent(vouched, since) == 0


def test_a_revoked_authority_makes_a_known_key_refused_as_ssh_does(vouched: Sshd, tmp_path: Path) -> None:
    road, site = road_to(tmp_path, vouched), site_of(vouched)
    with road.known_hosts.open("a") as stream:
        stream.write(f"@revoked * {vouched.host_authority_line.split(maxsplit=2)[2]}")
    since = vouched.mark()
    with pytest.raises(HostKeyRefused, match=r"authority of the host key .* is marked as revoked"):
        connect(site, road)
    argv = [*ssh(site, login_place(site), road.known_hosts), vouched.address, "true"]
    ran = subprocess.run(argv, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (ran.returncode, "REVOKED HOST KEY" in ran.stderr) == (255, True)
    assert credentials_sent(vouched, since) == 0


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
def test_every_kind_of_key_and_authority_is_judged_as_ssh_keygen_signs_it(tmp_path: Path, kind: str) -> None:
    authority, host = keygen(tmp_path / "authority", kind=kind), keygen(tmp_path / "host", kind=kind)
    argv = ["ssh-keygen", "-q", "-s", str(authority), "-I", "h", "-h", "-n", "*.example.org", "-V", "-1m:+1h"]
    subprocess.run([*argv, str(host) + ".pub"], check=True)
    certificate = base64.b64decode((tmp_path / "host-cert.pub").read_text().split()[1])
    key, signer = (
        base64.b64decode((tmp_path / f"{name}.pub").read_text().split()[1]) for name in ("host", "authority")
    )
    place = Place(host="Login1.example.org", port=22, user="me")
    assert hostcertificates.objection(certificate, key, place, {signer}) == ""
    assert "another authority" in hostcertificates.objection(certificate, key, place, {key})
    assert "not one of this host key" in hostcertificates.objection(certificate, signer, place, {signer})
    broken = certificate[:-5] + bytes([certificate[-5] ^ 1]) + certificate[-4:]
    assert "signature is wrong" in hostcertificates.objection(broken, key, place, {signer})
    subprocess.run([*[word for word in argv if word != "-h"], str(host) + ".pub"], check=True)
    user = base64.b64decode((tmp_path / "host-cert.pub").read_text().split()[1])
    assert "not one of this host key" in hostcertificates.objection(user, key, place, {signer})


def test_an_authority_that_signs_with_sha1_is_not_believed(tmp_path: Path) -> None:
    authority, host = keygen(tmp_path / "authority", kind="rsa"), keygen(tmp_path / "host")
    argv = [
        "ssh-keygen",
        "-q",
        "-t",
        "ssh-rsa",
        "-s",
        str(authority),
        "-I",
        "h",
        "-h",
        "-n",
        "a.example",
        str(host) + ".pub",
    ]
    subprocess.run(argv, check=True)
    certificate = base64.b64decode((tmp_path / "host-cert.pub").read_text().split()[1])
    key, signer = (
        base64.b64decode((tmp_path / f"{name}.pub").read_text().split()[1]) for name in ("host", "authority")
    )
    place = Place(host="a.example", port=22, user="me")
    assert "SHA-1" in hostcertificates.objection(certificate, key, place, {signer})


def test_trusting_a_host_leaves_the_other_lines_alone(tmp_path: Path) -> None:
    path, place = tmp_path / "known_hosts", Place(host="a.example", port=22, user="me")
    blob = base64.b64encode(b"old").decode()
    kept = f"# mine\n@cert-authority * ssh-ed25519 {blob}\nb.example ssh-ed25519 {blob}\n"
    path.write_text(kept + f"a.example,c.example ssh-ed25519 {blob}\na.example ssh-rsa {blob}\n")
    hostkeys.replace(path, place, hostkeys.HostKey(kind="ssh-ed25519", blob=b"new"))
    new = base64.b64encode(b"new").decode()
    assert path.read_text() == kept + f"c.example ssh-ed25519 {blob}\na.example ssh-ed25519 {new}\n"


# One-time codes


def test_key_and_code_let_in_with_one_attempt(coded: Sshd, secret: str, tmp_path: Path) -> None:
    since = coded.mark()
    with connected(site_of(coded, secret=secret), road_to(tmp_path, coded)) as connection:
        assert connection.run("id -un").stdout == "flctl-login\n"
        assert connection.logins == 1
    counted = coded.attempts(since)
    assert (counted.connections, counted.keys, counted.codes, counted.failed_codes) == (1, 1, 1, 0)


def test_codes_of_eight_digits_are_sent_where_the_profile_says_so(coded: Sshd, tmp_path: Path) -> None:
    early_in_a_step()
    reference = secret_file(tmp_path, coded.reset_codes(period=30, digits=8))
    with connected(site_of(coded, secret=reference, totp={"digits": 8}), road_to(tmp_path, coded)) as connection:
        assert connection.run("true").status == 0


def test_a_wrong_secret_costs_exactly_one_attempt(coded: Sshd, secret: str, tmp_path: Path) -> None:
    site, road, since = (
        site_of(coded, secret=secret_file(tmp_path, another_secret())),
        road_to(tmp_path, coded),
        coded.mark(),
    )
    with pytest.raises(LoginNeeded, match="refused the one-time code") as caught:
        connect(site, road)
    assert not isinstance(caught.value, CodeSpent)
    assert (
        "clock" in caught.value.hint
        and "login.totp.secret" in caught.value.hint
        and "flctl release" in caught.value.hint
    )
    coded.wait_for(GONE, since=since)
    counted = coded.attempts(since)
    assert (counted.connections, counted.keys, counted.codes, counted.failed_codes) == (1, 1, 0, 1)


def test_a_used_code_is_not_sent_again_and_no_connection_is_made(coded: Sshd, secret: str, tmp_path: Path) -> None:
    site, road = site_of(coded, secret=secret), road_to(tmp_path, coded)
    with connected(site, road):
        pass
    since = coded.mark()
    with pytest.raises(CodeSpent) as caught:
        connect(site, road)
    assert 0 < caught.value.until - time.time() <= 30 and caught.value.until % 30 == 0
    assert coded.attempts(since).connections == 0


RACER = """
import sys
from pathlib import Path
from flctl.errors import CodeSpent
from flctl.facility.connection import connect
from tests.ssh_sites import road_to, site_of
from tests.testbed.sshd import Sshd
server = Sshd(name="login-code", address="{address}", port=2243, user="flctl-login", kind="key+totp")
folder = Path(sys.argv[1])
folder.mkdir()
site, road = site_of(server, secret=sys.argv[2]), road_to(folder, server)
print("ready", flush=True)
sys.stdin.readline()
try:
    connect(site, road).close()
    print("in")
except CodeSpent:
    print("spent")
"""


def test_of_two_processes_that_want_one_code_one_gets_it(coded: Sshd, secret: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", RACER.replace("{address}", ADDRESS)]
    racers = [
        subprocess.Popen(
            [*argv, str(tmp_path / str(n)), secret], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    early_in_a_step()
    since = coded.mark()
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    answers = sorted(racer.communicate(timeout=60)[0] for racer in racers)
    assert answers == ["in\n", "spent\n"]
    counted = coded.attempts(since)
    assert (counted.codes, counted.failed_codes) == (1, 0)


def pam(server: Sshd, line: str) -> None:
    path = Path("/etc/pam.d") / f"flctl-sshd-{server.name}"
    path.write_text(f"{line}\naccount required pam_unix.so\nsession required pam_permit.so\n")


def test_a_question_that_is_not_for_a_code_is_shown_and_not_answered(coded: Sshd, secret: str, tmp_path: Path) -> None:
    pam(coded, "auth required pam_unix.so")
    since = coded.mark()
    with pytest.raises(LoginNeeded, match=r"'Password:'.*nothing was answered") as caught:
        connect(site_of(coded, secret=secret), road_to(tmp_path, coded))
    assert "login.totp.prompt" in caught.value.hint
    coded.wait_for(GONE, since=since)
    assert coded.attempts(since).failed_codes == 0
    assert "authentication failure" not in coded.log_text(since)
    coded.reset_codes()


def test_a_second_question_after_the_code_is_not_answered(coded: Sshd, secret: str, tmp_path: Path) -> None:
    module = re.findall(r"auth required (.*)", (Path("/etc/pam.d") / f"flctl-sshd-{coded.name}").read_text())[0]
    pam(coded, f"auth required {module}\nauth required {module}")
    with pytest.raises(LoginNeeded, match="asked again"):
        connect(site_of(coded, secret=secret), road_to(tmp_path, coded))
    coded.reset_codes()


def test_a_refusal_without_any_question_is_told_apart(coded: Sshd, secret: str, tmp_path: Path) -> None:
    pam(coded, "auth required pam_deny.so")
    with pytest.raises(LoginNeeded, match="without asking for a code"):
        connect(site_of(coded, secret=secret), road_to(tmp_path, coded))
    coded.reset_codes()


@pytest.mark.parametrize("totp", [{"automation": "forbidden"}, {"permission": ""}])
def test_a_code_is_not_automated_without_the_facilitys_permission(
    coded: Sshd, secret: str, tmp_path: Path, totp: dict[str, str]
) -> None:
    since = coded.mark()
    with pytest.raises(ConfigurationError) as caught:
        connect(site_of(coded, secret=secret, totp=totp), road_to(tmp_path, coded))
    assert "permits" in f"{caught.value.message} {caught.value.hint}"
    assert (caught.value.exit_code, caught.value.site) == (3, coded.name)
    assert coded.attempts(since).connections == 0


def test_a_site_that_wants_a_code_unexpectedly_is_not_given_one(coded: Sshd, tmp_path: Path) -> None:
    with pytest.raises(LoginNeeded, match="wants more: keyboard-interactive") as caught:
        connect(site_of(coded, kind="key"), road_to(tmp_path, coded))
    assert "key+totp" in caught.value.hint


def test_neither_secret_nor_code_is_in_any_command_line_or_environment(
    coded: Sshd, secret: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    text = coded.totp_secret
    code = parse_secret(text, Totp()).code(time.time())
    reference = f"command:{sys.executable} -c \"import time; time.sleep(0.3); print(open('{secret[5:]}').read())\""
    road = road_to(tmp_path, coded)
    with Watch(text, code) as watch, connected(site_of(coded, secret=reference), road) as connection:
        connection.run("sleep 0.2")
    assert watch.looks > 10 and watch.found == []
    assert text not in caplog.text and not re.search(rf"\b{code}\b", caplog.text)
    for path in [*tmp_path.rglob("*")]:
        if path.is_file() and path.name != "secret":
            assert text.encode() not in path.read_bytes()


def test_errors_carry_the_sites_name(coded: Sshd, tmp_path: Path) -> None:
    road: Road = road_to(tmp_path, coded)
    with pytest.raises(ConfigurationError) as caught:
        connect(site_of(coded, secret="file:/does/not/exist"), road)
    assert caught.value.site == coded.name
