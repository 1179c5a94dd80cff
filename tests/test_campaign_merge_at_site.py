"""A merge that a site makes: the same bits as at home, once, whatever fails and whoever is killed; on local sites."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from flctl.campaign import shipped
from flctl.campaign.merge_files import allowed, check_made
from flctl.campaign.workspace import Workspace
from flctl.errors import AggregationRefused
from flctl.model.manifest import hash_folder
from flctl.records import FileEntry, Run, folder_sha256
from tests.campaigns import TRAINER, Campaign, reference

TRAINERS, MERGER = ("brno", "pisa"), "zlin"

SHARDED = """
import json, os, shutil
from pathlib import Path
import numpy
from safetensors.numpy import load_file, save_file

base, out = Path(os.environ["FLCTL_MODEL"]), Path(os.environ["FLCTL_OUT"])
dice = numpy.random.default_rng(int(os.environ["FLCTL_SEED"]))
for path in sorted(base.glob("*.safetensors")):
    tensors = {n: (t + 0.01 * dice.standard_normal(t.shape)).astype(t.dtype) for n, t in load_file(path).items()}
    save_file(tensors, out / path.name, metadata={"format": "pt"})
shutil.copy(base / "model.safetensors.index.json", out)
(out / "metrics.json").write_text(json.dumps({"steps": 4, "samples": int(dice.integers(5, 50)), "tokens": 90}))
"""


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    """One site trains, another merges: the merges change nothing of the training's run numbers and seeds."""
    made = Campaign(tmp_path, sites=("pisa", MERGER))
    aggregate(made, aggregate_at=MERGER)
    return made


def aggregate(campaign: Campaign, **keys: Any) -> None:
    """Lay these keys over [aggregation]."""
    path = campaign.place / "flctl.toml"
    lines = [line for line in path.read_text().splitlines() if line.split(" = ")[0] not in keys]
    start = lines.index("[aggregation]") + 1
    lines[start:start] = [f"{key} = {toml(value)}" for key, value in keys.items()]
    path.write_text("\n".join(lines) + "\n")


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def rounds(campaign: Campaign, number: int = 1, **options: Any) -> dict[str, Any]:
    return campaign.json("round", "--sites", "pisa", "--rounds", str(number), **options)


def model(campaign: Campaign, version: int) -> dict[str, Any]:
    return json.loads((campaign.place / "models" / f"{version:04d}" / "flctl.json").read_text())


def merges_begun(campaign: Campaign) -> int:
    """How often a merge really ran to its end: each job's log tells it once."""
    return sum(log.read_text().count("merged 100 %") for log in campaign.remote(MERGER).glob("runs/*/log"))


def check_is_fedavg(campaign: Campaign, version: int = 1) -> None:
    made = load_file(campaign.place / "models" / f"{version:04d}" / "model.safetensors")
    expected = reference(campaign.place, version)
    assert {name: tensor.tobytes() for name, tensor in made.items()} == {
        name: tensor.tobytes() for name, tensor in expected.items()
    }


def sent(campaign: Campaign, site: str) -> list[str]:
    """What was pushed to a site, but records."""
    paths = [
        e["path"] for e in campaign.journal() if e["event"] == "file" and (e["site"], e["direction"]) == (site, "out")
    ]
    return [path for path in paths if not path.startswith("runs/")]


def demanding(root: Path) -> Campaign:
    """A sharded float16 model with a file of an odd name, three sites, a rule with state, master weights."""
    from flctl.model.tiny import write_tiny_model

    root.mkdir()
    made = Campaign(root, sites=(*TRAINERS, MERGER))
    for folder in (made.place, root / "start"):
        shutil.rmtree(folder)
    write_tiny_model(root / "start", seed=1, dtype="float16", shard_size="100KB")
    (root / "start" / "read 'me'.txt").write_text("what travels with a model")
    paths = ",".join(str(root / f"{name}.toml") for name in made.sites)
    made.flctl("init", str(made.place), "--sites", paths, "--model", str(root / "start"), at=root)
    (root / "trainer.py").write_text(SHARDED)
    for site in TRAINERS:
        made.profile(site, trainer=root / "trainer.py")
    aggregate(made, rule="fedadam", options={"lr": 0.003}, master=True)
    return made


