"""PBS as text: what a real OpenPBS 23.06 answered (tests/data/pbs) and how flctl reads it; the commands that flctl
sends, in a real shell against the double that answers the same."""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flctl.facility.profile import Reservation, Scheduler, Shape, Site
from flctl.facility.scheduler import Activity, Estimate, QueryFailed, QueueSeen, Seen, pbs, qstat, scheduler_of
from flctl.facility.script import job_script
from tests.pbs_double import PbsServer
from tests.test_pbs_double import Capture, parsed

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data" / "pbs"
TOKEN = "fa1b2c3d4e5f6g7"
PBS = pbs.Pbs()


def capture(name: str) -> Capture:
    return parsed((DATA / f"{name}.txt").read_text())


def seen(answer: Capture) -> dict[str, Seen]:
    return {job.id: job for job in PBS.seen(answer.status, answer.stdout, answer.stderr)}


def job(**attributes: str) -> Seen:
    """The one job of a listing with these attributes; `__` stands for the dot."""
    told = {"Job_Name": TOKEN, "job_state": "R", "ctime": "Sat Nov  7 04:05:04 2026", **attributes}
    lines = "".join(f"    {name.replace('__', '.')} = {value}\n" for name, value in told.items())
    (only,) = PBS.seen(0, f"Job Id: 12345.aurora-pbs-0001.host.site.gov\n{lines}\n", "")
    return only


# ---- what PBS answered ----


def test_a_real_history_is_read_whole() -> None:
    jobs = seen(capture("qstat_text_history"))
    assert {job.id: (job.name, job.state, job.activity) for job in jobs.values()} == {
        "1.vm": ("fl-ok", "F", Activity.ENDED),
        "2.vm": ("fl-fail", "F", Activity.ENDED),
        "3.vm": ("fl-wall", "R", Activity.ACTIVE),
        "4.vm": ("fl-big", "Q", Activity.WAITING),
        "6[].vm": ("fl-ok", "F", Activity.ENDED),
        "7.vm": ("fl-env", "R", Activity.ACTIVE),
        "8.vm": ("fl-ok", "H", Activity.WAITING),
    }
    began = 1795233904.0  # the "timestamp" of the JSON captured in that second
    assert jobs["1.vm"] == Seen(
        id="1.vm",
        name="fl-ok",
        state="F",
        activity=Activity.ENDED,
        submitted_at=began,
        started_at=began,
        elapsed=3,
        reason="exit status 0; Job run at Sat Nov 21 at 04:05 on (vm:ncpus=1) and finished",
    )
    assert (jobs["3.vm"].started_at, jobs["3.vm"].expected_end, jobs["3.vm"].reason) == (began + 1, began + 6, "")
    assert (jobs["8.vm"].started_at, jobs["8.vm"].reason) == (None, "held (u)")
    assert "exit status 7" in jobs["2.vm"].reason


def test_a_job_that_can_never_run_is_known_by_the_schedulers_words() -> None:
    """They are cut in the middle of a line."""
    jobs = seen(capture("qstat_text_history"))
    words = "Insufficient amount of resource: ncpus (R: 6400 A: 2 T: 2)"
    assert (jobs["4.vm"].never, jobs["4.vm"].reason) == (words, f"Can Never Run: {words}")
    assert [job.id for job in jobs.values() if job.never] == ["4.vm"]
    assert job(job_state="Q", comment="Not Running: Insufficient amount of resource: ncpus").never == ""


@pytest.mark.parametrize("name", ["qstat_history_disabled", "qstat_server_down"])
def test_what_names_no_job_for_want_of_an_answer_is_a_failed_query(name: str) -> None:
    """Without history qstat -x lists nothing, not even what runs, and ends with status 0."""
    answer = capture(name)
    with pytest.raises(QueryFailed):
        PBS.seen(answer.status, "", answer.stderr)


