"""The demo shows the point of the exercise: what no site could learn alone, the merged model knows."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_the_demo_shows_that_the_global_model_knows_both_languages(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "flctl.cli.main", "demo", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )
    assert ran.returncode == 0, ran.stderr
    from flctl.campaign.demonstration import matrix
    from flctl.campaign.workspace import Workspace

    workspace = Workspace(tmp_path / "demo" / "campaign")
    last, first = matrix(workspace, 3), matrix(workspace, 1)
    for site, other in (("italy", "czechia"), ("czechia", "italy")):
        final = last[site]["global 0003"]
        assert final < last[site][f"{other}'s own"], "the other site's own model knows less of this language"
        assert final < first[site]["global 0000"]
        assert f"{final:.2f}" in ran.stdout
    assert "DOES NOT" not in ran.stdout
    assert str(workspace.root) in ran.stdout
    for entry in (json.loads(line) for line in (workspace.root / "journal.jsonl").read_text().splitlines()):
        assert entry["event"] != "file" or not entry["path"].endswith(".txt"), "models travel, text does not"
