"""A sample of the row "injection", and that the row sees the bugs it is there for."""

from pathlib import Path
from typing import Any

import pytest

from flctl.facility import script
from tests.chaos import injection


def test_no_string_of_a_sample_escapes() -> None:
    result = injection.run(seed=7, trials=800)
    assert result.failures == 0, "\n".join(result.notes)
    assert result.trials == 800 and result.figures["slots"] > 100
    assert result.figures["accepted and run"] > 30 and result.figures["refused"] > 400


@pytest.mark.parametrize("place", ["/", "//"])
def test_a_work_folder_that_is_the_root_stays_absolute(place: str, tmp_path: Path) -> None:
    """Found by the full aim: it became the login's own folder."""
    trial = injection.Trial(tmp_path)
    slot = next(slot for slot in trial.slots if slot.name == "storage.work")
    assert "#SBATCH --output=/runs/0001-1/log\n" in trial.render(slot, "slurm", place)


def _unquoted(name: str, value: Any) -> str:
    return value if isinstance(value, str) else " ".join(value.words)


@pytest.mark.parametrize(
    ("part", "bug", "slot"),
    [
        ("_in_shell", _unquoted, "storage.data"),
        ("_in_directive", _unquoted, "env:WORK"),
        ("shell_word", lambda text: f'"{text}"', "exports.VALUE"),
    ],
    ids=["values are not quoted", "directives take anything", "words are quoted as a shell does not"],
)
def test_a_planted_bug_is_seen(part: str, bug: Any, slot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, part, bug)
    monkeypatch.setattr(injection, "OPEN", {slot})
    assert injection.run(seed=7, trials=300).failures > 0


def test_every_key_of_a_profile_is_a_slot() -> None:
    names = {slot.name for slot in injection.slots()}
    assert {"name", "login.host", "shapes.prod.extra", "environment.exports", "exports.NAME", "signing.key"} <= names
    assert "environment.activate" not in names