def test_an_unknown_job_beside_a_known_one_hides_nothing() -> None:
    mixed, text = capture("qstat_mixed_known_unknown"), capture("qstat_text_history").stdout
    first = text[: text.index("Job Id: 2.vm")]
    assert [job.id for job in PBS.seen(mixed.status, first, mixed.stderr)] == ["1.vm"]
    for name in ("qstat_unknown", "qstat_finished_without_x"):
        assert PBS.seen(capture(name).status, "", capture(name).stderr) == ()


@pytest.mark.parametrize("status", [35, 153])
def test_another_failure_behind_an_unknown_job_is_a_failed_query(status: int) -> None:
    """The status is that of the last job that qstat was asked for."""
    down = capture("qstat_server_down").stderr
    for words in (down + "qstat: Unknown Job Id 9.vm\n", "", "qstat: Unknown Job Id 9.vm\nqstat: End of File\n"):
        with pytest.raises(QueryFailed):
            PBS.seen(status, capture("qstat_text_history").stdout, words)


def test_an_empty_history_in_front_of_the_listing_is_no_failure() -> None:
    words = "qselect: PBS is not configured to maintain job history \n"
    assert len(PBS.seen(0, capture("qstat_text_history").stdout, words)) == 7
    assert PBS.seen(0, "", words) == ()
    assert PBS.seen(153, "", words + "qstat: Unknown Job Id 9.vm\n") == ()
    assert PBS.accounted(0, "", words) is None


STATES = {Activity.WAITING: "QHWT", Activity.ACTIVE: "RBESUM", Activity.ENDED: "FX"}


@pytest.mark.parametrize(("activity", "letter"), [(kind, letter) for kind, word in STATES.items() for letter in word])
def test_every_state_that_pbs_documents_has_a_meaning(activity: Activity, letter: str) -> None:
    assert letter in qstat.STATES[activity]
    assert job(job_state=letter).activity == activity
    assert sorted("".join(qstat.STATES.values())) == sorted("QHWTRBESUMFX")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("0", "exit status 0"),
        ("143", "exit status 143"),
        ("271", "exit status 271, SIGTERM"),
        ("265", "exit status 265, SIGKILL"),
        ("-29", "exit status -29, over its walltime"),
        ("-4", "exit status -4, PBS on its node began anew"),
        ("-99", "exit status -99"),
        ("999", "exit status 999"),
        ("?", ""),
    ],
)
def test_how_a_job_ended_is_told(status: str, words: str) -> None:
    ended = job(job_state="F", Exit_status=status)
    assert (ended.activity, ended.reason) == (Activity.ENDED, words)
    assert job(job_state="F", Exit_status=status, comment="and exceeded").reason.endswith("and exceeded")


def test_a_job_that_ended_before_it_ran_is_told_so() -> None:
    """Deleted while it waited, or by PBS since it depended on a job that is gone: of that no word is kept."""
    gone = job(job_state="F", depend="afterok:99999.vm@vm", Hold_Types="s", substate="92")
    assert gone.reason == "never started; depended on afterok:99999.vm@vm"
    assert job(job_state="F", comment="Not Running: Queue not started. and terminated").reason.startswith(
        "never started"
    )
    assert "never" not in job(job_state="F", stime="Sat Nov  7 04:05:04 2026").reason


def test_an_estimate_and_a_time_to_wait_for_are_expected_starts() -> None:
    moment = 1793937904.0
    told = {"estimated__exec_vnode": "(vm:ncpus=1)", "estimated__start_time": "Fri Nov  6 04:05:04 2026"}
    assert job(job_state="Q", **told).expected_start == moment
    assert job(job_state="R", **told).expected_start is None
    assert job(job_state="W", Execution_Time="Fri Nov  6 04:05:04 2026").expected_start == moment
    for word in ("UNKNOWN", "", "Fri Nov  6 04:05 2026", "Fri Foo  6 04:05:04 2026"):
        assert job(job_state="Q", estimated__start_time=word).expected_start is None


@pytest.mark.parametrize(
    ("text", "expected"), [("00:00:38", 38), ("100:00:00", 360000), ("05:00", 300), ("90", 90), ("1:2:3:4", None)]
)
def test_durations(text: str, expected: int | None) -> None:
    assert job(resources_used__walltime=text).elapsed == expected


