"""Owns looking back at the journal once per process: damage is said and noted, what a crash left unsaid is made up."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flctl.campaign.merging import journal_model
from flctl.campaign.workspace import Workspace
from flctl.errors import Locked

_seen: set[Path] = set()
MOST = 5
"""Damaged lines that are said one by one."""


def look_back(workspace: Workspace, tell: Callable[[str], None]) -> None:
    """Warn of damage to the journal, once per process, and note it there, once for ever: the records are the truth, so
    the campaign goes on. A model that a kill, between its rename and its line, left without one gets it now."""
    if workspace.journal.path in _seen:
        return
    _seen.add(workspace.journal.path)
    damage = workspace.journal.damage()
    noted = {(entry.get("line"), entry.get("sha256")) for entry in workspace.journal if entry.get("event") == "damage"}
    for found in damage[:MOST]:
        tell(f"{workspace.journal.path} is damaged at {found}")
    if len(damage) > MOST:
        tell(f"{workspace.journal.path} is damaged in {len(damage) - MOST} more lines")
    if damage:
        tell("the campaign goes on, its records are elsewhere; flctl audit tells what cannot be proved any more")
    for found in damage:
        if (found.line, found.sha256) not in noted:
            workspace.journal.append(
                "damage", line=found.line, number=found.seq, offset=found.offset, sha256=found.sha256, what=found.what
            )
    if _unsaid(workspace):
        with suppress(Locked), workspace.lock_campaign(patience=0.0):
            for version in _unsaid(workspace):
                journal_model(workspace, version)


def _unsaid(workspace: Workspace) -> list[int]:
    events = [entry for entry in workspace.journal if entry.get("event") in ("model", "adopted")]
    said = {entry.get("version", entry.get("model")) for entry in events}
    return [model.version for model in workspace.models() if model.version and model.version not in said]
