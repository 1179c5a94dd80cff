"""A whole campaign in which reading a pickle is fatal: rounds, gates, merges and an evaluation need none."""

import os
import subprocess
import sys
from pathlib import Path

from tests.campaigns import Campaign

POISON = """
import _pickle, marshal, pickle, sys

class Poisoned:
    def __init__(self, *arguments, **options):
        raise SystemExit("a pickle was read")

    load = __init__  # dill, which torch imports where it is, looks at it

def poisoned(*arguments, **options):
    raise SystemExit("a pickle was read")

for module in (pickle, _pickle):
    module.Unpickler, module.load, module.loads = Poisoned, poisoned, poisoned
pickle._Unpickler = Poisoned
marshal.load = poisoned  # marshal.loads is Python's own way to read its compiled modules
"""


def run(campaign: Campaign, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(POISON)
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": f"{folder}:{Path(__file__).parent.parent}"},
        cwd=campaign.place,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


def test_a_campaign_unpickles_nothing(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    for words in (("round", "--rounds", "2"), ("verify",), ("status",)):
        done = run(campaign, tmp_path / "poison", "-m", "flctl.cli.main", *words)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (campaign.place / "models" / "0002").is_dir()


def test_the_poison_works(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    for words in ("import pickle; pickle.loads(pickle.dumps(1))", "import pickle, io; pickle.Unpickler(io.BytesIO())"):
        done = run(campaign, tmp_path / "poison", "-c", words)
        assert done.returncode == 1 and "a pickle was read" in done.stderr
