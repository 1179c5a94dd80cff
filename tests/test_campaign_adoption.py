"""Folders that were lost, damaged, copied or rolled back: what the sites know comes back, and nothing is trained twice;
one host drives a campaign."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.campaigns import Campaign


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path)


@pytest.fixture
def single(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path, sites=("pisa",))


def hash_of(campaign: Campaign, version: int) -> str:
    return str(json.loads((campaign.place / "models" / f"{version:04d}" / "flctl.json").read_text())["sha256"])


def started(campaign: Campaign) -> dict[str, int]:
    return {site: campaign.submissions(site) for site in campaign.sites}


def events(campaign: Campaign, name: str) -> list[dict[str, object]]:
    return [entry for entry in campaign.journal() if entry["event"] == name]


def ticks(campaign: Campaign, until: Callable[[], object], limit: float = 90) -> None:
    deadline = time.monotonic() + limit
    while not until():
        assert time.monotonic() < deadline
        assert campaign.flctl("campaign", "tick").returncode == 0
        time.sleep(0.3)


def elsewhere(campaign: Campaign, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command on a host with another machine-id, in a mount namespace of its own."""
    identity = campaign.root / "machine-id"
    identity.write_text("0123456789abcdef0123456789abcdef\n")
    words = " ".join(campaign.words(*arguments))
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", f"mount --bind {identity} /etc/machine-id && exec {words}"],
        cwd=campaign.place,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def test_a_lost_folder_is_rebuilt_from_the_sites_and_the_round_goes_on_without_training_twice(
    campaign: Campaign,
) -> None:
    """Two models were made, and of the third both sites have done their part."""
    campaign.json("round", "--rounds", "2")
    known = {version: hash_of(campaign, version) for version in (1, 2)}
    campaign.flctl("campaign", "start", "--rounds", "1")
    campaign.flctl("campaign", "tick")
    for site in campaign.sites:
        campaign.wait(lambda site=site: (campaign.remote(site) / "runs" / "0003-1" / "done.json").exists())
    before, label = started(campaign), campaign.remote("pisa").name
    assert before == {"brno": 3, "pisa": 3}
    spent = [row["used"] for row in campaign.json("status")["data"]["node_hours"]]
    shutil.copytree(campaign.place, campaign.root / "undisturbed")
    profiles = [shutil.copy(campaign.place / "sites" / f"{site}.toml", campaign.root) for site in campaign.sites]
    shutil.rmtree(campaign.place)
    rebuilt = campaign.flctl("adopt", str(campaign.place), "--sites", *profiles, "--id", label, at=campaign.root)
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert "model 0002" in rebuilt.stdout
    assert "what no site can tell" in rebuilt.stdout
    assert hash_of(campaign, 2) == known[2]
    hours = [row["used"] for row in campaign.json("status")["data"]["node_hours"]]
    assert all(hours) and hours == pytest.approx(spent, rel=0.5), "what adopted runs used counts"
    assert "steps = 4" in (campaign.place / "flctl.toml").read_text()
    assert [campaign.run("pisa", number)["stage"] for number in (1, 2)] == ["fetched", "fetched"]
    assert campaign.json("round")["data"]["model"]["version"] == 3
    assert started(campaign) == before
    assert campaign.run("pisa", 4) == {}
    made = hash_of(campaign, 3)
    campaign.place = campaign.root / "undisturbed"
    assert "another copy of this folder" in campaign.flctl("round").stderr
    assert campaign.flctl("adopt", "--takeover").returncode == 0
    assert campaign.json("round")["data"]["model"]["version"] == 3
    assert (hash_of(campaign, 3), started(campaign)) == (made, before)


def test_a_folder_without_a_model_at_any_site_cannot_be_rebuilt_and_that_is_said(single: Campaign) -> None:
    profile = str(single.root / "pisa.toml")
    answer = single.flctl("adopt", str(single.root / "new"), "--sites", profile, "--id", "camp-00ff00ff")
    assert answer.returncode == 3
    assert "no site has a whole model of camp-00ff00ff" in answer.stderr
    wrong = single.flctl("adopt", str(single.root / "other"), "--sites", profile, "--id", "camp")
    assert wrong.returncode == 2


