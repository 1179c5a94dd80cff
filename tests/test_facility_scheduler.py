"""Schedulers as text: every implementation through the same cases, every odd line seen on a real machine in a table.

tests/data/slurm holds what a real Slurm 22.05 answered: command, stdout, stderr, exit status."""

import os
import re
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from flctl.facility.profile import Environment, Scheduler, Shape, Site
from flctl.facility.scheduler import Activity, QueryFailed, Seen, local, scheduler_of, slurm
from flctl.facility.scheduler import Scheduler as AnyScheduler

DATA = Path(__file__).parent / "data" / "slurm"
PAYLOAD = "/work dir/c-1234/payload/ab"
TOKEN = "fa1b2c3d4e5f6g7"
NOW = 1_795_250_190.0


def site(kind: str, *, accounting: bool = True) -> Site:
    return Site(
        schema=1,
        name="here",
        scheduler=Scheduler(kind=kind, accounting=accounting),  # type: ignore[arg-type]
        shapes={"prod": Shape(walltime=600)},
        environment=Environment(seal_python="/opt/py 3/python3"),
    )


def scheduler(kind: str) -> AnyScheduler:
    return scheduler_of(site(kind), PAYLOAD)


@dataclass(frozen=True)
class Capture:
    command: str
    stdout: str
    stderr: str
    status: int


def capture(name: str) -> Capture:
    text = (DATA / f"{name}.txt").read_text(encoding="utf-8")
    match = re.fullmatch(r"\$ (.*?)\n--- stdout\n(.*)--- stderr\n(.*)--- exit (\d+)\n", text, re.DOTALL)
    assert match, name
    return Capture(match[1], match[2], match[3], int(match[4]))


# ---- one contract for all ----

EVERY = pytest.mark.parametrize("kind", ["slurm", "local", "pbs"])


@EVERY
def test_a_submission_is_one_simple_command_that_names_token_and_script(kind: str) -> None:
    """Its output is redirected by the caller, so it may be no list of commands."""
    command = scheduler(kind).submit("/work dir/it's/job.sh", TOKEN)
    words = shlex.split(command, posix=True)
    assert words[-1] == "/work dir/it's/job.sh"
    assert sum(TOKEN in word for word in words) == 1
    assert not re.search(r"[;&|<>\n]", command)


@EVERY
def test_every_command_is_posix_shell(kind: str) -> None:
    one = scheduler(kind)
    commands = [one.submit("/a b/job.sh", TOKEN), one.queue(), one.cancel(TOKEN, "17"), one.accounting([TOKEN, "fz"])]
    for command in filter(None, commands):
        framed = f"x=$( {{ {command}\n}} 2>&1 >&3 </dev/null ); y=$?"
        assert subprocess.run(["dash", "-n", "-c", framed], check=False).returncode == 0, command


@EVERY
def test_cancelling_is_by_name_and_never_by_an_id_that_may_be_anothers(kind: str) -> None:
    assert scheduler(kind).cancel(TOKEN, "4242") == scheduler(kind).cancel(TOKEN, None)
    assert TOKEN in scheduler(kind).cancel(TOKEN, None)


ROW = "{id}|{state}|1795250190|{start}|{end}|{elapsed}|{reason}|{name}\n"
IDS = {"slurm": ("1000", "1001"), "local": ("1795250190.17", "1795250190.18"), "pbs": ("1000.vm", "1001.vm.site.eu")}
LETTERS = {"RUNNING": "R", "COMPLETED": "F", "FAILED": "F", "TIMEOUT": "F", "CANCELLED": "F"}
"""PBS has letters for states, and one for all ends."""


def rows(kind: str, *jobs: dict[str, str]) -> str:
    blank = {"start": "N/A", "end": "N/A", "elapsed": "7", "reason": "None", "name": TOKEN, "state": "RUNNING"}
    blank |= {"id": IDS[kind][0]}
    return "".join((block if kind == "pbs" else ROW.format)(**(blank | job)) for job in jobs)


