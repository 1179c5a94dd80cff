"""Owns how fast a campaign grows: bytes of a round, how many more rounds fit, what a purge may take too early.

`flctl status` shows it and must be quick: of flctl.toml and the profiles it reads the few keys that it needs,
unchecked.
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from flctl.campaign.config import Configuration, EvaluationTable, FetchTable
from flctl.campaign.workspace import Workspace, read_toml
from flctl.errors import ConfigurationError
from flctl.facility import limits
from flctl.records import Plan, Run, Stage

DAY = 86400.0
CAREFUL = 0.8
"""Part of a purge window after which it is warned of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes free at a site (empty: at home) as far as is known, those that a round leaves there, and how many more
    rounds fit."""

    site: str
    free: int | None
    per_round: int

    @property
    def rounds(self) -> int | None:
        return None if self.free is None or not self.per_round else self.free // self.per_round


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What flctl.toml says of the models that travel: `fetch.kinds`, `aggregation.aggregate_at`, `evaluation.cross`."""

    kinds: Sequence[str]
    merger: str
    cross: bool

    @classmethod
    def of(cls, configuration: Configuration) -> "Traffic":
        return cls(
            kinds=configuration.fetch.kinds,
            merger=configuration.aggregation.aggregate_at,
            cross=configuration.evaluation.cross,
        )

    @classmethod
    def glimpse(cls, workspace: Workspace) -> "Traffic":
        """The same without checking the file; what cannot be meant counts as not written."""
        told = read_toml(workspace.root / "flctl.toml")
        kinds = _key(told, "fetch", "kinds", FetchTable().kinds)
        return cls(
            kinds=[str(kind) for kind in kinds] if isinstance(kinds, list | tuple) else FetchTable().kinds,
            merger=str(_key(told, "aggregation", "aggregate_at", "")),
            cross=_key(told, "evaluation", "cross", EvaluationTable().cross) is True,
        )


def _key(told: dict[str, Any], table: str, key: str, default: Any) -> Any:
    found = told.get(table)
    return found.get(key, default) if isinstance(found, dict) else default


def bytes_of_round(workspace: Workspace, traffic: Traffic, sites: Sequence[str], name: str) -> tuple[int, int]:
    """Bytes to the site and back for one model: the base there, weights like the base's back; where sites evaluate each
    other or one of them merges, also the others' weights there. A rule's state, which only merges know, is left out."""
    files = workspace.model_record(workspace.newest_model().version)["files"]
    whole = sum(item["size"] for item in files)
    weights = sum(item["size"] for item in files if any(fnmatch(item["path"], kind) for kind in traffic.kinds))
    others, trains = len([site for site in sites if site != name]), name in sites
    out, back = whole, weights if trains else 0
    if traffic.merger == name:
        out, back = out + others * weights, back + weights
    elif trains and traffic.cross:
        out += others * weights
    return out, back


def rooms(workspace: Workspace, sites: Sequence[str]) -> list[Room]:
    """Home first, then these sites, each as it was when it was last asked."""
    traffic = Traffic.glimpse(workspace)
    found = [Room(site="", free=shutil.disk_usage(workspace.root).free, per_round=_here(workspace, len(sites)))]
    for name in sites:
        there = sum(bytes_of_round(workspace, traffic, sites, name))
        found.append(Room(site=name, free=workspace.contact(name).free, per_round=there))
    return found


def _here(workspace: Workspace, sites: int) -> int:
    """Bytes of the newest model, its rule's state and what it was made of; of a first one, what they will be."""
    record = workspace.model_record(workspace.newest_model().version)
    whole: int = sum(item["size"] for item in record["files"])
    state: int = sum(item["size"] for item in (record.get("state") or {}).get("files", []))
    given = record.get("contributions", [])
    if not given:
        return whole * (1 + sites)
    return whole * (1 + len(given)) + state


def line(room: Room) -> str:
    """`brno: 120 GB free, 1.4 GB a round: 85 more`."""
    where = room.site or "home"
    if room.free is None:
        return f"{where}: not known yet, {limits.size(room.per_round)} a round"
    return f"{where}: {limits.size(room.free)} free, {limits.size(room.per_round)} a round: {room.rounds} more"


def too_small(workspace: Workspace, plan: Plan | None) -> list[str]:
    """A line for home and for each site where what is free is less than the rest of the plan leaves there."""
    left = plan.target - workspace.newest_model().version if plan else 0
    if plan is None or left < 1:
        return []
    return [
        f"space at {room.site or 'home'} for {room.rounds} of {limits.count(left, 'round')}: "
        f"{limits.size(room.free or 0)} free, {limits.size(room.per_round)} a round; flctl gc makes room"
        for room in rooms(workspace, plan.sites)
        if room.rounds is not None and room.rounds < left
    ]


def purges(workspace: Workspace, runs: Iterable[Run], now: float) -> list[str]:
    """A line for each run whose files a purge may take before its job has begun. `now`: Unix seconds."""
    found = []
    for run in runs:
        if not run.open or run.stage not in (Stage.DELIVERED, Stage.CLAIMED, Stage.QUEUED):
            continue
        try:
            days = _key(read_toml(workspace.profiles[run.site]), "storage", "purge_days", 0)
        except (ConfigurationError, KeyError):
            continue
        if type(days) is not int:
            continue
        start = max(now, run.job.expected_start or now)
        if days and start - run.created_at > CAREFUL * days * DAY:
            age = (start - run.created_at) / DAY
            found.append(
                f"{run.site}: run {run.number:04d} begins {age:.0f} days after its files were brought there, and files "
                f"that nobody touches go after {days}: flctl cancel {run.site}, then flctl retry {run.site}, brings "
                "what is gone"
            )
    return found
