"""Growth over time: gc takes what nobody needs and nothing else, whole or not at all; what fits is forecast; what a
site's purge took is brought again."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flctl.campaign.collected import collected_on
from flctl.campaign.growth import LEFT_OVER, collect_home
from flctl.campaign.needed import needed
from flctl.campaign.space import DAY, Room, line, purges, rooms, too_small
from flctl.campaign.workspace import Workspace
from flctl.errors import UsageError
from flctl.records import Contact, Job, Order, Plan, Run, Stage, Work
from tests.campaigns import Campaign

ROUNDS = 4
TODAY = time.strftime("%Y-%m-%d")


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """A campaign of four rounds with a rule that remembers; copied with its sites for each test."""
    campaign = Campaign(tmp_path_factory.mktemp("growth") / "one")
    campaign.set('rule = "fedavg"', 'rule = "fedadam"')
    ran = campaign.flctl("round", "--rounds", str(ROUNDS))
    assert ran.returncode == 0, ran.stderr
    return campaign


@pytest.fixture
def campaign(grown: Campaign) -> Campaign:
    """The same folders as they were: a campaign at local sites knows their absolute paths."""
    kept = grown.root.parent / "kept"
    if not kept.exists():
        shutil.copytree(grown.root, kept)
    shutil.rmtree(grown.root)
    shutil.copytree(kept, grown.root)
    return grown


def whole(campaign: Campaign, version: int) -> bool:
    folder = campaign.place / "models" / f"{version:04d}"
    return (folder / "model.safetensors").exists()


def given(campaign: Campaign, site: str, number: int) -> bool:
    return (campaign.place / "runs" / site / f"{number:04d}" / "1" / "out" / "model.safetensors").exists()


def there(campaign: Campaign, site: str, folder: str) -> set[str]:
    return {path.name for path in (campaign.remote(site) / folder).iterdir()}


def hashes(campaign: Campaign) -> list[str]:
    return [model.sha256 for model in Workspace(campaign.place).models()]


def test_gc_keeps_what_verifies_the_newest_models_and_all_records(campaign: Campaign) -> None:
    before = hashes(campaign)
    records = {path: path.read_bytes() for path in campaign.place.rglob("*.json") if "out" not in path.parts}
    records = {path: raw for path, raw in records.items() if path.name in ("flctl.json", "run.json", "done.json")}
    assert campaign.flctl("gc").returncode == 0
    assert [whole(campaign, version) for version in range(ROUNDS + 1)] == [True, False, True, True, True]
    assert [given(campaign, "brno", number) for number in range(1, ROUNDS + 1)] == [False, False, True, True]
    for version in (3, 4):
        answer = campaign.json("verify", str(version))["data"]
        assert answer["agrees"] and answer["rebuilt"], version
    assert hashes(campaign) == before
    assert all(path.read_bytes() == raw for path, raw in records.items())
    assert campaign.json("audit")["data"]["collected"] == [1]


def test_at_a_site_the_newest_models_the_records_and_the_state_stay(campaign: Campaign) -> None:
    remote = campaign.remote("brno")
    (remote / "state" / "optimizer").write_text("mine")
    (remote / "payload" / ("0" * 64)).mkdir()
    for left in ("models/.0001.part", "models/.0002.gathered", "runs/.0001-1.part.old.77", "models/.gone.0001"):
        (remote / left).mkdir()
    kept = there(campaign, "brno", "payload") - {"0" * 64}
    assert campaign.flctl("gc").returncode == 0
    assert there(campaign, "brno", "models") == {"0003"}
    assert there(campaign, "brno", "payload") == kept
    assert (remote / "state" / "optimizer").read_text() == "mine"
    assert there(campaign, "brno", "runs") == {f"{number:04d}-1" for number in range(1, ROUNDS + 1)}
    for number in range(1, ROUNDS + 1):
        names = there(campaign, "brno", f"runs/{number:04d}-1")
        assert {"claim", "owner", "done.json", "order.json", "job.sh", "job.id"} <= names
        assert ("out" in names) == (number > ROUNDS - 2), number  # a lost home begins anew with these
        assert "checkpoint" not in names
    assert campaign.flctl("round").returncode == 0
    assert campaign.json("audit")["data"]["differences"] == []


def test_a_dry_run_says_the_same_and_takes_nothing(campaign: Campaign) -> None:
    before = {path: path.stat().st_size for path in sorted(campaign.root.rglob("*")) if path.is_file()}
    dry = campaign.json("gc", "--dry-run")["data"]
    after = {path: path.stat().st_size for path in sorted(campaign.root.rglob("*")) if path.is_file()}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {"journal.jsonl", "contact.json", "verify.lock"}
    assert before.keys() <= after.keys()
    assert dry["dry_run"]
    assert campaign.json("gc")["data"]["items"] == dry["items"]
    assert campaign.json("gc")["data"]["items"] == []
    told = [entry for entry in campaign.journal() if entry["event"] == "collected"]
    assert {(entry["site"], entry["path"], entry["size"]) for entry in told} == {
        (item["site"], item["path"], item["bytes"]) for item in dry["items"]
    }


def test_a_collected_version_is_called_collected_and_not_missing(campaign: Campaign, tmp_path: Path) -> None:
    assert campaign.flctl("gc", "--keep", "1", "--home").returncode == 0
    for words in (["verify", "1"], ["export", "1", "--out", str(tmp_path / "out")]):
        ran = campaign.flctl(*words)
        assert ran.returncode == 2
        assert f"model 0001 was collected by gc on {TODAY}" in ran.stderr
    ran = campaign.flctl("verify", "3")
    assert ran.returncode == 0, ran.stderr
    assert f"what it was made from was collected by gc on {TODAY}" in ran.stdout
    assert "collected by gc, records kept: models 0001, 0002" in campaign.flctl("audit").stdout
    assert campaign.flctl("export", "4", "--out", str(tmp_path / "four")).returncode == 0


def test_a_note_without_a_gc_is_found_by_the_audit(campaign: Campaign) -> None:
    assert campaign.flctl("gc", "--home").returncode == 0
    other = campaign.place / "models" / "0002"
    shutil.copy(campaign.place / "models" / "0001" / "collected.json", other)
    (other / "model.safetensors").unlink()
    (difference,) = campaign.json("audit", code=8)["data"]["differences"]
    assert (difference["file"], difference["round"]) == ("models/0002/collected.json", 2)


def test_killed_at_any_moment_gc_leaves_a_whole_state_and_goes_on(campaign: Campaign) -> None:
    workspace, killed = Workspace(campaign.place), 0
    entries = {version: workspace.model_record(version)["files"] for version in range(ROUNDS + 1)}
    for moment in (1, 2, 3, 5, 8, 13):
        ran = campaign.flctl("gc", "--keep", "1", FLCTL_FAULT=f"collect:{moment}")
        killed += ran.returncode == -signal.SIGKILL
        for version, files in entries.items():
            folder = workspace.model_folder(version)
            present = [(folder / entry["path"]).exists() for entry in files]
            assert all(present) or collected_on(folder), (moment, version)
        assert campaign.json("audit")["data"]["differences"] == [], moment
    assert killed > 3
    assert campaign.flctl("gc", "--keep", "1").returncode == 0
    assert [whole(campaign, version) for version in range(ROUNDS + 1)] == [True, False, False, True, True]
    assert campaign.json("audit")["data"]["differences"] == []
    assert campaign.json("verify")["data"]["rebuilt"]


@pytest.mark.parametrize("point", ["collect-at", "collected-at"])
def test_killed_while_a_site_is_cleared_gc_goes_on_there(campaign: Campaign, point: str) -> None:
    assert campaign.flctl("gc", FLCTL_FAULT=point).returncode == -signal.SIGKILL
    assert campaign.flctl("gc").returncode == 0
    assert there(campaign, "brno", "models") == there(campaign, "pisa", "models") == {"0003"}
    assert campaign.flctl("round").returncode == 0


def test_a_hidden_name_that_a_killed_gc_left_at_a_site_goes_next_time(campaign: Campaign) -> None:
    remote = campaign.remote("pisa")
    (remote / "models" / "0000").rename(remote / "models" / ".gone.0000")
    (remote / "runs" / "0001-1" / "out").rename(remote / "runs" / "0001-1" / ".gone.out")
    assert campaign.flctl("gc").returncode == 0
    assert there(campaign, "pisa", "models") == {"0003"}
    assert ".gone.out" not in there(campaign, "pisa", "runs/0001-1")


def test_what_an_open_run_and_a_failed_one_need_stays(campaign: Campaign) -> None:
    campaign.profile("brno", seconds=600)
    campaign.profile("pisa", behave="fail")
    process, number = campaign.popen("round"), ROUNDS + 1
    stages = {"pisa": "failed", "brno": "running"}
    campaign.wait(lambda: all(campaign.run(site, number).get("stage") == stage for site, stage in stages.items()))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    workspace = Workspace(campaign.place)
    found = needed(workspace, 1)
    assert {(run.site, run.number) for run in found.alive} == {("brno", ROUNDS + 1), ("pisa", ROUNDS + 1)}
    assert campaign.flctl("gc", "--keep", "1").returncode == 0
    assert "0004" in there(campaign, "brno", "models")
    assert "out" in there(campaign, "brno", f"runs/{ROUNDS + 1:04d}-1")
    campaign.kill_job("brno")
    campaign.profile("pisa")
    assert campaign.flctl("retry", "pisa").returncode == 0
    campaign.profile("brno")
    campaign.flctl("cancel", "brno")


def test_a_site_that_cannot_be_reached_is_said_and_the_others_are_done(campaign: Campaign) -> None:
    path = campaign.place / "sites" / "pisa.toml"
    path.write_text(
        path.read_text().replace(
            'connection = "local"',
            '[login]\nhost = "127.0.96.9"\nport = 24699\nuser = "nobody"\nkey = "/nonexistent"\n',
        )
    )
    answer = campaign.json("gc", code=None)
    assert answer["status"] == "partial"
    assert [error["site"] for error in answer["errors"]] == ["pisa"]
    assert answer["exit_code"] in (3, 4, 5)
    assert {item["site"] for item in answer["data"]["items"]} == {"", "brno"}
    assert there(campaign, "brno", "models") == {"0003"}


def test_names_that_interruptions_leave_are_known_by_their_form() -> None:
    for name in (".0003.part", ".0003.gathered", ".0001-1.part.old.99", ".brno-0001-1.part"):
        assert LEFT_OVER.fullmatch(name)
    for name in ("0003", ".flctl-incoming", ".owner.abc", "done.json.sig"):
        assert not LEFT_OVER.fullmatch(name)


# What fits


def test_status_tells_how_many_more_rounds_fit(campaign: Campaign) -> None:
    assert campaign.flctl("round").returncode == 0
    rows = {row["site"]: row for row in campaign.json("status")["data"]["space"]}
    files = json.loads((campaign.place / "models" / "0005" / "flctl.json").read_text())
    model = sum(entry["size"] for entry in files["files"])
    state = sum(entry["size"] for entry in files["state"]["files"])
    assert rows[""]["per_round"] == 3 * model + state
    for site in ("brno", "pisa"):
        assert rows[site]["free"] > 0
        assert rows[site]["rounds"] == rows[site]["free"] // rows[site]["per_round"]
    assert "space, brno: " in campaign.flctl("status").stdout


def test_a_plan_that_does_not_fit_is_warned_of(campaign: Campaign) -> None:
    workspace = Workspace(campaign.place)
    contact = workspace.contact("pisa")
    per_round = {room.site: room.per_round for room in rooms(workspace, ("brno", "pisa"))}["pisa"]
    workspace.save_contact("pisa", replace(contact, free=int(2.5 * per_round)))
    plan = Plan(sites=("brno", "pisa"), first=5, target=9, steps=4, min_sites=2)
    (warning,) = too_small(workspace, plan)
    assert warning.startswith("space at pisa for 2 of 5 rounds")
    assert "flctl gc" in warning
    assert too_small(workspace, replace(plan, target=6)) == []
    assert warning in campaign.flctl("plan", "--offline", "--rounds", "5").stdout


def test_the_forecast_in_words() -> None:
    assert line(Room(site="", free=10_000_000, per_round=3_000_000)) == "home: 10 MB free, 3 MB a round: 3 more"
    assert line(Room(site="brno", free=None, per_round=3_000_000)) == "brno: not known yet, 3 MB a round"


# What a purge takes


def queued(created_at: float, start: float | None) -> Run:
    order = Order(site="brno", work=Work.TRAIN, base=4, round=5)
    job = Job(token="f", expected_start=start)
    return Run(number=9, order=order, stage=Stage.QUEUED, job=job, created_at=created_at, changed_at=created_at)


def test_a_purge_that_comes_before_the_job_is_warned_of(campaign: Campaign) -> None:
    path = campaign.place / "sites" / "brno.toml"
    path.write_text(path.read_text().replace("[storage]\n", "[storage]\npurge_days = 10\n"))
    workspace, now = Workspace(campaign.place), time.time()
    assert purges(workspace, [queued(now - 2 * DAY, None)], now) == []
    assert purges(workspace, [queued(now - 2 * DAY, now + 3 * DAY)], now) == []
    (warning,) = purges(workspace, [queued(now - 2 * DAY, now + 9 * DAY)], now)
    assert "run 0009 begins 11 days after its files were brought there" in warning
    assert purges(workspace, [queued(now - 9 * DAY, None)], now) != []


def purge(folder: Path) -> None:
    """Take every file below, as a purge does: the folders stay."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


