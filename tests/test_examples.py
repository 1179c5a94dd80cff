"""The published experiments' scaled-down forms run: on real Slurm (FLaS), behind PBS (DOE), and with `flctl partition`
(APPFL); the full-scale files are ones that flctl takes."""

import json
import random
import re
from pathlib import Path

import pytest

from examples.doe import scaled as doe
from examples.doe import tasks
from examples.running import LocalCampaign, report, scores
from tests.pbs_double import PbsServer

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_doe_runs_behind_pbs_and_without_a_scheduler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One round: every group's site trains and evaluates; the merged model knows more of every group than the start."""
    with PbsServer(tmp_path / "pbs", name="alcf") as pbs:
        asked = doe.options(["--rounds", "1", "--steps", "3", "--records", "60"])
        place = doe.on_this_machine(pbs, tmp_path, asked)
        assert len(pbs.jobs()) == 4, "two trainings, two evaluations"
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 2 + 4
    for site in doe.SITES:
        seen = scores(place, site, 1)
        assert seen["0001"]["perplexity"] < seen["base"]["perplexity"]
        assert f"{seen['0001']['perplexity']:.2f}" in rows[3]
    for path in place.rglob("*"):
        assert path.suffix not in (".jsonl", ".txt") or path.name == "journal.jsonl", "no text came home"


def test_the_chemistry_follows_from_its_rules() -> None:
    assert [len(group) for group in tasks.GROUPS.values()] == [4, 6, 2, 2]
    known = {"CCO": ("C2H6O", 46.07), "CC(=O)O": ("C2H4O2", 60.05), "CCCl": ("C2H5Cl", 64.51), "CN": ("CH5N", 31.06)}
    for smiles, (formula, mass) in known.items():
        assert tasks.formula(smiles) == formula
        assert tasks.mass(smiles) == pytest.approx(mass, abs=0.01)
    dice = random.Random(1)
    for _ in range(50):
        question, answer = tasks.GROUPS["reactions"]["forward_synthesis"](dice)
        start = question.split()[2]
        assert tasks.atoms(answer)["C"] == tasks.atoms(start)["C"] and tasks.kind(answer) == "an acid"


def test_the_same_seed_writes_the_same_tasks(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tasks.write_group("properties", tmp_path / name, seed=seed, records=20)
    texts = [(tmp_path / name).read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    assert {json.loads(line)["task"] for line in texts[0].splitlines()} == set(tasks.GROUPS["properties"])


def test_a_table_goes_between_the_marks_of_a_readme(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- written by the run -->\nold\n<!-- end -->\nafter\n")
    report(readme, ["new"])
    assert readme.read_text() == "before\n<!-- written by the run -->\n\nnew\n\n<!-- end -->\nafter\n"


def test_a_command_that_fails_is_told_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 3"):
        LocalCampaign(tmp_path).flctl("round")


@pytest.mark.parametrize("name", ["appfl", "flas", "doe"])
def test_every_readme_has_a_table_that_its_run_wrote(name: str) -> None:
    text = (EXAMPLES / name / "README.md").read_text()
    (table,) = re.findall(r"<!-- written by the run -->(.*?)<!-- end -->", text, re.DOTALL)
    assert len(re.findall(r"^\| .*\d+\.\d\d", table, re.MULTILINE)) >= 4
