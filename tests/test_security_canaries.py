"""Passwords, passphrases, keys, secrets of one-time codes and every code made of them, in a whole campaign over real
sshds: nowhere to be found."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from flctl.facility.codes import parse_secret
from flctl.facility.profile import Totp
from tests.ssh_campaigns import SshCampaign
from tests.ssh_sites import Watch, agent, early_in_a_step, keygen, secret_file
from tests.testbed.sshd import Sshd

PASSPHRASE = "canary of a passphrase"
DEFECT = """
import sys
from flctl.facility import codes
def broken(secret, totp, real=codes.parse_secret):
    made = real(secret, totp), secret
    raise ZeroDivisionError("provoked")
codes.parse_secret = broken
from flctl.cli.main import main
sys.exit(main())
"""
"""flctl with a defect at the moment at which it has the secrets in its hands."""


class Ways(SshCampaign):
    """A campaign with a way to log in of its own at each site."""

    def __init__(self, root: Path, ways: dict[Sshd, dict[str, Any]]) -> None:
        self.ways = {server.name: way for server, way in ways.items()}
        super().__init__(root, *ways)

    def profile(self, name: str, **fields: Any) -> None:
        self.login = dict(self.ways[name])
        super().profile(name, **fields)


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Sshd]]:
    with ExitStack() as stack:
        yield {
            kind: stack.enter_context(
                Sshd(name=f"canary-{n}", address="127.0.97.3", port=24760 + n, user=f"flctl-can{n}", kind=kind)
            )
            for n, kind in enumerate(("key", "key+totp", "password+totp"))
        }


def leaks(
    roots: Sequence[Path], secrets: Sequence[str], codes: Sequence[str], *, kept: Sequence[Path] = ()
) -> list[str]:
    """Files below these folders that hold a secret, or a code as a word of its own (not within weights, where any six
    digits turn up by chance)."""
    words = re.compile(rb"(?<![0-9A-Za-z.])(?:" + b"|".join(code.encode() for code in codes) + rb")(?![0-9A-Za-z])")
    found = []
    for path in (path for root in roots for path in root.rglob("*") if path.is_file() and path not in kept):
        content = path.read_bytes()
        if any(secret.encode() in content for secret in secrets):
            found.append(f"{path}: a secret")
        elif path.suffix != ".safetensors" and path.name != "tokenizer.json" and words.search(content):
            found.append(f"{path}: a code")
    return found


def test_no_secret_and_no_code_is_anywhere(
    servers: dict[str, Sshd], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, both, keyed = tmp_path / "mine", servers["password+totp"], servers["key+totp"]
    for path in (mine, mine / "password", mine / "codes", mine / "more-codes", tmp_path / "camp"):
        path.mkdir(mode=0o700)
    key = keygen(mine / "key", passphrase=PASSPHRASE)
    servers["key"].authorize(key.with_suffix(".pub").read_text())
    permitted = {"totp.automation": "permitted", "totp.permission": "by the test"}
    secrets = [both.reset_codes(), keyed.reset_codes()]
    ways = {
        servers["key"]: {"key": "agent"},
        keyed: {**permitted, "totp.secret": secret_file(mine / "codes", secrets[1])},
        both: {
            **permitted,
            "totp.secret": secret_file(mine / "more-codes", secrets[0]),
            "password.secret": secret_file(mine / "password", both.reset_password()),
        },
    }
    words = [*secrets, both.password, PASSPHRASE, key.read_text().splitlines()[3]]
    words.append(keyed.client_key.read_text().splitlines()[3])
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("FLCTL_DEBUG", "1")
    makers = [parse_secret(secret, Totp()).code for secret in secrets]
    with agent(key, passphrase=PASSPHRASE) as address:
        monkeypatch.setenv("SSH_AUTH_SOCK", address)
        campaign = Ways(tmp_path / "camp", ways)
        early_in_a_step()
        began, said = time.time(), ""
        with Watch(*words, makers=makers) as watch:
            ran = campaign.flctl("round", timeout=300)
            said += ran.stdout + ran.stderr
            assert ran.returncode == 0, said
            for command in (("status",), ("log", servers["key"].name), ("audit",)):
                ran = campaign.flctl(*command)
                said += ran.stdout + ran.stderr
            monkeypatch.setattr(campaign, "words", lambda *arguments: [sys.executable, "-c", DEFECT, *arguments])
            for server in (keyed, both):
                ran = campaign.flctl("auth", "test", server.name)
                assert "Traceback" in ran.stderr and "ZeroDivisionError: provoked" in ran.stderr, ran.stderr
                said += ran.stdout + ran.stderr
    codes = [maker(began + step) for maker in makers for step in range(-30, int(time.time() - began) + 60, 30)]
    assert watch.looks > 20 and watch.found == []
    assert [word for word in words if word in said] == []
    assert not re.search("|".join(rf"(?<![\w.]){code}(?!\w)" for code in codes), said)
    roots = [tmp_path / "camp", tmp_path / "state", *(server.account.home for server in ways)]
    assert all(root.is_dir() for root in roots)
    assert leaks(roots, words, codes) == []
    campaign.clear()


def test_the_scan_sees_a_leak(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"code": "123456"}')
    (tmp_path / "log").write_text("1.123456 and 9123456")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "x.safetensors").write_bytes(b"\0JBSWY3DPEHPK3PXP\0 123456")
    found = leaks([tmp_path], ["JBSWY3DPEHPK3PXP"], ["123456"])
    assert sorted(Path(line.split(":")[0]).name for line in found) == ["journal.jsonl", "x.safetensors"]


@pytest.mark.parametrize("leak", ["JBSWY3DPEHPK3PXP", "731942"], ids=["secret", "code"])
def test_the_watch_sees_a_leak(leak: str) -> None:
    for words, environment in ((["sleep", "0.5"], {"LEAK": leak}), (["sh", "-c", "sleep 0.5; :", leak], {})):
        with Watch("JBSWY3DPEHPK3PXP", makers=[lambda moment: "731942"]) as watch:
            subprocess.run(words, env={"PATH": "/usr/bin:/bin", **environment}, check=True)
        assert watch.found
