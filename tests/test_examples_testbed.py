"""FLaS scaled down on two real Slurm clusters behind real sshds, with the manual pages of Debian."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.flas import scaled
from examples.running import scores
from tests.testbed import Testbed


@pytest.fixture
def bed(testbed: Testbed) -> Iterator[Testbed]:
    testbed.reset()
    yield testbed
    testbed.user.end_processes()


def test_flas_runs_on_two_slurm_clusters(bed: Testbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: set(facility.slurm.jobs()) for name, facility in bed.facilities.items()}
    asked = scaled.options(["--rounds", "2", "--steps", "4", "--width", "64", "--layers", "2"])
    place = scaled.on_testbed(bed, tmp_path, asked)
    for name, facility in bed.facilities.items():
        assert len(set(facility.slurm.jobs()) - before[name]) == 4, "two trainings, two evaluations"
        assert scores(place, name, 2)["0002"]["perplexity"] < scores(place, name, 1)["base"]["perplexity"]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        "start",
        "global, round 1",
        "global, round 2",
        "leonardo's own, round 2",
        "karolina's own, round 2",
    ]
