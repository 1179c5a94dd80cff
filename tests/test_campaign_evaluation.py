"""Evaluations in a campaign of local sites: `flctl history`, `flctl evaluate`, early stop and the way back, each also
after a kill and with a lost folder."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from flctl.campaign.matrix import history_of
from flctl.campaign.needed import needed
from flctl.campaign.workspace import Workspace
from flctl.errors import ConfigurationError
from tests.campaigns import Campaign

LOSSES = [3.0, 2.0, 2.5, 2.6]
"""Of each version at each site; model 0001 is the best."""


@pytest.fixture
def single(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path, sites=("brno",))


def record(campaign: Campaign, version: int) -> dict[str, Any]:
    return dict(json.loads((campaign.place / "models" / f"{version:04d}" / "flctl.json").read_text()))


def versions(campaign: Campaign) -> list[str]:
    return sorted(path.name for path in (campaign.place / "models").iterdir() if not path.name.startswith("."))


def proved(campaign: Campaign, version: int) -> None:
    """Every bit of a model, and every record of the campaign, is what it was."""
    for words in (("verify", str(version)), ("audit",)):
        ran = campaign.flctl(*words)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def killed(campaign: Campaign, fault: str, *words: str) -> None:
    ran = campaign.flctl(*words, FLCTL_FAULT=fault)
    assert ran.returncode == -9, f"{fault} was not passed\n{ran.stdout}{ran.stderr}"


def decides(campaign: Campaign, *, patience: int = 0, roll_back: bool = True) -> None:
    """Set what losses decide."""
    path = campaign.place / "flctl.toml"
    text = re.sub(r"^patience = \d+", f"patience = {patience}", path.read_text(), flags=re.MULTILINE)
    path.write_text(re.sub(r"^roll_back = \w+", f"roll_back = {str(roll_back).lower()}", text, flags=re.MULTILINE))


# Early stop, and the way back


def test_a_plan_stops_and_goes_back_to_the_best_version_through_a_kill_at_every_point(single: Campaign) -> None:
    """With a rule that remembers: the next model goes on from what it remembered beside the best one."""
    single.profile("brno", losses=LOSSES)
    single.set('rule = "fedavg"', 'rule = "fedadam"')
    decides(single, patience=1)
    for fault in ("stop", "stop-recorded", "ordered brno/4", "roll-back", "roll-back-recorded", "roll-back-rename"):
        killed(single, fault, "round", "--rounds", "8")
    killed(single, "roll-back-durable", "round", "--rounds", "8")
    assert versions(single) == ["0000", "0001", "0002", "0003", "0004"]
    assert single.submissions("brno") == 4, "three trainings, and one look at the last model"
    best, back = record(single, 1), record(single, 4)
    assert (back["sha256"], back["steps"], back["state"]) == (best["sha256"], best["steps"], best["state"])
    assert (back["rolled_back_to"], back["rule"], back["contributions"]) == (1, "rollback", [])
    assert single.flctl("campaign", "tick").returncode == 0
    (line,) = [entry for entry in single.journal() if entry.get("version") == 4 and entry["event"] == "model"]
    assert line["rolled_back_to"] == 1
    proved(single, 4)
    assert "not improved in 1 version since model 0001 (2.0000)" in single.flctl("status").stdout
    decides(single, roll_back=False)
    assert single.json("round", "--rounds", "1")["data"]["done"]
    assert record(single, 5)["parents"] == [{"version": 4, "sha256": best["sha256"]}]
    assert record(single, 5)["state"]["step"] == best["state"]["step"] + 1
    proved(single, 5)


def test_a_round_says_how_its_plan_ended_and_where_the_next_goes_on(single: Campaign) -> None:
    single.profile("brno", losses=[2.0, 3.0, 3.0])
    decides(single, patience=1)
    ran = single.flctl("round", "--rounds", "3")
    assert ran.returncode == 0, ran.stderr
    assert "the plan ended at model 0002: the mean loss over brno has not improved in 1 version" in ran.stdout
    assert "model 0003 has the weights of model 0000" in ran.stdout
    shown = single.flctl("history").stdout.splitlines()
    assert shown[2].endswith("best")
    assert shown[5].split() == ["0003", "2.0000", "(7.40)", "2.0000", "(7.39)", "the", "weights", "of", "0000"]


def test_a_version_that_was_gone_back_to_is_made_again_when_it_is_lost(single: Campaign) -> None:
    single.profile("brno", losses=[2.0, 3.0])
    decides(single)
    assert single.json("round")["data"]["done"]
    assert record(single, 2)["rolled_back_to"] == 0
    single.flctl("campaign", "start", "--rounds", "1")
    shutil.rmtree(single.place / "models" / "0002")
    decides(single, roll_back=False)
    assert single.json("round")["data"]["done"]
    assert (record(single, 2)["rolled_back_to"], record(single, 2)["sha256"]) == (0, record(single, 0)["sha256"])
    assert [item["base"] for item in record(single, 3)["contributions"]] == [2]
    proved(single, 2)


def test_a_best_version_that_is_damaged_is_no_way_back_and_a_person_may_give_it_up(single: Campaign) -> None:
    single.profile("brno", losses=[2.0, 3.0])
    decides(single)
    weights = single.place / "models" / "0000" / "model.safetensors"
    killed(single, "roll-back-recorded", "round")
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"\0\1"[good[-1] == 0 :][:1])
    ran = single.flctl("round")
    assert ran.returncode == 3
    assert f"{weights} is not what was recorded" in ran.stderr
    assert versions(single) == ["0000", "0001"]
    assert single.flctl("cancel").returncode == 0
    weights.write_bytes(good)
    decides(single, roll_back=False)
    assert single.json("round")["data"]["model"]["version"] == 2
    assert "rolled_back_to" not in record(single, 2)


def test_a_changed_file_of_a_version_that_was_gone_back_to_is_found(single: Campaign) -> None:
    single.profile("brno", losses=[2.0, 3.0])
    decides(single)
    assert single.json("round")["data"]["done"]
    path = single.place / "models" / "0002" / "config.json"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content + b" ")
    ran = single.flctl("verify", "2")
    assert ran.returncode == 8
    assert "models/0002/config.json: not what was recorded" in ran.stdout


def test_gc_keeps_the_best_version_and_what_a_plan_evaluates(single: Campaign) -> None:
    single.profile("brno", losses=[3.0, 2.0, 2.5, 2.5, 2.5, 2.5])
    assert single.json("round", "--rounds", "4")["data"]["done"]
    workspace = Workspace(single.place)
    assert history_of(workspace).best == 1
    assert needed(workspace, 1).versions == {0, 1, 3, 4}
    killed(single, "plan-recorded", "evaluate", "brno", "--model", "2")
    assert needed(workspace, 1).versions == {0, 1, 2, 3, 4}


def test_losses_that_decide_are_refused_with_noise_and_where_nothing_is_evaluated(single: Campaign) -> None:
    from flctl.campaign.config import load_configuration
    from flctl.campaign.foresight import check_validation

    workspace, file = Workspace(single.place), single.place / "flctl.toml"
    text = file.read_text()
    for key, before in (("patience = 1", "patience = 0"), ("roll_back = true", "roll_back = false")):
        noise = "\n[privacy]\nclip = 1.0\nnoise_multiplier = 1.0\n"
        file.write_text(text.replace(before, key) + noise)
        with pytest.raises(ConfigurationError, match=f"evaluation.{key.split()[0]} lets the losses"):
            load_configuration(workspace)
    file.write_text(text.replace("steps = 4", "steps = 4\nvalidation = 0"))
    profile = single.place / "sites" / "brno.toml"
    check_validation(workspace, load_configuration(workspace), ["brno"])  # a trainer of its own
    profile.write_text("".join(line for line in profile.read_text().splitlines(True) if "command =" not in line))
    with pytest.raises(ConfigurationError, match=r"train\.validation is 0 at brno"):
        check_validation(workspace, load_configuration(workspace), ["brno"])


# flctl evaluate


def test_an_evaluation_goes_on_after_a_kill_at_every_step_and_asks_each_site_once(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    log = tmp_path / "points"
    passed = campaign.flctl("evaluate", "--dry-run", FLCTL_FAULT_LOG=str(log))
    assert (passed.returncode, log.exists()) == (0, False), "a dry run passes no point"
    for fault in ("plan", "plan-recorded", "order-recorded", "ordered pisa/1", "attempt-placed"):
        killed(campaign, fault, "evaluate", "brno", "pisa")
    answer = campaign.json("evaluate", "brno,pisa")
    assert answer["data"]["evaluation"] == {
        "model": 0,
        "sites": {site: {"loss": 1.0, "perplexity": 2.7, "tokens": 10} for site in ("brno", "pisa")},
    }
    assert [campaign.submissions(site) for site in campaign.sites] == [1, 1]
    assert versions(campaign) == ["0000"]
    assert campaign.json("evaluate", "--sites", "brno")["data"]["done"]
    assert [campaign.submissions(site) for site in campaign.sites] == [2, 1]
    proved(campaign, 0)


def test_an_older_version_is_brought_to_a_site_that_has_it_no_more(single: Campaign) -> None:
    single.profile("brno", losses=LOSSES)
    assert single.json("round", "--rounds", "2")["data"]["done"]
    shutil.rmtree(single.remote("brno") / "models" / "0001")
    ran = single.flctl("evaluate", "brno", "--model", "1")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-2].split() == ["0001", "brno", "2.0000", "2.70", "10"]
    assert (single.remote("brno") / "models" / "0001" / "model.safetensors").exists()
    assert single.flctl("evaluate", "brno", "--model", "7").returncode == 2
    assert single.json("round")["data"]["model"]["version"] == 3


def test_what_is_under_way_is_not_disturbed(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    campaign.flctl("campaign", "start", "--rounds", "2")
    plan = (campaign.place / "plan.json").read_bytes()
    ran = campaign.flctl("evaluate", "brno")
    assert ran.returncode == 2
    assert "a plan is under way to model 0002 by brno, pisa; nothing is evaluated besides" in ran.stderr
    assert (campaign.place / "plan.json").read_bytes() == plan
    campaign.flctl("cancel")
    killed(campaign, "plan-recorded", "evaluate", "brno")
    for words in (("evaluate", "pisa"), ("round", "--rounds", "2"), ("campaign", "start", "--rounds", "1")):
        assert "model 0000 is being evaluated at brno" in campaign.flctl(*words).stderr
    assert "flctl plan" not in campaign.flctl("plan", "--rounds", "1").stderr
    assert campaign.json("round")["data"]["evaluation"]["sites"].keys() == {"brno"}, "it goes on with what is open"
    killed(campaign, "plan-recorded", "evaluate", "brno")
    assert campaign.flctl("cancel").returncode == 0
    assert campaign.json("round", "--sites", "pisa")["data"]["model"]["version"] == 1


def test_an_evaluation_that_fails_is_6_and_may_be_tried_again(single: Campaign) -> None:
    single.profile("brno", behave="blind")
    answer = single.json("evaluate", "brno", code=6)
    assert "nothing can be seen" in answer["errors"][0]["message"]
    assert "go on without it" in single.flctl("status").stdout
    single.profile("brno")
    assert single.flctl("retry", "brno").returncode == 0
    assert single.flctl("evaluate", "brno").returncode == 0
    assert single.attempts("brno") == ["0001-1", "0001-2"]


def test_an_evaluation_is_held_by_a_budget_like_any_job(single: Campaign) -> None:
    single.set("[aggregation]", "[budget]\nmax_node_hours = 0.01\n\n[aggregation]")
    ran = single.flctl("evaluate", "brno")
    assert ran.returncode == 9
    assert "node-hours" in ran.stderr
    assert not (single.root / "brno" / "work").exists(), "no site was touched"


def test_a_folder_rebuilt_from_the_sites_does_not_send_contributions_because_models_were_evaluated(
    tmp_path: Path,
) -> None:
    """Orders of `flctl evaluate` name versions alone: they are no sign of [evaluation] cross."""
    campaign = Campaign(tmp_path)
    assert campaign.json("round")["data"]["done"]
    assert campaign.json("evaluate", "all")["data"]["done"]
    profiles = [shutil.copy(campaign.place / "sites" / f"{site}.toml", campaign.root) for site in campaign.sites]
    label = campaign.remote("pisa").name
    shutil.rmtree(campaign.place)
    rebuilt = campaign.flctl("adopt", str(campaign.place), "--sites", *profiles, "--id", label, at=campaign.root)
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert "cross = false" in (campaign.place / "flctl.toml").read_text()
    assert campaign.json("round")["data"]["model"]["version"] == 2
    assert history_of(Workspace(campaign.place)).scores[1].keys() == {"brno", "pisa"}


# flctl history


def test_history_shows_holes_the_mean_and_the_best_and_what_to_type_for_the_rest(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    campaign.profile("brno", losses=[3.0, 2.0, 2.5])
    campaign.profile("pisa", losses=[3.5, 2.5, 2.0])
    empty = campaign.json("history")["data"]
    assert (empty["best"], empty["mean_over"], empty["models"][0]["mean_loss"]) == (None, [], None)
    assert campaign.json("round", "--rounds", "2")["data"]["done"]
    lines = campaign.flctl("history", "--trained").stdout.splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["model", "brno", "pisa", "mean"],
        ["0000", "3.0000", "(7.40)", "3.5000", "(7.40)", "3.2500", "(25.79)"],
        ["0001", "2.0000", "(7.40)", "2.5000", "(7.40)", "2.2500", "(9.49)", "best"],
        ["0002", "-", "-", "-"],
    ]
    assert lines[-1] == "  -> now: flctl evaluate brno pisa"
    assert campaign.flctl("evaluate", "pisa").returncode == 0
    data = campaign.json("history")["data"]
    assert (data["best"], data["lacking"], data["mean_over"]) == (1, ["brno"], ["brno", "pisa"])
    last = data["models"][2]
    assert (last["mean_loss"], list(last["sites"]), last["sites"]["pisa"]["loss"]) == (None, ["pisa"], 2.0)
    assert data["models"][1]["trained"]["brno"]["loss"] == 1.0
