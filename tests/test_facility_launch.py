"""How a job's program is started N times: what each scheduler is asked for, what launchers get, what is refused."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from flctl.errors import ConfigurationError
from flctl.facility.launch import rank_lines
from flctl.facility.profile import Environment, Scheduler, Shape, Site, load_site
from flctl.facility.script import job_script
from tests.campaigns import Campaign

TEMPLATES = Path(__file__).parent.parent / "templates"
NODES = Shape(nodes=4, ranks=4, gpus=4, cpus=32, walltime=3600)


def site(kind: str = "slurm", launch: str = "srun", shape: Shape = NODES) -> Site:
    scheduler = Scheduler(kind=kind)  # type: ignore[arg-type]
    return Site(
        schema=1, name="here", scheduler=scheduler, shapes={"prod": shape}, environment=Environment(launch=launch)
    )


def script(site: Site) -> str:
    root = PurePosixPath("/w")
    template = (TEMPLATES / f"{site.scheduler.kind}.sh").read_text(encoding="utf-8")
    places = {"run": root / "r", "workdir": root, "payload": root / "p"}
    return job_script(site, template, token="f", campaign="c", data="/d", now=0.0, **places)


def exported(site: Site, name: str) -> str:
    text = "\n".join([*rank_lines(site), f'printf %s "${name}"'])
    return subprocess.run(["bash", "-c", text], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True).stdout


def test_slurm_is_asked_for_the_ranks_and_their_share_of_the_cpus() -> None:
    lines = script(site()).splitlines()
    asked = {"--nodes=4", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8"}
    assert {f"#SBATCH {option}" for option in asked} <= set(lines)


def test_pbs_is_asked_for_the_ranks_in_its_select_statement() -> None:
    assert "#PBS -l select=4:ncpus=32:ngpus=4:mpiprocs=4:ompthreads=8" in script(site("pbs", "mpiexec -n 16"))
    one = replace(NODES, nodes=1, ranks=1)
    assert "#PBS -l select=1:ncpus=32:ngpus=4\n" in script(site("pbs", "", one))


@pytest.mark.parametrize(
    ("name", "value"),
    [("FLCTL_RANKS", "16"), ("FLCTL_NODES", "4"), ("FLCTL_RANKS_PER_NODE", "4"), ("OMP_NUM_THREADS", "8")],
)
def test_launchers_are_told_how_many(name: str, value: str) -> None:
    assert exported(site(), name) == value


@pytest.mark.parametrize(
    ("made", "cpus"),
    [
        (site(), "8"),
        (site(launch="srun --ntasks=4 /opt/bin/torchrun --no-python"), "32"),
        (site(shape=replace(NODES, cpus=0)), ""),
        (site("pbs"), ""),
    ],
    ids=["a rank's", "the node's for torchrun", "unknown", "no Slurm"],
)
def test_srun_gets_the_cpus_that_it_no_longer_takes_from_the_job(made: Site, cpus: str) -> None:
    assert exported(made, "SRUN_CPUS_PER_TASK") == cpus


def test_one_process_is_started_as_it_is() -> None:
    text = script(site("local", "", Shape()))
    assert "\n  exec   python3 /w/p/train.py\n" in text
    assert "OMP_NUM_THREADS" not in text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[shapes.prod]\nranks = 4\n", "environment.launch: must say what starts the 4 processes of shapes.prod"),
        ("[shapes.prod]\nnodes = 2\n", "environment.launch: must say what starts the 2 processes of shapes.prod"),
        ("[shapes.prod]\nranks = 4\ncpus = 30\n", "shapes.prod.cpus: 30 per node cannot be shared evenly by ranks = 4"),
        ('[shapes.prod]\n[environment]\nlaunch = "torchrun"\n', "environment.launch: torchrun needs --no-python"),
        ('[shapes.prod]\nextra = ["--ntasks-per-node=4"]\n', "--ntasks-per-node is set by the job template"),
        ("[shapes.prod]\nranks = 0\n", "shapes.prod.ranks"),
    ],
)
def test_what_could_not_start_its_ranks_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "here.toml"
    path.write_text(f'schema = 1\nname = "here"\nconnection = "local"\n[scheduler]\nkind = "slurm"\n{text}')
    with pytest.raises(ConfigurationError) as caught:
        load_site(path)
    assert problem in str(caught.value)


def test_a_trainer_of_the_users_own_may_start_its_ranks_itself(tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    text = '[scheduler]\nkind = "slurm"\n[shapes.prod]\nranks = 4\n[environment]\ntrainer = "/mine.sh"\n'
    path.write_text(f'schema = 1\nname = "here"\nconnection = "local"\n{text}')
    assert load_site(path).shape.ranks == 4


def test_a_template_from_before_ranks_is_refused_where_there_are_several(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, ("pisa",))
    profile, template = campaign.place / "sites" / "pisa.toml", campaign.place / "templates" / "slurm.sh"
    text = profile.read_text().replace('kind = "local"', 'kind = "slurm"')
    text = text.replace("[shapes.small]", "[shapes.small]\nranks = 2")
    profile.write_text(text.replace("[environment]", '[environment]\nlaunch = "srun"'))
    template.write_text(template.read_text().replace("{{ranks}}", "1"))
    ran = campaign.flctl("round", "--wait", "20s")
    assert "asks for other processes than ranks = 2 of sites/pisa.toml" in ran.stderr
    assert "--ntasks-per-node={{ranks}}" in ran.stderr
    assert campaign.run("pisa")["stage"] == "ordered"
