"""Owns the planted bugs: flctl with one promise broken at run time, to see that the checker notices.

python -m tests.chaos.planted BUG ARGUMENTS-OF-FLCTL... This file needs nothing of the tests, so that a copy of it runs
in any environment that has flctl.
"""

import functools
import hashlib
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

BUGS: dict[str, Callable[[], None]] = {}


def bug(function: Callable[[], None]) -> Callable[[], None]:
    BUGS[function.__name__.replace("_", "-")] = function
    return function


@bug
def no_claim() -> None:
    """Each call of submit submits, also when a call before was cut off."""
    from flctl.campaign.session import Session

    ask = Session.ask

    @functools.wraps(ask)
    def careless(self: Any, commands: Any, **options: Any) -> Any:
        unclaimed = {
            name: text.replace("mkdir claim ||", "mkdir -p claim ||") if name == "submit" else text
            for name, text in dict(commands).items()
        }
        return ask(self, unclaimed, **options)

    Session.ask = careless  # type: ignore[method-assign]


@bug
def trust_exit_status() -> None:
    """What a transfer that succeeded has brought is not looked at."""
    from flctl.campaign import session

    same = session._same
    session._same = lambda path, entry: same(path, entry) or path.is_file()


@bug
def absent_is_done() -> None:
    """A job that is in no listing has done its work; what lies in its out/ (PLANTED_OUT) is what it made."""
    from flctl.records import Contribution, FileEntry, Stage

    check: Any = importlib.import_module("flctl.campaign.steps.check")
    judge = check.judge

    def hasty(run: Any, evidence: Any, **options: Any) -> Any:
        verdict = judge(run, evidence, **options)
        listed = [job for job in evidence.seen or () if job.name == run.job.token and job.activity != "ended"]
        if evidence.done is not None or evidence.seen is None or listed or evidence.owner is None:
            return verdict
        content = (Path(os.environ["PLANTED_OUT"]) / "model.safetensors").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        file = FileEntry(path="model.safetensors", size=len(content), sha256=digest)
        made = Contribution(sha256="", files=(file,), metrics={}, steps=4, samples=10, tokens=50)
        return replace(verdict, stage=Stage.ENDED, contribution=made, failure=None, revoke=False)

    check.judge = hasty


@bug
def no_folder_fsync() -> None:
    """A rename is taken for durable."""
    from flctl import durable
    from flctl.campaign import creation, journal, remote_merge, workspace

    for module in (durable, creation, journal, remote_merge, workspace):
        if hasattr(module, "fsync_folder"):
            module.fsync_folder = lambda folder: None


@bug
def reuse_codes() -> None:
    """No process remembers which codes were used."""
    from flctl.facility import codes, ledger

    for module in (ledger, codes):
        for name, answer in (("check", lambda *a, **k: None), ("spend", lambda *a, **k: 0)):
            if hasattr(module, name):
                setattr(module, name, answer)


@bug
def recursive_pull() -> None:
    """A run's whole out/ comes back, whatever lies there."""
    from flctl.facility.local import LocalConnection

    def pull(self: Any, source: Any, files: Any, target: Path, progress: Any = None) -> None:
        shutil.copytree(source, target, dirs_exist_ok=True)

    LocalConnection.pull = pull  # type: ignore[method-assign]


def main(argv: list[str]) -> None:
    BUGS[argv[0]]()
    sys.argv = ["flctl", *argv[1:]]
    from flctl.cli.main import main as flctl

    flctl()


if __name__ == "__main__":
    main(sys.argv[1:])
