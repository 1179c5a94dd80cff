"""Owns the note that `flctl gc` leaves where it took files away: `collected.json`, beside the record that stays."""

import time
from pathlib import Path

from flctl.campaign.workspace import read_record, write_json
from flctl.errors import ConfigurationError

NAME = "collected.json"


def collected_on(folder: Path) -> str:
    """The day on which gc took the files of a model version or of an attempt; empty if it did not."""
    path = folder / NAME
    if not path.is_file():
        return ""
    try:
        return time.strftime("%Y-%m-%d", time.localtime(float(read_record(path)["at"])))
    except (ConfigurationError, KeyError, TypeError, ValueError):
        return "a day that its damaged note does not tell"


def note_collected(folder: Path, *, files: int, size: int) -> None:
    """From now on the files of this folder count as collected, whether they are gone already or not."""
    write_json(folder / NAME, {"at": time.time(), "files": files, "bytes": size})


def said(what: str, day: str) -> str:
    """`model 0003 was collected by gc on 2026-11-21`."""
    return f"{what} was collected by gc on {day}"
