"""Owns the dry run: what a round would do, rendered in memory, nothing touched."""

import time
from pathlib import PurePosixPath
from typing import Any

from flctl.campaign import shipped
from flctl.campaign.config import load_configuration, load_profile
from flctl.campaign.planning import is_open, proposed
from flctl.campaign.privacy import outlook
from flctl.campaign.session import VARIABLE
from flctl.campaign.steps.deliver import read_template
from flctl.campaign.workspace import Workspace
from flctl.facility.script import job_script
from flctl.records import Plan, token_of


def rehearse(
    workspace: Workspace, names: list[str], rounds: int | None, steps: int | None
) -> tuple[Plan, dict[str, str]]:
    """The plan, and the job script of each site's next run (and of a merge, where a site makes it). Before the first
    login `$WORK` stands as `/_WORK_`: only the site knows it."""
    current = workspace.plan()
    plan = current if current is not None and is_open(workspace, current) else proposed(workspace, names, rounds, steps)
    scripts = {name: _script(workspace, name) for name in plan.sites}
    if place := load_configuration(workspace).aggregation.aggregate_at:
        scripts[f"{place}, merge"] = _script(workspace, place, later=plan.sites.count(place), merges=True)
    return plan, scripts


def private_after(workspace: Workspace, plan: Plan) -> dict[str, Any] | None:
    """What the plan's models are to tell of the sites' contributions, once all are made; None: nobody asked."""
    newest = workspace.newest_model().version
    return outlook(workspace, load_configuration(workspace), newest, max(0, plan.target - newest))


def _script(workspace: Workspace, name: str, *, later: int = 0, merges: bool = False) -> str:
    """The job script of the site's next run but `later`."""
    site, contact = load_profile(workspace, name), workspace.contact(name)
    work = VARIABLE.sub(lambda match: f"/_{match[1] or match[2]}_", site.storage.work.replace("~", "/_HOME_"))
    root = PurePosixPath(contact.workdir or f"{work.replace('//', '/')}/{workspace.label}")
    number = max((run.number for run in workspace.runs(name)), default=0) + 1 + later
    return job_script(
        site,
        read_template(workspace.root / "templates", site.scheduler.kind),
        token=token_of(workspace.id, name, number, 1),
        campaign=workspace.name,
        run=root / "runs" / f"{number:04d}-1",
        workdir=root,
        payload=root / "payload" / shipped.payload_sha256(),
        data=contact.data or site.storage.data,
        now=time.time(),
        program=root / "payload" / shipped.merger_sha256() / shipped.MERGER if merges else None,
    )