def test_a_folder_that_went_back_in_time_meets_what_it_ordered_and_trains_nothing_twice(campaign: Campaign) -> None:
    """cp -a before the second round, put back after the third."""
    campaign.json("round")
    shutil.copytree(campaign.place, campaign.root / "old", symlinks=True)
    campaign.json("round", "--rounds", "2")
    known, before = {version: hash_of(campaign, version) for version in (2, 3)}, started(campaign)
    assert before == {"brno": 3, "pisa": 3}
    shutil.rmtree(campaign.place)
    (campaign.root / "old").rename(campaign.place)
    assert campaign.json("round", "--rounds", "2")["data"]["model"]["version"] == 3
    assert {version: hash_of(campaign, version) for version in (2, 3)} == known
    assert started(campaign) == before
    assert {entry["site"] for entry in events(campaign, "folder went back")} == {"brno", "pisa"}
    assert {(entry["site"], entry["number"]) for entry in events(campaign, "adopted")} == {("brno", 3), ("pisa", 3)}


def test_an_attempt_that_was_opened_after_the_copy_is_taken_up(single: Campaign) -> None:
    """The copy knows the first attempt; at the site the second one has succeeded."""
    single.profile("pisa", behave="fail")
    single.flctl("campaign", "start", "--rounds", "1")
    single.flctl("campaign", "tick")
    single.wait(lambda: (single.remote("pisa") / "runs" / "0001-1" / "done.json").exists())
    shutil.copytree(single.place, single.root / "old")
    single.json("round", code=6)
    single.profile("pisa")
    single.flctl("retry", "pisa")
    single.json("round")
    known, before = hash_of(single, 1), started(single)
    shutil.rmtree(single.place)
    (single.root / "old").rename(single.place)
    assert single.json("round")["data"]["model"]["version"] == 1
    assert (hash_of(single, 1), started(single)) == (known, before)
    assert single.run("pisa")["attempt"] == 2


def test_a_copied_folder_is_driven_by_one_host_and_a_take_over_refuses_the_other(campaign: Campaign) -> None:
    campaign.json("round")
    before = (campaign.place / "journal.jsonl").read_bytes()
    for command in (("round",), ("campaign", "tick"), ("cancel",), ("retry",)):
        refused = elsewhere(campaign, *command)
        assert refused.returncode == 10, (command, refused.stdout + refused.stderr)
        assert "flctl adopt --takeover" in refused.stderr
    assert (campaign.place / "journal.jsonl").read_bytes() == before
    copy = shutil.copytree(campaign.place, campaign.root / "copy")
    first, campaign.place = campaign.place, copy
    taken = elsewhere(campaign, "adopt", "--takeover")
    assert taken.returncode == 0, taken.stderr
    assert "epoch 2" in taken.stdout
    assert elsewhere(campaign, "round").returncode == 0
    campaign.place = first
    refused = campaign.flctl("round")
    assert refused.returncode == 10, refused.stderr
    assert "driven from" in refused.stderr
    assert started(campaign) == {"brno": 2, "pisa": 2}


def test_two_copies_without_a_record_of_a_driver_are_told_apart_by_the_site(campaign: Campaign) -> None:
    """Folders of an older flctl, copied: whoever comes first drives."""
    copy = shutil.copytree(campaign.place, campaign.root / "copy")
    campaign.json("round")
    campaign.place = copy
    refused = elsewhere(campaign, "round")
    assert refused.returncode == 10, refused.stdout + refused.stderr
    assert started(campaign) == {"brno": 1, "pisa": 1}


def test_a_claim_is_made_by_the_driver_alone(single: Campaign) -> None:
    """Another host takes over between our first contact and our submission."""
    from flctl.campaign.driver import guard
    from flctl.campaign.workspace import Workspace

    single.json("round")
    test, record = guard(Workspace(single.place)), single.remote("pisa") / "driver.json"
    assert subprocess.run(["sh", "-c", test], cwd=record.parent).returncode == 0
    data = json.loads(record.read_text())
    for change in ({"epoch": 2}, {"host": "0" * 64}, {"epoch": 2, "host": "0" * 64}):
        record.write_text(json.dumps({**data, **change}) + "\n")
        assert subprocess.run(["sh", "-c", test], cwd=record.parent).returncode != 0, change
    record.unlink()
    assert subprocess.run(["sh", "-c", test], cwd=record.parent).returncode == 0


