"""Owns what crossed each site's border, by the journal, and whether all that came in was invited.

What may come in: small records of an attempt, as answers to commands; files that the attempt's completion record names,
each with the size and sha256 that it says; the end of a log that a person asked for; the small file of `site test`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flctl.campaign.trail import Moved, Trail
from flctl.facility.shell import LIMIT as RECORD_MOST
from flctl.records import FileEntry

LOG_MOST = 64 * 1024
"""Bytes of a log that a person may see in one go."""
TEST_MOST = 4096
OUTWARD = (
    (r"models/\d{4,}/.+", "model"),
    (r"models/\d{4,}-state/.+", "rule's state"),
    (r"models/[^/]+-\d{4,}-\d+/.+", "contribution"),
    (r"payload/.+", "payload"),
    (r"runs/\d{4,}-\d+/.+", "order"),
    (r"/.+/staged/frozen-[0-9a-f]{64}/.+", "frozen base"),
    (r"/.+", "staged"),
)
MODEL = re.compile(r"models/(\d{4,})/(.+)")
TEST = re.compile(r"\.test-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """What of one kind crossed a site's border in one direction while one model version was being made: how many
    files (one that was sent again counts again) and bytes."""

    site: str
    direction: str
    round: int
    kind: str
    files: int
    bytes: int


def crossings(trail: Trail) -> tuple[Crossing, ...]:
    found: dict[tuple[str, int, str, str], list[int]] = {}
    for one in trail.moved():
        key = (one.site, trail.round_of(one.line), "in" if one.inward else "out", kind_of(one))
        found.setdefault(key, []).append(one.size)
    return tuple(
        Crossing(site=site, direction=direction, round=round_, kind=kind, files=len(sizes), bytes=sum(sizes))
        for (site, round_, direction, kind), sizes in sorted(found.items())
    )


def kind_of(one: Moved) -> str:
    if TEST.fullmatch(one.path):
        return "test"
    if not one.inward:
        return next((kind for pattern, kind in OUTWARD if re.fullmatch(pattern, one.path)), "other")
    if one.attempt is None:
        return "model" if MODEL.fullmatch(one.path) else "other"
    name = one.attempt[2]
    return "log" if name == "log" else "model file" if name.startswith("out/") else "record"


def uninvited(
    trail: Trail,
    done: Mapping[tuple[str, int, int], tuple[FileEntry, ...]],
    models: Mapping[int, tuple[FileEntry, ...]],
) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of each file that came in and should not have. `done`: the files that the kept completion
    record of each attempt names, by site, run's number and attempt; `models`: those of each model's record (a campaign
    that is adopted takes its model from a site). Where there is no such record, nothing is judged."""
    most = {"record": RECORD_MOST, "log": LOG_MOST, "test": TEST_MOST}
    for one in trail.moved():
        kind = kind_of(one)
        if not one.inward:
            continue
        if kind == "other":
            yield one.line, f"{one.site} sent {one.path}, which is on no list"
        elif kind == "model file" and one.attempt:
            number, attempt, name = one.attempt
            named = done.get((one.site, number, attempt))
            entry = FileEntry(path=name.removeprefix("out/"), size=one.size, sha256=one.sha256)
            if named is not None and entry not in named:
                yield one.line, f"{one.site} sent {one.path}, which the completion record does not name so"
        elif kind == "model" and (match := MODEL.fullmatch(one.path)):
            entry = FileEntry(path=match[2], size=one.size, sha256=one.sha256)
            if entry not in models.get(int(match[1]), (entry,)):
                yield one.line, f"{one.site} sent {one.path}, which the model's record does not name so"
        elif one.size > most.get(kind, 0):
            yield one.line, f"{one.site} sent {one.size:,} bytes as {one.path}, more than a {kind} may have"
