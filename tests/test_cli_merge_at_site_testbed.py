"""The merge as a Slurm job of one of two real facilities, ordered, fetched and checked by an unprivileged user."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.federation import SITES, Federation
from tests.testbed import Testbed


@pytest.fixture
def bed(testbed: Testbed) -> Iterator[Testbed]:
    testbed.reset()
    yield testbed
    testbed.user.end_processes()


def merging(bed: Testbed, name: str) -> Federation:
    """karolina merges, with a rule that remembers; both train."""
    federation = Federation(bed, name)
    federation.set('rule = "fedavg"', 'rule = "fedadam"\noptions = { lr = 0.003 }\naggregate_at = "karolina"')
    return federation


def crossed(federation: Federation, site: str, direction: str) -> set[str]:
    entries = [entry for entry in federation.journal() if entry["event"] == "file" and entry["site"] == site]
    return {entry["path"] for entry in entries if entry["direction"] == direction}


def model(federation: Federation, version: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((federation.place / "models" / f"{version:04d}" / "flctl.json").read_text())
    return record


def test_two_rounds_merged_by_slurm_jobs_of_a_site_have_the_bits_of_merges_at_home(bed: Testbed) -> None:
    federation = merging(bed, "merge-at-site")
    before = {site: set(bed.facilities[site].slurm.jobs()) for site in SITES}
    answer = federation.json("round", "--rounds", "2")
    assert (answer["status"], answer["data"]["model"]["version"]) == ("ok", 2)
    works = [(run["site"], run["number"], run["work"]) for run in answer["data"]["runs"]]
    assert [work for work in works if work[0] == "karolina"] == [
        ("karolina", 1, "train"),
        ("karolina", 2, "merge"),
        ("karolina", 3, "train"),
        ("karolina", 4, "merge"),
    ]
    for site in SITES:
        jobs = set(bed.facilities[site].slurm.jobs()) - before[site]
        assert jobs == {run["job_id"] for run in answer["data"]["runs"] if run["site"] == site}
    for version in (1, 2):
        assert federation.json("verify", str(version))["data"]["agrees"], "made again at home, with every bit"
        assert model(federation, version)["made_by"]["site"] == "karolina"
        assert model(federation, version)["state"]["step"] == version
    sent, brought = crossed(federation, "karolina", "out"), crossed(federation, "karolina", "in")
    assert "models/leonardo-0001-1/model.safetensors" in sent
    assert "models/0001-state/momentum/model.safetensors" in sent
    assert not [path for path in sent if path.startswith("models/karolina")], "it has what it made"
    assert {path.removeprefix("runs/0004-1/") for path in brought if path.startswith("runs/0004-1/out/")} == {
        "out/model.safetensors",
        "out/state/momentum/model.safetensors",
        "out/state/variance/model.safetensors",
        "out/state/state.json",
    }
    assert not [path for path in crossed(federation, "leonardo", "out") if "karolina" in path or "state" in path]


def test_killed_while_the_site_merges_a_round_completes_and_the_merge_was_submitted_once(bed: Testbed) -> None:
    federation = merging(bed, "merge-killed")
    slurm = bed.facilities["karolina"].slurm
    before = set(slurm.jobs())
    process = federation.popen("round")
    federation.wait(lambda: any(federation.remote("karolina").glob("runs/0002-1/claim")), what="the merge's claim")
    federation.kill(process)
    bed.reset_codes()
    assert federation.json("round")["data"]["model"]["version"] == 1
    assert len(set(slurm.jobs()) - before) == 2
    log = (federation.remote("karolina") / "runs" / "0002-1" / "log").read_text()
    assert log.count("merged 100 %") == 1
    assert federation.json("verify")["data"]["agrees"]
