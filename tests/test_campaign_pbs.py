"""Whole rounds with a site whose batch system is PBS (the double, which really runs the jobs) beside another one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.campaigns import TRAINER, Campaign, reference
from tests.pbs_double import PbsServer

PROFILE = """\
schema = 1
name = "pisa"
connection = "local"

[scheduler]
kind = "pbs"
account = "proj"
queue = "workq"
filesystems = "home:eagle"
accounting = {accounting}
shape = "small"

[shapes.small]
cpus = {cpus}
walltime = "{walltime}"

[storage]
work = "{home}/work"
data = "{home}/data"

[environment]
python = "{python}"
seal_python = "{python}"

[poll]
every = 1
absence = 1
claim_window = 3

[train]
command = "{trainer}"
{train}
"""


class PbsCampaign(Campaign):
    """brno has no batch system, pisa has PBS."""

    pbs: PbsServer

    def pisa(
        self,
        *,
        walltime: str = "00:10:00",
        cpus: int = 1,
        accounting: bool = True,
        trainer: Path = TRAINER,
        **train: Any,
    ) -> None:
        home = self.root / "pisa"
        text = PROFILE.format(
            home=home,
            python=sys.executable,
            trainer=trainer,
            walltime=walltime,
            cpus=cpus,
            accounting=json.dumps(accounting),
            train="\n".join(f"{key} = {json.dumps(value)}" for key, value in train.items()),
        )
        (self.place / "sites" / "pisa.toml").write_text(text)

    def job(self) -> str:
        """pisa's newest job."""
        return max(self.pbs.jobs(), key=lambda job_id: int(job_id.partition(".")[0]))

    def log(self) -> str:
        logs = sorted((self.root / "pisa").glob("work/*/runs/*/log"))
        return logs[-1].read_text() if logs else ""


@pytest.fixture
def campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PbsCampaign]:
    with PbsServer(tmp_path / "pbs", kill_delay=5, name="vm.site.eu") as pbs:
        monkeypatch.setenv("PATH", pbs.env()["PATH"])
        campaign = PbsCampaign(tmp_path / "a b")
        campaign.pbs = pbs
        campaign.pisa()
        yield campaign


def test_two_rounds_make_the_models_that_numpy_makes(campaign: PbsCampaign) -> None:
    campaign.pisa(samples=30)
    answer = campaign.json("round", "--sites", "brno", "pisa", "--rounds", "2")
    assert (answer["status"], answer["data"]["model"]["version"]) == ("ok", 2)
    for version in (1, 2):
        made = load_file(campaign.place / "models" / f"{version:04d}" / "model.safetensors")
        expected = reference(campaign.place, version)
        assert made.keys() == expected.keys()
        assert all(tensor.tobytes() == expected[name].tobytes() for name, tensor in made.items())
    runs = [run for run in answer["data"]["runs"] if run["site"] == "pisa"]
    assert [(run["number"], run["stage"], run["job_id"], run["samples"]) for run in runs] == [
        (1, "fetched", "1.vm.site.eu", 30),
        (2, "fetched", "2.vm.site.eu", 30),
    ]
    assert campaign.pbs.jobs() == {"1.vm.site.eu": "F", "2.vm.site.eu": "F"}
    assert {campaign.pbs.exit_status(job) for job in campaign.pbs.jobs()} == {0}
    assert campaign.submissions("pisa") == 2


def test_what_the_job_asked_for_and_where_its_words_went(campaign: PbsCampaign) -> None:
    campaign.json("round")
    told = campaign.pbs.attributes(campaign.job())
    assert told["Account_Name"] == "proj"
    assert told["Rerunable"] == "False" and told["Mail_Points"] == "n" and told["Join_Path"] == "oe"
    assert told["Resource_List"]["select"] == "1:ncpus=1"
    assert told["Resource_List"]["filesystems"] == "home:eagle"
    folder = campaign.remote("pisa") / "runs" / "0001-1"
    assert told["Output_Path"] == f"vm.site.eu:{folder}/pbs.log"
    assert "trainer: begins" in (folder / "log").read_text()
    assert "trainer" not in (folder / "pbs.log").read_text()


def test_the_log_is_readable_while_the_job_runs(campaign: PbsCampaign) -> None:
    """PBS itself brings a job's output only at its end."""
    campaign.pisa(behave="hang")
    process = campaign.popen("round")
    campaign.wait(lambda: campaign.run("pisa").get("stage") == "running", what="a running job")
    campaign.wait(lambda: "trainer: begins" in campaign.flctl("log", "pisa").stdout, what="the log")
    assert not list((campaign.remote("pisa") / "runs").glob("*/pbs.log"))
    assert campaign.run("pisa")["job"]["state"] == "R"
    assert campaign.flctl("cancel", "pisa").returncode == 0
    process.communicate(timeout=60)
    campaign.pbs.wait_state(campaign.job(), "F")
    assert campaign.pbs.exit_status(campaign.job()) == 271


