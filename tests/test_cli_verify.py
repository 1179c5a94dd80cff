"""`flctl verify` and `flctl export` as typed: which version is meant, what is said, how it ends."""

import shutil
import subprocess
from pathlib import Path

import pytest

from flctl.cli.verify import version_of
from flctl.errors import UsageError
from tests.campaigns import Campaign


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """A campaign of one round."""
    campaign = Campaign(tmp_path_factory.mktemp("verify"))
    ran = campaign.flctl("round")
    assert ran.returncode == 0, ran.stderr
    return campaign


def test_a_version_is_written_as_people_write_it() -> None:
    assert [version_of(text) for text in ("7", "0007", "newest", None)] == [7, 7, None, None]
    for text in ("seven", "-1", "1.0", "², ", ""):
        with pytest.raises(UsageError, match="no version"):
            version_of(text)


def test_verify_says_what_it_looked_at(campaign: Campaign) -> None:
    newest, first = campaign.flctl("verify"), campaign.flctl("verify", "0000")
    assert (newest.returncode, newest.stderr) == (0, "")
    assert newest.stdout.startswith("model 0001  sha256 ")
    assert "every bit agrees" in newest.stdout
    assert "made again from 2 contributions" in newest.stdout
    assert "made of no contributions" in first.stdout


def test_verify_names_what_is_wrong_and_says_what_to_do(campaign: Campaign, tmp_path: Path) -> None:
    shutil.copytree(campaign.place, tmp_path / "copy")
    path = tmp_path / "copy" / "models" / "0001" / "config.json"
    path.write_text(path.read_text() + " ")
    ran = campaign.flctl("verify", at=tmp_path / "copy")
    assert ran.returncode == 8
    assert "models/0001/config.json: not what was recorded" in ran.stdout
    assert "flctl: model 0001 is not what was recorded: models/0001/config.json" in ran.stderr
    assert "restore" in ran.stderr
    answer = campaign.json("-C", str(tmp_path / "copy"), "verify", code=8)
    assert (answer["command"], answer["status"], answer["errors"][0]["code"]) == (
        "verify",
        "error",
        "aggregation_refused",
    )
    assert not answer["data"]["agrees"]


def test_a_version_that_cannot_be_meant_is_a_usage_error(campaign: Campaign, tmp_path: Path) -> None:
    for words in (["verify", "seven"], ["export", "7", "--out", str(tmp_path / "out")], ["export", "newest"]):
        ran = campaign.flctl(*words)
        assert ran.returncode == 2, ran.stderr
        assert "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_export_says_what_it_wrote(campaign: Campaign, tmp_path: Path) -> None:
    ran: subprocess.CompletedProcess[str] = campaign.flctl("export", "newest", "--out", str(tmp_path / "out"))
    assert ran.returncode == 0, ran.stderr
    files = list((tmp_path / "out").iterdir())
    assert f"{len(files)} files, " in ran.stdout
    assert str(tmp_path / "out") in ran.stdout
    assert not {"flctl.json", "state"} & {path.name for path in files}