def test_a_rule_with_state_and_master_weights_makes_the_same_models_at_a_site_as_at_home(tmp_path: Path) -> None:
    there, here = demanding(tmp_path / "there"), demanding(tmp_path / "here")
    aggregate(there, aggregate_at=MERGER)
    for campaign in (there, here):
        answer = campaign.json("round", "--sites", ",".join(TRAINERS), "--rounds", "3")
        assert answer["data"]["model"]["version"] == 3
    for version in (1, 2, 3):
        ours, theirs = model(there, version), model(here, version)
        for item in (*ours["contributions"], *theirs["contributions"]):
            assert item.pop("records").keys() == {"run.json", "order.json", "job.sh", "done.json"}
        for key in (
            "sha256",
            "files",
            "state",
            "contributions",
            "rule",
            "options",
            "master",
            "steps",
            "parents",
            "gates",
        ):
            assert ours[key] == theirs[key], (version, key)
        assert (ours["made_by"]["site"], ours["made_by"]["number"]) == (MERGER, version)
        folders = [campaign.place / "models" / f"{version:04d}" for campaign in (there, here)]
        contents = [
            {
                str(p.relative_to(folder)): p.read_bytes()
                for p in folder.rglob("*")
                if p.is_file() and p.name != "flctl.json"
            }
            for folder in folders
        ]
        assert contents[0] == contents[1]
        assert sum("/master/" in f"/{name}" for name in contents[0]) > 1, (
            "the state came back, in shards like the model"
        )
    assert there.json("verify")["data"]["agrees"], "made again at home, with every bit"
    assert [(run["work"], run["stage"]) for run in there.json("status")["data"]["runs"] if run["site"] == MERGER] == [
        ("merge", "fetched")
    ] * 3


def test_what_the_merging_site_contributed_itself_does_not_travel_again(campaign: Campaign) -> None:
    aggregate(campaign, aggregate_at="pisa")
    rounds(campaign, 2)
    check_is_fedavg(campaign, 2)
    assert [path for path in sent(campaign, "pisa") if path.startswith("models/pisa")] == []
    remote = campaign.remote("pisa")
    own, gathered = remote / "runs" / "0001-1" / "out", remote / "models" / "pisa-0001-1"
    assert (gathered / "model.safetensors").stat().st_ino == (own / "model.safetensors").stat().st_ino
    assert [run["work"] for run in campaign.json("status")["data"]["runs"]] == ["train", "merge", "train", "merge"]


def test_only_the_files_that_the_order_makes_come_back(campaign: Campaign) -> None:
    """Whatever else lies in the output; and the zip went there under its hash."""
    tamper(campaign, 'cp "$FLCTL_ORDER" "$FLCTL_OUT/notes.txt"; mkdir "$FLCTL_OUT/state"; echo 1 >"$FLCTL_OUT/state/x"')
    rounds(campaign)
    crossed = [e for e in campaign.journal() if e["event"] == "file" and e["site"] == MERGER]
    inbound = {e["path"].removeprefix("runs/0001-1/") for e in crossed if e["direction"] == "in"}
    assert inbound <= {"out/model.safetensors", "done.json", "job.id", "owner"}
    (archive,) = campaign.remote(MERGER).glob("payload/*/merge.zip")
    assert archive.parent.name == folder_sha256(hash_folder(archive.parent))
    assert not (campaign.place / "models" / "0001" / "state").exists()
    check_is_fedavg(campaign)


def tamper(campaign: Campaign, command: str) -> None:
    """The merging site's Python is a program that lets the merge run and then does something to its output."""
    python = campaign.root / "python"
    python.write_text(f'#!/bin/sh\n{sys.executable} "$@" || exit $?\n{command}\n')
    python.chmod(0o755)
    set_python(campaign, python)


def set_python(campaign: Campaign, python: Path | str) -> None:
    path = campaign.place / "sites" / f"{MERGER}.toml"
    path.write_text(re.sub(r'(?m)^python = ".*"', f'python = "{python}"', path.read_text()))


SPOIL = 'python3 - "$FLCTL_OUT" <<"END"\nimport sys\nfrom pathlib import Path\nout = Path(sys.argv[1])\n{}\nEND'
NAN = 'p = out / "model.safetensors"; p.write_bytes(p.read_bytes()[:-4] + bytes((0, 0, 192, 127)))'
SILENT = 'p = out / "metrics.json"; p.write_bytes(p.read_bytes().replace(b"pisa-0001-1", b"pisa-0001-2"))'