@pytest.mark.parametrize("status", [271, -29])
def test_a_job_over_its_walltime_is_failed_and_not_merged(campaign: PbsCampaign, status: int) -> None:
    """PBS tells it by the status of the job's shell, or by one of its own; without a checkpoint it is for a person."""
    if status < 0:
        campaign.pbs.tell_limit(status)
    campaign.pisa(walltime="00:00:03", behave="hang")
    answer = campaign.json("round", code=6)
    assert "SIGTERM" in answer["errors"][0]["message"]
    assert campaign.run("pisa")["failure"]["cause"] == "time"
    campaign.pbs.wait_state(campaign.job(), "F")
    assert campaign.pbs.exit_status(campaign.job()) == status
    assert not (campaign.place / "models" / "0001").exists()
    campaign.pisa()
    assert campaign.flctl("retry", "pisa").returncode == 0
    assert campaign.json("round")["data"]["model"]["version"] == 1
    assert campaign.attempts("pisa") == ["0001-1", "0001-2"]


ENDS_AT_USR1 = """
import runpy, signal, sys
runpy.run_path({trainer!r})
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(print("warned", flush=True)))
signal.pause()
"""


def test_a_program_is_warned_before_the_walltime_and_what_it_saved_counts(campaign: PbsCampaign) -> None:
    """PBS itself warns nobody."""
    trainer = campaign.root.parent / "trainer.py"
    trainer.write_text(ENDS_AT_USR1.format(trainer=str(TRAINER)))
    campaign.pisa(walltime="00:00:25", trainer=trainer)  # warned a tenth of it before the end
    answer = campaign.json("round")
    assert answer["data"]["model"]["version"] == 1
    assert "warned" in campaign.log()
    assert campaign.pbs.exit_status(campaign.job()) == 0


def test_both_ranks_of_mpiexec_are_warned_and_what_they_saved_counts(campaign: PbsCampaign) -> None:
    """One of them knows SIGUSR1 only, the other the file only."""
    campaign.pisa(trainer=TRAINER.parent / "rank.py", cpus=2)
    profile = campaign.place / "sites" / "pisa.toml"
    launch = 'launch = "mpiexec --oversubscribe --allow-run-as-root -n $FLCTL_RANKS"'
    text = profile.read_text().replace("cpus = 2", "cpus = 2\nranks = 2")
    profile.write_text(text.replace("[environment]", f"[environment]\n{launch}"))
    process = campaign.popen("round", "--sites", "pisa")
    campaign.wait(lambda: all(list((campaign.root / "pisa").glob(f"work/*/runs/*/up.{rank}")) for rank in (0, 1)))
    (run,) = (campaign.remote("pisa") / "runs").iterdir()
    os.kill(shell_of(run), signal.SIGUSR1)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0, told
    first, second = (json.loads((run / f"rank.{rank}").read_text()) for rank in (0, 1))
    assert first["ignored"] and second["ignored"] and first["signals"] and not second["signals"] and second["file"]
    assert ":ncpus=2:mpiprocs=2:ompthreads=1" in (run / "job.sh").read_text()


def shell_of(run: Path) -> int:
    """The job script's shell: it started the one that started the program."""
    pid = int((run / "program.pid").read_text())
    for _ in range(2):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid


@pytest.mark.parametrize("history", [True, False])
def test_a_job_killed_outright_is_not_merged(campaign: PbsCampaign, history: bool) -> None:
    """Its own shell's SIGKILL is for a person; where PBS says nothing at all, it is lost, and tried again."""
    campaign.pbs.keep_history(history)
    campaign.pisa(behave="hang")
    process = campaign.popen("round")
    campaign.wait(lambda: campaign.run("pisa").get("stage") == "running", what="a running job")
    campaign.pisa()
    campaign.pbs.kill(campaign.job())
    text, _ = process.communicate(timeout=120)
    message = " ".join(text.split())
    assert "ended without a record" in message
    assert ("exit status 265, SIGKILL" in message) is history
    assert process.returncode == (6 if history else 0), text
    assert campaign.attempts("pisa") == (["0001-1"] if history else ["0001-1", "0001-2"])
    assert (campaign.place / "models" / "0001").exists() is not history


