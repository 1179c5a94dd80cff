"""`flctl plan` as typed, and what `round` and `campaign start` say and refuse before anything is sent."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flctl.campaign.workspace import Workspace
from flctl.records import Held
from tests.campaigns import Campaign
from tests.pbs_double import PbsServer

LIMIT = "4 nodes for 6:00:00: batch allows 2:00:00; use extended"
QUEUES = '\n[queues.batch]\nmax_walltime = "02:00:00"\n\n[queues.extended]\nmax_nodes = 64\n'


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path)


def lay(campaign: Campaign, site: str, *, old: str = "", new: str = "", more: str = "") -> None:
    path = campaign.place / "sites" / f"{site}.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new) + more if old else text + more)


def limit(campaign: Campaign, site: str) -> None:
    big = 'walltime = "06:00:00"\nnodes = 4\npartition = "batch"'
    lay(campaign, site, old='walltime = "00:10:00"', new=big, more=QUEUES)


def test_a_plan_tells_each_site_and_writes_its_script_and_submits_nothing(campaign: Campaign) -> None:
    answer = campaign.json("plan", "--rounds", "3")
    data = answer["data"]
    assert (answer["command"], data["first"], data["target"], data["steps"]) == ("plan", 1, 3, 4)
    assert [view["site"] for view in data["sites"]] == ["brno", "pisa"]
    for view in data["sites"]:
        assert view["told"]["asked"]
        assert view["free"] > view["need"] > view["bytes_out"] > view["bytes_in"] > 0
        assert view["node_hours_plan"] == pytest.approx(3 * view["node_hours_round"])
        assert (view["logins"], view["used"], view["problems"]) == (0, 0, [])
    scripts = campaign.json("round", "--dry-run")["data"]["scripts"]
    assert [Path(path).read_text() for path in data["scripts"]] == [scripts["brno"], scripts["pisa"]]
    assert {
        path.stat().st_mode & 0o077 for path in (campaign.place / "plan", *(campaign.place / "plan").iterdir())
    } == {0}
    assert not (campaign.root / "brno" / "work").exists(), "nothing was sent, nothing made there"
    assert not (campaign.place / "plan.json").exists()
    text = campaign.flctl("plan", "--out", "elsewhere").stdout
    for words in ("brno", "node-hours", "3 x the model", "estimate", "elsewhere/brno.sh", "nothing was submitted"):
        assert words in text
    assert (campaign.place / "elsewhere" / "pisa.sh").exists()


def test_the_sites_own_balance_is_shown_by_both_commands(campaign: Campaign) -> None:
    lay(campaign, "brno", more='\n[budget]\nbalance = "echo 1234 left"\nunit = "core-hours"\n')
    for command in (("plan",), ("site", "test", "brno")):
        assert "in core-hours | 1234 left" in campaign.flctl(*command).stdout


def test_offline_no_site_is_asked(campaign: Campaign) -> None:
    before = campaign.journal()
    answer = campaign.json("plan", "--offline")
    assert [(view["told"]["asked"], view["free"]) for view in answer["data"]["sites"]] == [(False, None)] * 2
    assert campaign.journal() == before
    assert not (campaign.place / "runs" / "brno" / "contact.json").exists()


def test_a_broken_limit_is_3_and_every_site_with_one_is_named(campaign: Campaign) -> None:
    limit(campaign, "brno")
    ran = campaign.flctl("plan", "--offline")
    assert ran.returncode == 3
    assert f"flctl: brno: {LIMIT}\n" in ran.stderr
    assert "pisa" in ran.stdout
    limit(campaign, "pisa")
    errors = campaign.json("plan", code=3)["errors"]
    assert [(error["site"], error["message"]) for error in errors] == [("brno", LIMIT), ("pisa", LIMIT)]
    for command in (("round",), ("campaign", "start", "--rounds", "2"), ("round", "--dry-run")):
        refused = campaign.flctl(*command)
        assert refused.returncode == 3
        assert f"brno: {LIMIT}" in refused.stderr
        assert f"pisa: {LIMIT}" in refused.stderr
    assert not (campaign.place / "plan.json").exists()
    assert not (campaign.root / "brno" / "work").exists()


def test_the_site_that_merges_has_limits_too(campaign: Campaign) -> None:
    limit(campaign, "pisa")
    campaign.set('rule = "fedavg"', 'rule = "fedavg"\naggregate_at = "pisa"')
    for command in (("plan", "--offline"), ("round",), ("campaign", "start", "--rounds", "1")):
        refused = campaign.flctl(*command, "--sites", "brno")
        assert (refused.returncode, f"pisa: {LIMIT}" in refused.stderr) == (3, True)
    assert not (campaign.place / "plan.json").exists()


def test_a_round_under_way_goes_on_though_its_profile_has_a_limit_now(campaign: Campaign) -> None:
    lay(campaign, "brno", old="[train]", new="[train]\nseconds = 4")
    assert campaign.flctl("campaign", "start", "--rounds", "1", "--sites", "brno").returncode == 0
    assert campaign.flctl("campaign", "tick").returncode == 0
    assert campaign.run("brno")["stage"] in ("queued", "running")
    limit(campaign, "brno")
    assert campaign.json("round")["data"]["model"]["version"] == 1
    assert campaign.flctl("round", "--sites", "brno").returncode == 3


def test_a_budget_without_room_is_9_with_plan_and_with_round(campaign: Campaign) -> None:
    lay(campaign, "pisa", more="\n[budget]\nmax_node_hours = 0.1\n")
    (error,) = campaign.json("plan", code=9)["errors"]
    assert (error["site"], error["code"]) == ("pisa", "budget_refused")
    for command in (("round",), ("campaign", "start", "--rounds", "2")):
        refused = campaign.flctl(*command)
        assert refused.returncode == 9
        assert "node-hours" in refused.stderr
    assert not (campaign.place / "plan.json").exists()


def test_the_campaigns_budget_is_9_too(campaign: Campaign) -> None:
    with (campaign.place / "flctl.toml").open("a") as file:
        file.write("\n[budget]\nmax_node_hours = 0.3\n")
    (error,) = campaign.json("plan", "--offline", code=9)["errors"]
    assert error["site"] is None
    assert "0.3333 node-hours at most, 0 of 0.3 used so far" in campaign.flctl("plan", "--offline").stdout
    assert campaign.flctl("round").returncode == 9


def test_limits_and_budgets_are_told_together_and_configuration_counts_first(campaign: Campaign) -> None:
    limit(campaign, "brno")
    lay(campaign, "pisa", more="\n[budget]\nmax_node_hours = 0.1\n")
    errors = campaign.json("plan", "--offline", code=3)["errors"]
    assert [(error["site"], error["code"]) for error in errors] == [
        ("brno", "configuration"),
        ("pisa", "budget_refused"),
    ]


def test_remembered_room_that_is_too_little_is_9_until_the_site_says_otherwise(campaign: Campaign) -> None:
    workspace = Workspace(campaign.place)
    workspace.save_contact("brno", replace(workspace.contact("brno"), free=1000))
    (error,) = campaign.json("plan", "--offline", code=9)["errors"]
    assert "3 x the model" in error["message"]
    assert campaign.json("plan")["errors"] == []
    assert campaign.json("plan", "--offline")["errors"] == []


def test_a_held_site_is_not_asked_and_that_is_no_failure(campaign: Campaign) -> None:
    workspace = Workspace(campaign.place)
    workspace.save_contact("brno", replace(workspace.contact("brno"), held=Held(reason="a refused code", since=1.0)))
    views = {view["site"]: view for view in campaign.json("plan")["data"]["sites"]}
    assert not views["brno"]["told"]["asked"]
    assert "held: a refused code" in views["brno"]["notes"][0]
    assert views["pisa"]["told"]["asked"]


def behind_ssh(campaign: Campaign, site: str, kind: str) -> None:
    """Let the site be one whose login host does not answer."""
    login = f'host = "127.0.0.94"\nport = 2919\nuser = "me"\nkind = "{kind}"'
    lay(campaign, site, old='connection = "local"', new=f"[login]\n{login}")


def test_a_site_that_needs_a_person_is_not_asked_and_that_is_no_failure(campaign: Campaign) -> None:
    behind_ssh(campaign, "brno", 'attended"\nhold = "01:00:00')
    views = {view["site"]: view for view in campaign.json("plan")["data"]["sites"]}
    assert not views["brno"]["told"]["asked"]
    assert views["brno"]["notes"] == ["not asked: a person must log in: no kept connection is open -> flctl login brno"]


def test_a_site_that_nobody_could_log_in_to_is_a_broken_profile(campaign: Campaign) -> None:
    behind_ssh(campaign, "brno", "attended")
    (error,) = campaign.json("plan", code=3)["errors"]
    assert error["site"] == "brno" and "login.hold" in error["hint"]
    assert campaign.flctl("round").returncode == 3
    assert not (campaign.place / "plan.json").exists()


def test_a_site_that_does_not_answer_is_5_and_is_shown_as_it_is_remembered(campaign: Campaign) -> None:
    key = campaign.root / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    behind_ssh(campaign, "brno", f'key"\nkey = "{key}')
    answer = campaign.json("plan", code=5)
    assert [(error["site"], error["code"]) for error in answer["errors"]] == [("brno", "site_unreachable")]
    assert [view["site"] for view in answer["data"]["sites"]] == ["brno", "pisa"]
    assert [view["logins"] for view in answer["data"]["sites"]] == [2, 0]


def test_a_broken_profile_is_told_and_the_other_sites_all_the_same(campaign: Campaign) -> None:
    lay(campaign, "brno", old='work = "', new='wrok = "')
    answer = campaign.json("plan", code=3)
    assert [error["site"] for error in answer["errors"]] == ["brno"]
    assert "storage.work" in answer["errors"][0]["message"]
    assert [view["site"] for view in answer["data"]["sites"]] == ["pisa"]


def test_a_plan_under_way_is_shown_and_not_contradicted(campaign: Campaign) -> None:
    assert campaign.flctl("campaign", "start", "--rounds", "2").returncode == 0
    assert campaign.json("plan", "--offline")["data"]["target"] == 2
    assert campaign.json("plan", "--offline", "--rounds", "5", code=2)["data"] is None
    assert campaign.flctl("round", "--dry-run", "--rounds", "5").returncode == 2


def test_round_and_start_say_a_line_per_site_before_they_begin(campaign: Campaign) -> None:
    started = campaign.flctl("campaign", "start", "--rounds", "1").stdout
    assert "  brno: 1 node for 0:10:00; 0.1667 node-hours a round at most, 0 used; " in started
    lines = campaign.flctl("round").stdout.splitlines()
    first = next(index for index, line in enumerate(lines) if "delivered" in line)
    assert ["brno: 1 node" in lines[0], "pisa: 1 node" in lines[1], first] == [True, True, 3]
    assert "4 local steps, fewer than 10" in lines[2]
    again = campaign.json("plan", "--offline")["data"]["sites"]
    assert all(view["used"] > 0 for view in again)
    assert json.loads(campaign.flctl("round", "--json").stdout)["data"]["model"]["version"] == 2


def test_site_test_counts_its_checks_and_a_tiny_job_tells_what_jobs_find(campaign: Campaign) -> None:
    lay(campaign, "pisa", old="/data", new="/nowhere")
    text = campaign.flctl("site", "test", "--batch").stdout
    assert "13 checks: 13 ok; 0 logins" in text
    assert "13 checks: 12 ok, 1 fail; 0 logins" in text
    assert text.count("python in a job") == 2
    reports = campaign.json("site", "test", "brno", "--batch", "--wait", "2m")["data"]["sites"]
    found = {check["name"]: check for check in reports[0]["checks"]}
    assert found["python in a job"]["result"] == "ok"
    assert "torch" in found["python in a job"]["detail"]
    assert not list((campaign.remote("brno") / "runs").iterdir())


def test_what_a_killed_test_left_is_removed_once_it_is_old(campaign: Campaign) -> None:
    assert campaign.flctl("site", "test", "brno").returncode == 0
    runs = campaign.remote("brno") / "runs"
    for name, age in ((".ftest0", 7200), (".ftest1", 0), (".other", 7200), ("0001-1", 7200)):
        (runs / name).mkdir(parents=True)
        (runs / name / "job.sh").write_text("")
        os.utime(runs / name, (time.time() - age,) * 2)
    assert campaign.flctl("site", "test", "brno", "--batch").returncode == 0
    assert sorted(path.name for path in runs.iterdir()) == [".ftest1", ".other", "0001-1"]


def test_an_interrupted_plan_goes_on_to_no_other_site(campaign: Campaign) -> None:
    mark, slow = campaign.root / "mark", campaign.root / "slow"
    slow.write_text(f"#!/bin/sh\ntouch {mark}\nsleep 3\n")
    slow.chmod(0o755)
    lay(campaign, "brno", more=f'\n[budget]\nbalance = "{slow}"\n')
    child = campaign.popen("plan")
    campaign.wait(mark.exists, what="the question that takes long")
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 130, said
    asked = [name for name in campaign.sites if (campaign.place / "runs" / name / "contact.json").exists()]
    assert asked == ["brno"]


def test_a_tiny_job_without_torch_fails_with_pythons_words(campaign: Campaign) -> None:
    path = campaign.place / "sites" / "brno.toml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("python = ")]
    path.write_text("\n".join(lines).replace("[environment]", '[environment]\npython = "/usr/bin/python3"') + "\n")
    answer = campaign.json("site", "test", "brno", "--batch", code=6)
    assert "No module named" in answer["errors"][0]["message"]


def test_a_tiny_job_that_does_not_answer_is_cancelled_and_cleared_away(campaign: Campaign) -> None:
    lay(campaign, "brno", old="[environment]", new='[environment]\nactivate = ["sleep 300"]')
    # Python on the login host is asked with the same activation, and has its own limit.
    lay(campaign, "brno", old="sleep 300", new='test -z \\"${FLCTL_JOB_ID:-}\\" || sleep 300')
    answer = campaign.json("site", "test", "brno", "--batch", "--wait", "3s")
    check = answer["data"]["sites"][0]["checks"][-1]
    assert (check["name"], check["result"]) == ("python in a job", "warn")
    assert "cancelled" in check["detail"]
    assert not list((campaign.remote("brno") / "runs").iterdir())


def test_a_cancelled_tiny_job_that_writes_to_the_last_is_cleared_away(campaign: Campaign) -> None:
    writes = "for late in {1..20000}; do : >late.$late || break; done"
    line = f"test -z ${{FLCTL_JOB_ID:-}} || {{ trap '{writes}' TERM; sleep 300 & wait; }}"
    lay(campaign, "brno", old="[environment]", new=f'[environment]\nactivate = ["{line}"]')
    campaign.json("site", "test", "brno", "--batch", "--wait", "2s")
    assert not list((campaign.remote("brno") / "runs").iterdir())


def test_pbs_is_asked_the_same_questions(tmp_path: Path) -> None:
    with PbsServer(tmp_path / "pbs") as pbs:
        campaign = Campaign(tmp_path / "c", sites=("brno",))
        path = pbs.env({"PATH": os.environ["PATH"]})["PATH"]
        lay(campaign, "brno", old='kind = "local"', new='kind = "pbs"\nqueue = "workq"')
        tested = campaign.flctl("site", "test", "--batch", "--wait", "1m", PATH=path)
        assert tested.returncode == 0, tested.stdout + tested.stderr
        for words in ("PBS 23.06", "workq takes 1 node for 0:10:00", "torch", "15 checks: 15 ok; 0 logins"):
            assert words in tested.stdout
        planned = campaign.flctl("plan", PATH=path)
        assert planned.returncode == 0, planned.stderr
        assert "no estimate" in planned.stdout
        lay(campaign, "brno", old="workq", new="nosuch")
        for command in (("site", "test"), ("plan",)):
            refused = campaign.flctl(*command, PATH=path)
            assert refused.returncode == 3
            assert "there is no queue nosuch; there is: workq" in refused.stderr
