"""Trainers of one's own: those of examples/trainers in whole campaigns, and what train.command may say."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath

import numpy
import pytest
from safetensors.numpy import load_file

from flctl.campaign.config import CampaignTable, Configuration
from flctl.campaign.corpora import write_corpus
from flctl.campaign.creation import frame
from flctl.campaign.salvage import _fill_in
from flctl.campaign.trainers import trainer_of
from flctl.errors import ConfigurationError
from flctl.facility.profile import Environment, Scheduler, Shape, Site, load_site
from flctl.facility.script import job_script
from tests.campaigns import PROFILE, Campaign, make_model, reference

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "trainers"
SITES = ("brno", "pisa")


class OwnCampaign(Campaign):
    """Two local sites, made with `flctl init --trainer`."""

    def __init__(
        self, root: Path, trainer: Path, model: Path, *, options: str = "", sites: tuple[str, ...] = SITES
    ) -> None:
        self.root, self.place, self.sites = root, root / "camp", sites
        for name, language in zip(sites, ("czech", "italian"), strict=False):
            (root / name / "data").mkdir(parents=True)
            (root / name / "data" / "private.txt").write_text(prose(language, root))
            self.profile(name)
        profiles = [str(root / f"{name}.toml") for name in sites]
        words = ["init", str(self.place), "--model", str(model), "--trainer", str(trainer), "--sites", *profiles]
        made = self.flctl(*words, at=root)
        assert made.returncode == 0, made.stderr
        self.set("steps = 100", f"steps = 4\n{options}")

    def profile(self, name: str, **options: object) -> None:
        text = PROFILE.format(
            name=name, home=self.root / name, python=sys.executable, trainer="", walltime="00:10:00", train=""
        )
        (self.root / f"{name}.toml").write_text(
            text.replace('command = ""\n', "").replace(
                "[environment]\n", '[environment]\nexports = {OMP_NUM_THREADS = "1"}\n'
            )
        )

    def metrics(self, site: str, number: int) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = self.run(site, number)["contribution"]["metrics"]["evaluation"]
        return found


def prose(language: str, folder: Path) -> str:
    """Some thousand letters."""
    write_corpus(language, folder / language, seed=1)
    return "".join(path.read_text() for path in sorted((folder / language).iterdir()))[:6000]


def numpy_start(folder: Path) -> Path:
    subprocess.run([sys.executable, EXAMPLES / "numpy_trainer.py", folder], check=True)
    return folder


def test_two_rounds_of_a_trainer_without_pytorch(tmp_path: Path) -> None:
    """A model that is a single tensor: no config, no tokenizer, nothing of transformers."""
    trainer = EXAMPLES / "numpy_trainer.py"
    camp = OwnCampaign(tmp_path, trainer, numpy_start(tmp_path / "start"))
    camp.set("cross = false", "cross = true")
    (camp.place / "trainer" / "__pycache__").mkdir()
    (camp.place / "trainer" / "__pycache__" / "x.pyc").write_bytes(b"left at home")
    assert camp.json("round", "--rounds", "2")["exit_code"] == 0
    merged = load_file(camp.place / "models" / "0002" / "model.safetensors")
    assert {name: tensor.tobytes() for name, tensor in merged.items()} == {
        name: tensor.tobytes() for name, tensor in reference(camp.place, 2).items()
    }
    for site in SITES:
        first, second, last = camp.metrics(site, 1), camp.metrics(site, 3), camp.metrics(site, 4)  # 2, 4 evaluate
        assert first["base"]["perplexity"] == pytest.approx(256)
        assert first["trained"]["loss"] < first["base"]["loss"] and second["trained"]["loss"] < second["base"]["loss"]
        assert second["base"]["loss"] < first["base"]["loss"]
        assert last["0002"]["loss"] < second["base"]["loss"] and len(last) == 2  # and the other site's contribution
        (there,) = (camp.remote(site) / "payload").glob("*/numpy_trainer.py")
        assert there.read_bytes() == trainer.read_bytes()
        assert list(there.parent.iterdir()) == [there]
        script = (camp.remote(site) / "runs" / "0002-1" / "job.sh").read_text()
        assert f"exec   {sys.executable} {there}\n" in script
        gone_out = {e["path"] for e in camp.journal() if e["event"] == "file" and e["site"] == site}
        assert f"payload/{there.parent.name}/numpy_trainer.py" in gone_out


def test_two_rounds_of_the_trainer_of_transformers(tmp_path: Path) -> None:
    make_model(tmp_path / "start")
    options = "lr = 1e-3\nbatch = 4\nlength = 64"
    camp = OwnCampaign(tmp_path, EXAMPLES / "hf_trainer.py", tmp_path / "start", options=options, sites=("pisa",))
    ran = camp.flctl("round", "--rounds", "2", timeout=600)
    assert ran.returncode == 0, ran.stderr
    first, second = (camp.metrics("pisa", number) for number in (1, 2))
    assert first["trained"]["loss"] < first["base"]["loss"]
    assert second["trained"]["loss"] < second["base"]["loss"] == pytest.approx(first["trained"]["loss"])


@pytest.mark.parametrize("warning", ["signal", "file"])
def test_the_trainer_without_pytorch_ends_when_it_is_told(tmp_path: Path, warning: str) -> None:
    (tmp_path / "data.txt").write_text(prose("czech", tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "order.json").write_text(json.dumps({"work": "train", "train": {}}))
    stop = tmp_path / "stop"
    told = {"MODEL": numpy_start(tmp_path / "start"), "OUT": tmp_path / "out", "DATA": tmp_path, "STOP": stop}
    told |= {"ORDER": tmp_path / "order.json", "STEPS": 10**9, "SEED": 2**61, "DEADLINE": int(time.time()) + 3600}
    environment = {**os.environ, **{f"FLCTL_{name}": str(value) for name, value in told.items()}}
    running = subprocess.Popen([sys.executable, EXAMPLES / "numpy_trainer.py"], env=environment)
    if warning == "file":
        stop.touch()
    else:
        while not catches(running.pid, signal.SIGUSR1):
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGUSR1)
    assert running.wait(60) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["steps"] < 10**9 and metrics["evaluation"]["trained"]["loss"] <= numpy.log(256) + 1e-3


def catches(pid: int, number: int) -> bool:
    (mask,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


SHOW = "import json, sys\nprint(json.dumps(sys.argv[1:]))\n"
REFUSED = (
    *("; touch X", "$(touch X)", "`touch X`", "| touch X", "& touch X", "> X", "'; touch X; '", '"; touch X; "'),
    *("\\; touch X", "${x:-$(touch X)}", "* ?", "!!", "$1", "$((1))", "a\u2028b", "a\u00a0b", "a\nb", "\x1b[2J"),
)
LITERAL = ("{a,b}", "~root", "#", "--name=[a]", "(touch X)", "a=b %s ^", "-- -c", "{{token}}", "è,:+@")


def own_site(folder: Path, argument: str) -> Site:
    (folder / "trainer").mkdir()
    (folder / "trainer" / "mine.py").write_text(SHOW)
    (folder / "a.toml").write_text(
        'schema = 1\nname = "a"\nscheduler = {kind = "local", shape = "s"}\n[shapes.s]\n'
        f'[environment]\npython = "{sys.executable}"\n[train]\ncommand = {json.dumps(f"trainer/mine.py {argument}")}\n'
    )
    return load_site(folder / "a.toml")


@pytest.mark.parametrize("odd", REFUSED)
def test_a_command_of_more_than_words_is_refused_at_home(tmp_path: Path, odd: str) -> None:
    with pytest.raises(ConfigurationError, match=r"train(: |\.)command: "):
        own_site(tmp_path, odd)


@pytest.mark.parametrize("odd", [*LITERAL, "$HOME"])
def test_odd_characters_of_a_command_mean_themselves(tmp_path: Path, odd: str) -> None:
    """Variables are the site's; a shell makes nothing of the rest, or of the campaign's place there."""
    trainer = trainer_of(tmp_path, configured(), own_site(tmp_path, odd))
    root = PurePosixPath(tmp_path / "site's $HOME; touch X")
    there = Path(trainer.place(root))
    there.mkdir(parents=True)
    (there / "mine.py").write_text(SHOW)
    site = load_site(tmp_path / "a.toml")
    (line,) = [line for line in script_of(site, trainer.command(root)).splitlines() if line.startswith("  exec ")]
    environment = {"HOME": "/ho me", "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    ran = subprocess.run(["bash", "-c", line, "bash", "first"], cwd=tmp_path, env=environment, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == (["/ho me"] if odd == "$HOME" else odd.split())
    assert not (tmp_path / "X").exists()


def script_of(site: Site, command: tuple[str, ...]) -> str:
    run = PurePosixPath("/work/c/runs/0001-1")
    return job_script(
        site,
        (ROOT / "templates" / "local.sh").read_text(),
        token="f0",
        campaign="c",
        run=run,
        workdir=run.parent.parent,
        payload=run.parent.parent / "payload" / "ab",
        data="/data",
        now=0.0,
        command=command,
    )


def site_with(trainer: str = "", **train: object) -> Site:
    environment = Environment(python="python3.11", trainer=trainer)
    scheduler = Scheduler(kind="local", shape="s")
    return Site(schema=1, name="a", scheduler=scheduler, shapes={"s": Shape()}, environment=environment, train=train)


def configured(**train: object) -> Configuration:
    return Configuration(campaign=CampaignTable(name="c", id="0"), train=train)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("mine.py", "mine.py is a file of"),
        ("python3 mine.py", "write trainer/mine.py"),
        ("other.py", "other.py is no path of the site"),
        ("trainer/other.py", "there is no file"),
        ("bash trainer/../flctl.toml", "there is no file"),
        ("trainer/run.sh", "nothing says what runs trainer/run.sh: write bash trainer/run.sh"),
    ],
)
def test_a_command_that_cannot_run_is_refused_at_home(tmp_path: Path, command: str, words: str) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "flctl.toml").touch()
    for name in ("mine.py", "run.sh"):
        (tmp_path / "trainer" / name).touch()
    with pytest.raises(ConfigurationError) as refused:
        trainer_of(tmp_path, configured(command=command), site_with())
    assert words in refused.value.message and str(tmp_path / "flctl.toml") in refused.value.message


def test_what_is_run(tmp_path: Path) -> None:
    """A site's own command wins, also an empty one; profiles of flctl 0.1 are read as they were."""
    (tmp_path / "trainer" / "part").mkdir(parents=True)
    (tmp_path / "trainer" / "part" / "run.sh").write_text("true\n")

    def line(campaign: Configuration, site: Site) -> str:
        text = script_of(site, trainer_of(tmp_path, campaign, site).command(PurePosixPath("/w")))
        return next(line.split("exec", 1)[1].strip() for line in text.splitlines() if line.startswith("  exec "))

    assert line(configured(), site_with()) == "python3.11 /work/c/payload/ab/train.py"
    assert line(configured(command="/opt/a.py -x"), site_with()) == "python3.11 /opt/a.py -x"
    assert line(configured(command="$HOME/bin/go a.py"), site_with()) == '"$HOME/bin/go" a.py'
    assert line(configured(command="/opt/a.py"), site_with(command="julia /b.jl")) == "julia /b.jl"
    assert line(configured(command="/opt/a.py"), site_with(command="")) == "python3.11 /work/c/payload/ab/train.py"
    assert line(configured(), site_with(trainer="/opt/old one")) == "python3.11 '/opt/old one'"
    assert line(configured(), site_with(trainer="/opt/old.py")) == "python3.11 /opt/old.py"
    shipped = line(configured(command="bash trainer/part/run.sh"), site_with())
    assert re.fullmatch(r"bash /w/payload/[0-9a-f]{64}/part/run.sh", shipped)
    (tmp_path / "trainer" / "part" / "run.sh").write_text("false\n")
    assert line(configured(command="bash trainer/part/run.sh"), site_with()) != shipped


