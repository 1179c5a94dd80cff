"""The documentation is true: every command as it is, every key of every file, no name that leads nowhere."""

import json
import re
import tomllib
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from flctl.campaign.config import Configuration
from flctl.facility.table import keys_of
from flctl.model.rules import RULES, defaults_of
from tests.commands_page import PAGE, page

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("**/*.md"))]


def test_the_commands_are_documented_as_they_are() -> None:
    assert PAGE.read_text() == page(), "run: make docs"


def test_every_key_of_flctl_toml_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    missing = [".".join(key) for key in keys_of(Configuration) if f"`{'.'.join(key)}`" not in text and len(key) > 1]
    assert missing == []


def test_every_default_of_flctl_toml_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    shown = dict(re.findall(r"^\| `(\w+\.\w+)` \| ([^|]*) \|", text, re.MULTILINE))
    for table, kind in get_type_hints(Configuration).items():
        for key in fields(kind) if is_dataclass(kind) else ():
            default = key.default_factory() if key.default_factory is not MISSING else key.default
            if default is not MISSING:
                cell = shown[f"{table}.{key.name}"].strip("` ").replace("none", "{}")
                said = tomllib.loads(f"value = {cell}")["value"]
                assert said == (list(default) if isinstance(default, tuple) else default), (table, key.name)


def test_every_rule_and_every_option_of_it_is_documented_with_its_default() -> None:
    rows = {
        line.split("`")[1]: line
        for line in (ROOT / "docs" / "aggregation.md").read_text().splitlines()
        if "|" in line and "`" in line
    }
    assert rows.keys() >= RULES.keys()
    for name in RULES:
        for option, default in defaults_of(name).items():
            assert f"`{option} = {json.dumps(default)}`" in rows[name], (name, option)


def test_every_option_of_the_trainer_is_documented() -> None:
    source = (ROOT / "flctl" / "payload" / "train.py").read_text()
    table = re.search(r"^OPTIONS: .*?^}", source, re.DOTALL | re.MULTILINE)
    assert table is not None
    names = set(re.findall(r'^ +"(\w+)":', table[0], re.MULTILINE))
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert len(names) > 10
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_command_in_the_text_exists(path: Path) -> None:
    from typer.main import get_command

    from flctl.cli.main import app

    top = get_command(app)
    for words in re.findall(r"`(?:\$ )?flctl ([a-z][a-z ]*)", path.read_text()):
        first, *rest = words.split()
        assert first in top.commands, words  # type: ignore[attr-defined]
        group = getattr(top.commands[first], "commands", None)  # type: ignore[attr-defined]
        assert group is None or not rest or rest[0] in group, words
