"""Campaigns of local sites for tests: real folders, real jobs, the real program as a subprocess."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import load_file

TRAINER = Path(__file__).parent / "data" / "trainer.py"

PROFILE = """\
schema = 1
name = "{name}"
connection = "local"

[scheduler]
kind = "local"
shape = "small"

[shapes.small]
walltime = "{walltime}"

[storage]
work = "{home}/work"
data = "{home}/data"

[environment]
python = "{python}"
seal_python = "{python}"

[poll]
every = 1
absence = 1
claim_window = 3

[train]
command = "{trainer}"
{train}
"""


class Campaign:
    """One campaign of local sites and the commands on it."""

    def __init__(
        self, root: Path, sites: tuple[str, ...] = ("brno", "pisa"), dtype: str = "float32", *options: str
    ) -> None:
        self.root, self.place, self.sites = root, root / "camp", sites
        for name in sites:
            home = root / name
            (home / "data").mkdir(parents=True)
            (home / "data" / "private.txt").write_text("canary-of-" + name)
            self.profile(name)
        make_model(root / "start", dtype)
        paths = ",".join(str(root / f"{name}.toml") for name in sites)
        made = self.flctl("init", str(self.place), "--sites", paths, "--model", str(root / "start"), *options, at=root)
        assert made.returncode == 0, made.stderr
        self.set("steps = 100", "steps = 4")

    def profile(self, name: str, *, walltime: str = "00:10:00", trainer: Path = TRAINER, **train: Any) -> None:
        """Write the site's profile (into the campaign, once there is one)."""
        text = PROFILE.format(
            name=name,
            home=self.root / name,
            python=sys.executable,
            trainer=trainer,
            walltime=walltime,
            train="\n".join(f"{key} = {json.dumps(value)}" for key, value in train.items()),
        )
        folder = self.place / "sites" if self.place.exists() else self.root
        (folder / f"{name}.toml").write_text(text)

    def set(self, old: str, new: str) -> None:
        """Change a line of flctl.toml."""
        path = self.place / "flctl.toml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def words(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "flctl.cli.main", *arguments]

    def flctl(
        self, *arguments: str, at: Path | None = None, timeout: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(*arguments),
            env={**os.environ, **environment},
            cwd=at or self.place,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    def json(self, *arguments: str, code: int | None = 0) -> dict[str, Any]:
        """The one object a command prints; its exit code is in it and is the process's own."""
        ran = self.flctl(*arguments, "--json")
        answer = json.loads(ran.stdout)
        assert answer["exit_code"] == ran.returncode
        if code is not None:
            assert ran.returncode == code, ran.stdout + ran.stderr
        return answer

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.words(*arguments),
            cwd=self.place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, site: str, number: int = 1) -> dict[str, Any]:
        path = self.place / "runs" / site / f"{number:04d}" / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def wait(self, condition: Callable[[], Any], limit: float = 240, what: str = "") -> None:
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline, f"waited {limit} s for {what or condition}"
            time.sleep(0.01)

    def journal(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.place / "journal.jsonl").read_text().splitlines()]

    def journal_numbers(self) -> list[int]:
        from flctl.campaign.journal import Journal

        return [entry["seq"] for entry in Journal(self.place / "journal.jsonl")]

    def remote(self, site: str) -> Path:
        """The campaign's folder at the site."""
        (folder,) = (path for path in (self.root / site / "work").iterdir() if path.name != "staged")
        return folder

    def attempts(self, site: str) -> list[str]:
        return sorted(path.name for path in (self.remote(site) / "runs").iterdir() if not path.name.startswith("."))

    def submissions(self, site: str) -> int:
        """How often a job was really submitted: each attempt's log says so once per start."""
        logs = (self.remote(site) / "runs").glob("*/log")
        return sum(log.read_text().count("trainer: begins") for log in logs)

    def kill_job(self, site: str) -> None:
        """SIGKILL to every process of the site's running job."""
        for card in (self.remote(site) / "runs").glob("*/job.card"):
            if json.loads(card.read_text())["state"] == "RUNNING":
                os.killpg(json.loads(card.read_text())["group"], signal.SIGKILL)


def make_model(folder: Path, dtype: str = "float32") -> None:
    from flctl.model.tiny import write_tiny_model

    write_tiny_model(folder, seed=1, dtype=dtype)


def reference(place: Path, version: int) -> dict[str, numpy.ndarray]:
    """FedAvg in numpy from the fetched contributions of the campaign in `place`, as the documentation writes it."""
    record = json.loads((place / "models" / f"{version:04d}" / "flctl.json").read_text())
    given = sorted(record["contributions"], key=lambda item: (item["site"], item["number"]))
    total = sum(item["samples"] for item in given)
    sums: dict[str, numpy.ndarray] = {}
    for item in given:
        share = numpy.float32(numpy.float64(item["samples"]) / numpy.float64(total))
        folder = place / "runs" / item["site"] / f"{item['number']:04d}" / str(item["attempt"]) / "out"
        for name, tensor in load_file(folder / "model.safetensors").items():
            sums[name] = sums.get(name, numpy.float32(0)) + share * tensor
    return sums