def test_a_job_deleted_by_hand_waits_for_a_person(campaign: PbsCampaign) -> None:
    campaign.pisa(behave="hang")
    process = campaign.popen("round")
    campaign.wait(lambda: "trainer: begins" in campaign.log(), what="the trainer")
    subprocess.run(["qdel", campaign.job()], check=True, timeout=20)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 6
    assert "was cancelled at the site, not by flctl" in " ".join(text.split())
    run = campaign.run("pisa")
    assert (run["stage"], run["failure"]["cause"]) == ("running", "cancelled at the site")
    assert campaign.submissions("pisa") == 1
    campaign.pisa()
    assert campaign.flctl("retry", "pisa").returncode == 0
    assert campaign.json("round")["data"]["model"]["version"] == 1


def test_a_server_that_is_down_changes_nothing_and_the_round_goes_on_after(campaign: PbsCampaign) -> None:
    campaign.pisa(seconds=4)
    process = campaign.popen("round")
    campaign.wait(lambda: campaign.run("pisa").get("stage") in ("queued", "running"), what="a job")
    campaign.pbs.down()
    failed = [*campaign.journal()]
    campaign.wait(lambda: any(entry["event"] == "query failed" for entry in campaign.journal()[len(failed) :]))
    assert campaign.run("pisa")["stage"] in ("queued", "running")
    campaign.pbs.up()
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    assert campaign.attempts("pisa") == ["0001-1"]
    (entry, *_) = [entry for entry in campaign.journal() if entry["event"] == "query failed"]
    assert "errno=15010" in json.dumps(entry)


def test_a_server_that_is_down_at_submission_gets_no_second_job(campaign: PbsCampaign) -> None:
    """Nothing proves that it did not take the job: the claim waits, and a later attempt is the first to start."""
    campaign.pbs.down()
    process = campaign.popen("round")
    campaign.wait(lambda: campaign.run("pisa").get("stage") == "claimed", what="a claim without an id")
    campaign.pbs.up()
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert "never accepted by the scheduler: Connection refused qsub: cannot connect" in " ".join(text.split())
    assert len(campaign.pbs.jobs()) == campaign.submissions("pisa") == 1


def test_without_history_a_round_goes_through(campaign: PbsCampaign) -> None:
    campaign.pbs.keep_history(False)
    campaign.pisa(seconds=2)
    assert campaign.json("round", "--rounds", "2")["data"]["model"]["version"] == 2
    campaign.pisa(accounting=False)
    assert campaign.json("round")["data"]["model"]["version"] == 3
    assert campaign.pbs.jobs() == {}


def test_a_job_that_pbs_forgot_is_lost_and_its_successor_starts_once(campaign: PbsCampaign) -> None:
    """A job that qsub gave an id to and that then is nowhere, as has been seen."""
    campaign.pisa(cpus=64)
    process = campaign.popen("round")
    campaign.wait(lambda: campaign.run("pisa").get("stage") == "queued", what="a queued job")
    campaign.pisa()
    campaign.pbs.forget(campaign.job())
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert "ended before it started" in " ".join(text.split())
    assert campaign.run("pisa")["past"][0]["cause"] == "lost"
    assert campaign.submissions("pisa") == 1


def test_a_job_that_can_never_run_is_failed_in_pbs_words_and_leaves_the_queue(campaign: PbsCampaign) -> None:
    campaign.pisa(cpus=64)
    answer = campaign.json("round", code=6)
    assert "can never run: Insufficient amount of resource: ncpus" in answer["errors"][0]["message"]
    assert list(campaign.pbs.jobs().values()) == ["F"]
    assert campaign.submissions("pisa") == 0


def test_a_job_whose_dependency_is_gone_is_failed_as_one_that_never_started(campaign: PbsCampaign) -> None:
    path = campaign.place / "sites" / "pisa.toml"
    path.write_text(
        path.read_text().replace("[shapes.small]", '[shapes.small]\ndependency = "afterok:99999.vm.site.eu"')
    )
    answer = campaign.json("round", code=6)
    assert "never started; depended on afterok:99999" in answer["errors"][0]["message"]


def test_a_queue_that_does_not_exist_is_told_in_pbs_words(campaign: PbsCampaign) -> None:
    path = campaign.place / "sites" / "pisa.toml"
    path.write_text(path.read_text().replace('queue = "workq"', 'queue = "nosuch"'))
    answer = campaign.json("round", code=6)
    assert "qsub: Unknown queue" in answer["errors"][0]["message"]
    assert campaign.pbs.jobs() == {}