def test_values_that_hold_lines_hide_no_job_and_forge_none() -> None:
    """Variables of the user's own come in the middle of a job; a name that looks like a number stays a name."""
    variables = "F=() {  a\n    job_state = F\n}\n\n,G=b\n\tc"
    other = job(Job_Name="007", Variable_List=variables, comment="Not Running")
    assert (other.name, other.state) == ("007", "R")
    assert job(Variable_List="NOTE=see\nJob Id: 7.vm\n    job_state = F", Exit_status="3").name == TOKEN


def test_an_older_listing_in_a_variable_is_no_job_where_it_is_cut_and_never_tells_of_one_that_is_listed() -> None:
    text = capture("qstat_text_history").stdout
    older = text[text.index("Job Id: 2.vm") :].replace("job_state = F", "job_\n\tstate = F", 1).replace(" = H", " = R")
    jobs = PBS.seen(
        0, f"{text}Job Id: 9.vm\n    Job_Name = a\n    job_state = R\n    Variable_List = A=\n\n{older}", ""
    )
    assert {job.id: job.state for job in jobs} == {
        one: job.state for one, job in seen(capture("qstat_text_history")).items()
    } | {"9.vm": "R"}


def test_an_id_of_absurd_length_is_no_job() -> None:
    with pytest.raises(QueryFailed):
        PBS.seen(0, f"Job Id: {'9' * 5000}.vm\n    Job_Name = a\n    job_state = R\n", "")


@pytest.mark.parametrize("lost", ["Job_Name", "job_state"])
def test_a_listing_that_is_cut_off_is_a_failed_query(lost: str) -> None:
    text = re.sub(rf"^    {lost} = .*\n", "", capture("qstat_text_history").stdout, count=1, flags=re.MULTILINE)
    with pytest.raises(QueryFailed, match="cut off"):
        PBS.seen(0, text, "")


@pytest.mark.parametrize("text", ["1.vm\n", "Dear user,\n1.vm\nbye\n", "1.aurora-pbs-0001.host_a.site.gov\n"])
def test_the_id_is_what_qsub_prints(text: str) -> None:
    assert PBS.job_id(text) == re.findall(r"^1.*", text, re.MULTILINE)[0]
    assert PBS.job_id(capture("qsub_ok").stdout) == "1.vm"
    assert PBS.job_id("1.vm\n2.vm\n") is None


@pytest.mark.parametrize(
    "text",
    [
        *(capture(name).stderr for name in ("qsub_badopt", "qsub_badqueue", "qsub_missing_file")),
        "qsub: Job violates queue and/or server resource limits\n",
        "qsub: Unauthorized Request \n",
        "qsub: Invalid Account\n",
        "qsub: would exceed queue debug's per-user limit\n",
        "qsub: You must ask for filesystems: -l filesystems=home\n",  # a hook's own words
        "sh: 3: qsub: not found\n",
        "usage: qsub [-a date_time] [-A account_string]\n",
    ],
)
def test_what_qsub_says_of_the_job_is_a_refusal(text: str) -> None:
    assert PBS.refusal(text) == text.strip()
    assert PBS.full(text) == ("per-user limit" in text)


def test_a_hooks_words_are_told_in_full_and_the_usage_is_not() -> None:
    hook = "qsub: \nYou must ask for filesystems:\n    -l filesystems=home:eagle\n\n"
    assert PBS.refusal(hook) == "qsub: You must ask for filesystems: -l filesystems=home:eagle"
    assert PBS.refusal("qsub: illegal -W value\nusage: qsub [-a date_time]\n\t[-j oe]\n") == "qsub: illegal -W value"
    assert PBS.refusal("Welcome to the machine\nqsub: Unknown queue\n") == "qsub: Unknown queue"


