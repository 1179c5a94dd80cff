"""What a plan means for each site, in figures: bytes, jobs, node-hours, room; and everything that speaks against it."""

import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flctl.campaign.config import Configuration, load_configuration, load_profile
from flctl.campaign.foresight import exposed, outdated
from flctl.campaign.outlook import (
    ROOM,
    Matter,
    Outlook,
    Told,
    forecast,
    is_resident,
    jobs_of_round,
    want_of,
    whole_budget,
)
from flctl.campaign.planning import drafted
from flctl.campaign.rehearsal import considered, scripts_of, write_scripts
from flctl.campaign.space import Traffic, bytes_of_round
from flctl.campaign.workspace import Workspace
from flctl.errors import UsageError
from flctl.facility import rsync
from flctl.records import Contribution, Job, Order, Plan, Run, Stage, Work
from tests.campaigns import Campaign
from tests.ssh_sites import keygen

SITES = ("brno", "pisa")
NOW = 1_795_250_190.0


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("plan"))


@pytest.fixture
def workspace(campaign: Campaign) -> Workspace:
    for name in SITES:
        campaign.profile(name)
    return Workspace(campaign.place)


def change(campaign: Campaign, site: str, old: str, new: str) -> None:
    """Change a line of a profile."""
    path = campaign.place / "sites" / f"{site}.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def look(
    workspace: Workspace, *, rounds: int = 1, told: dict[str, Told] | None = None, now: float = NOW
) -> dict[str, Outlook]:
    configuration = load_configuration(workspace)
    plan = drafted(workspace, SITES, rounds, None)
    matter = Matter(workspace=workspace, configuration=configuration, plan=plan, now=now)
    return {view.site: view for view in forecast(matter, told or {})}


def sizes(workspace: Workspace) -> tuple[int, int]:
    """Bytes of the newest model, and of its weights."""
    files = workspace.model_record(0)["files"]
    whole = sum(item["size"] for item in files)
    return whole, sum(item["size"] for item in files if item["path"].endswith(".safetensors"))


def with_merge_at(workspace: Workspace, place: str) -> Configuration:
    configuration = load_configuration(workspace)
    return replace(configuration, aggregation=replace(configuration.aggregation, aggregate_at=place))


def with_evaluation(workspace: Workspace) -> Configuration:
    configuration = load_configuration(workspace)
    return replace(configuration, evaluation=replace(configuration.evaluation, cross=True))


def test_the_base_goes_there_and_its_weights_come_back(workspace: Workspace) -> None:
    whole, weights = sizes(workspace)
    assert whole > weights > 0
    configuration = load_configuration(workspace)
    assert bytes_of_round(workspace, Traffic.of(configuration), SITES, "brno") == (whole, weights)
    assert jobs_of_round(configuration, SITES, "brno") == 1


def test_sites_that_evaluate_each_other_get_the_others_weights(workspace: Workspace) -> None:
    whole, weights = sizes(workspace)
    configuration = with_evaluation(workspace)
    more = bytes_of_round(workspace, Traffic.of(configuration), (*SITES, "more"), "brno")
    assert more == (whole + 2 * weights, weights)
    assert jobs_of_round(configuration, SITES, "brno") == 2


def test_the_site_that_merges_gets_the_others_weights_and_gives_the_merged_ones(workspace: Workspace) -> None:
    whole, weights = sizes(workspace)
    configuration = with_merge_at(workspace, "brno")
    assert bytes_of_round(workspace, Traffic.of(configuration), SITES, "brno") == (whole + weights, 2 * weights)
    assert bytes_of_round(workspace, Traffic.of(configuration), ("pisa",), "brno") == (whole + weights, weights)
    assert jobs_of_round(configuration, SITES, "brno") == 2
    assert jobs_of_round(configuration, ("pisa",), "brno") == 1
    site = load_profile(workspace, "brno")
    assert want_of(workspace, configuration, site, None).size == (ROOM + 2) * whole


def run_at(site: str, stage: Stage) -> Run:
    order = Order(site=site, work=Work.TRAIN, base=0, round=1, plan=1, steps=4)
    return Run(number=1, order=order, stage=stage, job=Job(token="f" * 15), created_at=NOW, changed_at=NOW)


