"""Owns what a person may decide about a campaign: plans, retries, skips, cancellations, releases."""

import time
from dataclasses import replace

from flctl import faults
from flctl.campaign import attempts, budget, deciding, driver, steps
from flctl.campaign.config import Configuration, load_configuration, load_profile, whole_profile
from flctl.campaign.engine import Engine
from flctl.campaign.foresight import check_rule, foresee
from flctl.campaign.report import failed_runs
from flctl.campaign.workspace import Workspace
from flctl.errors import ConfigurationError, FlctlError, Interrupted, Locked, LoginTooSoon, UsageError
from flctl.facility import allowance
from flctl.policy import decide
from flctl.policy.evaluating import CANCELLED
from flctl.records import Cause, Failure, Plan, Run, Stage, Work

NO_SITES = "flctl site add NAME; flctl site list --available shows which there are"


def chosen_sites(workspace: Workspace, names: list[str]) -> tuple[str, ...]:
    """The sites a command line names: `all` or nothing is every profile of the campaign. Each must be complete."""
    if not names or names == ["all"]:
        names = list(workspace.profiles)
    if not names:
        raise ConfigurationError(f"the campaign has no sites: {workspace.root / 'sites'} is empty", hint=NO_SITES)
    for name in names:
        whole_profile(workspace, name)
    return tuple(sorted(set(names)))


def is_open(workspace: Workspace, plan: Plan) -> bool:
    """Whether the plan is still to be fulfilled: a model is missing, or a run of it is under way, or what was to be
    evaluated is not, or the best version is to be gone back to."""
    if workspace.newest_model().version < plan.target or any(run.open for run in workspace.runs()):
        return True
    configuration = load_configuration(workspace)
    view = deciding.view_of(workspace, configuration)
    if view is None or not (plan.evaluates is not None or plan.rolled_back or configuration.evaluation.roll_back):
        return False
    return not decide(configuration.policy.name, view, time.time()).done


def drafted(workspace: Workspace, sites: tuple[str, ...], rounds: int | None, steps_: int | None) -> Plan:
    """The plan for `rounds` more models by these sites; whether it can work has not been looked at."""
    configuration, last = load_configuration(workspace), workspace.plan()
    first = workspace.newest_model().version + 1
    return Plan(
        number=next_number(workspace),
        sites=sites,
        first=first,
        target=first + (rounds or 1) - 1,
        steps=steps_ or configuration.steps,
        min_sites=configuration.campaign.min_sites or len(sites),
        rolled_back=last.rolled_back if last else (),
    )


def next_number(workspace: Workspace) -> int:
    last = workspace.plan()
    return last.number + 1 if last else max((run.order.plan for run in workspace.runs()), default=1)


def proposed(workspace: Workspace, names: list[str], rounds: int | None, steps_: int | None) -> Plan:
    """The plan for `rounds` more models by these sites, which nothing that is known speaks against."""
    configuration = load_configuration(workspace)
    sites = chosen_sites(workspace, names)
    plan = drafted(workspace, sites, rounds, steps_)
    check_least(configuration, len(sites))
    foresee(workspace, configuration, sites, plan.min_sites, rounds or 1)
    budget.check_first_round(workspace, configuration, sites)
    return plan


def check_least(configuration: Configuration, sites: int) -> None:
    """ConfigurationError if a merge needs more contributions than there are planned sites."""
    least = configuration.campaign.min_sites
    if least > sites:
        raise ConfigurationError(
            f"flctl.toml: campaign.min_sites is {least}, but only {sites} sites are planned",
            hint="lower it, or name more sites",
        )


def open_plan(workspace: Workspace, names: list[str], rounds: int | None, steps_: int | None) -> Plan:
    """The plan to work on: the open one, if the arguments do not contradict it, else a new one, written."""
    driver.ours(workspace)
    with workspace.lock_campaign():
        current = continued(workspace, names, rounds, steps_)
        if current is not None:
            left = current.target - workspace.newest_model().version
            if current.evaluates is None:
                foresee(workspace, load_configuration(workspace), current.sites, current.min_sites, left)
            return current
        return written(workspace, proposed(workspace, names, rounds, steps_))


def written(workspace: Workspace, plan: Plan) -> Plan:
    """A new plan in the place of the last one."""
    faults.point("plan", str(plan.target))
    workspace.save_plan(plan)
    faults.point("plan-recorded", str(plan.target))
    told = {"evaluates": plan.evaluates} if plan.evaluates is not None else {"steps": plan.steps}
    workspace.journal.append("plan", sites=list(plan.sites), first=plan.first, target=plan.target, **told)
    return plan


