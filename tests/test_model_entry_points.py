"""A rule of a user's own package: installed by pip, found by its name, merged with like any other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flctl.errors import ConfigurationError
from flctl.model.rules import RULES, find_rule
from tests.checkpoints import read_weights, write_weights

PACKAGE = Path(__file__).parent / "data" / "rule_package"

MERGE = """
import json, sys
from pathlib import Path
from flctl.model.merge import Recipe, Source, merge
from flctl.model.state import read_state
root, options = Path(sys.argv[1]), json.loads(sys.argv[2])
for version in (1, 2):
    base = root / str(version - 1)
    sources = [Source(site=site, number=version, folder=root / site, weight=1) for site in "ab"]
    recipe = Recipe(rule="lion", options=options)
    merge(base, sources, root / str(version), recipe=recipe, state=read_state(base / "state"))
"""

LOOK = "import sys; from flctl.model.rules import find_rule; find_rule(sys.argv[1])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip put the package."""
    root = tmp_path_factory.mktemp("lion")
    shutil.copytree(PACKAGE, root / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(root / "site")]
    subprocess.run([*command, *options, str(root / "source")], check=True)
    return root / "site"


def python(program: str, *words: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True)


def test_a_package_of_the_users_adds_a_rule_with_options_and_state(installed: Path, tmp_path: Path) -> None:
    w, updates = np.array([1.0, -2.0, 0.5]), np.array([[0.5, -0.1, 0.0], [-0.1, -0.3, 0.0]])
    write_weights(tmp_path / "0", {"w": ("F64", w)})
    for site, update in zip("ab", updates, strict=True):
        write_weights(tmp_path / site, {"w": ("F64", w + update)})
    done = python(MERGE, str(tmp_path), json.dumps({"lr": 0.25}), path=installed)
    assert done.returncode == 0, done.stderr
    momentum = np.zeros(3)
    for version in ("1", "2"):
        delta = np.mean([read_weights(tmp_path / site)["w"][1] for site in "ab"], axis=0) - w
        w = w + 0.25 * np.sign(0.9 * momentum + 0.1 * delta)
        momentum = 0.99 * momentum + 0.01 * delta
        assert read_weights(tmp_path / version)["w"][1] == pytest.approx(w, rel=0, abs=1e-12)
        kept = read_weights(tmp_path / version / "state" / "momentum")["w"][1]
        assert kept == pytest.approx(momentum, rel=0, abs=1e-12)
    record = json.loads((tmp_path / "2" / "state" / "state.json").read_text())
    assert (record["rule"], record["step"]) == ("lion", 2)


def test_an_option_that_the_users_rule_lacks_is_named(installed: Path, tmp_path: Path) -> None:
    write_weights(tmp_path / "0", {"w": ("F64", np.zeros(1))})
    done = python(MERGE, str(tmp_path), json.dumps({"beta": 1}), path=installed)
    assert "the rule lion has no option 'beta'; did you mean beta" in done.stderr


def test_rules_are_found_without_torch(installed: Path) -> None:
    program = "import sys; from flctl.model.rules import find_rule; print(*map(find_rule, sys.argv[1:]), sep='\\n')"
    done = python(f"{program}; print('torch' in sys.modules)", "lion", *RULES, path=installed)
    assert done.stdout.count("Rule(step=") == len(RULES) + 1
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("lino", "did you mean lion?"),
        ("FedAdm", "did you mean fedadam?"),
        ("tremmed_mean", "did you mean trimmed_mean?"),
    ],
)
def test_an_unknown_rule_is_told_its_nearest_neighbour(name: str, advice: str, installed: Path) -> None:
    done = python(LOOK, name, path=installed)
    assert f"ConfigurationError: no aggregation rule is called {name!r}; {advice}" in done.stderr


def test_an_unknown_rule_near_to_none_is_told_all() -> None:
    with pytest.raises(ConfigurationError, match=r"'zzz'; there are: .*fedadagrad, fedadam, .*median.*trimmed_mean"):
        find_rule("zzz")


def test_a_registered_rule_that_is_none_or_cannot_be_loaded_is_refused(installed: Path, tmp_path: Path) -> None:
    """The files that pip writes, by hand: a second package with three entries, one of them of the first's name."""
    information = tmp_path / "other-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (information / "entry_points.txt").write_text(
        "[flctl.rules]\nlion = other:lion\nnumber = other:number\nbroken = other_broken:rule\n"
    )
    (tmp_path / "other.py").write_text("lion = number = 5\n")
    (tmp_path / "other_broken.py").write_text("1 / 0\n")
    both = Path(f"{installed}{os.pathsep}{tmp_path}")
    errors = {name: python(LOOK, name, path=both).stderr for name in ("number", "broken", "lion")}
    assert "the rule 'number' of other:number is no flctl.model.rules.Rule" in errors["number"]
    assert "the rule 'broken' of other_broken:rule cannot be loaded: division by zero" in errors["broken"]
    assert "the rule 'lion' is registered by flctl_lion:LION and by other:lion; one must go" in errors["lion"]
