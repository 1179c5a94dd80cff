"""A campaign's folder that somebody else made: its names, records, links and templates order nothing."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flctl.campaign.creation import create
from flctl.campaign.steps.deliver import read_template
from flctl.campaign.steps.fetch import carry
from flctl.campaign.workspace import Workspace, read_record, write_json
from flctl.cli.main import app
from flctl.errors import ConfigurationError, FlctlError
from flctl.facility import hostkeys
from flctl.facility.hostkeys import HostKey
from flctl.facility.openssh import Place
from tests.campaigns import PROFILE, make_model

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m"
SECRET = "a secret that no site may see"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    make_model(tmp_path / "start")
    profile = PROFILE.format(
        name="pisa", home=tmp_path / "pisa", python="python3", trainer="/t", walltime="00:10:00", train=""
    )
    create(tmp_path / "camp", profiles={"pisa": profile}, model=tmp_path / "start")
    (tmp_path / "secret").write_text(SECRET)
    yield tmp_path / "camp"


def said(place: Path, *words: str) -> str:
    ran = CliRunner().invoke(app, ["-C", str(place), *words])
    return ran.output + (str(ran.exception) if isinstance(ran.exception, FlctlError) else "")


BAD = ("../../x", "a/b", "a\\u001b[2J", "a b", "a*", "x" * 200)


@pytest.mark.parametrize(
    ("key", "value"), [*((key, bad) for key in ("name", "id") for bad in BAD), ("name", ".."), ("name", "-a")]
)
def test_a_campaign_of_no_plain_name_is_refused(place: Path, key: str, value: str) -> None:
    toml = place / "flctl.toml"
    toml.write_text(re.sub(rf'(?m)^{key} = "[^"]*"', lambda _: f'{key} = "{value}"', toml.read_text()))
    with pytest.raises(ConfigurationError, match="cannot be called"):
        Workspace(place)


def test_names_and_words_of_others_are_no_orders_to_the_terminal(place: Path) -> None:
    plan = {"sites": [f"pisa{ESCAPES}"], "first": 1, "target": 2, "steps": 1, "min_sites": 0}
    (place / "plan.json").write_text(json.dumps(plan))
    model = json.loads((place / "models" / "0000" / "flctl.json").read_text()) | {"gates": {"warnings": [ESCAPES]}}
    write_json(place / "models" / "0000" / "flctl.json", model)
    heard = said(place, "status")
    (place / "runs" / f"x{ESCAPES}" / "0001").mkdir(parents=True)
    (place / "runs" / f"x{ESCAPES}" / "0001" / "run.json").write_text("{}")
    with (place / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps({"event": "file", "direction": "in", "site": ESCAPES, "path": ESCAPES, "size": 1}))
        journal.write('\n[1]\n"x"\n5\n' + "[" * 100_000 + "\n")
    heard += "".join(said(place, *words) for words in (("status",), ("audit",), ("verify",), ("site", "list")))
    assert "models 0001 to 0002" in heard and "0001/run.json" in heard
    assert not re.search("[\x1b\x07\x9b]", heard)


def test_a_profile_of_no_plain_name_is_refused(place: Path) -> None:
    (place / "sites" / f"x{ESCAPES}.toml").write_text("schema = 1\n")
    heard = said(place, "status")
    assert "is no name of a site's profile" in heard and not re.search("[\x1b\x07\x9b]", heard)


def test_what_an_editor_leaves_beside_a_profile_is_none(place: Path) -> None:
    (place / "sites" / ".#pisa.toml").symlink_to("me@host.4242")
    assert list(Workspace(place).profiles) == ["pisa"]


def test_a_record_that_is_nested_without_end_is_damaged(place: Path) -> None:
    (place / "plan.json").write_text("[" * 200_000)
    with pytest.raises(ConfigurationError, match="is damaged"):
        read_record(place / "plan.json")


def test_a_driver_of_no_time_is_said(place: Path) -> None:
    for since in ("1e300", "NaN", "-1e300"):
        (place / "driver.json").write_text(f'{{"host": "{"0" * 64}", "name": "n", "since": {since}}}')
        assert "internal" not in said(place, "gc", "--dry-run")


def test_a_link_is_no_template(place: Path) -> None:
    template = place / "templates" / "slurm.sh"
    template.unlink()
    template.symlink_to(place.parent / "secret")
    with pytest.raises(ConfigurationError, match="symbolic link"):
        read_template(place / "templates", "slurm")


def test_what_a_link_in_a_model_leads_to_is_not_carried_on(place: Path) -> None:
    model, out = place / "models" / "0000", place / "out"
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(place.parent / "secret")
    out.mkdir()
    with pytest.raises(ConfigurationError, match="a link"):
        carry(model, out)
    assert list(out.iterdir()) == []


def test_a_link_is_no_known_hosts(place: Path) -> None:
    known = place / "known_hosts"
    known.unlink()
    known.symlink_to(place.parent / "secret")
    with pytest.raises(ConfigurationError, match="symbolic link"):
        hostkeys.record(known, Place(host="h", port=22, user="u"), [HostKey(kind="ssh-ed25519", blob=b"x")])
    assert (place.parent / "secret").read_text() == SECRET