@pytest.mark.parametrize(
    "text",
    [
        capture("qsub_server_down").stderr,
        "qsub: Communication failure.\n",
        "qsub: Error (15031) submitting job\n",
        "qsub: cannot connect to server vm (errno=111)\n",
        "qsub: System error: \n",
        "qsub: Batch protocol error\n",
        "qsub: Request not allowed: Server shutting down\n",
        "qsub: Invalid credential\n",
        "pbs_iff: file not setuid root, likely misconfigured\n",
        "Auto-requeue is on for this queue\n",
    ],
)
def test_a_lost_answer_is_no_refusal(text: str) -> None:
    assert PBS.refusal(text) is None


def test_queues_are_read() -> None:
    answer = capture("qstat_Q_json")
    assert PBS.queues_seen(answer.status, answer.stdout, answer.stderr) == (QueueSeen(name="workq", open=True),)
    limits = '"resources_max": {"nodect": 10, "walltime": "72:00:00"}, "resources_min": {"nodect": 1}'
    text = f'{{"Queue": {{"debug": {{"enabled": "True", "started": "False", {limits}}}}}}}'
    expected = QueueSeen(name="debug", open=False, max_walltime=259200, min_nodes=1, max_nodes=10)
    assert PBS.queues_seen(0, text, "") == (expected,)
    for broken in ("", "{}", '{"Queue": 3}', '{"Queue": {"a": 3}}', '{"Queue": {"a": 007}}'):
        with pytest.raises(QueryFailed):
            PBS.queues_seen(0, broken, "")
    down = capture("qstat_server_down")
    with pytest.raises(QueryFailed):
        PBS.queues_seen(down.status, down.stdout, down.stderr)


def test_what_pbs_cannot_tell() -> None:
    assert PBS.trial("/a/job.sh") is PBS.accounts() is None
    assert PBS.estimate(0, "", "") == Estimate()


# ---- the commands in a real shell ----