@pytest.mark.parametrize(("stage", "there"), [(Stage.ORDERED, False), (Stage.DELIVERED, True), (Stage.FETCHED, True)])
def test_a_model_that_was_delivered_is_not_sent_or_stored_again(
    workspace: Workspace, stage: Stage, there: bool
) -> None:
    whole, _ = sizes(workspace)
    workspace.save_run(run_at("brno", stage))
    try:
        assert is_resident(workspace, "brno") == there
        assert not is_resident(workspace, "pisa")
        view = look(workspace)["brno"]
        assert view.resident == there
        assert view.need == (ROOM - there) * whole
    finally:
        (workspace.run_folder("brno", 1) / "run.json").unlink()


def test_node_hours_are_those_of_every_job_in_its_whole_walltime(campaign: Campaign, workspace: Workspace) -> None:
    change(campaign, "brno", 'walltime = "00:10:00"', 'walltime = "06:00:00"\nnodes = 4')
    view = look(workspace, rounds=3)["brno"]
    assert (view.nodes, view.walltime) == (4, 6 * 3600)
    assert view.node_hours_round == pytest.approx(24)
    assert view.node_hours_plan == pytest.approx(72)
    assert view.problems == ()


def test_a_queues_limit_is_a_problem_in_one_line(campaign: Campaign, workspace: Workspace) -> None:
    limit(campaign, "brno")
    view = look(workspace)["brno"]
    (problem,) = view.problems
    assert (problem.exit_code, problem.message) == (3, "4 nodes for 6:00:00: batch allows 2:00:00; use extended")
    assert look(workspace)["pisa"].problems == ()


def limit(campaign: Campaign, site: str) -> None:
    """Ask for more than the site's queue allows."""
    change(campaign, site, 'walltime = "00:10:00"', 'walltime = "06:00:00"\nnodes = 4\npartition = "batch"')
    path = campaign.place / "sites" / f"{site}.toml"
    tables = '\n[queues.batch]\nmax_walltime = "02:00:00"\n\n[queues.extended]\nmax_nodes = 64\n'
    path.write_text(path.read_text() + tables)


def test_a_budget_without_room_for_a_round_is_a_problem_and_one_for_some_rounds_a_note(
    campaign: Campaign, workspace: Workspace
) -> None:
    (campaign.place / "sites" / "brno.toml").open("a").write("\n[budget]\nmax_node_hours = 0.1\n")
    (problem,) = look(workspace)["brno"].problems
    assert problem.exit_code == 9
    assert "0.1667 are asked for" in problem.message
    change(campaign, "brno", "max_node_hours = 0.1", "max_node_hours = 0.4")
    view = look(workspace, rounds=3)["brno"]
    assert view.problems == ()
    assert "room for 2 of 3 rounds" in " ".join(view.notes)
    assert look(workspace, rounds=2)["brno"].notes == ()
    # What the round under way has used or reserved is part of the plan.
    running = run_at("brno", Stage.RUNNING)
    job = replace(running.job, rate=1.0, walltime=600.0, elapsed=300.0)
    workspace.save_run(replace(running, job=job))
    try:
        under_way = look(workspace, rounds=2)["brno"]
        assert under_way.used == pytest.approx(1 / 12)
        assert (under_way.problems, under_way.notes) == ((), ())
        assert "room for 2 of 3 rounds" in " ".join(look(workspace, rounds=3)["brno"].notes)
    finally:
        (workspace.run_folder("brno", 1) / "run.json").unlink()


def test_a_budget_for_the_training_of_a_round_and_not_its_evaluation_is_a_note(
    campaign: Campaign, workspace: Workspace
) -> None:
    (campaign.place / "sites" / "brno.toml").open("a").write("\n[budget]\nmax_node_hours = 0.2\n")
    plan = drafted(workspace, SITES, 1, None)
    matter = Matter(workspace=workspace, configuration=with_evaluation(workspace), plan=plan, now=NOW)
    view = forecast(matter, {})[0]
    assert view.problems == ()
    assert "room for 0 of 1 round " in " ".join(view.notes)


