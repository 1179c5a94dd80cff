"""Owns what a campaign still needs of what it has made: to resume, to make a version again, to roll back."""

from dataclasses import dataclass, field

from flctl.campaign.matrix import history_of
from flctl.campaign.report import failed_runs
from flctl.campaign.workspace import Workspace
from flctl.records import Run, Stage

Contributed = tuple[str, int, int]
"""The site, its run's number, and the attempt."""


@dataclass(slots=True, kw_only=True)
class Needed:
    """`versions`: models whose files stay at home. `models`: names of models (also rules' states, contributions) that
    runs under way read, at home and at sites; `kept`: the newest versions, by number. `contributions`: what was fetched
    and stays. `from_version`: the oldest version that sites keep, at least what the newest one was made from: that one
    may not have come to any site yet, and a lost home begins anew from what they have. `alive`: runs that are under
    way, may be tried again, or still wait to be merged."""

    kept: frozenset[int]
    from_version: int
    versions: set[int] = field(default_factory=set)
    models: set[str] = field(default_factory=set)
    contributions: set[Contributed] = field(default_factory=set)
    alive: tuple[Run, ...] = ()

    def lives(self, site: str, number: int) -> bool:
        return any((run.site, run.number) == (site, number) for run in self.alive)


def needed(workspace: Workspace, keep: int) -> Needed:
    """What must stay so that all runs under way go on, and the `keep` newest versions can be made again: their bases
    with the rule's state, their contributions. The first model stays, too, and the best."""
    newest = workspace.newest_model().version
    kept = frozenset([model.version for model in workspace.models()][-keep:])
    retried = {(run.site, run.number) for run in failed_runs(workspace)}
    alive = tuple(
        run
        for run in workspace.runs()
        if run.open or (run.site, run.number) in retried or (run.stage == Stage.FETCHED and run.order.round > newest)
    )
    bases = {parent["version"] for parent in workspace.model_record(newest).get("parents", [])}
    best, plan = history_of(workspace).best, workspace.plan()
    found = Needed(kept=kept, from_version=min(kept | bases), versions={0, *kept}, alive=alive)
    found.versions |= {version for version in (best, plan.evaluates if plan else None) if version is not None}
    found.versions |= {back.source for back in plan.rolled_back if back.version > newest} if plan else set()
    for version in sorted(kept):
        record = workspace.model_record(version)
        found.versions |= {parent["version"] for parent in record.get("parents", [])}
        for item in record.get("contributions", []):
            found.versions.add(item.get("base", version))
            found.contributions.add((item["site"], item["number"], item["attempt"]))
        made_by = record.get("made_by") or {}
        if "number" in made_by:
            run = workspace.run(made_by["site"], made_by["number"])
            found.contributions.add((run.site, run.number, run.attempt))
    for run in alive:
        found.versions.add(run.order.base)
        found.models |= {f"{run.order.base:04d}", *(subject.name for subject in run.order.subjects)}
        found.contributions.add((run.site, run.number, run.attempt))
    for name in found.models:
        if name.isdigit():
            found.versions.add(int(name))
        elif name.count("-") >= 2:
            site, number, attempt = name.rsplit("-", 2)
            found.contributions.add((site, int(number), int(attempt)))
    return found
