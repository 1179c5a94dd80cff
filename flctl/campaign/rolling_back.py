"""Owns the making of a version that has the weights of an earlier one: versions only grow, so rolling back makes a new
one. Its flctl.json says `rolled_back_to`; the rule goes on from what it remembered beside that version."""

from flctl import __version__, faults
from flctl.campaign import chain
from flctl.campaign.collected import collected_on, said
from flctl.campaign.merging import STATE, draft_folder, journal_model, model_record, state_of
from flctl.campaign.workspace import RESTORE, Workspace, write_json
from flctl.codec import from_data
from flctl.durable import link_files, move, remove
from flctl.errors import ConfigurationError
from flctl.records import FileEntry, RollBack

RULE = "rollback"
"""What flctl.json has in the place of a rule."""
OF_THE_WEIGHTS = ("frozen",)
"""What flctl.json says of the weights themselves, however they were made, besides their files."""


def make(workspace: Workspace, back: RollBack) -> None:
    """Make `models/<version>` with the files of the source. Until the rename there is no such version.
    ConfigurationError if the source is not whole any more."""
    from flctl.model.draft import translated

    source, draft = workspace.model_folder(back.source), draft_folder(workspace, back.version)
    record = workspace.model_record(back.source)
    files = tuple(from_data(FileEntry, item) for item in record["files"])
    beside = [f"{STATE}/{item['path']}" for item in (record.get("state") or {}).get("files", [])]
    _check(workspace, back.source, files)
    try:
        remove(draft)
        link_files(source, [*(entry.path for entry in files), *beside], draft)
    except OSError as error:
        raise translated(error, draft) from error
    told = model_record(
        version=back.version,
        files=files,
        parents=[{"version": back.source, "sha256": record["sha256"]}],
        steps=record.get("steps", 0),
        contributions=[],
        **chain.links(workspace, back.version),
        state=record.get("state"),
        rule=RULE,
        rolled_back_to=back.source,
        made_by={"flctl": __version__},
        **{key: record[key] for key in OF_THE_WEIGHTS if key in record},
    )
    write_json(draft / "flctl.json", told)
    faults.point("roll-back-rename", f"{back.version:04d}")
    move(draft, workspace.model_folder(back.version))
    faults.point("roll-back-durable", f"{back.version:04d}")
    journal_model(workspace, back.version)


def _check(workspace: Workspace, version: int, files: tuple[FileEntry, ...]) -> None:
    """ConfigurationError unless a version's files, and what its rule left, are what was recorded."""
    from flctl.model.manifest import check_plain, hash_file

    folder = workspace.model_folder(version)
    if day := collected_on(folder):
        raise ConfigurationError(
            said(f"model {version:04d}, which is to be gone back to,", day),
            hint="put its files back from where you copied them; flctl cancel gives the return up",
        )
    check_plain(folder)
    for entry in files:
        if not (folder / entry.path).is_file() or hash_file(folder, entry.path) != entry:
            raise ConfigurationError(f"{folder / entry.path} is not what was recorded", hint=RESTORE)
    state_of(workspace, version)
