"""A sample of the row "submit cuts", and what would happen without the claim."""

from collections.abc import Mapping
from typing import Any

import pytest

from flctl.campaign.session import Session
from flctl.facility.shell import Answer
from tests.chaos import submit_cuts


def test_a_submission_that_is_cut_is_found_again_and_never_repeated() -> None:
    result = submit_cuts.run(seed=1, trials=5)
    assert (result.trials, result.failures) == (5, 0), result.notes


def test_without_the_claim_the_same_cuts_submit_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row can fail: it counts in the controller's list, not in flctl's words."""
    asked = Session.ask

    def unclaimed(self: Session, commands: Mapping[str, str], **options: Any) -> dict[str, Answer]:
        claim = "mkdir claim || { test -d claim && exit 0; exit 47; }"
        assert "submit" not in commands or claim in commands["submit"]
        return asked(self, {name: text.replace(claim, "mkdir -p claim") for name, text in commands.items()}, **options)

    monkeypatch.setattr(Session, "ask", unclaimed)
    monkeypatch.setattr(submit_cuts, "KINDS", ("slow-after",))
    monkeypatch.setattr(submit_cuts, "RECOVERY", 10.0)
    result = submit_cuts.run(seed=1, trials=8)
    assert any(note.startswith("2 jobs") for note in result.notes), result.notes
