"""Owns what a plan means for each of its sites before anything costs node-hours: resources, limits, budgets, bytes,
logins, space. What is on this machine alone is read; what a site itself said comes as `Told`."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flctl.campaign import budget, contacts
from flctl.campaign.access import expected_logins
from flctl.campaign.config import BudgetTable, Configuration, load_profile
from flctl.campaign.contacts import DAY, failure_of
from flctl.campaign.foresight import exposed, limits_broken, outdated, way_barred
from flctl.campaign.frozen import is_there
from flctl.campaign.space import Traffic, bytes_of_round
from flctl.campaign.workspace import Workspace
from flctl.errors import BudgetRefused, FlctlError
from flctl.facility import holding, limits
from flctl.facility.certificates import clock
from flctl.facility.holding import Kept
from flctl.facility.openssh import Place
from flctl.facility.probe import Want
from flctl.facility.profile import Site
from flctl.records import Failure, Plan, Stage

ROOM = 3
"""A site must have room for so many times the model: the base, the run's output, and one more for what is under way
(the next base beside this one, the partial files of a transfer, a second attempt)."""
CONTACTS = 3
"""Contacts of a job that each tick would make by a login of its own: to submit it, at its start, at its end."""
FOLDERS = 40
"""Files of a run's folder, the payload and the like, besides those of the models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a site said when it was asked for a plan, if it was `asked`. `start`: when a job submitted then would begin
    (Unix seconds), the scheduler's estimate; `balance`: what the site's own command for it says; `note`: why something
    was not asked or not told."""

    asked: bool = False
    start: float | None = None
    balance: str = ""
    note: str = ""
    problems: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A plan at one site. `walltime` in seconds, node-hours as the site charges them, `*_round` of one round at most,
    the first one left out of `bytes_out` where the newest model is there already (`resident`); `bytes_frozen`: once,
    for the frozen base of adapters; `free` and `need` in bytes, the latter `copies` times the model and that base;
    `login_until` in Unix seconds; `look`: seconds between two looks of ticks, besides those at jobs' expected starts
    and ends, each a login of the day's `per_day` (None: costs none)."""

    site: str
    jobs: int
    nodes: int
    gpus: int
    walltime: int
    queue: str
    account: str
    node_hours_round: float
    node_hours_plan: float
    used: float
    reserved: float
    budget: float
    bytes_out: int
    bytes_in: int
    bytes_frozen: int
    resident: bool
    logins: int
    look: float | None
    per_day: int
    login_until: float | None
    free: int | None
    need: int
    copies: int
    purge_days: int
    told: Told = field(default_factory=Told)
    notes: tuple[str, ...] = ()
    problems: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Matter:
    """What a forecast is about; `now` in Unix seconds."""

    workspace: Workspace
    configuration: Configuration
    plan: Plan
    now: float

    @property
    def models(self) -> int:
        """How many are still to be made."""
        return models_left(self.workspace, self.plan)

    @property
    def names(self) -> list[str]:
        """The plan's sites, and the one that merges."""
        place = self.configuration.aggregation.aggregate_at
        return [*self.plan.sites, *([place] if place and place not in self.plan.sites else [])]


def forecast(matter: Matter, told: Mapping[str, Told]) -> tuple[Outlook, ...]:
    """What the plan means for each site, with every limit that it breaks."""
    return tuple(_at(matter, load_profile(matter.workspace, name), told.get(name, Told())) for name in matter.names)


def whole_budget(matter: Matter) -> list[Failure]:
    """That the campaign's own budget has no room for a first round of all sites, if so."""
    workspace, most = matter.workspace, matter.configuration.budget.max_node_hours
    if not most or any(run.open for run in workspace.runs()):
        return []
    sites = [load_profile(workspace, name) for name in matter.names]
    asked = sum(first_hours(matter.configuration, matter.plan, site) for site in sites)
    used = budget.used(workspace)
    if used + asked <= most * (1 + 1e-9):
        return []
    words = f"budget: {used:.4g} of {most:.4g} node-hours are used, and {asked:.4g} are asked for by all sites together"
    return [failure_of(BudgetRefused(words, hint="raise budget.max_node_hours in flctl.toml"))]


