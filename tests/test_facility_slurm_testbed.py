"""What only a real Slurm can show: reservations, dependencies, hopeless jobs, its own counts and estimates."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flctl.facility.scheduler import Activity
from flctl.facility.scheduler.slurm import Slurm
from tests.federation import Federation
from tests.testbed import Testbed
from tests.testbed.procs import wait_until
from tests.testbed.slurm import Slurm as Cluster


@pytest.fixture
def bed(testbed: Testbed) -> Iterator[Testbed]:
    testbed.reset()
    yield testbed
    testbed.user.end_processes()


@pytest.fixture
def cluster(bed: Testbed) -> Cluster:
    return bed.facilities["karolina"].slurm


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def of_job(cluster: Cluster, job_id: str, field: str) -> str:
    words = cluster.command("scontrol", "show", "job", job_id).split()
    return next((word.partition("=")[2] for word in words if word.startswith(f"{field}=")), "")


def blocker(cluster: Cluster, script: str) -> str:
    """A job of somebody else's."""
    return cluster.command("sbatch", "--parsable", "--output=/dev/null", "--chdir=/tmp", f"--wrap={script}").strip()


def test_a_reservation_is_used_in_its_window_and_the_ordinary_queue_outside(bed: Testbed, cluster: Cluster) -> None:
    federation, now = Federation(bed, "reserved"), time.time()
    user = bed.facilities["karolina"].account_name
    words = ("ReservationName=flctl", "StartTime=now", "Duration=60", f"Users={user}", "Nodes=ALL")
    cluster.command("scontrol", "create", "reservation", *words)
    try:
        window = {"name": "flctl", "start": moment(now - 60), "end": moment(now + 3500)}
        federation.lay("karolina", scheduler={"reservation": window})
        federation.json("round", "--sites", "karolina")
        assert of_job(cluster, federation.run("karolina")["job"]["id"], "Reservation") == "flctl"
    finally:
        cluster.wait_empty()
        cluster.command("scontrol", "delete", "ReservationName=flctl")
    federation.lay("karolina", scheduler={"reservation": window | {"end": moment(now + 300)}})
    federation.json("round", "--sites", "karolina")
    assert of_job(cluster, federation.run("karolina", 2)["job"]["id"], "Reservation") == ""


def test_a_job_waits_for_the_one_it_depends_on(bed: Testbed, cluster: Cluster, tmp_path: Path) -> None:
    """Then the scheduler's count of its time is kept."""
    go = tmp_path / "go"
    first = blocker(cluster, f"while ! test -e {go}; do sleep 0.2; done")
    federation = Federation(bed, "dependent")
    federation.lay("karolina", shapes={"prod": {"dependency": f"afterok:{first}"}}, train={"seconds": 3})
    process = federation.popen("round", "--sites", "karolina")
    federation.wait(lambda: (federation.run("karolina").get("job") or {}).get("reason") == "Dependency")
    (row,) = federation.json("status")["data"]["runs"]
    assert (row["stage"], row["note"]) == ("queued", "PENDING: Dependency")
    go.touch()
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    job = federation.run("karolina")["job"]
    assert 3 <= job["elapsed"] < 30
    assert of_job(cluster, job["id"], "JobState") == "COMPLETED"


def test_a_job_whose_dependency_failed_can_never_run_and_is_cancelled(bed: Testbed, cluster: Cluster) -> None:
    first = blocker(cluster, "exit 1")
    cluster.wait_state(first, "FAILED")
    federation = Federation(bed, "hopeless")
    federation.lay("karolina", shapes={"prod": {"dependency": f"afterok:{first}"}})
    answer = federation.json("round", "--sites", "karolina", code=6)
    job_id = federation.run("karolina")["job"]["id"]
    (error,) = answer["errors"]
    assert error["message"] == f"the scheduler says that job {job_id} can never run: DependencyNeverSatisfied"
    assert "sites/karolina.toml" in error["hint"] and "flctl retry karolina" in error["hint"]
    assert cluster.wait_state(job_id, "CANCELLED") == "CANCELLED"
    federation.lay("karolina", shapes={"prod": {"dependency": "singleton"}})
    assert federation.flctl("retry", "karolina").returncode == 0
    assert federation.json("round")["data"]["model"]["version"] == 1, "singleton: the only job of its name"


