"""A campaign of the testbed's two facilities, owned and driven by the orchestrator's account."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.campaigns import TRAINER, make_model
from tests.testbed import Testbed
from tests.testbed.orchestrator import run as run_as

SITES = ("karolina", "leonardo")


class Federation:
    """The campaign and the commands on it. `profiles` are laid over the testbed's own. Unless `real`, the sites
    run the small trainer of tests/data instead of train.py."""

    def __init__(self, bed: Testbed, name: str, *, real: bool = False, **profiles: Mapping[str, Any]) -> None:
        self.bed, self.place = bed, bed.user.home / name
        shutil.rmtree(self.place, ignore_errors=True)
        self.tables: dict[str, dict[str, Any]] = {site: dict(profiles.get(site, {})) for site in SITES}
        if not real:
            for site in SITES:
                trainer = bed.facilities[site].account.file(
                    bed.facilities[site].home / "trainer.py", TRAINER.read_text()
                )
                self.lay(site, train={"command": str(trainer)})
        folder = bed.user.folder(bed.user.home / f"{name}-in")
        for site in SITES:
            bed.user.file(folder / f"{site}.toml", bed.profile_toml(site, **self.tables[site]))
        self._give_model(folder / "start")
        paths = ",".join(str(folder / f"{site}.toml") for site in SITES)
        made = bed.flctl("init", str(self.place), "--sites", paths, "--model", str(folder / "start"))
        assert made.returncode == 0, made.stderr
        self.set("steps = 100", "steps = 4")

    def _give_model(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        make_model(folder)
        self.bed.user.give(folder, 0o700)
        for path in folder.iterdir():
            self.bed.user.give(path, 0o600)

    def lay(self, site: str, **tables: Mapping[str, Any]) -> None:
        """Lay more over the site's profile, and write it if the campaign is there."""
        for name, table in tables.items():
            self.tables[site][name] = {**self.tables[site].get(name, {}), **table}
        if self.place.exists():
            text = self.bed.profile_toml(site, **self.tables[site])
            self.bed.user.file(self.place / "sites" / f"{site}.toml", text)

    def set(self, old: str, new: str) -> None:
        path = self.place / "flctl.toml"
        text = path.read_text()
        assert old in text
        self.bed.user.file(path, text.replace(old, new))

    def flctl(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.bed.flctl(*arguments, cwd=self.place, **options)

    def json(self, *arguments: str, code: int | None = 0) -> dict[str, Any]:
        return self._object(self.flctl(*arguments, "--json"), code)

    def bare(self, *arguments: str, code: int | None = 0) -> dict[str, Any]:
        """The same from an empty environment, with no terminal and nothing on stdin."""
        program = self.bed.flctl("--version").args[0]
        words = [program, "-C", str(self.place), *arguments, "--json"]
        return self._object(run_as(self.bed.user, words, cwd=Path("/"), env={}), code)

    def _object(self, ran: subprocess.CompletedProcess[str], code: int | None) -> dict[str, Any]:
        assert ran.stdout.startswith("{"), ran.stdout + ran.stderr
        answer: dict[str, Any] = json.loads(ran.stdout)
        assert answer["exit_code"] == ran.returncode
        assert code is None or ran.returncode == code, ran.stdout + ran.stderr
        return answer

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        return self.bed.popen(*arguments, cwd=self.place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def kill(self, process: subprocess.Popen[str]) -> None:
        """kill -9 to the program and every child of it."""
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def run(self, site: str, number: int = 1) -> dict[str, Any]:
        path = self.place / "runs" / site / f"{number:04d}" / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def journal(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.place / "journal.jsonl").read_text().splitlines()]

    def remote(self, site: str) -> Path:
        """The campaign's folder at the site."""
        label = next(entry for entry in self.journal() if entry["event"] == "init")
        return self.bed.facilities[site].workdir / f"{label['name']}-{label['id']}"

    def jobs_started(self, site: str) -> int:
        logs = (self.remote(site) / "runs").glob("*/log")
        return sum(log.read_text().count("trainer: begins") for log in logs)

    def wait(self, condition: Callable[[], Any], *, limit: float = 90.0, what: str = "") -> Any:
        deadline = time.monotonic() + limit
        while not (value := condition()):
            assert time.monotonic() < deadline, f"waited {limit} s for {what or condition}"
            time.sleep(0.01)
        return value
