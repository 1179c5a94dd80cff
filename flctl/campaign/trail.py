"""Owns what the journal proves: its sound lines, the version each belongs to, and what crossed a border when."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flctl.campaign.chain import Line, lines_of
from flctl.campaign.journal import Journal

ATTEMPT = re.compile(r"runs/(\d{4,})-(\d+)/(.+)")
"""The path of an attempt's file at a site."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A file that the journal says crossed a site's border, at `line`."""

    line: int
    site: str
    inward: bool
    path: str
    size: int
    sha256: str

    @property
    def attempt(self) -> tuple[int, int, str] | None:
        """(run's number, attempt, name) where it is a file of an attempt."""
        match = ATTEMPT.fullmatch(self.path)
        return (int(match[1]), int(match[2]), match[3]) if match else None


@dataclass(slots=True, kw_only=True)
class Trail:
    """The journal as an audit reads it. `damaged`: what is wrong, by line; only the other lines are believed."""

    lines: list[Line]
    damaged: dict[int, str]
    ends: dict[int, int] = field(default_factory=dict)
    """By model version: the line with which it was made."""

    def sound(self, event: str) -> Iterator[Line]:
        return (one for one in self.lines if one.number not in self.damaged and one.entry.get("event") == event)

    def models(self) -> dict[int, Line]:
        """By version, the line that told of it last."""
        return {one.entry["version"]: one for one in self.sound("model") if isinstance(one.entry.get("version"), int)}

    def moved(self) -> Iterator[Moved]:
        for one in self.sound("file"):
            entry = one.entry
            yield Moved(
                line=one.number,
                site=str(entry.get("site")),
                inward=entry.get("direction") == "in",
                path=str(entry.get("path")),
                size=int(entry.get("size", 0)),
                sha256=str(entry.get("sha256")),
            )

    def round_of(self, line: int) -> int:
        """The version that was being made when a line was written."""
        later = [version for version, end in self.ends.items() if end >= line]
        return min(later) if later else max(self.ends, default=0) + 1

    def anchored(self, records: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[int, int, str]]:
        """(line, version, what is wrong) where a model's record names another line than there is."""
        for version, record in records.items():
            anchor = record.get("journal") or {}
            number, wanted = anchor.get("line"), anchor.get("sha256")
            if not isinstance(number, int) or number in self.damaged:
                continue
            if number > len(self.lines) or self.lines[number - 1].sha256 != wanted:
                yield number, version, f"it is not the line that the record of model {version:04d} names"


def trail_of(journal: Journal) -> Trail:
    return Trail(lines=list(lines_of(journal.path)), damaged={damage.line: damage.what for damage in journal.damage()})
