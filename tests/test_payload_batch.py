"""The local queue: a job is alive as long as its folder's lock is held; no process id is trusted."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

BATCH = Path(__file__).parent.parent / "flctl" / "payload" / "batch.py"


class Queue:
    """A folder of runs and the commands on it."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs

    def call(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-I", str(BATCH), *words], capture_output=True, text=True, timeout=60)

    def submit(self, name: str, text: str, walltime: float = 60, warn: float = 1) -> str:
        folder = self.runs / name
        folder.mkdir(parents=True)
        (folder / "job.sh").write_text(text)
        words = ["--name", name, "--walltime", str(walltime), "--warn", str(warn), str(folder / "job.sh")]
        submitted = self.call("submit", *words)
        assert submitted.returncode == 0, submitted.stderr
        return submitted.stdout.strip()

    def states(self) -> dict[str, str]:
        rows = [line.split("|") for line in self.call("list", str(self.runs)).stdout.splitlines()]
        return {row[7]: row[1] for row in rows}

    def wait(self, name: str, state: str, limit: float = 30) -> None:
        deadline = time.monotonic() + limit
        while self.states().get(name) != state:
            assert time.monotonic() < deadline, f"{name} is {self.states().get(name)}, not {state}"
            time.sleep(0.05)

    def wait_for_log(self, name: str, word: str) -> None:
        deadline = time.monotonic() + 20
        log = self.runs / name / "log"
        while not log.exists() or word not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = Queue(tmp_path / "runs")
    yield queue
    for name, state in queue.states().items():
        if state == "RUNNING":
            queue.call("cancel", str(queue.runs), "--name", name)
            queue.wait(name, "CANCELLED")


def test_a_job_runs_detached_and_its_end_is_told(queue: Queue) -> None:
    queue.submit("good", "echo out; echo err >&2; exit 0")
    queue.submit("bad", "exit 3")
    queue.wait("good", "COMPLETED")
    queue.wait("bad", "FAILED")
    assert (queue.runs / "good" / "log").read_text() == "out\nerr\n"


def test_every_row_has_the_eight_fields(queue: Queue) -> None:
    job_id = queue.submit("fields", "sleep 60")
    row = queue.call("list", str(queue.runs)).stdout.strip().split("|")
    assert row[0] == job_id
    assert len(row) == 8
    assert float(row[4]) == pytest.approx(float(row[2]) + 60, abs=1)


def elapsed(queue: Queue) -> str:
    return queue.call("list", str(queue.runs)).stdout.strip().split("|")[5]


def test_the_time_that_a_job_ran_grows_until_it_ends(queue: Queue) -> None:
    queue.submit("timed", "sleep 60")
    while (running := float(elapsed(queue))) < 0.5:
        time.sleep(0.1)
    queue.call("cancel", str(queue.runs), "--name", "timed")
    queue.wait("timed", "CANCELLED")
    ended, then = elapsed(queue), time.monotonic()
    assert float(ended) >= running
    while time.monotonic() < then + 0.2:
        assert elapsed(queue) == ended


def test_a_job_whose_end_nobody_wrote_down_has_no_time(queue: Queue) -> None:
    """Lost, or of a batch.py that did not write it."""
    queue.submit("older", "exit 0")
    queue.wait("older", "COMPLETED")
    path = queue.runs / "older" / "job.card"
    card = json.loads(path.read_text())
    del card["ended"]
    path.write_text(json.dumps(card))
    assert elapsed(queue) == ""


def test_a_job_outlives_the_process_group_that_submitted_it(queue: Queue, tmp_path: Path) -> None:
    folder = queue.runs / "tough"
    folder.mkdir(parents=True)
    (folder / "job.sh").write_text("sleep 1; echo survived")
    line = f"{sys.executable} -I {BATCH} submit --name tough --walltime 60 {folder}/job.sh; echo submitted; sleep 60"
    shell = subprocess.Popen(["sh", "-c", line], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert shell.stdout is not None
    shell.stdout.readline()
    shell.stdout.readline()
    os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()
    queue.wait_for_log("tough", "survived")
    queue.wait("tough", "COMPLETED")


def test_a_job_killed_whole_is_lost_and_one_whose_supervisor_died_still_runs(queue: Queue) -> None:
    queue.submit("killed", "sleep 60")
    group = int(queue.call("list", str(queue.runs)).stdout.split("|")[0].split(".")[1])
    os.kill(group, signal.SIGKILL)
    time.sleep(0.2)
    assert queue.states()["killed"] == "RUNNING", "the job's own processes hold the lock"
    os.killpg(group, signal.SIGKILL)
    queue.wait("killed", "LOST")


def test_a_folder_takes_one_job(queue: Queue) -> None:
    queue.submit("one", "sleep 60")
    again = queue.call("submit", "--name", "one", "--walltime", "9", str(queue.runs / "one" / "job.sh"))
    assert again.returncode == 1
    assert "already" in again.stderr


def test_the_walltime_warns_the_script_then_ends_the_job(queue: Queue) -> None:
    script = "trap 'echo warned' USR1; trap 'echo ended; exit 1' TERM; sleep 60 & while :; do wait; done"
    queue.submit("long", script, walltime=2, warn=1)
    queue.wait("long", "TIMEOUT")
    assert (queue.runs / "long" / "log").read_text().split() == ["warned", "ended"]


def test_cancel_ends_the_named_job_only(queue: Queue) -> None:
    queue.submit("a", "sleep 60")
    queue.submit("b", "sleep 60")
    queue.call("cancel", str(queue.runs), "--name", "a")
    queue.wait("a", "CANCELLED")
    assert queue.states()["b"] == "RUNNING"


def test_a_job_that_ignores_term_is_killed_in_the_end(queue: Queue) -> None:
    queue.submit("deaf", "trap '' TERM; echo ready; sleep 60")
    queue.wait_for_log("deaf", "ready")
    queue.call("cancel", str(queue.runs), "--name", "deaf")
    queue.wait("deaf", "CANCELLED")


def test_somebody_else_who_looks_at_the_same_moment_is_no_job(queue: Queue) -> None:
    queue.submit("dead", "kill -9 0")
    queue.wait("dead", "LOST")
    with (queue.runs / "dead" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert queue.states() == {"dead": "LOST"}
        assert queue.call("cancel", str(queue.runs), "--name", "dead").returncode == 0
        assert not (queue.runs / "dead" / "cancelled").exists()
