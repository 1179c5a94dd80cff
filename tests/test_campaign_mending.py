"""What is damaged, overtaken or collected is made again or brought, and never trained twice; who may not drive takes
nothing away."""

import json
import shutil
from pathlib import Path

import pytest

from tests.campaigns import Campaign
from tests.test_campaign_adoption import elsewhere, hash_of, started


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """Two rounds, each a plan of its own, at one site; copied for each test."""
    campaign = Campaign(tmp_path_factory.mktemp("mending") / "one", sites=("pisa",))
    for _ in range(2):
        assert campaign.flctl("round").returncode == 0
    return campaign


@pytest.fixture
def campaign(made: Campaign) -> Campaign:
    """The same folders as they were: a campaign at local sites knows their absolute paths."""
    kept = made.root.parent / "kept"
    if not kept.exists():
        shutil.copytree(made.root, kept, symlinks=True)
    shutil.rmtree(made.root)
    shutil.copytree(kept, made.root, symlinks=True)
    return made


def spoil(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def files(folder: Path) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.endswith("lock")}


def test_gc_takes_nothing_away_where_another_host_drives(campaign: Campaign) -> None:
    before = files(campaign.place), files(campaign.remote("pisa"))
    for arguments in (("gc", "--keep", "1"), ("gc", "--keep", "1", "--dry-run"), ("gc", "--keep", "1", "--home")):
        refused = elsewhere(campaign, *arguments)
        assert refused.returncode == 10, (arguments, refused.stdout + refused.stderr)
        assert "flctl adopt --takeover" in refused.stderr
    assert (files(campaign.place), files(campaign.remote("pisa"))) == before


def test_gc_of_a_copy_that_drives_no_more_takes_nothing_from_the_sites(campaign: Campaign) -> None:
    """It is told so by the site: its own folder still names this host."""
    old = campaign.place.rename(campaign.root / "old")
    shutil.copytree(old, campaign.place)
    assert campaign.flctl("adopt", "--takeover").returncode == 0
    before = files(campaign.remote("pisa"))
    for arguments in (("--dry-run",), ()):
        answer = campaign.flctl("-C", str(old), "gc", "--keep", "1", *arguments)
        assert answer.returncode == 10
        assert "another copy of this folder" in answer.stderr
    assert files(campaign.remote("pisa")) == before


def test_after_gc_that_keeps_one_model_a_lost_folder_still_begins_anew(campaign: Campaign) -> None:
    known = hash_of(campaign, 2)
    assert campaign.flctl("gc", "--keep", "1").returncode == 0
    profile, label = shutil.copy(campaign.place / "sites" / "pisa.toml", campaign.root), campaign.remote("pisa").name
    shutil.rmtree(campaign.place)
    before = started(campaign)
    rebuilt = campaign.flctl("adopt", str(campaign.place), "--sites", profile, "--id", label, at=campaign.root)
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert campaign.json("round")["data"]["model"]["version"] == 2
    assert (hash_of(campaign, 2), started(campaign)) == (known, before)


def test_a_folder_from_before_what_gc_took_is_told_so_and_goes_on_from_a_sites_model(campaign: Campaign) -> None:
    shutil.copytree(campaign.place, campaign.root / "old")
    assert campaign.flctl("round", "--rounds", "2").returncode == 0
    known, before = hash_of(campaign, 4), started(campaign)
    assert campaign.flctl("gc", "--keep", "1").returncode == 0
    shutil.rmtree(campaign.place)
    (campaign.root / "old").rename(campaign.place)
    told = campaign.flctl("round", "--rounds", "2")
    assert told.returncode == 6, told.stdout + told.stderr
    assert "is gone from the site" in told.stderr and "flctl adopt" in told.stderr
    taken = campaign.flctl("adopt")
    assert taken.returncode == 0, taken.stderr
    assert "model 0003" in taken.stdout
    assert campaign.json("round")["data"]["model"]["version"] == 4
    assert (hash_of(campaign, 4), started(campaign)) == (known, before)
    assert campaign.json("audit")["data"]["differences"] == []


def test_what_a_run_made_that_its_site_has_purged_is_trained_again_when_a_person_says_so(campaign: Campaign) -> None:
    campaign.flctl("campaign", "start", "--rounds", "1")
    campaign.flctl("campaign", "tick")
    folder = campaign.remote("pisa") / "runs" / "0003-1"
    campaign.wait(lambda: (folder / "done.json").exists())
    shutil.rmtree(folder / "out")
    assert "flctl retry pisa" in campaign.flctl("round").stderr
    assert campaign.flctl("retry", "pisa").returncode == 0
    assert campaign.json("round")["data"]["model"]["version"] == 3


def test_a_damaged_record_of_the_driver_is_made_again(campaign: Campaign) -> None:
    spoil(campaign.place / "driver.json")
    assert "flctl adopt" in campaign.flctl("round").stderr
    mended = campaign.flctl("adopt")
    assert mended.returncode == 0, mended.stderr
    assert campaign.json("round")["data"]["model"]["version"] == 3


def test_the_newest_model_with_a_changed_byte_is_merged_again_while_a_later_plan_is_open(campaign: Campaign) -> None:
    known, before = hash_of(campaign, 2), started(campaign)["pisa"]
    spoil(campaign.place / "models" / "0002" / "model.safetensors")
    refused = campaign.flctl("round")
    assert refused.returncode == 3
    assert "flctl adopt makes the newest model again" in refused.stderr
    assert campaign.flctl("adopt").returncode == 0
    assert campaign.json("round")["data"]["model"]["version"] == 3
    assert (hash_of(campaign, 2), started(campaign)["pisa"]) == (known, before + 1)
    assert campaign.json("audit")["data"]["differences"] == []


def test_an_older_model_whose_record_is_damaged_keeps_its_place(campaign: Campaign) -> None:
    known = hash_of(campaign, 1)
    spoil(campaign.place / "models" / "0001" / "flctl.json")
    assert campaign.flctl("adopt").returncode == 0
    assert hash_of(campaign, 1) == known
    assert campaign.flctl("verify").returncode == 0


def test_a_model_that_nobody_can_make_again_leaves_what_a_person_wrote_alone(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, sites=("pisa",))
    text = (campaign.place / "flctl.toml").read_text()
    spoil(campaign.place / "models" / "0000" / "flctl.json")
    assert campaign.flctl("adopt").returncode == 3
    assert (campaign.place / "flctl.toml").read_text() == text


def test_the_work_folder_may_be_changed_between_rounds_and_not_while_a_job_is_there(campaign: Campaign) -> None:
    path = campaign.place / "sites" / "pisa.toml"
    text = path.read_text()
    path.write_text(text.replace('/pisa/work"', '/pisa/elsewhere"'))
    assert campaign.json("round")["data"]["model"]["version"] == 3
    campaign.flctl("campaign", "start", "--rounds", "1")
    campaign.flctl("campaign", "tick")
    path.write_text(text)
    assert json.loads((campaign.place / "runs" / "pisa" / "0004" / "run.json").read_text())["stage"] != "ordered"
    assert "storage.work changed" in campaign.flctl("round").stderr