def test_only_plain_files_go_to_the_sites(tmp_path: Path) -> None:
    folder = tmp_path / "trainer"
    folder.mkdir()
    (folder / "mine.py").touch()
    (folder / "secret").symlink_to("/etc/shadow")
    with pytest.raises(ConfigurationError, match="no plain file"):
        trainer_of(tmp_path, configured(command="trainer/mine.py"), site_with())
    (folder / "secret").unlink()
    with (folder / "large").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ConfigurationError, match="more than 64 MiB"):
        trainer_of(tmp_path, configured(command="trainer/mine.py"), site_with())


def test_a_site_cannot_say_what_a_rebuilt_campaign_runs(tmp_path: Path) -> None:
    """What `flctl adopt` reads in orders was written at the sites; what runs at all of them is not for one to say."""
    text = PROFILE.format(name="brno", home="/h", python="python3", trainer="", walltime="00:10:00", train="")
    workspace = frame(tmp_path / "camp", name="c", id_="0a1b2c3d", profiles={"brno": text}, seed=0)
    order = {"work": "train", "round": 1, "steps": 3, "train": {"command": "/bin/evil", "lr": 0.5}}
    _fill_in(workspace, [("brno", order)])
    written = (workspace.root / "flctl.toml").read_text()
    assert "lr = 0.5" in written and "evil" not in written