@pytest.mark.parametrize(
    ("change", "words"),
    [('(out / "model.safetensors").unlink()', "no model.safetensors"), (NAN, "NaN"), (SILENT, "counted")],
    ids=["missing", "nan", "silent"],
)
def test_a_merge_that_is_not_what_was_ordered_makes_no_model(campaign: Campaign, change: str, words: str) -> None:
    tamper(campaign, SPOIL.format(change))
    answer = rounds(campaign, code=8)
    (error,) = [error for error in answer["errors"] if error["site"] == MERGER]
    assert words in error["message"]
    assert error["code"] == "aggregation_refused"
    assert campaign.run("pisa")["stage"] == "fetched", "who trained is not to blame"
    assert not list((campaign.place / "models").glob("*0001*"))
    set_python(campaign, sys.executable)
    assert campaign.flctl("retry", MERGER).returncode == 0
    assert rounds(campaign)["data"]["model"]["version"] == 1


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Run]:
    """A merge by a rule with state, as it was fetched."""
    campaign = Campaign(tmp_path_factory.mktemp("merged"), sites=("pisa", MERGER))
    aggregate(campaign, aggregate_at=MERGER, rule="fedavgm")
    rounds(campaign)
    workspace = Workspace(campaign.place)
    return workspace, workspace.run(MERGER, 1)


@pytest.mark.parametrize(
    ("path", "old", "new", "words"),
    [
        ("model.safetensors", b'"pt"', b'"tf"', "does not tell of the tensors"),
        ("state/momentum/model.safetensors", b'"F32"', b'"I32"', "does not tell of the tensors"),
        ("model.safetensors", b"\0", b"\1", "belongs to another model"),
        ("state/state.json", b'"step": 1', b'"step": 7', "step 7"),
        ("state/state.json", b'"rule": "fedavgm"', b'"rule": "diloco"', "of diloco"),
        ("state/state.json", b'"sha256": "', b'"sha256": "0', "names other files"),
        ("state/state.json", b"{", b"", "damaged"),
    ],
)
def test_what_came_back_is_refused_unless_it_is_what_this_merge_makes(
    merged: tuple[Workspace, Run], tmp_path: Path, path: str, old: bytes, new: bytes, words: str
) -> None:
    workspace, run = merged
    folder = tmp_path / "out"
    shutil.copytree(workspace.attempt_folder(run) / "out", folder)
    check_made(workspace, run, folder, hash_folder(folder))
    content = (folder / path).read_bytes()
    place = content.rindex(old)
    (folder / path).write_bytes(content[:place] + new + content[place + len(old) :])
    with pytest.raises(AggregationRefused, match=words) as refused:
        check_made(workspace, run, folder, hash_folder(folder))
    assert refused.value.site == MERGER


def test_only_files_of_the_sizes_that_the_order_gives_them_are_fetched(merged: tuple[Workspace, Run]) -> None:
    workspace, run = merged
    assert run.contribution is not None
    files = tuple(entry for entry in run.contribution.files if entry.path not in ("config.json", "tokenizer.json"))
    more = tuple(
        FileEntry(path=path, size=1, sha256="") for path in ("x", "../y", "state/z", "state/momentum/w", "log")
    )
    names = {"model.safetensors", "state/momentum/model.safetensors", "state/state.json"}
    assert {entry.path for entry in allowed(workspace, run, files + more)} == names
    for entry in files:
        if entry.path in names:
            larger = replace(entry, size=entry.size + (1 << 30))
            with pytest.raises(AggregationRefused, match=f"{larger.size:,} bytes of {entry.path}"):
                allowed(workspace, run, (*(e for e in files if e != entry), larger))


def test_a_python_without_torch_says_so_and_a_retry_completes_the_round(campaign: Campaign) -> None:
    python = campaign.root / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    set_python(campaign, python)
    answer = rounds(campaign, code=6)
    (error,) = answer["errors"]
    assert error["site"] == MERGER
    assert "torch" in error["message"]
    assert "environment.python" in error["message"]
    assert f"flctl retry {MERGER}" in error["hint"]
    shown = campaign.flctl("status").stdout
    assert 'aggregate_at = ""' in shown
    assert rounds(campaign, code=6)["data"]["model"]["version"] == 0, "nothing is tried again without being asked"
    set_python(campaign, sys.executable)
    campaign.flctl("retry", MERGER)
    assert rounds(campaign)["data"]["model"]["version"] == 1
    assert campaign.attempts(MERGER) == ["0001-1", "0001-2"]
    assert campaign.submissions("pisa") == 1
    check_is_fedavg(campaign)