def _at(matter: Matter, site: Site, told: Told) -> Outlook:
    workspace, name, shape = matter.workspace, site.name, site.shape
    resident, contact = is_resident(workspace, name), workspace.contact(name)
    jobs = jobs_of_round(matter.configuration, matter.plan.sites, name)
    hours = jobs * budget.node_hours(site)
    out, back = bytes_of_round(workspace, Traffic.of(matter.configuration), matter.plan.sites, name)
    want = want_of(workspace, matter.configuration, site, matter.plan)
    kept = {} if site.connection == "local" else holding.found(site, workspace.root / "known_hosts")
    until, doubts = _login_until(site, kept)
    needed = expected_logins(site, kept)
    view = Outlook(
        site=name,
        jobs=jobs,
        nodes=shape.nodes,
        gpus=shape.gpus,
        walltime=shape.walltime,
        queue=limits.named(site, matter.now),
        account=shape.account,
        node_hours_round=hours,
        node_hours_plan=hours * matter.models + last_evaluation(matter, site),
        used=budget.used(workspace, name),
        reserved=budget.reserved(workspace, name),
        budget=site.budget.max_node_hours,
        bytes_out=out,
        bytes_in=back,
        bytes_frozen=frozen_left(workspace, site),
        resident=resident,
        logins=needed,
        look=contacts.between_ticks(site) if needed else None,
        per_day=site.login.per_day,
        login_until=until,
        free=contact.free,
        need=want.size,
        copies=want.copies,
        purge_days=site.storage.purge_days,
        told=told,
    )
    notes = (*([told.note] if told.note else doubts), *_notes(matter, site, view, want))
    return replace(view, notes=notes, problems=(*_problems(matter, site, view), *told.problems))


def _problems(matter: Matter, site: Site, view: Outlook) -> list[Failure]:
    errors: list[FlctlError] = [error] if (error := way_barred(site)) else []
    under_way = any(run.open for run in matter.workspace.runs(site.name))  # that was admitted
    own = replace(matter.configuration, budget=BudgetTable())  # the campaign's is for all sites together
    reason = budget.would_exceed(matter.workspace, own, site, first_hours(matter.configuration, matter.plan, site))
    if reason and not under_way:
        errors.append(BudgetRefused(reason, hint=f"raise budget.max_node_hours in sites/{site.name}.toml"))
    if view.free is not None and view.free < view.need:
        words = f"{limits.size(view.free)} are free there, a round wants {limits.size(view.need)}"
        words += f" ({rooms_of(view)})"
        errors.append(BudgetRefused(words, hint="make room there; flctl plan asks the site again"))
    return [*limits_broken(matter.workspace, site, matter.now), *(failure_of(error) for error in errors)]


def first_hours(configuration: Configuration, plan: Plan, site: Site) -> float:
    """Node-hours of what must be admitted for a model to be made: training and merge, not the evaluation after it."""
    asked = (site.name in plan.sites) + (configuration.aggregation.aggregate_at == site.name)
    return asked * budget.node_hours(site)


def _notes(matter: Matter, site: Site, view: Outlook, want: Want) -> list[str]:
    notes, room = [], view.budget - view.used - view.reserved + _begun(matter, site)
    if view.budget and view.node_hours_round and room < view.node_hours_plan * (1 - 1e-9):
        rounds = max(0, int(room / view.node_hours_round + 1e-9))
        told = f"{rounds} of {limits.count(matter.models, 'round')}"
        notes.append(f"the budget has room for {told} if each job takes its whole walltime")
    until = None if site.login.renew_unattended else view.login_until
    if until is not None and matter.now < until < matter.now + view.walltime:
        ends = clock(until)
        notes.append(f"the login is good until {ends}, and a job may run longer: flctl login {view.site} then")
    if words := _too_many_logins(matter, site, view):
        notes.append(words)
    if view.purge_days and want.seconds > view.purge_days * 86400:
        notes.append(
            f"the plan lasts {want.seconds / 86400:.0f} days or more, and files that nobody touches go after "
            f"{view.purge_days}"
        )
    return notes


def _too_many_logins(matter: Matter, site: Site, view: Outlook) -> str:
    """A warning if ticks would need more logins than the day's: at least one to submit, one at the start and one at the
    end of each job, where jobs take their whole walltime one after the other."""
    if not view.logins or site.login.attended or matter.models < 2:
        return ""
    rounds = min(matter.models, DAY / max(view.walltime, 1))
    needed, most = round(rounds * CONTACTS * max(1, view.jobs)), site.login.per_day
    if needed <= most:
        return ""
    return f"ticks would want {needed} logins a day and make {most} (login.per_day); a flctl round stays logged in"


def _begun(matter: Matter, site: Site) -> float:
    """Node-hours that are used or reserved already for models that are still to be made."""
    workspace, newest = matter.workspace, matter.workspace.newest_model().version
    runs = [run for run in workspace.runs(site.name) if run.order.plan == matter.plan.number]
    return sum(
        budget.used_by(run, budget.default_rate(workspace, run)) + budget.reserved_by(run)
        for run in runs
        if run.order.round > newest
    )


def _login_until(site: Site, kept: Mapping[Place, Kept]) -> tuple[float | None, list[str]]:
    """Until when the login is good without a person (None: for good, or not at all), and what is to be said of it."""
    if site.connection == "ssh" and site.login.attended and site.login.hold:
        if len(kept) == len(holding.places(site)):
            return min(one.until for one in kept.values()), []
        return None, [f"a person must log in first: flctl login {site.name}"]
    if site.connection == "local" or site.login.kind != "certificate":
        return None, []
    from flctl.facility.renewal import certificate_until

    try:
        until = certificate_until(site)
    except FlctlError as error:
        return None, [error.message]
    return until, [] if until is not None else [f"no certificate is valid now: flctl login {site.name}"]


