"""The engine on local sites: rounds, ticks, failures, people's decisions, kills; real jobs, the real program."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.campaigns import Campaign, reference


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path)


def test_two_rounds_make_the_models_that_numpy_makes(campaign: Campaign) -> None:
    campaign.profile("pisa", samples=30)
    answer = campaign.json("round", "--sites", "brno", "pisa", "--rounds", "2")
    assert (answer["status"], answer["data"]["done"], answer["data"]["waiting"]) == ("ok", True, [])
    assert answer["data"]["model"]["version"] == 2
    for version in (1, 2):
        made = load_file(campaign.place / "models" / f"{version:04d}" / "model.safetensors")
        expected = reference(campaign.place, version)
        assert made.keys() == expected.keys()
        for name, tensor in made.items():
            assert tensor.tobytes() == expected[name].tobytes(), name
    runs = answer["data"]["runs"]
    assert [(run["site"], run["number"], run["stage"], run["base"], run["round"]) for run in runs] == [
        ("brno", 1, "fetched", 0, 1),
        ("pisa", 1, "fetched", 0, 1),
        ("brno", 2, "fetched", 1, 2),
        ("pisa", 2, "fetched", 1, 2),
    ]
    assert [run["samples"] for run in runs] == [10, 30, 10, 30]
    assert all(run["queue_seconds"] >= 0 and run["train_seconds"] > 0 and run["job_id"] for run in runs)
    assert campaign.json("status")["data"]["runs"] == runs


def test_only_named_files_come_back_and_the_journal_lists_each(campaign: Campaign) -> None:
    campaign.json("round")
    crossed = [entry for entry in campaign.journal() if entry["event"] == "file"]
    names = {way: {e["path"].rsplit("/", 1)[-1] for e in crossed if e["direction"] == way} for way in ("in", "out")}
    assert names["in"] <= {"model.safetensors", "done.json", "job.id", "owner"}
    assert names["in"] >= {"model.safetensors", "done.json", "job.id"}
    assert names["out"] >= {"model.safetensors", "config.json", "seal.py", "train.py", "job.sh", "order.json"}
    assert all(entry["size"] > 0 and len(entry["sha256"]) == 64 for entry in crossed)
    for path in campaign.place.rglob("*"):
        if path.is_file():
            assert b"canary-of-" not in path.read_bytes(), path


def test_a_site_keeps_what_it_has_and_is_not_sent_it_again(campaign: Campaign) -> None:
    campaign.json("round", "--rounds", "2")
    for site in campaign.sites:
        sent = [e["path"] for e in campaign.journal() if e["event"] == "file" and e["site"] == site]
        sent = [path for path in sent if path.startswith(("models/", "payload/"))]
        assert len(sent) > 6
        assert len(sent) == len(set(sent))


@pytest.mark.parametrize(("behave", "words"), [("nan", "NaN"), ("shape", "shape"), ("missing", "missing")])
def test_a_spoilt_contribution_is_refused_at_fetch_by_tensor_and_site(
    campaign: Campaign, behave: str, words: str
) -> None:
    campaign.profile("pisa", behave=behave)
    answer = campaign.json("round", code=8)
    first = sorted(load_file(campaign.place / "models" / "0000" / "model.safetensors"))[0]
    (error,) = [error for error in answer["errors"] if error["site"] == "pisa"]
    assert first in error["message"]
    assert words.lower() in error["message"].lower()
    assert [(run["site"], run["stage"]) for run in answer["data"]["runs"]] == [("brno", "fetched"), ("pisa", "failed")]
    assert answer["data"]["model"]["version"] == 0
    campaign.profile("pisa")
    assert campaign.flctl("retry", "pisa").returncode == 0
    assert campaign.json("round")["data"]["model"]["version"] == 1
    assert campaign.attempts("pisa") == ["0001-1", "0001-2"]
    assert campaign.attempts("brno") == ["0001-1"]


def test_a_failed_job_tells_why_and_may_be_skipped(campaign: Campaign) -> None:
    campaign.profile("pisa", behave="fail")
    answer = campaign.json("round", code=6)
    assert "the data is spoilt" in answer["errors"][0]["message"]
    assert "flctl retry pisa" in answer["errors"][0]["hint"]
    assert campaign.json("round", code=6)["data"]["model"]["version"] == 0
    assert campaign.flctl("skip", "pisa").returncode == 0
    answer = campaign.json("round")
    assert answer["data"]["model"]["version"] == 1
    record = json.loads((campaign.place / "models" / "0001" / "flctl.json").read_text())
    assert [item["site"] for item in record["contributions"]] == ["brno"]


def test_with_min_sites_a_round_closes_without_the_failed_one(campaign: Campaign) -> None:
    campaign.set("min_sites = 0", "min_sites = 1")
    campaign.profile("pisa", behave="fail")
    answer = campaign.json("round")
    assert (answer["status"], answer["data"]["model"]["version"]) == ("partial", 1)
    assert [error["site"] for error in answer["errors"]] == ["pisa"]


def test_a_trainer_that_writes_nothing_has_not_succeeded(campaign: Campaign) -> None:
    campaign.profile("pisa", behave="silent")
    assert "metrics.json" in campaign.json("round", code=6)["errors"][0]["message"]


def test_a_job_killed_outright_is_never_averaged_and_tried_again(campaign: Campaign) -> None:
    campaign.profile("pisa", behave="hang")
    process = campaign.popen("round")
    campaign.wait(lambda: campaign.run("pisa").get("stage") == "running")
    campaign.profile("pisa")
    campaign.kill_job("pisa")
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert "ended without a record" in text
    assert campaign.run("pisa")["attempt"] == 2
    assert campaign.json("status")["data"]["model"]["version"] == 1


def test_a_job_over_its_walltime_fails_with_that_reason(campaign: Campaign) -> None:
    campaign.profile("pisa", walltime="00:02", behave="hang")
    answer = campaign.json("round", code=6)
    assert "SIGTERM" in answer["errors"][0]["message"]
    assert "TIMEOUT" in answer["errors"][0]["message"]


def test_a_cancelled_run_is_closed_and_its_job_ends(campaign: Campaign) -> None:
    campaign.profile("pisa", behave="hang")
    process = campaign.popen("round")
    campaign.wait(lambda: campaign.run("pisa").get("stage") == "running")
    cancelled = campaign.flctl("cancel", "pisa")
    assert cancelled.returncode == 0, cancelled.stderr
    process.communicate(timeout=60)
    assert process.returncode == 6
    assert campaign.run("pisa")["failure"]["message"] == "cancelled with flctl cancel"
    card = campaign.remote("pisa") / "runs" / "0001-1" / "job.card"
    campaign.wait(lambda: json.loads(card.read_text())["state"] == "CANCELLED")


def test_cancelling_everything_ends_the_plan(campaign: Campaign) -> None:
    assert campaign.flctl("campaign", "start", "--rounds", "5").returncode == 0
    campaign.flctl("campaign", "tick")
    assert campaign.flctl("cancel").returncode == 0
    assert campaign.json("campaign", "tick")["data"]["done"]
    assert campaign.json("round", "--rounds", "1")["data"]["model"]["version"] == 1


def test_ticks_alone_make_the_models(campaign: Campaign) -> None:
    assert campaign.flctl("campaign", "start", "--rounds", "2", "--sites", "brno,pisa").returncode == 0

    def ticked() -> bool:
        return campaign.json("campaign", "tick")["data"]["done"]

    campaign.wait(ticked)
    assert campaign.json("status")["data"]["model"]["version"] == 2
    assert campaign.json("campaign", "tick")["status"] == "ok"
    assert [campaign.submissions(site) for site in campaign.sites] == [2, 2]


def test_a_tick_that_finds_nothing_due_contacts_nobody(campaign: Campaign) -> None:
    for site in campaign.sites:
        campaign.profile(site, seconds=30)
        path = campaign.place / "sites" / f"{site}.toml"
        path.write_text(path.read_text().replace("every = 1", "every = 3600"))
    campaign.flctl("campaign", "start", "--rounds", "1")
    campaign.flctl("campaign", "tick")
    before = (campaign.place / "runs" / "brno" / "contact.json").read_text()
    answer = campaign.json("campaign", "tick")
    assert (campaign.place / "runs" / "brno" / "contact.json").read_text() == before
    assert [row["site"] for row in answer["data"]["waiting"]] == ["brno", "pisa"]
    campaign.flctl("cancel")


def test_a_tick_without_a_plan_is_no_error_and_one_that_finds_all_locked_says_busy(campaign: Campaign) -> None:
    from flctl.campaign.workspace import lock

    assert campaign.json("campaign", "tick")["status"] == "ok"
    campaign.flctl("campaign", "start", "--rounds", "1")
    with lock(campaign.place / "lock", "test", 1), lock(campaign.place / "runs" / "brno" / "lock", "test", 1):
        assert campaign.json("campaign", "tick", code=10)["errors"][0]["code"] == "locked"
    assert campaign.json("round")["data"]["done"]


def test_who_waits_too_long_for_a_lock_is_told(campaign: Campaign) -> None:
    from flctl.campaign.workspace import lock

    with lock(campaign.place / "lock", "test", 1):
        refused = campaign.flctl("campaign", "start", "--rounds", "1")
    assert refused.returncode == 10
    assert "another flctl" in refused.stderr


def test_an_open_plan_is_continued_and_not_contradicted(campaign: Campaign) -> None:
    campaign.flctl("campaign", "start", "--rounds", "1")
    refused = campaign.flctl("round", "--sites", "brno")
    assert refused.returncode == 2
    assert "plan" in refused.stderr
    assert campaign.json("round", "--rounds", "1")["data"]["model"]["version"] == 1


def test_wait_runs_out_with_its_own_code_and_loses_nothing(campaign: Campaign) -> None:
    for site in campaign.sites:
        campaign.profile(site, seconds=6)
    answer = campaign.json("round", "--wait", "2s", code=11)
    assert not answer["data"]["done"]
    assert campaign.json("round")["data"]["done"]
    assert [campaign.submissions(site) for site in campaign.sites] == [1, 1]


def test_a_dry_run_touches_nothing(campaign: Campaign) -> None:
    def tree() -> dict[str, Any]:
        return {str(p): (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in campaign.root.rglob("*")}

    before = tree()
    shown = campaign.flctl("round", "--dry-run", "--rounds", "3")
    assert shown.returncode == 0
    assert "models 0001 to 0003" in shown.stdout
    assert shown.stdout.count("seal.py") >= 4
    assert tree() == before


STAGES = {
    "ordered": "ordered pisa/1",
    "delivering": "pushed runs/0001-1",
    "delivered": "run-recorded pisa/1.1 delivered",
    "claiming": "submit pisa/0001-1",
    "claimed": "submitted pisa/0001-1",
    "queued": "run-recorded pisa/1.1 queued",
    "looking": "checked pisa",
    "ended": "run-recorded pisa/1.1 ended",
    "fetching": "pulled runs/0001-1/out",
    "gated": "out-renamed pisa/0001-1",
    "fetched": "run-recorded pisa/1.1 fetched",
    "merging": "merged 0001",
    "merged": "model-durable 0001",
}
"""The fault point at which a round is killed in each stage."""


@pytest.mark.parametrize("turn", range(3))
def test_killed_in_any_stage_a_round_goes_on_and_submits_once(campaign: Campaign, turn: int) -> None:
    """kill -9 at a point of every third stage, each time the same command again; the crash matrix takes other ones."""
    points, log = list(STAGES.values())[turn::3], campaign.root / "points"
    while points:
        killed = campaign.flctl("round", "--rounds", "1", FLCTL_FAULT=";".join(points), FLCTL_FAULT_LOG=str(log))
        assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
        assert log.read_text().splitlines()[-1] == points.pop(0)
    finished = campaign.json("status")["data"]["model"]["version"] == 1
    if not finished:
        answer = campaign.json("round", "--rounds", "1")
        assert answer["data"]["model"]["version"] == 1
    for site in campaign.sites:
        assert campaign.attempts(site) == ["0001-1"]
        assert campaign.submissions(site) == 1
    made = load_file(campaign.place / "models" / "0001" / "model.safetensors")
    assert all(made[name].tobytes() == tensor.tobytes() for name, tensor in reference(campaign.place, 1).items())


def test_a_rolled_back_folder_meets_its_own_claims(campaign: Campaign) -> None:
    """The campaign's folder as it was before the round: nothing is submitted again, the same model comes out."""
    campaign.flctl("campaign", "start", "--rounds", "1")
    shutil.copytree(campaign.place, campaign.root / "backup")
    first = campaign.json("round")["data"]["model"]["sha256"]
    shutil.rmtree(campaign.place)
    (campaign.root / "backup").rename(campaign.place)
    assert campaign.json("round")["data"]["model"]["sha256"] == first
    assert [campaign.submissions(site) for site in campaign.sites] == [1, 1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_wait_in_order_and_the_jobs_go_on(campaign: Campaign, number: signal.Signals) -> None:
    for site in campaign.sites:
        campaign.profile(site, seconds=4)
    process = campaign.popen("round")
    campaign.wait(lambda: campaign.run("brno").get("stage") == "running")
    os.kill(process.pid, number)
    text, _ = process.communicate(timeout=15)
    assert process.returncode == 130
    assert "run 0001 is running, job" in text
    assert campaign.json("round")["data"]["done"]
    assert [campaign.submissions(site) for site in campaign.sites] == [1, 1]


def test_cross_evaluation_sends_models_not_text(campaign: Campaign) -> None:
    campaign.set("cross = false", "cross = true")
    campaign.json("round")
    looked = campaign.run("pisa", 2)
    assert looked["order"]["work"] == "evaluate"
    assert set(looked["contribution"]["metrics"]["evaluation"]) == {"0001", "brno-0001-1"}
    assert (campaign.remote("pisa") / "models" / "brno-0001-1" / "config.json").exists()


def test_what_an_interrupted_push_left_behind_is_not_taken_for_part_of_the_model(campaign: Campaign) -> None:
    """A draft beside the files would change the folder's hash, and no job would train on it."""
    campaign.flctl("campaign", "start", "--rounds", "1")
    label = json.loads((campaign.place / "journal.jsonl").read_text().splitlines()[0])
    part = campaign.root / "pisa" / "work" / f"{label['name']}-{label['id']}" / "models" / ".0000.part"
    (part / ".partial").mkdir(parents=True)
    for name in (".flctl-x1y2", ".partial/model.safetensors", "it's a $name"):
        (part / name).write_bytes(b"left behind")
    assert campaign.json("round")["data"]["done"]
    assert not list(campaign.remote("pisa").glob("models/0000/.*"))
