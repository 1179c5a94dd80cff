"""Owns the hash chain of the ledger: what a model's flctl.json says of the records before it, and reading it back.

Each flctl.json names the sha256 of the one before it, of the records of every run that it was made from, and of the
last line that the journal had by then; the journal names the flctl.json in turn.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from flctl.campaign.workspace import Workspace
from flctl.records import Run

KEPT = ("job.sh", "order.json", "done.json", "done.json.sig")
"""The files of an attempt's folder that are kept for ever, if there are such."""


def sha_of(path: Path) -> str | None:
    """sha256 of a small file; None if there is none."""
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def records_of(workspace: Workspace, run: Run) -> dict[str, str]:
    """sha256 of the run's record and of what is kept of its last attempt, by name."""
    paths = {name: workspace.attempt_folder(run) / name for name in KEPT}
    paths["run.json"] = workspace.run_folder(run.site, run.number) / "run.json"
    return {name: digest for name, path in sorted(paths.items()) if (digest := sha_of(path))}


def links(workspace: Workspace, version: int) -> dict[str, Any]:
    """What the flctl.json of a new version says of what came before it."""
    previous = sha_of(workspace.model_folder(version - 1) / "flctl.json")
    *_, last = (None, *lines_of(workspace.journal.path))
    return {
        "previous": {"version": version - 1, "sha256": previous} if previous else None,
        "journal": {"line": last.number, "sha256": last.sha256} if last else None,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of the journal, counted from 1, without its newline. `entry`: what it says, empty if it cannot be read."""

    number: int
    raw: bytes
    entry: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        return sha256(self.raw).hexdigest()


def lines_of(path: Path) -> Iterator[Line]:
    """The journal's lines, damaged ones among them; what a torn last line left is none."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield Line(number=number, raw=line[:-1], entry=_object(line))


def _object(raw: bytes) -> dict[str, Any]:
    try:
        data = json.loads(raw)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}
