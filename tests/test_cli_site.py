"""`flctl site list | show | add`, as typed: in a campaign and outside of one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.campaigns import Campaign
from tests.terminals import Terminal
from tests.test_sites import FACILITIES

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """One campaign; tests that add to it take the addition back."""
    return Campaign(tmp_path_factory.mktemp("site"))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return tmp_path


def flctl(*arguments: str, at: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "FLCTL_CAMPAIGN"}
    words = [sys.executable, "-m", "flctl.cli.main", *arguments]
    return subprocess.run(words, cwd=at, env={**kept, **environment}, capture_output=True, text=True)


def data(*arguments: str, at: Path) -> Any:
    ran = flctl(*arguments, "--json", at=at)
    answer = json.loads(ran.stdout)
    assert (answer["exit_code"], answer["command"]) == (ran.returncode, " ".join(arguments[:2]))
    return answer["data"]


def test_the_shipped_profiles_are_listed_anywhere(outside: Path) -> None:
    rows = {row["name"]: row for row in data("site", "list", "--available", at=outside)["sites"]}
    assert sorted(rows) == sorted(FACILITIES)
    assert rows["frontier"] | {"path": ""} == {
        "name": "frontier",
        "title": "Frontier (OLCF, US)",
        "login": "attended",
        "person": "each login",
        "scheduler": "slurm",
        "transfer": "dtn.ccs.ornl.gov",
        "checked": "2026-07-22",
        "questions": 4,
        "fill_in": ["login.user", "scheduler.account", "storage.work", "storage.data", "login.hold"],
        "path": "",
    }
    assert (rows["leonardo"]["person"], rows["karolina"]["person"]) == ("renewal", "never")
    assert "login.renew" in rows["leonardo"]["fill_in"], "it still holds an example's e-mail"


def test_the_list_has_a_line_for_each(outside: Path) -> None:
    lines = flctl("site", "list", "--available", at=outside).stdout.splitlines()
    assert lines[0].split() == ["site", "login", "person", "scheduler", "checked", "questions"]
    assert [line.split()[0] for line in lines[1:-1]] == sorted(FACILITIES)


def shown(*arguments: str, columns: int, at: Path) -> list[str]:
    """The lines that a terminal of that width shows."""
    words = [sys.executable, "-m", "flctl.cli.main", *arguments]
    kept = {name: value for name, value in os.environ.items() if name != "FLCTL_CAMPAIGN"}
    with Terminal(words, cwd=at, env={**kept, "COLUMNS": str(columns), "TERM": "dumb"}) as terminal:
        assert terminal.end() == 0, terminal.screen
    return terminal.screen.replace("\r", "").splitlines()


def test_on_a_terminal_of_80_columns_no_name_is_cut(outside: Path) -> None:
    lines = shown("site", "list", "--available", columns=80, at=outside)
    assert max(map(len, lines)) <= 80
    assert set(FACILITIES) <= {line.split()[0] for line in lines if line.strip()}
    assert len([line for line in lines if re.search(r"\d{4}-\d\d-\d\d +\d+ *$", line)]) == len(FACILITIES)


@pytest.mark.parametrize("name", FACILITIES)
def test_a_profile_is_shown_within_80_columns(name: str, outside: Path) -> None:
    lines = shown("site", "show", name, columns=80, at=outside)
    assert [line for line in lines[:-1] if len(line.rstrip()) > 80 and " " in line.strip()] == []  # but for an address
    assert lines[0].split()[:2] == ["site", name]
    assert "…" not in "".join(lines)


def test_without_a_campaign_its_sites_cannot_be_listed(outside: Path) -> None:
    ran = flctl("site", "list", at=outside)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert "no campaign here" in ran.stderr


def test_a_campaign_lists_its_own_sites(campaign: Campaign) -> None:
    rows = data("site", "list", at=campaign.place)["sites"]
    assert [(row["name"], row["login"], row["person"], row["fill_in"]) for row in rows] == [
        ("brno", "local", "never", []),
        ("pisa", "local", "never", []),
    ]
    assert rows[0]["path"] == str(campaign.place / "sites" / "brno.toml")
    assert "fill in" not in flctl("site", "list", at=campaign.place).stdout
    assert flctl("site", "show", "brno", at=campaign.place).stdout.split()[:2] == ["site", "brno"]


@pytest.mark.parametrize("name", FACILITIES)
def test_a_profile_shows_its_evidence_its_questions_and_what_to_fill_in(name: str, outside: Path) -> None:
    whole = data("site", "show", name, at=outside)
    assert whole["shipped"]
    ran = flctl("site", "show", name, at=outside)
    assert ran.returncode == 0, ran.stderr
    about = whole["profile"]["about"]
    said = (about["docs"], about["checked"], *about["evidence"], *about["questions"], *whole["fill_in"])
    for text in (*said, whole["person"], whole["profile"]["login"]["host"], *whole["profile"]["shapes"]):
        assert text in ran.stdout, text
    for queue in whole["profile"]["queues"]:
        assert any(line.startswith(queue + " ") for line in ran.stdout.splitlines()), queue
    assert ran.stdout.splitlines()[-1] == whole["path"] == str(ROOT / "sites" / f"{name}.toml")


def test_what_a_login_is_like_is_told(outside: Path) -> None:
    text = flctl("site", "show", "alps-clariden", at=outside).stdout
    assert "certificate at clariden.alps.cscs.ch; through ela.cscs.ch; renewed by cscs-key sign" in text
    text = flctl("site", "show", "meluxina", at=outside).stdout
    assert "key at login.lxp.lu:8822" in text
    assert "transfer   data.leonardo.cineca.it, no shell" in flctl("site", "show", "leonardo", at=outside).stdout
    assert "one session per connection" in flctl("site", "show", "frontier", at=outside).stdout


def test_a_campaigns_own_profile_comes_before_the_shipped_one(campaign: Campaign) -> None:
    own = campaign.place / "sites" / "lumi.toml"
    shutil.copy(ROOT / "sites" / "lumi.toml", own)
    own.write_text(own.read_text().replace('user = ""', 'user = "me"'))
    try:
        whole = data("site", "show", "lumi", at=campaign.place)
        assert (whole["shipped"], whole["path"]) == (False, str(own))
        assert "login.user" not in whole["fill_in"]
        listed = flctl("site", "list", at=campaign.place).stdout
        assert listed.endswith(f"{own}: fill in scheduler.account, storage.work, storage.data\n")
        assert "not in this campaign" not in flctl("site", "show", "lumi", at=campaign.place).stdout
        assert "not in this campaign" in flctl("site", "show", "polaris", at=campaign.place).stdout
    finally:
        own.unlink()


@pytest.mark.parametrize("command", ["show", "add"])
def test_an_unknown_name_is_told_the_nearest_one(command: str, campaign: Campaign) -> None:
    ran = flctl("site", command, "fronteir", at=campaign.place)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert "did you mean frontier?" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_with_json_an_error_names_its_own_command(outside: Path) -> None:
    for command in ("list", "show"):
        arguments = ("site", command, *(["nowhere"] if command == "show" else []), "--json")
        answer = json.loads(flctl(*arguments, at=outside).stdout)
        assert (answer["command"], answer["status"]) == (f"site {command}", "error")


@pytest.mark.parametrize("named", ["option", "variable"])
def test_a_campaign_that_is_named_must_be_there(named: str, outside: Path) -> None:
    gone = str(outside / "gone")
    if named == "option":
        ran = flctl("-C", gone, "site", "show", "lumi", at=outside)
    else:
        ran = flctl("site", "show", "lumi", at=outside, FLCTL_CAMPAIGN=gone)
    assert ran.returncode == 3
    assert "is not a campaign" in ran.stderr


def test_adding_copies_the_profile_and_the_template_it_needs(campaign: Campaign) -> None:
    template = campaign.place / "templates" / "pbs.sh"
    template.unlink(missing_ok=True)
    before = {path: path.read_bytes() for path in campaign.place.rglob("*") if path.is_file()}
    ran = flctl("site", "add", "polaris", "lumi", at=campaign.place)
    added = [campaign.place / "sites" / f"{name}.toml" for name in ("polaris", "lumi")]
    try:
        assert ran.returncode == 0, ran.stderr
        assert f"{added[0]}: fill in login.user, scheduler.account, storage.work, storage.data" in ran.stdout
        assert "5 open questions: flctl site show polaris" in ran.stdout
        assert ran.stdout.splitlines()[-1] == "then type: flctl site test polaris lumi"
        assert [path.read_bytes() for path in added] == [(ROOT / "sites" / path.name).read_bytes() for path in added]
        assert template.read_bytes() == (ROOT / "templates" / "pbs.sh").read_bytes()
        journal = campaign.place / "journal.jsonl"
        after = {path for path in campaign.place.rglob("*") if path.is_file()}
        assert after - set(before) == {*added, template}
        assert all(path.read_bytes() == content for path, content in before.items() if path != journal)
        events = [json.loads(line) for line in journal.read_text().splitlines()]
        assert [(event["event"], event["site"]) for event in events[-2:]] == [
            ("site added", "polaris"),
            ("site added", "lumi"),
        ]
    finally:
        for path in added:
            path.unlink(missing_ok=True)


def test_a_template_that_was_changed_is_left_alone(campaign: Campaign) -> None:
    template, added = campaign.place / "templates" / "slurm.sh", campaign.place / "sites" / "lumi.toml"
    template.write_text(template.read_text() + "# mine\n")
    try:
        assert flctl("site", "add", "lumi", at=campaign.place).returncode == 0
        assert template.read_text().endswith("# mine\n")
    finally:
        added.unlink(missing_ok=True)


def test_adding_never_overwrites_and_adds_all_or_none(campaign: Campaign) -> None:
    mine = campaign.place / "sites" / "lumi.toml"
    mine.write_text((ROOT / "sites" / "lumi.toml").read_text().replace('user = ""', 'user = "me"'))
    text = mine.read_text()
    try:
        ran = flctl("site", "add", "polaris", "lumi", at=campaign.place)
        assert ran.returncode == 3
        assert "has a site 'lumi' already" in ran.stderr
        assert mine.read_text() == text
        assert not (campaign.place / "sites" / "polaris.toml").exists()
    finally:
        mine.unlink()


def test_a_profile_of_ones_own_is_added_by_its_path(campaign: Campaign, tmp_path: Path) -> None:
    own = tmp_path / "home-cluster.toml"
    own.write_text((ROOT / "sites" / "karolina.toml").read_text().replace('name = "karolina"', 'name = "home-cluster"'))
    added = campaign.place / "sites" / "home-cluster.toml"
    try:
        assert flctl("site", "add", str(own), at=campaign.place).returncode == 0
        assert added.read_bytes() == own.read_bytes()
    finally:
        added.unlink(missing_ok=True)


def test_a_profile_that_is_wrong_is_not_added(campaign: Campaign, tmp_path: Path) -> None:
    own = tmp_path / "wrong.toml"
    own.write_text(
        (ROOT / "sites" / "karolina.toml").read_text().replace('name = "karolina"', 'name = "wrong"\nport = 1')
    )
    ran = flctl("site", "add", str(own), at=campaign.place)
    assert ran.returncode == 3
    assert f"{own}: port: unknown key" in ran.stderr
    assert not (campaign.place / "sites" / "wrong.toml").exists()


def test_two_profiles_of_one_name_are_refused(campaign: Campaign, tmp_path: Path) -> None:
    own = tmp_path / "lumi.toml"
    shutil.copy(ROOT / "sites" / "lumi.toml", own)
    ran = flctl("site", "add", "lumi", str(own), at=campaign.place)
    assert ran.returncode == 3
    assert "two profiles of one site" in ran.stderr


def test_the_example_is_no_facility(campaign: Campaign) -> None:
    assert flctl("site", "add", "example", at=campaign.place).returncode == 3