def block(**job: str) -> str:
    """The same job as PBS lists it."""
    state = LETTERS.get(job["state"], job["state"])
    lines = [f"Job Id: {job['id']}", f"    Job_Name = {job['name']}", f"    job_state = {state}"]
    lines += ["    ctime = " + time.asctime(time.gmtime(NOW)), f"    resources_used.walltime = {job['elapsed']}"]
    if job["start"] != "N/A":
        lines += [f"    Resource_List.walltime = {int(job['end']) - int(job['start'])}"]
        lines += ["    stime = " + time.asctime(time.gmtime(int(job["start"])))]
    return "\n".join(lines) + "\n\n"


@EVERY
def test_an_empty_listing_is_an_answer(kind: str) -> None:
    assert scheduler(kind).seen(0, "", "") == ()


@EVERY
def test_a_listing_gives_name_state_and_times(kind: str) -> None:
    text = rows(kind, {"start": "1795250200", "end": "1795250800"})
    assert scheduler(kind).seen(0, text, "") == (
        Seen(
            id=IDS[kind][0],
            name=TOKEN,
            state="R" if kind == "pbs" else "RUNNING",
            activity=Activity.ACTIVE,
            submitted_at=NOW,
            started_at=NOW + 10,
            expected_end=NOW + 610,
            elapsed=7,
        ),
    )


@EVERY
@pytest.mark.parametrize("status", [1, 2, 127, 255, -1])
def test_a_query_that_failed_is_never_an_empty_listing(kind: str, status: int) -> None:
    with pytest.raises(QueryFailed):
        scheduler(kind).seen(status, "", "words of the site")
    with pytest.raises(QueryFailed):
        scheduler(kind).seen(status, rows(kind, {}), "")


@EVERY
@pytest.mark.parametrize(
    "text",
    [
        "Welcome to the machine!\n",
        "17|RUNNING|17952\n",
        "17|RUNNING\n",
        "17||1|2|3|4|None|x\n",
        "17|RUNNING|1|2|3|None|x\n",
        "\x1b[31mJOBID|STATE\n",
        "{}\n",
        "squeue: error: something\n",
    ],
)
def test_text_that_is_no_listing_is_a_failed_query(kind: str, text: str) -> None:
    with pytest.raises(QueryFailed):
        scheduler(kind).seen(0, text, "")


@EVERY
@pytest.mark.parametrize("name", ["a|b", "|", "", "x|COMPLETED|1|2|3|4|None|y", "a\nb", "$(id)", "č", "\x1b[2J"])
def test_a_job_of_any_name_leaves_the_others_readable(kind: str, name: str) -> None:
    first, second = IDS[kind]
    seen = scheduler(kind).seen(0, rows(kind, {"name": name}, {"id": second}), "")
    assert [(job.id, job.name) for job in seen] == [(first, name), (second, TOKEN)]


@EVERY
@pytest.mark.parametrize("word", ["SHINY_NEW_STATE", "running?", "C0MPLETED", "COMPLETED_MAYBE"])
def test_a_state_that_nobody_knows_is_active(kind: str, word: str) -> None:
    (job,) = scheduler(kind).seen(0, rows(kind, {"state": word}), "")
    assert (job.state, job.activity) == (word.upper(), Activity.ACTIVE)


@EVERY
@pytest.mark.parametrize("word", ["COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"])
def test_common_ends_are_ends(kind: str, word: str) -> None:
    (job,) = scheduler(kind).seen(0, rows(kind, {"state": word, "end": "1795250800"}), "")
    assert (job.activity, job.expected_end) == (Activity.ENDED, None)


@EVERY
@pytest.mark.parametrize("text", ["", "N/A", "Submitted job 17", "-1", "17 18", "$(id)", "17\n18", "17;18;19", "١٧"])
def test_what_is_no_id_is_no_id(kind: str, text: str) -> None:
    assert scheduler(kind).job_id(text) is None


@EVERY
@pytest.mark.parametrize("text", ["", "ssh: connection reset", "Killed", "Terminated", "warning: something"])
def test_when_in_doubt_nothing_was_refused(kind: str, text: str) -> None:
    assert scheduler(kind).refusal(text) is None


# ---- Slurm ----


