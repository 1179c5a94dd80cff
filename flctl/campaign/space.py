"""Owns how fast a campaign grows: bytes of a round, how many more rounds fit, what a purge may take too early."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flctl.campaign.config import load_configuration
from flctl.campaign.outlook import bytes_of_round
from flctl.campaign.workspace import Workspace
from flctl.errors import ConfigurationError
from flctl.facility import limits
from flctl.facility.profile import load_site
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


def rooms(workspace: Workspace, sites: Sequence[str]) -> list[Room]:
    """Home first, then these sites, each as it was when it was last asked."""
    configuration = load_configuration(workspace)
    found = [Room(site="", free=shutil.disk_usage(workspace.root).free, per_round=_here(workspace, len(sites)))]
    for name in sites:
        there = sum(bytes_of_round(workspace, configuration, sites, name))
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
            days = load_site(workspace.profiles[run.site]).storage.purge_days
        except (ConfigurationError, KeyError):
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