def test_a_budget_below_what_is_used_is_told_whatever_a_job_is_charged(
    campaign: Campaign, workspace: Workspace
) -> None:
    tables = "\n[budget]\nmax_node_hours = 0.1\n\n[queues.free]\ncharge = 0.0\n"
    (campaign.place / "sites" / "brno.toml").open("a").write(tables)
    change(campaign, "brno", "walltime", 'partition = "free"\nwalltime')
    run = replace(run_at("brno", Stage.FETCHED), spent=1.0)
    workspace.save_run(run)
    try:
        (problem,) = look(workspace)["brno"].problems
        assert (problem.exit_code, look(workspace)["brno"].notes) == (9, ())
    finally:
        (workspace.run_folder("brno", 1) / "run.json").unlink()


def test_others_weights_that_are_evaluated_or_merged_there_need_room(workspace: Workspace) -> None:
    whole, _ = sizes(workspace)
    site, plan = load_profile(workspace, "brno"), drafted(workspace, SITES, 1, None)
    three = replace(plan, sites=("brno", "lumi", "pisa"))
    crossed = with_evaluation(workspace)
    assert want_of(workspace, crossed, site, three).size == (ROOM + 2) * whole
    merged = replace(crossed, aggregation=with_merge_at(workspace, "brno").aggregation)
    assert want_of(workspace, merged, site, three).copies == ROOM + 3
    assert want_of(workspace, crossed, site, replace(plan, sites=("pisa",))).copies == ROOM


def test_the_campaigns_budget_is_for_all_sites_together(campaign: Campaign, workspace: Workspace) -> None:
    configuration = load_configuration(workspace)
    plan = drafted(workspace, SITES, 1, None)

    def against(most: float) -> list[int]:
        limited = replace(configuration, budget=replace(configuration.budget, max_node_hours=most))
        matter = Matter(workspace=workspace, configuration=limited, plan=plan, now=NOW)
        return [failure.exit_code for failure in whole_budget(matter)]

    assert against(0.0) == []
    assert against(0.3) == [9]
    assert against(0.34) == []


def test_too_little_room_at_the_site_is_a_problem(workspace: Workspace) -> None:
    whole, _ = sizes(workspace)
    before = workspace.contact("brno")
    try:
        workspace.save_contact("brno", replace(before, free=ROOM * whole - 1))
        (problem,) = look(workspace)["brno"].problems
        assert problem.exit_code == 9
        assert "3 x the model" in problem.message
        workspace.save_contact("brno", replace(before, free=ROOM * whole))
        assert look(workspace)["brno"].problems == ()
    finally:
        workspace.save_contact("brno", before)


def test_what_the_site_said_and_why_it_was_not_asked_is_part_of_the_outlook(workspace: Workspace) -> None:
    view = look(workspace, told={"brno": Told(note="not asked: no kept connection")})["brno"]
    assert view.notes == ("not asked: no kept connection",)
    assert look(workspace, told={"brno": Told(asked=True, start=NOW)})["brno"].told.start == NOW


@pytest.mark.parametrize(("lasts", "noted"), [("+5m", True), ("+1h", False)])
def test_a_certificate_that_ends_before_a_job_may_is_a_note(
    lasts: str, noted: bool, workspace: Workspace, campaign: Campaign, tmp_path: Path
) -> None:
    ca, key = keygen(tmp_path / "ca"), keygen(tmp_path / "key")
    sign = ["ssh-keygen", "-q", "-s", str(ca), "-I", "x", "-n", "me", "-V", f"-1m:{lasts}", f"{key}.pub"]
    subprocess.run(sign, check=True)
    login = f'[login]\nhost = "h"\nuser = "me"\nkind = "certificate"\nkey = "{key}"\nhold = "01:00:00"\n'
    path = campaign.place / "sites" / "brno.toml"
    text = path.read_text().replace('connection = "local"', "")
    head, _, tables = text.partition("\n[")
    path.write_text(f"{head}\n{login}\n[{tables}")
    view = look(workspace, now=time.time())["brno"]
    assert ("flctl login brno then" in " ".join(view.notes)) == noted
    assert view.login_until is not None and view.logins == 2, "no connection is kept, whatever login.hold would allow"


