"""The full-scale files of the examples are such as flctl and its trainer take, and agree with the shipped profiles."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from flctl.campaign.settings import Settings
from flctl.facility.profile import load_site

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PROFILES = sorted(EXAMPLES.glob("*/sites/*.toml"))
SETTINGS = sorted(EXAMPLES.glob("*/*.toml"))


def test_there_are_three_examples() -> None:
    assert [path.parent.name for path in SETTINGS] == ["appfl", "appfl", "doe", "doe", "flas", "flas"]
    assert len(PROFILES) == 10


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_a_profile_is_the_shipped_one_but_for_its_shapes(path: Path) -> None:
    site = load_site(path)
    assert site.name == path.stem
    shipped = ROOT / "sites" / path.name
    if shipped.exists():
        theirs = load_site(shipped)
        same = {"shapes": theirs.shapes, "scheduler": dataclasses.replace(site.scheduler, shape=theirs.scheduler.shape)}
        assert dataclasses.replace(site, **same) == theirs


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: f"{path.parts[-2]}-{path.stem}")
def test_settings_are_known_to_flctl_and_to_the_trainer(path: Path) -> None:
    Settings(path)
    source = (ROOT / "flctl" / "payload" / "train.py").read_text()
    table = re.search(r"^OPTIONS: .*?^}", source, re.DOTALL | re.MULTILINE)
    assert table is not None
    known = set(re.findall(r'^ +"(\w+)":', table[0], re.MULTILINE))
    assert set(tomllib.loads(path.read_text())["train"]) <= known


@pytest.mark.parametrize("name", ["flas", "doe"])
def test_the_global_batch_is_whole_at_every_site(name: str) -> None:
    train = tomllib.loads((EXAMPLES / name / "flctl.toml").read_text())["train"]
    for path in (EXAMPLES / name / "sites").glob("*.toml"):
        shape = load_site(path).shape
        assert train["batch"] % (shape.nodes * shape.ranks * train["micro_batch"]) == 0, path.stem
