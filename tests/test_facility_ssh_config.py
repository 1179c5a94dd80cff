"""What ~/.ssh/config adds to a profile, read by the real ssh; and logins that need it, to real sshds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flctl.campaign.creation import create
from flctl.campaign.report import summary
from flctl.errors import ConfigurationError
from flctl.facility import ssh_config
from flctl.facility.openssh import jump_place, login_place
from flctl.facility.profile import Login, Site, Transfer, missing
from flctl.facility.ssh_config import effective
from flctl.records import Contact
from tests.campaigns import make_model
from tests.ssh_sites import connected, keygen, local_site, road_to, site_of
from tests.testbed.facility import toml
from tests.testbed.sshd import Sshd

USER = "flctl-auth"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def server() -> Iterator[Sshd]:
    with Sshd(name="auth-conf", address="127.0.0.77", port=2730, user=USER) as started:
        yield started


@pytest.fixture(scope="module")
def gate() -> Iterator[Sshd]:
    with Sshd(name="auth-door", address="127.0.0.78", port=2731, user="flctl-gate") as started:
        yield started


def said(home: Path, text: str) -> None:
    """Write ~/.ssh/config."""
    path = home / ".ssh" / "config"
    path.write_text(text)
    path.chmod(0o600)


def bare(host: str = "alias", **login: Any) -> Site:
    site = replace(local_site(), name="site", connection="ssh")
    return replace(site, login=Login(**{"host": host, **login}))


def test_without_the_file_the_profile_is_all_there_is(home: Path) -> None:
    site = bare(user="me")
    assert effective(site) is site
    assert effective(local_site()) == local_site()


def test_what_the_profile_leaves_open_is_filled_in(home: Path) -> None:
    key = keygen(home / ".ssh" / "id_site")
    said(
        home,
        "Host alias\n HostName login.example.org\n User root\n Port 2022\n IdentityFile ~/.ssh/id_none\n"
        " IdentityFile ~/.ssh/id_site\n ProxyJump me@gate.example.org:2200\nHost *\n ServerAliveInterval 5\n",
    )
    site = effective(bare())
    login = site.login
    assert (login.host, login.user, login.port, login.key) == ("login.example.org", "root", 2022, str(key))
    assert login.proxy_jump == "me@gate.example.org:2200"
    assert "login.user" in missing(bare()) and "login.user" not in missing(site)


def test_what_the_profile_says_stays(home: Path) -> None:
    said(home, "Host *\n User other\n Port 2022\n IdentityFile ~/.ssh/config\n ProxyJump other\n")
    given = bare("login.example.org", user="me", port=23, key="/keys/mine", proxy_jump="gate.example.org:24")
    assert effective(given).login == replace(given.login, proxy_jump="other@gate.example.org:24")


def test_a_jump_host_may_be_written_as_an_address(home: Path) -> None:
    said(home, "Host alias\n ProxyJump ssh://me@gate.example.org:2200\n")
    assert effective(bare(user="me")).login.proxy_jump == "me@gate.example.org:2200"


def test_what_the_file_does_not_say_is_not_taken_from_ssh_itself(home: Path) -> None:
    (home / ".ssh" / "id_ed25519").write_text("a key that ssh would try")
    said(home, "Host other\n User you\n")
    assert effective(bare()) == bare()


@pytest.mark.parametrize(
    "option",
    ["StrictHostKeyChecking no", "UserKnownHostsFile /dev/null", "ForwardAgent yes", "ProxyCommand nc %h %p"],
)
def test_what_is_not_an_address_user_or_key_is_left_alone(home: Path, option: str) -> None:
    said(home, f"Host *\n {option}\n")
    assert effective(bare(user="me")) == bare(user="me")


def test_a_jump_host_is_found_by_its_alias(home: Path) -> None:
    said(home, "Host alias\n ProxyJump door\nHost door\n HostName gate.example.org\n User me\n Port 2200\n")
    assert effective(bare(user="you")).login.proxy_jump == "me@gate.example.org:2200"
    place = jump_place(effective(bare(user="you", proxy_jump="him@door")))
    assert place is not None and (place.user, place.host, place.port) == ("him", "gate.example.org", 2200)


@pytest.mark.parametrize("way", ["first,second", "door"])
def test_a_way_through_several_hosts_is_refused(home: Path, way: str) -> None:
    said(home, f"Host alias\n ProxyJump {way}\nHost door\n ProxyJump outer\n")
    with pytest.raises(ConfigurationError, match="one jump host at most") as caught:
        effective(bare(user="me"))
    assert "login.proxy_jump" in caught.value.hint and caught.value.site == "site"


def test_the_transfer_host_has_an_alias_of_its_own(home: Path) -> None:
    said(home, "Host mover\n HostName data.example.org\n Port 2022\n User other\n")
    site = effective(replace(bare(user="me"), transfer=Transfer(host="mover", shell=False)))
    assert site.transfer == Transfer(host="data.example.org", port=2022, shell=False)
    assert site.login.user == "me"


def test_a_key_without_a_certificate_does_not_hide_the_agents(home: Path) -> None:
    keygen(home / ".ssh" / "id_site")
    said(home, "Host alias\n IdentityFile ~/.ssh/id_site\n CertificateFile ~/.ssh/signed.pub\n")
    site = bare(user="me", kind="certificate")
    assert effective(site) == site
    (home / ".ssh" / "signed.pub").write_text("a certificate")
    effective.__globals__["_said"].cache_clear()
    login = effective(site).login
    assert (login.key, login.certificate) == (str(home / ".ssh" / "id_site"), str(home / ".ssh" / "signed.pub"))


def test_a_kind_without_a_key_gets_none(home: Path) -> None:
    keygen(home / ".ssh" / "id_site")
    said(home, "Host alias\n IdentityFile ~/.ssh/id_site\n")
    assert effective(bare(user="me", kind="totp")).login.key == "agent"


def test_a_file_that_ssh_cannot_read_is_said(home: Path) -> None:
    said(home, "Host *\n NoSuchOption yes\n")
    with pytest.raises(ConfigurationError, match="nosuchoption") as caught:
        effective(bare())
    assert "ssh -G alias" in caught.value.hint


def test_a_file_that_others_may_write_is_refused(home: Path) -> None:
    said(home, "Host *\n User me\n")
    (home / ".ssh" / "config").chmod(0o666)
    with pytest.raises(ConfigurationError, match="Bad owner or permissions on"):
        effective(bare())


@pytest.mark.parametrize("line", ["HostName -oProxyCommand=x", 'HostName "a b"', "User -lroot", 'User "me;id"'])
def test_what_could_be_taken_for_an_option_or_a_command_is_refused(home: Path, line: str) -> None:
    said(home, f"Host alias\n {line}\n")
    with pytest.raises(ConfigurationError, match="a name that flctl does not use"):
        effective(bare())


def test_an_ssh_that_is_missing_or_does_not_answer_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said(home, 'Match exec "sleep 60"\n User me\n')
    monkeypatch.setattr(ssh_config, "TIMEOUT", 0.3)
    with pytest.raises(ConfigurationError, match="it did not answer within"):
        effective(bare())
    monkeypatch.setenv("PATH", str(home))
    with pytest.raises(ConfigurationError, match="No such file or directory") as caught:
        effective(bare())
    assert "OpenSSH's client installed" in caught.value.hint


def test_status_asks_ssh_nothing(home: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "start")
    profile = {
        "schema": 1,
        "name": "far",
        "login": {"host": "alias", "kind": "certificate"},
        "scheduler": {"kind": "slurm"},
        "shapes": {"prod": {"walltime": "01:00:00"}},
        "storage": {"work": "/work", "data": "/data"},
    }
    workspace = create(tmp_path / "camp", profiles={"far": toml(profile)}, model=tmp_path / "start")
    workspace.save_contact("far", Contact(login_until=2e9))
    said(home, f'Match exec "touch {home}/asked"\n User me\n')
    assert summary(workspace, ())["logins"]["far"]["until"] == 2e9
    assert not (home / "asked").exists()


def test_a_login_by_alias_goes_through_the_jump_host_of_the_file(
    server: Sshd, gate: Sshd, home: Path, tmp_path: Path
) -> None:
    gate.authorize(server.client_key.with_suffix(".pub").read_text())
    said(
        home,
        f"Host site\n HostName {server.address}\n Port {server.port}\n User {USER}\n IdentityFile {server.client_key}\n"
        f" ProxyJump door\nHost door\n HostName {gate.address}\n Port {gate.port}\n User flctl-gate\n",
    )
    site = effective(replace(site_of(server), login=Login(host="site")))
    assert (login_place(site).host, login_place(site).port) == (server.address, server.port)
    seen, passed = server.mark(), gate.mark()
    with connected(site, road_to(tmp_path, server, gate)) as connection:
        assert connection.run("id -un").stdout == f"{USER}\n"
    assert (server.attempts(seen).logins, gate.attempts(passed).logins) == (1, 1)
