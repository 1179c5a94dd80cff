"""Owns the dry run: what a round would do at each site, its job scripts rendered in memory; no site is touched."""

import time
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from flctl.campaign import shipped
from flctl.campaign.config import load_configuration, load_profile, whole_profile
from flctl.campaign.contacts import failure_of
from flctl.campaign.foresight import check_models
from flctl.campaign.frozen import place_of
from flctl.campaign.planning import NO_SITES, check_least, continued, drafted, proposed
from flctl.campaign.privacy import outlook
from flctl.campaign.session import VARIABLE
from flctl.campaign.steps.deliver import read_template
from flctl.campaign.trainers import trainer_of
from flctl.campaign.workspace import Workspace, write_atomic
from flctl.errors import ConfigurationError, FlctlError
from flctl.facility.profile import Site
from flctl.facility.script import job_script
from flctl.facility.shell import Plain
from flctl.records import Failure, Plan, token_of

Problems = list[tuple[str, Failure]]


def rehearse(
    workspace: Workspace, names: list[str], rounds: int | None, steps: int | None
) -> tuple[Plan, dict[str, str]]:
    """The plan, and the job script of each site's next run (and of a merge, where a site makes it). Before the first
    login `$WORK` stands as `/_WORK_`: only the site knows it."""
    plan = making(workspace, names, rounds, steps) or proposed(workspace, names, rounds, steps)
    return plan, scripts_of(workspace, plan)


def considered(
    workspace: Workspace, names: list[str], rounds: int | None, steps: int | None
) -> tuple[Plan | None, Problems]:
    """The same plan, of those sites whose profiles are whole (None: of none is), and all that speaks against it."""
    problems, plan = Problems(), making(workspace, names, rounds, steps)
    wanted = plan.sites if plan else tuple(workspace.profiles) if names in ([], ["all"]) else tuple(sorted(set(names)))
    if not wanted:
        raise ConfigurationError(f"the campaign has no sites: {workspace.root / 'sites'} is empty", hint=NO_SITES)
    problems += [(name, failure_of(error)) for name in wanted if (error := _broken(workspace, name))]
    whole = tuple(name for name in wanted if name not in dict(problems))
    if not whole:
        return None, problems
    plan = replace(plan, sites=whole) if plan else drafted(workspace, whole, rounds, steps)
    configuration = load_configuration(workspace)
    try:
        check_least(configuration, len(wanted))
        left = max(0, plan.target - workspace.newest_model().version)
        check_models(workspace, configuration, whole, min(plan.min_sites, len(whole)), left)
    except FlctlError as error:
        problems.append((error.site or "", failure_of(error)))
    return plan, problems


def making(workspace: Workspace, names: list[str], rounds: int | None, steps: int | None) -> Plan | None:
    """The open plan, unless it only evaluates: then what follows it is looked at."""
    current = workspace.plan()
    evaluates = current is not None and current.evaluates is not None
    return None if evaluates else continued(workspace, names, rounds, steps)


def _broken(workspace: Workspace, name: str) -> FlctlError | None:
    """What is wrong with a site's profile or job template."""
    try:
        whole_profile(workspace, name)
        script_of(workspace, name)
    except FlctlError as error:
        return error
    return None


def private_after(workspace: Workspace, plan: Plan) -> dict[str, Any] | None:
    """What the plan's models are to tell of the sites' contributions, once all are made; None: nobody asked."""
    newest = workspace.newest_model().version
    return outlook(workspace, load_configuration(workspace), newest, max(0, plan.target - newest))


def scripts_of(workspace: Workspace, plan: Plan) -> dict[str, str]:
    """The job script of each site's next run by its name, and that of a merge which a site makes."""
    scripts = {name: script_of(workspace, name) for name in plan.sites}
    if place := load_configuration(workspace).aggregation.aggregate_at:
        scripts[f"{place}, merge"] = script_of(workspace, place, later=plan.sites.count(place), merges=True)
    return scripts


def write_scripts(folder: Path, scripts: dict[str, str]) -> list[Path]:
    """Write the scripts into a private folder; their paths."""
    written = {folder / f"{name.replace(', ', '-')}.sh": text for name, text in scripts.items()}
    for path, text in written.items():
        write_atomic(path, text.encode())
    return list(written)


def script_of(workspace: Workspace, name: str, *, later: int = 0, merges: bool = False) -> str:
    """The job script of the site's next run but `later`."""
    site, contact = load_profile(workspace, name), workspace.contact(name)
    work = VARIABLE.sub(lambda match: f"/_{match[1] or match[2]}_", site.storage.work.replace("~", "/_HOME_"))
    root = PurePosixPath(contact.workdir or f"{work.replace('//', '/')}/{workspace.label}")
    number = max((run.number for run in workspace.runs(name)), default=0) + 1 + later
    merger = Plain(root / "payload" / shipped.merger_sha256() / shipped.MERGER)
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
        command=(merger,) if merges else trainer_of(workspace.root, load_configuration(workspace), site).command(root),
        frozen=None if merges else _frozen_at(workspace, site, root),
    )


def _frozen_at(workspace: Workspace, site: Site, root: PurePosixPath) -> str | None:
    """The folder of the frozen base at the site, as far as it is known before anybody asked there."""
    frozen = workspace.frozen()
    if frozen is None:
        return None
    return workspace.contact(site.name).frozen or site.storage.frozen or str(place_of(root, frozen))