@pytest.mark.parametrize("text", ["1000\n", "1000;leonardo\n", "Dear user,\n1000\n"])
def test_the_id_is_what_parsable_prints(text: str) -> None:
    assert scheduler("slurm").job_id(text) == "1000"
    assert scheduler("slurm").job_id(capture("sbatch_ok").stdout) == "1013"


STATES = {
    Activity.WAITING: """PENDING CONFIGURING POWER_UP_NODE EXPEDITING REQUEUED REQUEUE_FED REQUEUE_HOLD SPECIAL_EXIT
        RESV_DEL_HOLD""",
    Activity.ACTIVE: "RUNNING COMPLETING SUSPENDED STOPPED SIGNALING RESIZING STAGE_OUT UPDATE_DB REVOKED",
    Activity.ENDED: """COMPLETED FAILED TIMEOUT DEADLINE OUT_OF_MEMORY CANCELLED PREEMPTED NODE_FAIL BOOT_FAIL
        LAUNCH_FAILED RECONFIG_FAIL""",
}


WORDS = [(activity, word) for activity, words in STATES.items() for word in words.split()]


@pytest.mark.parametrize(("activity", "word"), WORDS)
def test_every_state_that_slurm_documents_has_a_meaning(activity: Activity, word: str) -> None:
    assert word in slurm.STATES[activity]
    (job,) = scheduler("slurm").seen(0, rows("slurm", {"state": word}), "")
    assert job.activity == activity


def test_every_state_has_one_meaning() -> None:
    words = [word for words in slurm.STATES.values() for word in words]
    assert len(words) == len(set(words)) == len(WORDS)


REFUSED = {
    "sbatch_partition": "Invalid partition name specified",
    "sbatch_time": "Invalid --time specification",
    "sbatch_nodes": "not a valid node count",
    "sbatch_option": "unrecognized option",
    "sbatch_gres": "Invalid generic resource",
    "sbatch_no_file": "Unable to open file",
    "sbatch_no_script": "does not look like a batch script",
    "sbatch_dos": "DOS line breaks",
    "sbatch_reservation": "Requested reservation is invalid",
    "sbatch_memory": "Requested node configuration is not available",
    "sbatch_feature": "Invalid feature specification",
    "sbatch_not_found": "command not found",
}


@pytest.mark.parametrize(("name", "words"), REFUSED.items())
def test_a_refusal_of_a_real_sbatch_is_told_in_its_words(name: str, words: str) -> None:
    answer = capture(name)
    assert answer.status != 0
    assert scheduler("slurm").job_id(answer.stdout) is None
    assert words in (scheduler("slurm").refusal(answer.stderr) or "")


FAILED = "sbatch: error: Batch job submission failed: "


@pytest.mark.parametrize(
    "words",  # of slurm_errno.c
    [
        "Invalid account or account/partition combination specified",
        "Invalid qos specification",
        "Requested time limit is invalid (missing or exceeds some limit)",
        "Requested node configuration is not available",
        "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
        "User's group not permitted to use this partition",
        "Access/permission denied",
        "Node count specification invalid",
        "More processors requested than permitted",
        "Invalid generic resource (gres) specification",
        "Requested partition configuration not available now",
    ],
)
def test_the_controllers_words_are_a_refusal(words: str) -> None:
    assert scheduler("slurm").refusal(FAILED + words + "\n") == FAILED + words


BUSY = "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying.\n"
POLICY = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


@pytest.mark.parametrize(
    ("text", "refused", "full"),
    [
        (FAILED + POLICY, True, True),
        *(
            (f"sbatch: error: {limit}\n{FAILED}{POLICY}", True, "Submit" in limit)
            for limit in (
                *("AssocMaxSubmitJobLimit", "AssocGrpSubmitJobsLimit", "QOSMaxSubmitJobPerUserLimit"),
                *("QOSMaxSubmitJobPerAccountLimit", "QOSGrpSubmitJobsLimit"),
                *("QOSMaxWallDurationPerJobLimit", "AssocMaxCpuPerJobLimit", "QOSMaxNodePerJobLimit"),
            )
        ),
        (BUSY + FAILED + "Resource temporarily unavailable", True, True),
        (BUSY, False, True),  # cut off while it tried
        (FAILED + "Invalid qos specification", True, False),
        (FAILED + "Socket timed out on send/recv operation", False, False),
    ],
)
def test_a_full_queue_is_told_from_what_will_never_be_taken(text: str, refused: bool, full: bool) -> None:
    slurm = scheduler("slurm")
    assert (slurm.refusal(text) is not None, slurm.full(text)) == (refused, full)