def test_everything_that_speaks_against_a_plan_is_found_at_once(campaign: Campaign, workspace: Workspace) -> None:
    change(campaign, "brno", 'connection = "local"', 'connexion = "local"')
    plan, problems = considered(workspace, [], 2, None)
    assert plan is not None
    assert plan.sites == ("pisa",)
    assert [(site, failure.exit_code) for site, failure in problems] == [("brno", 3)]
    assert "connexion" in problems[0][1].message
    change(campaign, "pisa", 'work = "', 'work = "" # "')
    plan, problems = considered(workspace, [], 2, None)
    assert plan is None
    assert [site for site, _ in problems] == ["brno", "pisa"]
    assert "storage.work" in problems[1][1].message


def test_a_key_that_the_trainer_does_not_know_is_found_too(campaign: Campaign, workspace: Workspace) -> None:
    change(campaign, "pisa", "[train]\n", "[train]\nbacth = 4\n")
    change(campaign, "pisa", "command = ", "# command = ")
    plan, problems = considered(workspace, ["pisa"], None, None)
    assert plan is not None
    assert [failure.exit_code for _, failure in problems] == [3]
    assert "batch" in problems[0][1].message


def test_an_open_plan_is_the_plan_and_may_not_be_contradicted(workspace: Workspace) -> None:
    workspace.save_plan(Plan(sites=("brno",), first=1, target=3, steps=4, min_sites=1))
    try:
        plan, problems = considered(workspace, [], None, None)
        assert (plan and plan.target, problems) == (3, [])
        with pytest.raises(UsageError):
            considered(workspace, ["pisa"], None, None)
    finally:
        (workspace.root / "plan.json").unlink()


def test_the_scripts_are_written_as_they_are_rendered(workspace: Workspace, tmp_path: Path) -> None:
    scripts = scripts_of(workspace, drafted(workspace, SITES, 1, None))
    paths = write_scripts(tmp_path / "new", scripts)
    assert [path.name for path in paths] == ["brno.sh", "pisa.sh"]
    assert paths[0].read_text() == scripts["brno"]


def exposed_lines(workspace: Workspace, steps: int) -> list[str]:
    plan = replace(drafted(workspace, SITES, 1, None), steps=steps)
    return exposed(workspace, load_configuration(workspace), plan)


def test_so_few_steps_or_samples_that_an_update_tells_of_its_data_are_warned_of(
    campaign: Campaign, workspace: Workspace
) -> None:
    assert "9 local steps, fewer than 10" in exposed_lines(workspace, 9)[0]
    assert exposed_lines(workspace, 10) == []
    assert "4 local steps" in campaign.flctl("plan", "--offline").stdout
    for samples, warned in ((79, True), (80, False)):
        contribution = Contribution(steps=10, samples=samples, tokens=1, sha256="", files=(), metrics={})
        workspace.save_run(replace(run_at("brno", Stage.FETCHED), contribution=contribution))
        try:
            lines = exposed_lines(workspace, 10)
        finally:
            (workspace.run_folder("brno", 1) / "run.json").unlink()
        assert ("brno: 79 samples in its last run, fewer than 10 batches of 8" in " ".join(lines)) == warned
        assert bool(lines) == warned


@pytest.mark.parametrize(
    ("here", "there", "warned"),
    [
        ("3.1.0", "3.1 to 3.3 (protocol 31)", ["here", "at brno"]),
        ("3.4.2", "3.4 or newer (protocol 32)", ["here"]),
        ("3.4.3", "3.0 (protocol 30)", ["at brno"]),
        ("3.5.0", "of an unknown release (protocol 33)", []),
    ],
)
def test_an_rsync_with_known_holes_is_warned_of_here_and_there(
    campaign: Campaign,
    workspace: Workspace,
    here: str,
    there: str,
    warned: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert outdated(workspace, SITES) == [], "local sites: no rsync of another machine is met"
    with_login(campaign)
    monkeypatch.setattr(rsync, "rsync_program", lambda: ("rsync", tuple(map(int, here.split(".")))))
    workspace.save_contact("brno", replace(workspace.contact("brno"), rsync=there))
    found = outdated(workspace, SITES)
    assert [line.partition(": older")[0].removeprefix("rsync ") for line in found] == [
        f"{here if where == 'here' else there} {where}" for where in warned
    ]
    assert all("older than 3.4.3" in line for line in found)


def with_login(campaign: Campaign) -> None:
    login = '\n[login]\nhost = "brno.example.org"\nuser = "me"\nkey = "agent"\n'
    change(campaign, "brno", 'connection = "local"\n', login)