def continued(workspace: Workspace, names: list[str], rounds: int | None, steps_: int | None) -> Plan | None:
    """The open plan, if there is one. UsageError if the arguments contradict it; but one whose models are all made, and
    whose last evaluation nobody has begun, gives way to them."""
    plan = workspace.plan()
    if plan is None or not is_open(workspace, plan):
        return None
    try:
        agree(workspace, plan, names, rounds, steps_)
    except UsageError:
        missing = plan.evaluates is not None or workspace.newest_model().version < plan.target
        if missing or any(run.open for run in workspace.runs()):
            raise
        return None
    return plan


def agree(workspace: Workspace, plan: Plan, names: list[str], rounds: int | None, steps_: int | None) -> None:
    """UsageError if the arguments ask for something else than the open plan."""
    if plan.evaluates is not None and (names or rounds or steps_):
        raise UsageError(
            f"model {plan.evaluates:04d} is being evaluated at {', '.join(plan.sites)}, and this asks for a new model",
            hint="flctl round without these options goes on with it; flctl cancel ends it",
        )
    sites = None if not names else tuple(sorted(workspace.profiles if names == ["all"] else set(names)))
    different = [
        f"--{option} {ours} (the plan says {theirs})"
        for option, ours, theirs in (
            ("sites", sites and " ".join(sites), " ".join(plan.sites)),
            ("rounds", None if plan.ended else rounds, plan.target - plan.first + 1),
            ("steps", steps_, plan.steps),
        )
        if ours is not None and ours != theirs
    ]
    if different:
        raise UsageError(
            f"a plan is under way to model {plan.target:04d}, and this asks for another: {'; '.join(different)}",
            hint="flctl round without these options goes on with it; flctl cancel ends it",
        )


def affected(workspace: Workspace, site: str | None, what: str, runs: list[Run]) -> list[Run]:
    """The runs an intervention is about; UsageError if there are none."""
    if site is not None:
        load_profile(workspace, site)
    chosen = [run for run in runs if site in (None, run.site)]
    if not chosen:
        where = f"{site} has" if site else "the campaign has"
        raise UsageError(f"{where} no run that {what}", hint="flctl status shows them")
    return chosen


def retry(engine: Engine, site: str | None) -> list[Run]:
    """Open the next attempt of the failed runs, and of those that wait because their job was cancelled at its site."""
    workspace, opened = engine.workspace, []
    driver.ours(workspace)
    waiting = [run for run in workspace.runs() if attempts.waits_for_a_person(run)]
    for failed in affected(workspace, site, "failed and may be tried again", [*failed_runs(workspace), *waiting]):
        with workspace.lock_site(failed.site):
            run = workspace.run(failed.site, failed.number)
            if run.stage != Stage.FAILED and not attempts.waits_for_a_person(run):
                continue
            fresh = attempts.opened(workspace, run, automatic=False)
            engine.record(run, fresh)
        faults.point("retry-recorded", failed.site)
        with workspace.lock_campaign():
            _unskip(workspace, run)
        opened.append(fresh)
    return opened


def _unskip(workspace: Workspace, run: Run) -> None:
    plan = workspace.plan()
    if plan is not None and (run.order.round, run.site) in plan.skipped:
        left = tuple(pair for pair in plan.skipped if pair != (run.order.round, run.site))
        workspace.save_plan(replace(plan, skipped=left))


def skip(engine: Engine, site: str) -> tuple[int, FlctlError | None]:
    """Leave a site out of the model that is being made: its open run, if any, is cancelled. A site that cannot be
    reached is left out all the same; what it still does is never merged. Returns the version, and why the job there
    could not be cancelled."""
    workspace = engine.workspace
    plan = workspace.plan()
    version = workspace.newest_model().version + 1
    if plan is None or version > plan.target or site not in plan.sites:
        raise UsageError(f"no model that {site} is planned for is being made", hint="flctl status shows the plan")
    wanted = (plan.number, version, Work.TRAIN)
    runs = [run for run in workspace.runs(site) if (run.order.plan, run.order.round, run.order.work) == wanted]
    if any(run.stage == Stage.FETCHED for run in runs):
        raise UsageError(f"{site}'s contribution to model {version:04d} is already here", hint="flctl status")
    if set(plan.sites) <= plan.skips(version) | {site}:
        raise UsageError(
            f"{site} is the last site of model {version:04d}; without it there is none",
            hint="flctl cancel ends the plan",
        )
    left = len(set(plan.sites) - plan.skips(version) - {site})
    check_rule(workspace, load_configuration(workspace), left, min(left, plan.min_sites))
    trouble: FlctlError | None = None
    why = f"left out of model {version:04d} with flctl skip"
    for run in runs:
        try:
            _end(engine, run, why, skipped=True)
        except (Interrupted, Locked, LoginTooSoon):
            raise
        except FlctlError as error:
            trouble = error
            _close(engine, run, why, skipped=True)
    with workspace.lock_campaign():
        plan = workspace.plan() or plan
        if site not in plan.skips(version):
            workspace.save_plan(replace(plan, skipped=(*plan.skipped, (version, site))))
            faults.point("skip-recorded", site)
            workspace.journal.append("skip", site=site, version=version)
    return version, trouble