@pytest.mark.parametrize(
    "text",
    [
        capture("sbatch_timed_out").stderr,  # and the job was there when the controller answered again
        capture("sbatch_no_controller").stderr,
        FAILED + "Zero Bytes were transmitted or received\n",
        FAILED + "Transport endpoint is not connected\n",
        FAILED + "Connection reset by peer\n",
        FAILED + "Unexpected message received\n",
        FAILED + "Invalid authentication credential\n",
        FAILED + "Unspecified error\n",
        FAILED + "Something that only a newer Slurm says\n",
        "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying.\n",
        "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying.\n" + FAILED + "Invalid qos\n",
    ],
)
def test_a_lost_answer_is_no_refusal(text: str) -> None:
    assert scheduler("slurm").refusal(text) is None


def test_a_real_listing_is_read_whole() -> None:
    answer = capture("squeue_all")
    seen = {job.id: job for job in scheduler("slurm").seen(answer.status, answer.stdout, answer.stderr)}
    assert len(seen) == 18
    assert seen["1006"].name == "odd|na\nme"
    assert seen["1012_[1-3%1]"].activity == Activity.WAITING
    assert seen["1013"].reason == "JobHeldUser"
    assert (seen["1007"].state, seen["1007"].reason) == ("FAILED", "NonZeroExitCode")
    assert seen["1003"].activity == Activity.ENDED
    waiting, running = seen["1010"], seen["1009"]
    assert (waiting.expected_start, waiting.started_at) == (1_795_274_290, None)
    assert (running.started_at, running.expected_end) == (1_795_273_690, 1_795_274_290)


def test_local_times_are_not_guessed() -> None:
    """Only the site knows its zone; where SLURM_TIME_FORMAT has no effect there are no times, and no wrong ones."""
    answer = capture("squeue_local_time")
    seen = scheduler("slurm").seen(answer.status, answer.stdout, answer.stderr)
    assert len(seen) == 18
    assert all(job.submitted_at is job.started_at is job.expected_end is None for job in seen)


def test_the_listing_asks_for_what_the_capture_answers() -> None:
    asked = scheduler("slurm").queue().replace('"$(id -un)"', "root")
    assert capture("squeue_all").command in asked


@pytest.mark.parametrize("name", ["squeue_no_controller", "squeue_timed_out", "squeue_unknown_user"])
def test_a_real_squeue_that_could_not_answer_is_a_failed_query(name: str) -> None:
    """An unknown user is the worst: nothing on stdout, exit status 0."""
    answer = capture(name)
    with pytest.raises(QueryFailed, match="squeue ended with status"):
        scheduler("slurm").seen(answer.status, answer.stdout, answer.stderr)


def test_a_forgotten_job_is_an_empty_listing() -> None:
    answer = capture("squeue_forgotten")
    assert scheduler("slurm").seen(answer.status, answer.stdout, answer.stderr) == ()


def test_accounting_that_is_disabled_is_no_accounting() -> None:
    answer = capture("sacct_disabled")
    assert scheduler("slurm").accounted(answer.status, answer.stdout, answer.stderr) is None
    assert scheduler_of(site("slurm", accounting=False), PAYLOAD).accounting([TOKEN]) is None


def test_accounting_that_fails_is_a_failed_query() -> None:
    with pytest.raises(QueryFailed):
        scheduler("slurm").accounted(1, "", "sacct: error: slurmdbd: Connection refused")