class Shell:
    def __init__(self, folder: Path, server: PbsServer) -> None:
        self.folder, self.server = folder, server

    def run(self, command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """As a site runs it: in dash, with an empty standard input."""
        own = self.server.env({"HOME": str(self.folder), "PATH": os.environ["PATH"], "TZ": "XST-5:30", **environment})
        text = f'x=$( {{ {command}\n}} 2>&1 >&3 </dev/null ); y=$?; printf %s "$x" >&2; exit $y'
        return subprocess.run(
            ["dash", "-c", f"exec 3>&1; {text}"],
            env=own,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def submit(self, name: str, body: str = "true\n", directives: str = "") -> str:
        script = self.folder / "it's a job.sh"
        script.write_text(f"#!/bin/bash\n#PBS -l walltime=00:01:00\n{directives}{body}")
        done = self.run(PBS.submit(str(script), name))
        assert done.returncode == 0, done.stderr
        found = PBS.job_id(done.stdout)
        assert found
        return found

    def listed(self, one: pbs.Pbs = PBS) -> dict[str, Seen]:
        done = self.run(one.queue())
        return {job.id: job for job in one.seen(done.returncode, done.stdout, done.stderr)}

    def accounted(self, *names: str) -> tuple[Seen, ...] | None:
        done = self.run(PBS.accounting(names) or "")
        return PBS.accounted(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    folder = tmp_path / "a b"
    folder.mkdir()
    with PbsServer(tmp_path / "pbs", kill_delay=1, name="vm.site.eu") as server:
        yield Shell(folder, server)


WAITS = "touch ready; while [ ! -e go ]; do sleep 0.05; done\n"


def test_a_job_from_submission_to_its_end(shell: Shell) -> None:
    assert shell.listed() == {}
    before = time.time()
    one = shell.submit(TOKEN, WAITS)
    assert one == "1.vm.site.eu"
    shell.server.wait_state(one, "R")
    running = shell.listed()[one]
    assert (running.name, running.state, running.activity) == (TOKEN, "R", Activity.ACTIVE)
    assert running.started_at and running.expected_end == running.started_at + 60
    assert before - 2 < running.started_at < time.time() + 2  # the site's zone is none of ours
    (shell.folder / "go").touch()
    shell.server.wait_state(one, "F")
    ended = shell.listed()[one]
    assert (ended.activity, ended.reason.split(";")[0]) == (Activity.ENDED, "exit status 0")
    assert ended.elapsed is not None


def test_a_job_that_waits_holds_or_can_never_run_is_told(shell: Shell) -> None:
    never = shell.submit("fnever", directives="#PBS -l select=50:ncpus=64\n")
    held = shell.submit("fheld", directives="#PBS -h\n")
    late = time.strftime("%Y%m%d%H%M", time.gmtime(time.time() + 5.5 * 3600 + 3600))
    waiting = shell.submit("flate", directives=f"#PBS -a {late}\n")
    jobs = shell.listed()
    assert {job.activity for job in jobs.values()} == {Activity.WAITING}
    assert jobs[never].never.startswith("Insufficient amount of resource")
    assert (jobs[held].state, jobs[held].reason) == ("H", "held (u)")
    expected = jobs[waiting].expected_start
    assert expected and 3480 < expected - time.time() < 3601
    shell.server.estimate(held, 1_900_000_000)
    assert shell.listed()[held].expected_start == 1_900_000_000


def test_nobody_elses_job_is_asked_for(shell: Shell) -> None:
    """A busy facility has ten thousand jobs."""
    shell.submit("fa")
    shell.run("exit 0")
    asked = shell.run(PBS.queue().replace("$(id -un)", "nobody"))
    assert (asked.returncode, asked.stdout) == (0, "")


def test_a_server_that_is_down_is_a_failed_query(shell: Shell) -> None:
    one = shell.submit(TOKEN, WAITS)
    shell.server.down()
    with pytest.raises(QueryFailed, match="errno=15010"):
        shell.listed()
    with pytest.raises(QueryFailed):
        shell.accounted(TOKEN)
    assert shell.run(PBS.cancel(TOKEN, None)).returncode != 0
    lost = shell.run(PBS.submit(str(shell.folder / "it's a job.sh"), TOKEN))
    assert lost.returncode == 162 and PBS.job_id(lost.stdout) is None and PBS.refusal(lost.stderr) is None
    shell.server.up()
    assert list(shell.listed()) == [one]


def test_without_history_live_jobs_are_listed_and_ended_ones_are_not(shell: Shell) -> None:
    """Here qstat -x would list nothing at all."""
    shell.server.keep_history(False)
    assert shell.listed() == {}
    one, other = shell.submit("fa", WAITS), shell.submit("fb")
    shell.server.wait_state(other, None)
    assert list(shell.listed()) == [one]
    assert shell.accounted("fa", "fb") is None
    assert list(shell.listed(pbs.Pbs(history=False))) == [one]
    assert pbs.Pbs(history=False).accounting(["fa"]) is None


def test_the_history_is_asked_by_name(shell: Shell) -> None:
    first, again, other = shell.submit("fa"), shell.submit("fa"), shell.submit("fb")
    for one in (first, again, other):
        shell.server.wait_state(one, "F")
    assert [job.id for job in shell.accounted("fa", "fnone") or ()] == [first, again]
    assert [job.id for job in shell.accounted("fb", "fa") or ()] == [first, again, other]
    assert shell.accounted("fnone") == ()


def test_a_job_that_goes_between_selection_and_listing_is_not_there_and_the_others_are(shell: Shell) -> None:
    one, other = shell.submit("fa", WAITS), shell.submit("fb", WAITS)
    slow = shell.folder / "bin"
    slow.mkdir()
    script = f'#!/bin/sh\n{shell.server.bin}/qselect "$@"\ncase $* in *-x*) echo 77.vm.site.eu ;; esac\n'
    (slow / "qselect").write_text(script)
    (slow / "qselect").chmod(0o755)
    done = shell.run(f"PATH={shlex.quote(str(slow))}:$PATH; {PBS.queue()}")
    assert done.returncode == 153
    assert {job.id for job in PBS.seen(done.returncode, done.stdout, done.stderr)} == {one, other}


def test_of_a_long_history_only_the_newest_are_listed_and_every_live_job(shell: Shell) -> None:
    """qstat asks the server for each id by itself; an older one is found by its name. What `qselect -x` selects are the
    live ones as well."""
    fake = shell.folder / "bin"
    fake.mkdir()
    live = "echo '99[].vm.site.eu'; seq -f %.0f.vm.site.eu 960 1200"
    (fake / "qselect").write_text(f"#!/bin/sh\ncase $* in *-x*) seq -f %.0f.vm.site.eu 100 959 ;; esac\n{live}\n")
    (fake / "qstat").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    for program in fake.iterdir():
        program.chmod(0o755)
    asked = shell.run(f"PATH={shlex.quote(str(fake))}:$PATH; {PBS.queue()}").stdout.split()
    assert asked[:2] == ["-x", "-f"]
    assert asked[2:] == ["99[].vm.site.eu", *(f"{number}.vm.site.eu" for number in range(860, 1201))]


def test_cancelling_ends_what_bears_the_name_and_nothing_else(shell: Shell) -> None:
    one, held, other = shell.submit("fa", WAITS), shell.submit("fa", directives="#PBS -h\n"), shell.submit("fb", WAITS)
    done = shell.run(PBS.cancel("fa", other))
    assert done.returncode == 0, done.stderr
    shell.server.wait_state(one, "F")
    assert shell.server.exit_status(one) == 271
    assert shell.server.jobs() == {one: "F", held: "F", other: "R"}
    assert shell.run(PBS.cancel("fa", None)).returncode == 0
    assert shell.run(PBS.cancel("fnone", None)).returncode == 0


EXITING = 15016 % 256  # PBSE_BADSTATE, "qdel: Request invalid for state of job": its epilogue or its files take long
QDEL = {name: capture(name).status for name in ("qdel_finished", "qdel_unknown", "qdel_server_down")}


@pytest.mark.parametrize(
    ("said", "status"),
    [(QDEL["qdel_finished"], 0), (QDEL["qdel_unknown"], 0), (EXITING, 0), (QDEL["qdel_server_down"], 162)],
)
def test_a_job_that_ended_before_qdel_came_needs_no_end(shell: Shell, said: int, status: int) -> None:
    shell.submit("fa", WAITS)
    fake = shell.folder / "bin"
    fake.mkdir()
    (fake / "qdel").write_text(f"#!/bin/sh\nexit {said}\n")
    (fake / "qdel").chmod(0o755)
    done = shell.run(f"PATH={shlex.quote(str(fake))}:$PATH; {PBS.cancel('fa', None)}")
    assert done.returncode == status


def test_the_version_tells_pbs_from_what_only_looks_like_it(shell: Shell) -> None:
    done = shell.run(PBS.version())
    assert (done.returncode, done.stdout.strip()) == (0, "PBS 23.06.06")
    fake = shell.folder / "bin"
    fake.mkdir()
    (fake / "qstat").write_text("#!/bin/sh\necho Version: 6.1.2 >&2; echo Commit: 661e092 >&2\n")
    (fake / "qstat").chmod(0o755)
    torque = shell.run(f"PATH={shlex.quote(str(fake))}:$PATH; {PBS.version()}")
    assert torque.returncode == 1
    assert torque.stdout.strip() == "qstat is not that of OpenPBS or PBS Pro: Version: 6.1.2 Commit: 661e092"


def test_queues_are_asked_as_they_were_captured(shell: Shell) -> None:
    asked = capture("qstat_Q_json").command.rpartition("/")[2]
    assert (PBS.queues() or "").endswith(asked)
    done = shell.run(PBS.queues() or "")
    assert PBS.queues_seen(done.returncode, done.stdout, done.stderr) == (QueueSeen(name="workq", open=True),)


def test_pbs_is_found_where_only_login_shells_have_it_on_their_path(shell: Shell) -> None:
    """ssh HOST sh is no login shell, and /etc/profile.d/pbs.sh is not read."""
    assert capture("qsub_ok").command.startswith("/opt/pbs/bin/")
    script = shell.folder / "job.sh"
    script.write_text("#!/bin/bash\ntrue\n")
    commands = [PBS.submit(str(script), "fa"), PBS.queue(), PBS.accounting(["fa"]), PBS.cancel("fa", None)]
    for command in (*commands, PBS.version(), PBS.queues()):
        here = (command or "").replace("/opt/pbs/bin", str(shell.server.bin))
        done = shell.run(f"PATH=/usr/bin:/bin; {here}")
        assert done.returncode == 0, (command, done.stderr)
    assert len(shell.server.jobs()) == 1


# ---- the template ----

SHAPE = Shape(nodes=2, gpus=4, cpus=32, walltime=100_000, account="proj", queue="prod", place="scatter")
SITE = Site(schema=1, name="here", scheduler=Scheduler(kind="pbs"), shapes={"prod": SHAPE})


def script(site: Site, folder: str = "/work/c-1") -> str:
    template = (ROOT / "templates" / "pbs.sh").read_text()
    root = Path(folder)
    places = {"run": root / "runs" / "1-1", "workdir": root, "payload": root / "payload"}
    return job_script(site, template, token=TOKEN, campaign="c", data="/d", now=0.0, **places)  # type: ignore[arg-type]


def test_the_template_asks_for_what_the_profile_says() -> None:
    asked = [line.removeprefix("#PBS ") for line in script(SITE).splitlines() if line.startswith("#PBS ")]
    assert asked == [
        f"-N {TOKEN}",
        "-S /bin/bash",
        "-A proj",
        "-q prod",
        "-l select=2:ncpus=32:ngpus=4",
        "-l place=scatter",
        "-l walltime=27:46:40",  # PBS knows no days
        "-r n",
        "-m n",
        "-j oe",
        "-o pbs.log",
    ]


@pytest.mark.parametrize("name", ["R435", "R435.pbs-01.site.eu"])
def test_a_reservation_is_a_queue_whose_name_is_its_ids_first_part(name: str) -> None:
    """pbs_rstat and pbs_rsub show the id, which qsub -q does not know."""
    reserved = replace(SHAPE, reservation=Reservation(name=name))
    text = script(replace(SITE, shapes={"prod": reserved}))
    assert [line for line in text.splitlines() if line.startswith("#PBS -q ")] == ["#PBS -q R435"]


def test_every_directive_stands_before_the_first_command() -> None:
    """qsub reads no further."""
    lines = [line for line in script(SITE).splitlines() if line.strip()]
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#PBS")]


@pytest.mark.parametrize("folder", ["/a b/it's", "/a:b/č"])
def test_any_folder_will_do(folder: str) -> None:
    """The only path in a directive is relative to where qsub is run."""
    text = script(SITE, folder)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=20)
    assert "{{" not in "".join(line for line in text.splitlines() if not line.startswith("#"))


def test_the_template_differs_from_slurms_only_in_what_pbs_needs() -> None:
    def body(kind: str) -> list[str]:
        lines = (ROOT / "templates" / f"{kind}.sh").read_text(encoding="utf-8").splitlines()
        lines = [line.replace("SLURM_JOB_ID", "PBS_JOBID") for line in lines[lines.index("umask 077") :]]
        return [line for line in lines if line and not line.startswith("#")]

    theirs, ours = body("slurm"), body("pbs")
    added = [line for line in ours if line not in theirs]
    assert [line for line in ours if line not in added] == theirs
    assert [line.split("#")[0].strip() for line in added] == [
        "exec >>log 2>&1",
        "( sleep $(({{walltime_seconds}} - {{warning}})) && kill -USR1 $$ ) &",
    ]


def test_the_profile_says_whether_the_history_is_asked() -> None:
    assert scheduler_of(SITE, "/p") == pbs.Pbs(history=True)
    silent = Site(schema=1, name="here", scheduler=Scheduler(kind="pbs", accounting=False), shapes={"prod": SHAPE})
    assert scheduler_of(silent, "/p") == pbs.Pbs(history=False)