def open_targets(workspace: Workspace, site: str | None) -> list[Run]:
    """The open runs that `cancel` is about; none is an error only where a site is named."""
    driver.ours(workspace)
    runs = [run for run in workspace.runs() if run.open]
    return runs if site is None else affected(workspace, site, "is under way", runs)


def cancel_run(engine: Engine, run: Run) -> Run:
    return _end(engine, run, CANCELLED)


def give_up_run(engine: Engine, run: Run) -> Run:
    """Close a run whose site cannot be told to: what its job still makes is never merged."""
    return _close(engine, run, CANCELLED, skipped=False)


def end_plan(workspace: Workspace) -> None:
    """Close the plan at the newest model there is."""
    with workspace.lock_campaign():
        plan, newest = workspace.plan(), workspace.newest_model().version
        if plan is not None and is_open(workspace, plan):
            begun = {run.site for run in workspace.runs() if run.order.plan == plan.number}
            sites = plan.sites if plan.evaluates is None else tuple(site for site in plan.sites if site in begun)
            made = tuple(back for back in plan.rolled_back if back.version <= newest)
            workspace.save_plan(
                replace(plan, target=min(newest, plan.target), ended=CANCELLED, sites=sites, rolled_back=made)
            )
            faults.point("plan-end-recorded", str(newest))
            workspace.journal.append("plan ended", target=newest)


def _end(engine: Engine, run: Run, why: str, *, skipped: bool = False) -> Run:
    """Revoke the attempt at its site, cancel its job there, and close the run."""
    workspace = engine.workspace
    with workspace.lock_site(run.site) as lock:
        run = workspace.run(run.site, run.number)
        if run.open and run.stage not in (Stage.ORDERED, Stage.ENDED):
            if not run.job.ending:
                run = replace(run, job=replace(run.job, ending=why))
                workspace.save_run(run)
                faults.point("ending-recorded", run.site)
            steps.cancel(engine.access.session(load_profile(workspace, run.site), lock), run)
            run = replace(run, job=replace(run.job, ending=""))
        return _closed(engine, run, why, skipped=skipped)


def _close(engine: Engine, run: Run, why: str, *, skipped: bool) -> Run:
    """Close the run in the records alone; its site is told with the next contact (engine.py), or before the next
    attempt is delivered there."""
    with engine.workspace.lock_site(run.site):
        return _closed(engine, engine.workspace.run(run.site, run.number), why, skipped=skipped)


def _closed(engine: Engine, run: Run, why: str, *, skipped: bool) -> Run:
    if not run.open:
        if skipped and run.stage == Stage.FAILED:
            engine.record(run, replace(run, skipped=True))
        return run
    hint = f"flctl retry {run.site} {run.order.work}s again"
    failure = Failure(code="job_failed", exit_code=6, message=why, hint=hint, cause=Cause.CANCELLED_BY_US)
    closed = replace(run, stage=Stage.FAILED, failure=failure, skipped=skipped, held=None)
    engine.record(run, closed)
    return closed


def release(workspace: Workspace, site: str | None) -> list[str]:
    """Lift the holds of a site (or all): the next contact is tried at once. A run whose job was cancelled at its site
    is not released: whether it is tried again is what a person has to say."""
    names = [site] if site else list(workspace.profiles)
    released, left = list[str](), list[Run]()
    for name in names:
        profile = load_profile(workspace, name)
        with workspace.lock_site(name):
            contact, lifted = workspace.contact(name), allowance.release(profile)
            runs = [run for run in workspace.runs(name) if run.held is not None]
            left += [run for run in runs if attempts.waits_for_a_person(run)]
            held = [run for run in runs if not attempts.waits_for_a_person(run)]
            if contact.held is None and not held and contact.trouble is None and not lifted:
                continue
            workspace.save_contact(name, replace(contact, held=None, trouble=None, failures=0, due=0.0))
            for run in held:
                workspace.save_run(replace(run, held=None, changed_at=time.time()))
            faults.point("release-recorded", name)
            workspace.journal.append("release", site=name)
            released.append(name)
    if not released and left:
        first, why = left[0], attempts.why_held(left[0])
        raise UsageError(f"{first.site}: run {first.number:04d} is not released: {why.message}", hint=why.hint)
    if not released:
        raise UsageError(f"{site} is not held" if site else "no site is held", hint="flctl status shows what waits")
    return released
