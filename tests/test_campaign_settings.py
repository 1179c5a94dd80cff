"""`flctl init --settings`: a new campaign begins with another one's settings, and is itself all the same."""

import tomllib
from pathlib import Path

import pytest

from tests.campaigns import Campaign

WANTED = """\
# why these values

[campaign]
name = "theirs"
seed = 7
min_sites = 2

[aggregation]
rule = "fedavg"
weights = "equal"           # a comment stays

[train]
steps = 3
anything = "the trainer's own"
"""


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path)


def init(campaign: Campaign, text: str, *more: str) -> tuple[int, str, Path]:
    settings, place = campaign.root / "wanted.toml", campaign.root / "mine"
    settings.write_text(text)
    sites = ",".join(str(campaign.root / f"{name}.toml") for name in campaign.sites)
    words = ["--sites", sites, "--model", str(campaign.root / "start"), "--settings", str(settings), *more]
    ran = campaign.flctl("init", str(place), *words, at=campaign.root)
    return ran.returncode, ran.stderr, place


def test_a_campaign_begins_with_the_settings_and_is_one_of_its_own(campaign: Campaign) -> None:
    code, said, place = init(campaign, WANTED)
    assert code == 0, said
    text = (place / "flctl.toml").read_text()
    made = tomllib.loads(text)
    assert (made["campaign"]["name"], made["campaign"]["seed"], made["campaign"]["min_sites"]) == ("mine", 7, 2)
    assert len(made["campaign"]["id"]) == 8
    assert made["aggregation"]["weights"] == "equal" and made["train"] == {"steps": 3, "anything": "the trainer's own"}
    assert "# why these values" in text and "# a comment stays" in text
    assert campaign.flctl("status", "--json", at=place).returncode == 0


def test_a_seed_on_the_command_line_wins_and_no_campaign_table_is_needed(campaign: Campaign) -> None:
    code, said, place = init(campaign, "[train]\nsteps = 5\n", "--seed", "9")
    assert code == 0, said
    made = tomllib.loads((place / "flctl.toml").read_text())
    assert (made["campaign"]["seed"], made["train"]) == (9, {"steps": 5})


@pytest.mark.parametrize(
    ("text", "said"), [("[aggregation]\nrul = 1\n", "rul"), ("[[", "cannot read"), ("[campaign]\nseed = 'x'\n", "seed")]
)
def test_settings_that_cannot_be_leave_no_campaign(campaign: Campaign, text: str, said: str) -> None:
    code, error, place = init(campaign, text)
    assert (code, said in error, "wanted.toml" in error) == (3, True, True), error
    assert not place.exists() and not place.with_name(".mine.draft").exists()
