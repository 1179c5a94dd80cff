"""A virtual environment for each rival, made once and kept between runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.rivals import Rival

TORCH = "torch==2.13.0"  # that of constraints.txt: flctl and its rivals sum with the same library
VERSIONS = """
import importlib.metadata, json
print(json.dumps({d.name.lower(): d.version for d in importlib.metadata.distributions()}))
"""


class Unavailable(Exception):
    """An environment that could not be made; the message is the installer's last words."""


def environments() -> Path:
    chosen = os.environ.get("FLCTL_BENCH_ENVS")
    return Path(chosen) if chosen else Path.home() / ".cache" / "flctl-bench"


def programs_of(rival: Rival) -> Path:
    """The folder of the environment's programs. It is new when what is to be installed has changed.

    torch comes first and by its exact version: what is installed after it would otherwise choose a build with CUDA."""
    folder = environments() / rival.distribution
    done = folder / "installed.json"
    wanted = [TORCH, *rival.packages, *rival.alone]
    if done.exists() and json.loads(done.read_text()) == wanted:
        return folder / "bin"
    _called([sys.executable, "-m", "venv", "--clear", str(folder)])
    constraints = folder / "constraints.txt"
    constraints.write_text(f"{TORCH}\n")
    install = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    _called([*install, TORCH])
    _called([*install, "--constraint", str(constraints), *rival.packages])
    if rival.alone:
        _called([*install, "--no-deps", *rival.alone])
    done.write_text(json.dumps(wanted))
    return folder / "bin"


def versions_in(python: Path | str) -> dict[str, str]:
    answer = subprocess.run([str(python), "-c", VERSIONS], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(answer.stdout)
    return found


def _called(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise Unavailable(f"{' '.join(command)}: {' '.join(last)}")