def test_a_contribution_damaged_at_the_site_is_noticed_and_brought_again(campaign: Campaign) -> None:
    """Of the right size, so only its hash tells."""
    set_python(campaign, "/nonexistent")
    rounds(campaign, code=6)
    set_python(campaign, sys.executable)
    weights = campaign.remote(MERGER) / "models" / "pisa-0001-1" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    aggregate(campaign, weights="equal")  # another order, so a first attempt, which trusts names and sizes
    assert rounds(campaign)["data"]["model"]["version"] == 1
    assert "pisa-0001-1 is not the one that was ordered" in campaign.run(MERGER, 2)["past"][0]["reason"]
    assert weights.read_bytes() == good
    assert campaign.attempts(MERGER) == ["0001-1", "0002-1", "0002-2"]


def test_an_own_contribution_that_was_damaged_there_comes_from_home(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    aggregate(campaign, aggregate_at="pisa")
    campaign.profile("brno", seconds=4)
    process = campaign.popen("round")
    campaign.wait(lambda: campaign.run("pisa").get("stage") == "fetched")
    os.truncate(campaign.remote("pisa") / "runs" / "0001-1" / "out" / "model.safetensors", 1000)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    check_is_fedavg(campaign)
    assert "models/pisa-0001-1/model.safetensors" in sent(campaign, "pisa")


STAGES: dict[str, Callable[[Campaign], bool]] = {
    "ordered": lambda c: c.run(MERGER).get("stage") == "ordered",
    "delivering": lambda c: bool(list((c.root / MERGER / "work").glob("*/models/.*.part"))),
    "claimed": lambda c: bool(list((c.root / MERGER / "work").glob("*/runs/0001-1/claim"))),
    "running": lambda c: c.run(MERGER).get("stage") == "running",
    "ended": lambda c: c.run(MERGER).get("stage") == "ended",
    "fetching": lambda c: (c.place / "runs" / MERGER / "0001" / "1" / ".out.part").exists(),
    "fetched": lambda c: c.run(MERGER).get("stage") == "fetched",
    "merging": lambda c: (c.place / "models" / ".0001.draft").exists(),
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_any_stage_a_merge_is_submitted_once_and_made_once(campaign: Campaign, stage: str) -> None:
    process = campaign.popen("round", "--sites", "pisa")
    campaign.wait(lambda: STAGES[stage](campaign) or process.poll() is not None, what=stage)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    if campaign.json("status")["data"]["model"]["version"] == 0:
        assert rounds(campaign)["data"]["model"]["version"] == 1
    assert campaign.attempts(MERGER) == ["0001-1"]
    assert merges_begun(campaign) == 1
    assert [entry["version"] for entry in campaign.journal() if entry["event"] == "model"] == [1]
    check_is_fedavg(campaign)


def test_ticks_alone_make_the_models(campaign: Campaign) -> None:
    campaign.flctl("campaign", "start", "--rounds", "2", "--sites", "pisa")
    campaign.wait(lambda: campaign.json("campaign", "tick")["data"]["done"], limit=120)
    assert campaign.json("status")["data"]["model"]["version"] == 2
    assert merges_begun(campaign) == 2
    check_is_fedavg(campaign, 2)


def test_a_rolled_back_folder_meets_the_merge_it_had_ordered(campaign: Campaign) -> None:
    campaign.flctl("campaign", "start", "--rounds", "1", "--sites", "pisa")
    shutil.copytree(campaign.place, campaign.root / "backup")
    first = campaign.json("round")["data"]["model"]["sha256"]
    shutil.rmtree(campaign.place)
    (campaign.root / "backup").rename(campaign.place)
    assert campaign.json("round")["data"]["model"]["sha256"] == first
    assert merges_begun(campaign) == 1


def test_a_cancelled_merge_is_tried_again_or_made_at_home(campaign: Campaign) -> None:
    slow = campaign.root / "python"
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    set_python(campaign, slow)
    process = campaign.popen("round", "--sites", "pisa")
    campaign.wait(lambda: campaign.run(MERGER).get("stage") == "running")
    assert campaign.flctl("cancel", MERGER).returncode == 0
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 6, text
    assert f"flctl retry {MERGER} merges again" in campaign.run(MERGER)["failure"]["hint"]
    refused = campaign.flctl("skip", MERGER)
    assert refused.returncode == 2, "nobody's contribution is left out by it"
    aggregate(campaign, aggregate_at="")
    assert rounds(campaign, code=None)["data"]["model"]["version"] == 1
    assert "site" not in model(campaign, 1)["made_by"]
    check_is_fedavg(campaign)


def test_another_rule_after_a_failure_is_another_order(campaign: Campaign) -> None:
    set_python(campaign, "/nonexistent")
    rounds(campaign, code=6)
    set_python(campaign, sys.executable)
    aggregate(campaign, rule="fedavgm", options={"momentum": 0.5})
    assert rounds(campaign)["data"]["model"]["version"] == 1
    assert (model(campaign, 1)["rule"], model(campaign, 1)["options"]["momentum"]) == ("fedavgm", 0.5)
    assert campaign.attempts(MERGER) == ["0001-1", "0002-1"]


def test_what_was_fetched_and_then_spoilt_at_home_is_no_model(campaign: Campaign) -> None:
    gate, waiting = campaign.root / "gate", campaign.root / "python"
    waiting.write_text(f'#!/bin/sh\nwhile [ ! -e {gate} ]; do sleep 0.1; done\nexec {sys.executable} "$@"\n')
    waiting.chmod(0o755)
    set_python(campaign, waiting)
    process = campaign.popen("round", "--sites", "pisa")
    campaign.wait(lambda: campaign.run(MERGER).get("stage") == "running", what="the merge")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    gate.touch()
    campaign.wait(lambda: list(campaign.remote(MERGER).glob("runs/*/done.json")), what="the merge's record")
    advance = (
        "from pathlib import Path\nimport tempfile\nimport time\nfrom flctl.campaign.engine import Engine\n"
        "from flctl.campaign.workspace import Workspace\n"
        "engine = Engine(workspace=Workspace(Path.cwd()), runtime=Path(tempfile.mkdtemp()))\n"
        f"while engine.open_runs({MERGER!r}):\n    engine.advance({MERGER!r})\n    time.sleep(0.2)"
    )
    subprocess.run([sys.executable, "-c", advance], cwd=campaign.place, check=True, timeout=60)
    assert campaign.run(MERGER)["stage"] == "fetched"
    weights = campaign.place / "runs" / MERGER / "0001" / "1" / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    answer = rounds(campaign, code=8)
    assert "is not what was fetched" in answer["errors"][0]["message"]
    campaign.flctl("retry", MERGER)
    assert rounds(campaign)["data"]["model"]["version"] == 1
    check_is_fedavg(campaign)


@pytest.mark.parametrize(
    ("key", "table", "words"),
    [
        ({"aggregate_at": "nowhere"}, "", "has no site 'nowhere'; it has: pisa, zlin"),
        ({}, "[privacy]\nclip = 1.0\nnoise_multiplier = 1.0\n", "seed"),
    ],
    ids=["unknown", "private"],
)
def test_a_merge_that_may_not_be_made_there_is_refused_before_anything_begins(
    campaign: Campaign, key: dict[str, Any], table: str, words: str
) -> None:
    aggregate(campaign, **key)
    with (campaign.place / "flctl.toml").open("a") as file:
        file.write(table)
    for command in (("round",), ("campaign", "start", "--rounds", "1"), ("round", "--dry-run")):
        refused = campaign.flctl(*command)
        assert refused.returncode == 3, refused.stdout + refused.stderr
        assert "aggregation.aggregate_at" in refused.stderr
        assert words in refused.stderr
    assert not (campaign.place / "plan.json").exists()


def test_a_template_that_runs_a_program_of_its_own_cannot_merge_and_says_so(campaign: Campaign) -> None:
    template = campaign.place / "templates" / "local.sh"
    good = template.read_text()
    template.write_text(good.replace("{{python}} {{trainer}}", f"{sys.executable} {TRAINER}"))
    (error,) = rounds(campaign, code=3)["errors"]
    assert "local.sh names no {{trainer}}" in error["message"]
    template.write_text(good)
    assert rounds(campaign)["data"]["model"]["version"] == 1


def test_a_contribution_that_a_gate_refuses_goes_to_nobody(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, sites=(*TRAINERS, MERGER))
    aggregate(campaign, aggregate_at=MERGER)
    with (campaign.place / "flctl.toml").open("a") as file:
        file.write('[gates]\ncosine = "refuse"\ncosine_limit = 1.0\n')
    answer = campaign.json("round", code=8)
    assert "is refused" in answer["errors"][0]["message"]
    assert not [run for run in answer["data"]["runs"] if run["work"] == "merge"]
    assert not [path for path in sent(campaign, MERGER) if "-0001-1" in path]


def test_a_dry_run_shows_the_merges_script_too(campaign: Campaign) -> None:
    scripts = campaign.json("round", "--dry-run")["data"]["scripts"]
    assert set(scripts) == {"pisa", MERGER, f"{MERGER}, merge"}
    assert re.search(r"/payload/[0-9a-f]{64}/merge\.zip$", scripts[f"{MERGER}, merge"], re.M)
    assert "trainer.py" not in scripts[f"{MERGER}, merge"]
    assert "merge.zip" not in scripts[MERGER]


# The zip itself


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "merge.zip"
    path.write_bytes(shipped.merger())
    return path


def test_the_same_sources_give_the_same_zip(archive: Path) -> None:
    program = "import sys; from flctl.campaign import shipped; sys.stdout.buffer.write(shipped.merger())"
    again = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env={"TZ": "Asia/Tokyo"})
    assert again.stdout == archive.read_bytes()
    assert len(again.stdout) < 1 << 20


def test_the_zip_holds_what_merging_needs_and_nothing_of_the_campaign(archive: Path) -> None:
    names = zipfile.ZipFile(archive).namelist()
    assert {"__main__.py", "flctl/__init__.py", "flctl/model/merge.py", "flctl/model/rules/__init__.py"} <= set(names)
    assert not [name for name in names if re.search("campaign|cli|facility|policy|payload|tiny", name)]
    program = (
        f"import sys; sys.path.insert(0, {str(archive)!r}); import flctl, flctl.model.remote; print(flctl.__file__)"
    )
    ran = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(str(archive)), "no other flctl takes part"


def ran(archive: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, str(archive)], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_an_old_python_is_told_that_it_is_too_old(archive: Path) -> None:
    """The first file is Python 3.6; here it meets this Python under an old one's name."""
    ast.parse(zipfile.ZipFile(archive).read("__main__.py").decode(), feature_version=(3, 6))
    program = f"import sys, runpy; sys.version_info = (3, 6, 8); runpy.run_path({str(archive)!r}, run_name='__main__')"
    old = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert old.returncode == 1
    assert re.match(r"flctl: error: merging needs Python 3.11 or newer, and \S+ is ", old.stdout)


def test_of_several_processes_of_a_launcher_the_first_merges(archive: Path) -> None:
    for name in ("SLURM_PROCID", "PMI_RANK", "RANK"):
        other = ran(archive, **{name: "1"})
        assert (other.returncode, other.stdout) == (0, "")
    assert "FLCTL_ORDER" in ran(archive, SLURM_PROCID="0").stdout


def test_a_merge_that_has_no_time_left_says_so_and_leaves_nothing(campaign: Campaign) -> None:
    rounds(campaign)
    run = campaign.remote(MERGER) / "runs" / "0001-1"
    again = campaign.root / "again"
    (again / "out").mkdir(parents=True)
    models = run.parent.parent / "models"
    order = json.loads((run / "order.json").read_text())
    late = ran(
        next(run.parent.parent.glob("payload/*/merge.zip")),
        FLCTL_ORDER=str(run / "order.json"),
        FLCTL_SUBJECTS="\n".join(str(models / subject["name"]) for subject in order["subjects"]),
        FLCTL_MODEL=str(models / "0000"),
        FLCTL_OUT=str(again / "out"),
        FLCTL_DEADLINE="1",
    )
    assert late.returncode == 130
    assert late.stdout.splitlines()[-1].startswith("flctl: error: the walltime is nearly over")
    assert [path.name for path in again.rglob("*")] == ["out"]
