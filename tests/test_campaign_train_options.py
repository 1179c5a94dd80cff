"""What [train] may say is known when a plan is made, by train.py's own table."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flctl.campaign import train_options
from tests.campaigns import Campaign

TRAINER = Path(__file__).parents[1] / "flctl" / "payload" / "train.py"
VALUES = (
    0,
    1,
    -1,
    2,
    0.5,
    1.5,
    -0.1,
    1e9,
    True,
    False,
    "",
    "x",
    "adamw",
    "full",
    "text",
    "auto",
    "4bit",
    "cosine",
    None,
    [],
)


@pytest.fixture(scope="module")
def trainer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_of_options", TRAINER)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_table_is_the_trainers_own(trainer: ModuleType) -> None:
    assert dict(train_options.known()) == trainer.OPTIONS
    assert train_options.known()["lr"][1] == (0.0, math.inf)


@pytest.mark.parametrize("name", sorted(train_options.known()))
def test_a_plan_refuses_the_values_that_the_trainer_refuses(trainer: ModuleType, name: str) -> None:
    for value in VALUES:
        if name in ("scaffold", "dp_noise_multiplier") and not train_options.unfit(name, value):
            continue  # refused for another option's sake: see below
        try:
            trainer.read_options({name: value})
            refused = ""
        except trainer.Refused as reason:
            refused = str(reason)
        assert bool(train_options.unfit(name, value)) == bool(refused), (name, value, refused)


@pytest.mark.parametrize(
    ("given", "processes", "words"),
    [
        ({"scaffold": True}, 1, "SGD"),
        ({"scaffold": True, "optimizer": "sgd"}, 1, ""),
        ({"dp_noise_multiplier": 1.0, "mu": 0.1}, 1, "goes with neither"),
        ({"dp_noise_multiplier": 1.0}, 2, "for one process, and a job there has 2"),
        ({"dp_noise_multiplier": 1.0}, 1, ""),
        ({"batch": 6}, 4, "which the 4 processes of a job there cannot share evenly"),
        ({"batch": 8}, 4, ""),
        ({"quantize": "4bit"}, 1, "trains a whole model"),
    ],
)
def test_options_that_do_not_go_together_are_found(given: dict[str, Any], processes: int, words: str) -> None:
    reason = train_options.clash(given, processes, frozen=False)
    assert words in reason if words else not reason


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('sharding = "fulll"', "train.sharding is 'fulll', and should be one of: auto, none, full, hybrid"),
        ('mu = "x"', "train.mu is 'x', and should be a number"),
        ("micro_batch = -1", "train.micro_batch is -1, and should be at least 0"),
        ("steps = 7", "all sites make as many steps: say it in [train] of flctl.toml"),
        ("scaffold = true", "pisa: train.scaffold corrects the steps of SGD"),
    ],
)
def test_flctl_plan_refuses_them_with_the_file_and_what_is_right(tmp_path: Path, line: str, words: str) -> None:
    campaign = Campaign(tmp_path, ("pisa",))
    profile = campaign.place / "sites" / "pisa.toml"
    text = profile.read_text()
    (before, _, after) = text.partition("[train]")
    kept = [other for other in after.splitlines() if not other.startswith(("command", "behave"))]
    profile.write_text("\n".join([before.replace("trainer = ", "# trainer = "), "[train]", line, *kept]))
    ran = campaign.flctl("round", "--dry-run")
    assert (ran.returncode, words in ran.stderr) == (3, True), ran.stderr