@pytest.mark.parametrize(
    ("line", "state", "reason"),
    [
        ("17|CANCELLED by 0|1795250190|1795250190|1795250200|10|0:0|karolina|fa", "CANCELLED", "CANCELLED by 0"),
        ("17|CANCELLED+|1795250190|Unknown|1795250200|10|0:0|karolina|fa", "CANCELLED", ""),
        ("17|FAILED|1795250190|1795250190|1795250200|10|0:53|karolina|fa", "FAILED", "0:53"),
        ("17|OUT_OF_MEMORY|1795250190|1795250190|1795250200|10|0:125|karolina|fa", "OUT_OF_MEMORY", "0:125"),
        ("17|TIMEOUT|1795250190|1795250190|1795250200|10|0:0|karolina|fa", "TIMEOUT", ""),
    ],
)
def test_lines_of_sacct_are_read(line: str, state: str, reason: str) -> None:
    (job,) = scheduler("slurm").accounted(0, line + "\n", "") or ()
    assert (job.state, job.reason, job.activity, job.name) == (state, reason, Activity.ENDED, "fa")


# ---- local ----


def test_a_job_that_nobody_holds_any_more_has_ended() -> None:
    (job,) = scheduler("local").seen(0, rows("local", {"state": "LOST"}), "")
    assert job.activity == Activity.ENDED
    assert set(local.STATES) == {"RUNNING", "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "LOST"}


@pytest.mark.parametrize(
    "text",
    [
        "sh: 1: python4: not found",
        "python3: can't open file '/a/batch.py': [Errno 2] No such file or directory",
        "batch.py submit: error: argument --walltime: invalid float value: 'x'",
    ],
)
def test_a_program_that_could_not_run_refused_the_job(text: str) -> None:
    assert scheduler("local").refusal(text + "\n") == text


def test_a_folder_that_another_job_holds_is_no_refusal() -> None:
    assert scheduler("local").refusal("batch.py: error: a job already holds /a/runs/0001-1\n") is None


BATCH = Path(__file__).parent.parent / "flctl" / "payload" / "batch.py"


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    """A campaign's folder at a site, with a blank in its path and the real batch.py."""
    folder = tmp_path / "a b"
    (folder / "payload" / "ab").mkdir(parents=True)
    (folder / "payload" / "ab" / "batch.py").write_bytes(BATCH.read_bytes())
    return folder


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh"], input=command, capture_output=True, text=True, timeout=30, check=False)


def test_the_real_batch_py_answers_as_it_is_read(campaign: Path) -> None:
    """Before the first delivery there is neither a runs folder nor batch.py, and no job."""
    here = Site(schema=1, name="here", scheduler=Scheduler(kind="local"), shapes={"prod": Shape(walltime=60)})
    one = scheduler_of(here, str(campaign / "payload" / "ab"))
    before = shell(one.queue())
    assert one.seen(before.returncode, before.stdout, before.stderr) == ()
    run = campaign / "runs" / "0001-1"
    run.mkdir(parents=True)
    os.mkfifo(run / "end")
    (run / "job.sh").write_text("#!/bin/bash\nread -r status <end\nexit $status\n")
    submitted = shell(one.submit(str(run / "job.sh"), TOKEN))
    job_id = one.job_id(submitted.stdout)
    assert submitted.returncode == 0 and job_id, submitted.stderr
    listed = shell(one.queue())
    (job,) = one.seen(listed.returncode, listed.stdout, listed.stderr)
    assert (job.id, job.name, job.activity) == (job_id, TOKEN, Activity.ACTIVE)
    assert job.started_at and job.expected_end == job.started_at + 60
    cancelled = shell(one.cancel(TOKEN, job_id))
    assert cancelled.returncode == 0, cancelled.stderr
    with (run / "lock").open("a") as lock:
        subprocess.run(["flock", "--timeout", "20", str(lock.fileno())], pass_fds=[lock.fileno()], check=True)
    listed = shell(one.queue())
    (job,) = one.seen(listed.returncode, listed.stdout, listed.stderr)
    assert (job.state, job.activity) == ("CANCELLED", Activity.ENDED)


def test_a_batch_py_that_is_gone_is_a_failed_query(campaign: Path) -> None:
    (campaign / "runs").mkdir()
    (campaign / "payload" / "ab" / "batch.py").unlink()
    one = scheduler_of(site("local"), str(campaign / "payload" / "ab"))
    answer = shell(one.queue())
    with pytest.raises(QueryFailed):
        one.seen(answer.returncode, answer.stdout, answer.stderr)