def ask(cluster: Cluster, command: str) -> tuple[int, str, str]:
    """As a user somewhere far away, with habits of his own."""
    habits = {"TZ": "Asia/Tokyo", "SLURM_TIME_FORMAT": "relative", "SINFO_PARTITION": "nothing", "LANG": "C.UTF-8"}
    environment = {"PATH": os.environ["PATH"], **habits, **cluster.environment}
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_the_cluster_answers_what_a_plan_asks(bed: Testbed, cluster: Cluster, tmp_path: Path) -> None:
    slurm, script = Slurm(), tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#SBATCH --time=00:10:00\ntrue\n")
    script.chmod(0o755)
    assert ask(cluster, slurm.version())[1].startswith("slurm")
    queues = {queue.name: queue for queue in slurm.queues_seen(*ask(cluster, slurm.queues() or ""))}
    assert set(queues) == set(cluster.partitions)
    assert (queues["qgpu"].open, queues["qgpu"].max_walltime, queues["qgpu"].max_nodes) == (True, 86400, None)
    assert slurm.accounts_seen(*ask(cluster, slurm.accounts() or "")) == ("root",)
    user = f"user={bed.facilities['karolina'].account_name}"
    accounts = (slurm.accounts() or "").replace('user="$(id -un)"', user)
    assert slurm.accounts_seen(*ask(cluster, accounts)) == ("testbed",)
    without = bed.facilities["leonardo"].slurm
    assert slurm.accounts_seen(*ask(without, slurm.accounts() or "")) is None
    assert slurm.accounted(*ask(without, slurm.accounting(["fa"]) or "")) is None
    start = slurm.estimate(*ask(cluster, slurm.trial(str(script)) or "")).start
    assert start is not None and abs(start - time.time()) < 120
    full = cluster.command(
        *("sbatch", "--parsable", "--output=/dev/null", "--chdir=/tmp", "-n", str(cluster.cpus), "-t", "60"),
        "--wrap=sleep 600",
    ).strip()
    cluster.wait_state(full, "RUNNING")
    later = slurm.estimate(*ask(cluster, slurm.trial(str(script)) or "")).start
    assert later is not None and 3000 < later - time.time() < 3700
    script.write_text("#!/bin/bash\n#SBATCH --nodes=7\ntrue\n")
    assert "node configuration" in slurm.estimate(*ask(cluster, slurm.trial(str(script)) or "")).refusal


def blocked(cluster: Cluster, name: str, *options: str) -> str:
    """A job of root's that is held."""
    words = ("sbatch", "--parsable", "--hold", "--output=/dev/null", "--chdir=/tmp", f"--job-name={name}", *options)
    return cluster.command(*words, "--wrap=true").strip()


def test_no_name_of_another_job_is_taken_for_ours(bed: Testbed, cluster: Cluster) -> None:
    """Names that look like records, and an array around ours, of the same user, in the same queue."""
    slurm, now = Slurm(), int(time.time())
    ours = blocked(cluster, "fours")
    blocked(cluster, f"x\n{ours}|COMPLETED|{now}|{now}|{now}|0:01|None|fours")
    blocked(cluster, "fours,fours|fours")
    blocked(cluster, "fours", "--array=1-3%1")
    seen = slurm.seen(*ask(cluster, slurm.queue(["fours", "fother"])))
    assert {(job.id, job.state, job.name) for job in seen if job.id == ours} == {(ours, "PENDING", "fours")}
    assert {job.name for job in seen} == {"fours"}
    assert [job.id for job in seen if "_" in job.id]
    assert {job.activity for job in seen} == {Activity.WAITING}


def test_a_job_of_the_same_id_before_the_controller_lost_its_state_is_not_ours(bed: Testbed, cluster: Cluster) -> None:
    """Ids start again, accounting keeps both: the name decides."""
    slurm, accounting = Slurm(), cluster.accounting
    assert accounting is not None
    cluster.stop()
    shutil.rmtree(cluster.folder / "state")
    cluster.start(fresh=False)
    first = blocked(cluster, "fbefore")
    row = ("sacct", "-n", "-P", "-X", "-j", first, "--name=fbefore", "--format=State")
    wait_until(lambda: cluster.command(*row).strip(), "its row", every=0.5)  # a faster job's has no name
    cluster.command("scontrol", "release", first)
    wait_until(lambda: cluster.command(*row).strip() == "COMPLETED", "its end in the row", every=0.5)
    cluster.controller.stop()
    cluster.node.stop()
    shutil.rmtree(cluster.folder / "state")
    cluster.start(fresh=False)
    second = blocked(cluster, "fagain")
    assert second == first
    command = slurm.accounting(["fagain"], [second]) or ""
    wait_until(lambda: slurm.accounted(*ask(cluster, command)), "the second one's row", every=0.5)
    (row,) = slurm.accounted(*ask(cluster, command)) or ()
    assert (row.id, row.name, row.state, row.cluster) == (second, "fagain", "PENDING", cluster.name)
    older = slurm.accounting(["fbefore"], [first]) or ""
    (row,) = slurm.accounted(*ask(cluster, older)) or ()
    assert (row.id, row.name, row.state) == (first, "fbefore", "COMPLETED"), "the one of before is there still"