def test_what_a_purge_took_before_a_round_is_brought_again(campaign: Campaign) -> None:
    """Old models, the payload and the sealed records are gone; what stays looks old."""
    for site in campaign.sites:
        remote = campaign.remote(site)
        for folder in ("models", "payload"):
            purge(remote / folder)
        for path in remote.rglob("*"):
            os.utime(path, (0, 0))
    ran = campaign.flctl("round", "--rounds", "2")
    assert ran.returncode == 0, ran.stderr
    assert campaign.json("verify")["data"]["agrees"]
    assert all(campaign.run(site, ROUNDS + 1)["attempt"] == 1 for site in campaign.sites)


@pytest.mark.parametrize(("point", "gone"), [("attempt-placed", "job.sh"), ("submit", "*"), ("submit", "")])
def test_an_order_that_was_purged_before_it_was_submitted_is_restored(tmp_path: Path, gone: str, point: str) -> None:
    """`gone`: the files; nothing: their folder as well."""
    campaign = Campaign(tmp_path, ("brno",))
    assert campaign.flctl("round", FLCTL_FAULT=point).returncode == -signal.SIGKILL
    folder = campaign.remote("brno") / "runs" / "0001-1"
    assert sorted(path.name for path in folder.iterdir()) == ["job.sh", "order.json"]
    for path in folder.glob(gone or "*"):
        path.unlink()
    if not gone:
        folder.rmdir()
    ran = campaign.flctl("round")
    assert ran.returncode == 0, ran.stderr
    assert campaign.submissions("brno") == 1
    assert campaign.json("audit")["data"]["differences"] == []


def test_a_version_that_gc_took_is_a_usage_error_for_programs(campaign: Campaign) -> None:
    from flctl.campaign.rebuilding import rebuild

    workspace = Workspace(campaign.place)
    collect_home(workspace, 1, dry=False)
    with pytest.raises(UsageError, match="collected by gc"):
        rebuild(workspace, 1)
    assert workspace.contact("brno") != Contact()
