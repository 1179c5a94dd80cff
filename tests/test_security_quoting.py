"""Any text that flctl puts into a remote command comes back as it was, whatever login shell reads it first."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flctl.facility.shell import Program, quote
from tests.chaos.hostile_text import MARK, hostile
from tests.ssh_sites import connected, road_to, site_of
from tests.testbed.sshd import Sshd

SHELLS = [
    path
    for path in ("/bin/bash", "/bin/dash", "/bin/sh", "/bin/csh", "/bin/tcsh", "/usr/bin/fish")
    if shutil.which(path)
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(params=SHELLS)
def server(request: pytest.FixtureRequest) -> Iterator[Sshd]:
    number = SHELLS.index(request.param)
    name = f"quote-{Path(request.param).name}"
    with Sshd(
        name=name, address="127.0.97.2", port=24720 + number, user=f"flctl-q{number}", shell=request.param
    ) as server:
        yield server


def texts(canary: Path) -> list[str]:
    chance = random.Random(4)
    made = [hostile(chance, "word").replace(MARK, str(canary)) for _ in range(300)]
    return [text.encode("utf-8", "replace").decode().replace("\0", "")[:2000] for text in made]


def test_any_text_comes_back_as_it_was(server: Sshd, tmp_path: Path) -> None:
    canary = server.account.home / "canary"
    canary.unlink(missing_ok=True)
    given = texts(canary)
    commands = {f"t{n}": f"printf '<%s>' {quote(text)}" for n, text in enumerate(given)}
    with connected(site_of(server), road_to(tmp_path, server)) as connection:
        told: Any = {}
        for start in range(0, len(given), 100):
            part = dict(list(commands.items())[start : start + 100])
            program = Program.of(part)
            told |= program.answers(connection.run(program.script).stdout, part, site=server.name)
    for n, text in enumerate(given):
        assert told[f"t{n}"].stdout == f"<{text}>", text
    assert not canary.exists()
    assert os.path.exists(server.account.home)