def test_a_damaged_record_is_refused_and_made_again_from_the_site(single: Campaign) -> None:
    single.profile("pisa", seconds=2)
    single.flctl("campaign", "start", "--rounds", "1")
    single.flctl("campaign", "tick")
    path = single.place / "runs" / "pisa" / "0001" / "run.json"
    raw = path.read_bytes()
    assert b'"number": 1' in raw
    path.write_bytes(raw.replace(b'"number": 1', b'"number": 2'))
    refused = single.flctl("round")
    assert refused.returncode == 3
    assert str(path) in refused.stderr
    assert "flctl adopt" in refused.stderr
    mended = single.flctl("adopt")
    assert mended.returncode == 0, mended.stderr
    assert "put aside" in mended.stdout
    assert single.json("round")["data"]["model"]["version"] == 1
    assert single.submissions("pisa") == 1


def test_a_damaged_plan_and_model_are_made_again(campaign: Campaign) -> None:
    campaign.json("round", "--rounds", "2")
    known = hash_of(campaign, 2)
    (campaign.place / "plan.json").write_text("{")
    record = campaign.place / "models" / "0002" / "flctl.json"
    record.write_text(record.read_text().replace('"steps"', '"stepz"', 1))
    assert campaign.flctl("round").returncode == 3
    assert campaign.flctl("adopt").returncode == 0
    assert campaign.json("round")["data"]["model"]["version"] == 2
    assert hash_of(campaign, 2) == known
    assert started(campaign) == {"brno": 2, "pisa": 2}


def test_what_a_site_makes_up_in_its_runs_folder_is_not_believed(single: Campaign) -> None:
    single.json("round")
    runs = single.remote("pisa") / "runs"
    for name in ("0007-1", "0008-1", "x;y", "0009-99999", "9999999-1"):
        (runs / name).mkdir()
    order = json.loads((runs / "0001-1" / "order.json").read_text())
    (runs / "0008-1" / "order.json").write_text(json.dumps({**order, "number": 8}))
    (runs.parent / "driver.json").write_text("\x1b[31m{" + "[" * 100_000)
    assert single.json("round")["data"]["model"]["version"] == 2
    assert single.run("pisa", 8) == {}
    assert single.run("pisa", 2)["stage"] == "fetched"


def test_of_many_ticks_at_once_one_works_and_the_others_say_that_they_are_not_needed(single: Campaign) -> None:
    single.profile("pisa", seconds=3)
    single.flctl("campaign", "start", "--rounds", "1")
    many = [single.popen("campaign", "tick") for _ in range(20)]
    codes = [process.wait(120) for process in many]
    texts = [process.communicate()[0] for process in many]
    assert set(codes) <= {0, 10}, texts
    assert all("another flctl" in text for code, text in zip(codes, texts, strict=True) if code == 10)
    ticks(single, lambda: (single.place / "models" / "0001").exists())
    assert single.submissions("pisa") == 1
    assert sorted(os.listdir(single.place / "models")) == ["0000", "0001"]


def test_a_tick_beside_a_working_one_is_busy_at_once(single: Campaign) -> None:
    single.flctl("campaign", "start", "--rounds", "1")
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom flctl.campaign.workspace import Workspace\n"
        "space = Workspace(Path(sys.argv[1]))\n"
        "with space.lock_campaign(), space.lock_site('pisa'): print('held', flush=True); time.sleep(300)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(single.place)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        busy = single.flctl("campaign", "tick")
        assert busy.returncode == 10
        assert "another flctl" in busy.stderr
    finally:
        holder.kill()
        holder.communicate()
    assert single.flctl("campaign", "tick").returncode == 0


def test_what_privacy_an_adopted_model_cost_counts_as_unknown(single: Campaign) -> None:
    """No epsilon is stated for its successors: what was spent is told by nobody."""
    from flctl.campaign.privacy import multipliers
    from flctl.campaign.workspace import Workspace

    single.json("round")
    single.flctl("campaign", "start", "--rounds", "1")
    single.flctl("campaign", "tick")
    profile, label = shutil.copy(single.place / "sites" / "pisa.toml", single.root), single.remote("pisa").name
    new = single.root / "new"
    single.wait(lambda: (single.remote("pisa") / "runs" / "0002-1" / "done.json").exists())
    assert single.flctl("adopt", str(new), "--sites", profile, "--id", label, at=single.root).returncode == 0
    assert multipliers(Workspace(new), 1) == {1: 0.0}
