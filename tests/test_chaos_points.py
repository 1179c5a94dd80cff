"""The fault points: each name that is in the source is passed by a campaign, and a point kills where it is told to."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaigns import Campaign
from tests.federation import Federation
from tests.testbed import Testbed

ROOT = Path(__file__).resolve().parents[1]


def names() -> Iterator[str]:
    """The name of every fault point in the source."""
    for path in sorted((ROOT / "flctl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "faults.point":
                name = node.args[0]
                assert isinstance(name, ast.Constant) and isinstance(name.value, str), f"{path}: a name is a literal"
                yield name.value


def passed(log: Path) -> set[str]:
    return {line.split(" ")[0] for line in log.read_text().splitlines()} if log.exists() else set()


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLCTL_FAULT_LOG", str(tmp_path / "points"))
    return tmp_path / "points"


def test_every_fault_point_is_passed_by_a_campaign(tmp_path: Path, log: Path, testbed: Testbed) -> None:
    rolled_back(Campaign(folder(tmp_path, "a"), sites=("pisa",)))
    mended(Campaign(folder(tmp_path, "b")))
    merged_at_a_site(Campaign(folder(tmp_path, "c")))
    logged_in(testbed)
    found = passed(log) | passed(testbed.user.home / "points.log")
    assert sorted(set(names()) - found) == []


def folder(root: Path, name: str) -> Path:
    (root / name).mkdir()
    return root / name


def rolled_back(campaign: Campaign) -> None:
    """A round, the folder put back to before it, the same again; more, until the best version is gone back to; then
    old models and runs collected."""
    campaign.flctl("campaign", "start", "--rounds", "1")
    shutil.copytree(campaign.place, campaign.root / "backup")
    assert campaign.json("round")["data"]["done"]
    shutil.rmtree(campaign.place)
    (campaign.root / "backup").rename(campaign.place)
    assert campaign.json("round")["data"]["done"]
    campaign.profile("pisa", losses=[2.0, 2.0, 3.0])
    campaign.set("patience = 0", "patience = 1")
    campaign.set("roll_back = false", "roll_back = true")
    assert campaign.json("round", "--rounds", "3")["data"]["done"]
    assert campaign.flctl("gc", "--keep", "1").returncode == 0


def mended(campaign: Campaign) -> None:
    """A job that dies, one that fails and is tried again, a site without a road, one left out, a plan ended."""
    campaign.profile("pisa", behave="hang")
    campaign.flctl("campaign", "start", "--rounds", "1")
    campaign.flctl("campaign", "tick")
    campaign.wait(lambda: (campaign.remote("pisa") / "runs" / "0001-1" / "out").exists())
    campaign.profile("pisa", behave="fail")
    campaign.kill_job("pisa")
    campaign.flctl("round")
    path = campaign.place / "sites" / "pisa.toml"
    good = path.read_text()
    assert campaign.flctl("retry", "pisa").returncode == 0
    path.write_text(good.replace("/work", "/$NOWHERE"))
    campaign.flctl("campaign", "tick")
    path.write_text(good)
    assert campaign.flctl("release", "pisa").returncode == 0
    campaign.flctl("round")
    assert campaign.flctl("skip", "pisa").returncode == 0
    assert campaign.json("round")["data"]["done"]
    campaign.profile("pisa", behave="hang")
    campaign.flctl("campaign", "start", "--rounds", "1")
    campaign.flctl("campaign", "tick")
    assert campaign.flctl("cancel").returncode == 0


def merged_at_a_site(campaign: Campaign) -> None:
    campaign.set("[aggregation]", '[aggregation]\naggregate_at = "brno"')
    assert campaign.json("round")["data"]["done"]


def logged_in(bed: Testbed) -> None:
    """A site with codes and an interval between logins: a tick after the login comes too early, and so does one at the
    end of a code's time step."""
    bed.reset()
    points = bed.user.home / "points.log"
    leonardo = {"login": {"interval": 600}, "poll": {"login_every": 1}, "train": {"seconds": 60}}
    federation = Federation(bed, "points", leonardo=leonardo)
    federation.flctl("campaign", "start", "--rounds", "1", "--sites", "leonardo")

    def too_early() -> bool:
        federation.flctl("campaign", "tick", env={"FLCTL_FAULT_LOG": str(points)})
        return passed(points) >= {"postponed", "logged-in"}

    federation.wait(too_early)


KILLED = "from flctl import faults\nfor n in range(5): faults.point('here', str(n)); print(n, flush=True)"


@pytest.mark.parametrize(
    ("fault", "reached"), [("here", 0), ("here:3", 2), ("here 4", 4), ("*:2", 1), ("elsewhere;here 1:1", 1), ("", 5)]
)
def test_a_point_kills_at_the_pass_that_is_asked_for(tmp_path: Path, fault: str, reached: int) -> None:
    environment = {**os.environ, "FLCTL_FAULT": fault, "FLCTL_FAULT_LOG": str(tmp_path / "log")}
    ran = subprocess.run([sys.executable, "-c", KILLED], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == (0 if reached == 5 else -9)
    assert ran.stdout.split() == [str(n) for n in range(reached)]
    assert len((tmp_path / "log").read_text().splitlines()) == min(5, reached + 1)
