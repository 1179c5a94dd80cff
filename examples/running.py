"""Owns what the scaled-down experiments share: sites and campaigns on this machine, and the tables of their READMEs."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROFILE = """\
schema = 1
name = "{name}"
title = "{title}"
connection = "local"

[scheduler]
kind = "{kind}"
{scheduler}shape = "small"

[shapes.small]
{cpus}walltime = "01:00:00"

[storage]
work = "{home}/work"
data = "{home}/data"

[environment]
python = "{python}"
seal_python = "{python}"

[poll]
every = 1
absence = 2
"""


def local_site(folder: Path, name: str, title: str, *, pbs: bool = False, python: Path = Path(sys.executable)) -> Path:
    """The profile of a site of this machine, with its home below `folder`: no scheduler, or the PBS on PATH."""
    home = folder / name
    (home / "data").mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text(
        PROFILE.format(
            name=name,
            title=title,
            kind="pbs" if pbs else "local",
            scheduler='account = "proj"\nqueue = "workq"\nfilesystems = "home"\n' if pbs else "",
            cpus="cpus = 1\n" if pbs else "",
            home=home,
            python=python,
        )
    )
    return path


class LocalCampaign:
    """A campaign of sites of this machine, moved by the command line as a user would."""

    def __init__(self, place: Path, env: Mapping[str, str] | None = None) -> None:
        self.place, self._env = place, {**os.environ, **(env or {})}

    def init(self, profiles: Sequence[Path], model: Path, settings: Path, *more: str) -> None:
        """`more`: further words for flctl init."""
        sites = ",".join(map(str, profiles))
        words = ["--sites", sites, "--model", str(model), "--settings", str(settings), *more]
        self._run(["init", str(self.place), *words], Path.cwd())

    def flctl(self, *words: str) -> dict[str, Any]:
        """The answer of a command, with --json. RuntimeError with its words if it failed."""
        answer: dict[str, Any] = json.loads(self._run([*words, "--json"], self.place))
        return answer

    def _run(self, words: Sequence[str], cwd: Path) -> str:
        argv = [sys.executable, "-m", "flctl.cli.main", *words]
        ran = subprocess.run(argv, cwd=cwd, env=self._env, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
        if ran.returncode:
            raise RuntimeError(f"flctl {' '.join(words)}: exit code {ran.returncode}\n{ran.stdout}")
        return ran.stdout


class TestbedCampaign:
    """The same across the testbed's two facilities (real sshd, one-time codes, Slurm), owned by its orchestrator."""

    __test__ = False

    def __init__(self, bed: Any, name: str, env: Mapping[str, str] | None = None) -> None:
        self._bed, self._env, self.place = bed, env, bed.user.home / name
        self.folder: Path = bed.user.home / f"{name}-in"
        for old in (self.place, self.folder):
            shutil.rmtree(old, ignore_errors=True)
        bed.user.folder(self.folder)

    def init(self, profiles: Mapping[str, str], model: Path, settings: Path, *more: str) -> None:
        """`profiles` are texts by name; model and settings may lie where the orchestrator cannot look."""
        shutil.copytree(model, self.folder / "start")
        shutil.copyfile(settings, self.folder / settings.name)
        for name, text in profiles.items():
            (self.folder / f"{name}.toml").write_text(text)
        self._give(self.folder)
        sites = ",".join(str(self.folder / f"{name}.toml") for name in profiles)
        words = ["--model", str(self.folder / "start"), "--settings", str(self.folder / settings.name)]
        self._run(["init", str(self.place), "--sites", sites, *words, *more], self._bed.user.home)

    def _give(self, folder: Path) -> None:
        for path in (folder, *folder.rglob("*")):
            self._bed.user.give(path, 0o700 if path.is_dir() else 0o600)

    def flctl(self, *words: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._run([*words, "--json"], self.place))
        return answer

    def _run(self, words: Sequence[str], cwd: Path) -> str:
        ran = self._bed.flctl(*words, cwd=cwd, env=self._env, timeout=3600)
        if ran.returncode:
            raise RuntimeError(f"flctl {' '.join(words)}: exit code {ran.returncode}\n{ran.stdout}{ran.stderr}")
        return str(ran.stdout)


def scores(place: Path, site: str, version: int) -> dict[str, dict[str, float]]:
    """What the site measured after the merge that made `version` (`[evaluation] cross`), by subject: the version itself
    (`0003`) and the other sites' contributions; beside them `own`, its own contribution, and `base`."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted((place / "runs" / site).glob("*/run.json")):
        run = json.loads(path.read_text())
        if run["contribution"] and run["order"]["round"] == version:
            evaluation = run["contribution"]["metrics"]["evaluation"]
            if run["order"]["work"] == "train":
                found |= {"base": evaluation["base"], "own": evaluation["trained"]}
            else:
                found |= evaluation
    return found


def perplexities(place: Path, sites: Sequence[str], rounds: int) -> list[list[object]]:
    """Of every global model, and of what each site made in the last round, on each site's private text."""
    rows: list[list[object]] = [["start", *(scores(place, site, 1)["base"]["perplexity"] for site in sites)]]
    for version in range(1, rounds + 1):
        found = [scores(place, site, version)[f"{version:04d}"]["perplexity"] for site in sites]
        rows.append([f"global, round {version}", *found])
    last = {site: scores(place, site, rounds) for site in sites}
    for owner in sites:
        names = [
            "own" if site == owner else next(name for name in last[site] if name.startswith(f"{owner}-"))
            for site in sites
        ]
        own = [last[site][name]["perplexity"] for site, name in zip(sites, names, strict=True)]
        rows.append([f"{owner}'s own, round {rounds}", *own])
    return rows


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [list(columns), ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def report(readme: Path | None, lines: Sequence[str]) -> None:
    """Print the lines, and put them into the README between its two marks, if one is given."""
    print("\n".join(lines))
    if readme is not None:
        text = readme.read_text(encoding="utf-8")
        head, begin, rest = text.partition("<!-- written by the run -->\n")
        _, end, tail = rest.partition("<!-- end -->")
        if not (begin and end):
            raise RuntimeError(f"{readme} has no marks to write between")
        readme.write_text(head + begin + "\n" + "\n".join(lines) + "\n\n" + end + tail, encoding="utf-8")


def parameters(model: Path) -> int:
    """Of a model folder."""
    from safetensors import safe_open

    count = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  not a mapping
                shape, size = file.get_slice(name).get_shape(), 1
                for length in shape:
                    size *= length
                count += size
    return count


class Clock:
    """How long it took, as words for a table's caption."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __str__(self) -> str:
        seconds = time.monotonic() - self._began
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