def models_left(workspace: Workspace, plan: Plan) -> int:
    return max(0, plan.target - workspace.newest_model().version)


def jobs_of_round(configuration: Configuration, sites: Sequence[str], name: str) -> int:
    """Jobs at the site for one model: training, the others' contributions evaluated, the merge."""
    trains = name in sites
    evaluates = trains and configuration.evaluation.cross
    return trains + evaluates + (configuration.aggregation.aggregate_at == name)


def last_evaluation(matter: Matter, site: Site) -> float:
    """Node-hours of evaluating the plan's last model, where the best version is gone back to and nothing else does."""
    table = matter.configuration.evaluation
    asked = table.roll_back and not table.cross and matter.models > 0 and site.name in matter.plan.sites
    return budget.node_hours(site) if asked else 0.0


def is_resident(workspace: Workspace, name: str) -> bool:
    """Whether the newest model is at the site already, as far as the records tell."""
    newest = workspace.newest_model().version
    return any(
        run.stage != Stage.ORDERED
        and (run.order.base == newest or any(subject.name == f"{newest:04d}" for subject in run.order.subjects))
        for run in workspace.runs(name)
        if run.stage != Stage.FAILED
    )


def frozen_left(workspace: Workspace, site: Site) -> int:
    """Bytes of the frozen base that are still to go there."""
    frozen = workspace.frozen()
    return frozen.size if frozen and not is_there(workspace, site) else 0


def want_of(workspace: Workspace, configuration: Configuration, site: Site, plan: Plan | None) -> Want:
    """The room that a round needs at the site: ROOM x the model, less the base if it is there, and one more for each
    contribution that comes there to be merged, or each of the others' to be evaluated; and how long the plan lasts at
    least."""
    files = workspace.model_record(workspace.newest_model().version)["files"]
    whole = sum(item["size"] for item in files)
    sites = plan.sites if plan else tuple(workspace.profiles)
    copies = ROOM - is_resident(workspace, site.name)
    if configuration.aggregation.aggregate_at == site.name:
        copies += len(sites)
    elif configuration.evaluation.cross and site.name in sites:
        copies += len(sites) - 1
    seconds = models_left(workspace, plan) * site.shape.walltime if plan else 0
    size = copies * whole + frozen_left(workspace, site)
    return Want(size=size, files=copies * len(files) + FOLDERS, copies=copies, seconds=seconds)


def rooms_of(view: Outlook) -> str:
    """What `need` is made of."""
    return f"{view.copies} x the model" + (", and the frozen base" if view.bytes_frozen else "")


def resources(view: Outlook) -> str:
    """`4 nodes x 8 GPUs for 6:00:00 in batch`."""
    gpus = f" x {limits.count(view.gpus, 'GPU')}" if view.gpus else ""
    where = f" in {view.queue}" if view.queue else ""
    return f"{limits.count(view.nodes, 'node')}{gpus} for {limits.clock(view.walltime)}{where}"


def hours(view: Outlook) -> str:
    """`4 node-hours a round at most, 12.3 of 100 used`."""
    used = f"{view.used:.4g} of {view.budget:.4g} used" if view.budget else f"{view.used:.4g} used"
    return f"{view.node_hours_round:.4g} node-hours a round at most, {used}"


def logins(view: Outlook) -> str:
    """`2 a round, which stays logged in; or each time a tick looks: every 2:00:00 and when a job is expected ...`."""
    if view.look is None:
        return f"{view.logins} a round"
    every = limits.clock(round(view.look))
    return (
        f"{view.logins} a round, which stays logged in; or each time a tick looks: every {every} "
        f"and when a job is expected to begin or end (login.per_day = {view.per_day})"
    )


def line(view: Outlook) -> str:
    """The site in one line."""
    there = "the model is there" if view.resident else f"{limits.size(view.bytes_out)} there"
    once = f", {limits.size(view.bytes_frozen)} of frozen base once" if view.bytes_frozen else ""
    words = [
        resources(view),
        hours(view),
        f"{there}, {limits.size(view.bytes_in)} back{once}",
        limits.count(view.logins, "login"),
    ]
    return f"{view.site}: {'; '.join([*words, *view.notes])}"


def brief(workspace: Workspace, configuration: Configuration, plan: Plan) -> list[str]:
    """What `round` and `campaign start` say before they begin: a line per site, of what is remembered of it."""
    from flctl.campaign.space import too_small

    matter = Matter(workspace=workspace, configuration=configuration, plan=plan, now=time.time())
    warnings = [*too_small(workspace, plan), *exposed(workspace, configuration, plan), *outdated(workspace, plan.sites)]
    return [line(view) for view in forecast(matter, {})] + warnings
