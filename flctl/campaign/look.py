"""Owns an audit under way: what is believed so far, what was found, and how a file or a record is looked at."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flctl.campaign.collected import NAME as COLLECTED
from flctl.campaign.collected import collected_on
from flctl.campaign.rebuilding import Progress, Stop
from flctl.campaign.trail import Trail
from flctl.campaign.workspace import Workspace, read_record
from flctl.errors import ConfigurationError, Interrupted
from flctl.model.manifest import hash_file
from flctl.records import FileEntry

UNREADABLE = (ConfigurationError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Something that is not as it was recorded: a file of the campaign's folder, the model version that was being made
    when it was written (None: unknown), and what is wrong."""

    file: str
    round: int | None
    what: str


@dataclass(slots=True, kw_only=True)
class Look:
    """An audit under way. `records`: each version's flctl.json that the chain speaks for; `given`: what those say of
    the runs in them, by (site, number); `done`: the files that each attempt's sound record names."""

    workspace: Workspace
    trail: Trail
    tell: Progress
    stopped: Stop
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    given: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    done: dict[tuple[str, int, int], tuple[FileEntry, ...]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    collected: list[int] = field(default_factory=list)
    files: int = 0
    bytes: int = 0

    def differs(self, path: Path, round_: int | None, what: str) -> None:
        self.differences.append(Difference(file=self.place(path), round=round_, what=what))

    def place(self, path: Path) -> str:
        return path.relative_to(self.workspace.root).as_posix()

    def hashed(self, folder: Path, name: str) -> FileEntry | None:
        """None if it is not there, or is no plain file."""
        if self.stopped():
            raise Interrupted("stopped while checking; nothing was changed")
        try:
            entry = hash_file(folder, name)
        except ConfigurationError:
            return None
        self.files, self.bytes = self.files + 1, self.bytes + entry.size
        self.tell("checking files", self.bytes, 0)
        return entry

    def compare(self, folder: Path, entries: Iterable[FileEntry], version: int | None, besides: str = "") -> None:
        """Every file of a folder against the entries that there must be, and no other but `besides`."""
        wanted = {entry.path: entry for entry in entries}
        for name, entry in wanted.items():
            found = self.hashed(folder, name)
            if found != entry:
                self.differs(folder / name, version, "is missing" if found is None else "is not what was recorded")
        for path in sorted(folder.rglob("*")):
            inner = path.relative_to(folder)
            hidden = any(part.startswith(".") for part in inner.parts)
            if not path.is_dir() and not hidden and inner.as_posix() not in {*wanted, besides}:
                self.differs(path, version, "is named by no record")

    def is_collected(self, folder: Path, version: int | None) -> bool:
        """Whether gc took the files of a folder, as its note there and the journal say."""
        if not collected_on(folder):
            return False
        note, place = folder / COLLECTED, self.place(folder)
        if fault := record_fault(note):
            self.differs(note, version, fault)
        elif not self.trail.damaged and not any(
            (one.entry.get("site"), one.entry.get("path")) == ("", place) for one in self.trail.sound("collected")
        ):
            self.differs(note, version, "tells of a flctl gc that the journal does not know")
        return True


def record_fault(path: Path) -> str:
    """What is wrong with a record of flctl by itself: by its checksum, and byte by byte by how flctl writes one."""
    try:
        read_record(path)
        raw = path.read_bytes()
        same = (json.dumps(json.loads(raw), indent=1, ensure_ascii=False) + "\n").encode() == raw
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except UNREADABLE as error:
        return getattr(error, "message", str(error)).replace(f"{path} ", "")
    return "" if same else "is not as it was written"
