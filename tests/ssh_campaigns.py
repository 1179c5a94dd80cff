"""Campaigns of sites over real sshds for tests: the account's own home, the local scheduler there, real jobs."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.campaigns import PROFILE, TRAINER, Campaign
from tests.terminals import Terminal
from tests.testbed import python
from tests.testbed.sshd import Sshd


class SshCampaign(Campaign):
    """A campaign of the servers' sites, and the commands on it. `login`: keys of [login] in their profiles."""

    def __init__(self, root: Path, *servers: Sshd, train: dict[str, Any] | None = None, **login: Any) -> None:
        self.servers = {server.name: server for server in servers}
        self.login, self.train = login, train or {}
        python.ready()
        super().__init__(root, tuple(self.servers))

    def home(self, site: str) -> Path:
        """The folder of this campaign's tests in the account's home."""
        return self.servers[site].account.home / "campaigns" / self.root.name

    def profile(self, name: str, *, walltime: str = "00:10:00", trainer: Path = TRAINER, **login: Any) -> None:
        """Write the site's profile anew; the keys of `login` are added to, or replace, those of [login]."""
        server, home = self.servers[name], self.home(name)
        self.login |= login
        for folder in (home.parent, home, home / "data"):
            server.account.folder(folder)
        server.account.file(home / "trainer.py", trainer.read_text())
        text = PROFILE.format(
            name=name,
            home=home,
            python=python.PYTHON,
            trainer=home / "trainer.py",
            walltime=walltime,
            train="\n".join(f"{key} = {json.dumps(value)}" for key, value in self.train.items()),
        )
        table = {
            "host": server.address,
            "port": server.port,
            "user": server.user,
            "kind": server.kind,
            "key": str(server.client_key),
            "host_keys": [server.host_key_fingerprint],
            "per_day": 100_000,
            **self.login,
        }
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        folder = self.place / "sites" if self.place.exists() else self.root
        (folder / f"{name}.toml").write_text(text.replace('connection = "local"\n', f"\n[login]\n{lines}"))

    def remote(self, site: str) -> Path:
        (folder,) = (self.home(site) / "work").iterdir()
        return folder

    def clear(self) -> None:
        """Take away what it left in the accounts' homes."""
        for site in self.servers:
            shutil.rmtree(self.home(site), ignore_errors=True)

    def logins(self, site: str) -> list[dict[str, Any]]:
        """The journal's events of logins."""
        return [entry for entry in self.journal() if entry["event"] == "login" and entry["site"] == site]

    def on_a_terminal(self, *arguments: str, answers: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Run flctl as a person does, who answers these questions; the exit code and what the terminal shows."""
        with Terminal(self.words(*arguments), cwd=self.place) as terminal:
            for question, answer in (answers or {}).items():
                terminal.expect(question)
                terminal.type(answer)
            return terminal.end(), terminal.screen
