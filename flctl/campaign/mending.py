"""Owns putting aside what is damaged or overtaken in a campaign's folder, so that it can be made again: from what the
sites know, from the contributions, or from files that are sound."""

import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from flctl.campaign.adoption import record_without_history
from flctl.campaign.merging import STATE
from flctl.campaign.session import Session
from flctl.campaign.steps.fetch import gone
from flctl.campaign.workspace import Workspace, read_record, write_json
from flctl.codec import from_data
from flctl.durable import move, remove
from flctl.errors import ConfigurationError
from flctl.model.manifest import hash_file, hash_folder
from flctl.records import FileEntry, Stage, Work, folder_sha256


def set_aside(workspace: Workspace) -> list[Path]:
    """Give each damaged record another name, so that it can be made again from what the sites know; and the newest
    model, if its record or a file of it is damaged, so that it is merged again. What a newer flctl wrote is left
    alone."""
    records = [*workspace.root.glob("runs/*/*/run.json"), *workspace.root.glob("runs/*/contact.json")]
    records += [workspace.root / "plan.json", workspace.root / "frozen.json"]
    models = sorted(workspace.root.glob("models/[0-9]*/flctl.json"))
    aside = _put_aside(workspace, [*records, *models[-1:]])
    for path, after in pairwise(models):
        aside += _put_aside(workspace, [path])
        if aside and aside[-1].name == f".{path.parent.name}.damaged":
            _describe_again(workspace, aside[-1], path.parent, after)
    if len(models) > 1 and models[-1].exists() and not _agrees(workspace, models[-1].parent):
        what = "a file of it is not what was recorded"
        aside.append(_moved_aside(workspace, models[-1].parent, what, "damaged"))
    return aside


def _agrees(workspace: Workspace, folder: Path) -> bool:
    """Whether the files of a model are those of its record."""
    files = tuple(from_data(FileEntry, item) for item in workspace.model_record(int(folder.name))["files"])
    try:
        return tuple(hash_file(folder, entry.path) for entry in files) == files
    except (OSError, ConfigurationError):
        return False


def _describe_again(workspace: Workspace, aside: Path, folder: Path, after: Path) -> None:
    """An older model, whose record is damaged and whose files are those that the next one was made from, gets a new
    record and its place back; how it was made is not told any more."""
    try:
        parents = {item["version"]: item["sha256"] for item in read_record(after)["parents"]}
        files = tuple(entry for entry in hash_folder(aside) if not entry.path.startswith(f"{STATE}/"))
    except (ConfigurationError, KeyError, TypeError):
        return
    version, digest = int(folder.name), folder_sha256(files)
    steps = [run.order.global_step for run in workspace.runs() if run.order.base == version]
    if parents.get(version) == digest and steps:
        (aside / "flctl.json").rename(aside.with_name(f".{folder.name}.flctl.json.damaged"))
        write_json(
            aside / "flctl.json",
            record_without_history(version, digest, steps[0], files, {"at": round(time.time(), 3)}),
        )
        move(aside, folder)


def set_driver_aside(workspace: Workspace) -> list[Path]:
    """The same for the record of who drives: this host begins one of its own, and each site says whether it may."""
    return _put_aside(workspace, [workspace.root / "driver.json"])


def cannot_follow(session: Session) -> bool:
    """Whether the next model cannot be made, because what a run for it made is gone from this site: a folder that was
    put back from a backup meets what a later gc has taken."""
    workspace, site = session.workspace, session.site.name
    following = workspace.newest_model().version + 1
    runs = [
        run
        for run in workspace.runs(site)
        if run.order.round == following and run.order.work == Work.TRAIN and run.stage != Stage.FETCHED
    ]
    commands = {str(run.number): gone(session, run) for run in runs if not run.skipped}
    return any(answer.status == 0 for answer in session.ask(commands).values()) if commands else False


def set_overtaken_aside(workspace: Workspace) -> list[Path]:
    """Give the records of runs for models up to one that was brought from a site another name: what they still wait for
    is not needed, and the next contact makes them again as the site tells them."""
    newest, aside = workspace.newest_model().version, []
    if "adopted" not in workspace.model_record(newest):
        return []
    for run in workspace.runs():
        done = run.stage == Stage.FETCHED or run.skipped
        last = newest - 1 if run.order.work == Work.EVALUATE else newest
        if run.order.round <= last and not done:
            path = workspace.run_folder(run.site, run.number) / "run.json"
            aside.append(_moved_aside(workspace, path, f"model {newest:04d} was brought from a site", "overtaken"))
    return aside


def _moved_aside(workspace: Workspace, place: Path, reason: str, why: str) -> Path:
    new = place.with_name(f".{place.name}.{why}")
    remove(new)
    move(place, new)
    workspace.journal.append("put aside", path=str(place.relative_to(workspace.root)), reason=reason)
    return new


def _put_aside(workspace: Workspace, paths: Iterable[Path]) -> list[Path]:
    aside = []
    for path in paths:
        if not path.is_symlink() and not path.exists():
            continue
        try:
            read_record(path)
        except ConfigurationError as error:
            if "is damaged" not in error.message and not path.is_symlink():
                raise
            place = path.parent if path.name == "flctl.json" else path
            aside.append(_moved_aside(workspace, place, error.message, "damaged"))
    return aside
