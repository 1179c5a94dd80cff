"""The stand-in for OpenPBS against what a real one answered: every file of tests/data/pbs, field by field.

What differs from one day to the next (times, pids, memory) is compared by its form, all else by its value."""

import getpass
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.pbs_double import PbsServer
from tests.ssh_sites import connected, road_to, site_of
from tests.testbed.procs import STATE
from tests.testbed.sshd import Sshd

DATA = Path(__file__).parent / "data" / "pbs"
CAPTURES = sorted(path.stem for path in DATA.glob("*.txt"))
USER = getpass.getuser()

HEAD = "#!/bin/bash\n#PBS -l select={select}\n#PBS -l walltime={walltime}\n"
SCRIPTS = {
    "ok": HEAD + "#PBS -N fl-ok\n#PBS -j oe\nwhile [ ! -e go-ok ]; do sleep 0.05; done\n",
    "fail": HEAD + "#PBS -N fl-fail\n#PBS -j oe\nwhile [ ! -e go-fail ]; do sleep 0.05; done\nexit 7\n",
    "wall": HEAD + "#PBS -N fl-wall\n#PBS -j oe\nexec sleep 600\n",
    "big": HEAD + "#PBS -N fl-big\ntrue\n",
    "unicode": HEAD + '#PBS -N fl-env\n#PBS -v NOTE=caffe_quoted,MULTI="a b"\nexec sleep 600\n',
    "badopt": HEAD + "true\n",
}
SELECT = {"big": "100:ncpus=64"}
WALLTIME = {"wall": "00:00:05", "badopt": "soon"}


@dataclass(frozen=True)
class Capture:
    command: str
    stdout: str
    stderr: str
    status: int


def parsed(text: str) -> Capture:
    match = re.fullmatch(r"\$ (.*?)\n--- stdout\n(.*)--- stderr\n(.*)--- exit (\d+)\n", text, re.DOTALL)
    assert match, text
    return Capture(match[1], match[2], match[3], int(match[4]))


class Replay:
    """The day of the captures once more: their commands, in an order that leads to what they show."""

    def __init__(self, folder: Path, pbs: PbsServer) -> None:
        self.home, self.pbs = folder / "home", pbs
        (self.home / "jobs").mkdir(parents=True)
        for name, text in SCRIPTS.items():
            filled = text.format(select=SELECT.get(name, "1:ncpus=1"), walltime=WALLTIME.get(name, "00:05:00"))
            (self.home / "jobs" / f"{name}.sh").write_text(filled)
        self.answers: dict[str, Capture] = {}

    def local(self, text: str) -> str:
        """A capture's text as it would be here: this user, home and place of the commands."""
        text = text.replace("/home/fluser", str(self.home)).replace("/opt/pbs/bin", str(self.pbs.bin))
        return text.replace("fluser", USER)

    def ask(self, *names: str) -> None:
        for name in names:
            command = self.local(parsed((DATA / f"{name}.txt").read_text()).command)
            done = subprocess.run(
                command.split(),
                env={
                    "HOME": str(self.home),
                    "LANG": "C.UTF-8",
                    "LOGNAME": USER,
                    "SHELL": "/bin/bash",
                    "TZ": "UTC",
                    "PATH": f"{self.pbs.bin}:/usr/bin:/bin",
                    "MAIL": f"/var/mail/{USER}",
                },
                cwd=self.home,
                capture_output=True,
                text=True,
                timeout=30,
            )
            self.answers[name] = Capture(command, done.stdout, done.stderr, done.returncode)

    def go(self) -> dict[str, Capture]:
        pbs = self.pbs
        self.ask("qsub_ok", "qsub_fail", "qsub_walltime", "qsub_toolarge", "qsub_badopt", "qsub_array", "qsub_env")
        self.ask("qsub_held", "qsub_badqueue", "qsub_missing_file", "qstat_version", "qstat_plain", "qstat_wide")
        self.ask("qstat_json_running", "qstat_history_disabled")
        pbs.keep_history(True)
        (self.home / "go-fail").touch()
        pbs.wait_state("3.vm", "R")
        (self.home / "go-ok").touch()
        pbs.wait_state("7.vm", "R")
        self.ask("qstat_json_history", "qstat_text_history", "qstat_finished_without_x", "qstat_unknown")
        self.ask("qstat_mixed_known_unknown", "qsub_waiting", "qsub_depend_bad", "qselect_by_name", "qselect_none")
        self.ask("qdel_queued", "qdel_running", "qdel_finished", "qdel_unknown")
        pbs.wait_state("7.vm", "F")
        pbs.wait_state("3.vm", "F")
        self.ask("qstat_json_deleted", "pbsnodes_json", "qstat_B_json", "qstat_Q_json", "pbs_rstat")
        pbs.down()
        self.ask("qstat_server_down", "qsub_server_down", "qdel_server_down")
        return self.answers


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replay]:
    folder = tmp_path_factory.mktemp("pbs")
    with PbsServer(folder / "pbs", history=False, kill_delay=1) as pbs:
        replay = Replay(folder, pbs)
        replay.go()
        yield replay


def test_every_captured_command_is_replayed(replay: Replay) -> None:
    assert sorted(replay.answers) == CAPTURES
    assert len(CAPTURES) == 36


@pytest.mark.parametrize("name", CAPTURES)
def test_the_double_answers_as_openpbs_did(replay: Replay, name: str) -> None:
    real = parsed(replay.local((DATA / f"{name}.txt").read_text()))
    ours = replay.answers[name]
    assert ours.status == real.status
    assert ours.stderr == real.stderr
    assert_same(read(ours.stdout), read(real.stdout), name)


# ---- how answers are read and compared ----

TIME = r"[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4}"
VOLATILE = {
    "timestamp": r"\d{10}",
    "history_timestamp": r"\d{10}",
    "last_state_change_time": r"\d{10}",
    "last_used_time": r"\d{10}",
    "session_id": r"\d+",
    "substate": r"\d\d",
    "resources_used.mem": r"\d+kb",
    "resources_used.vmem": r"\d+kb",
    "resources_used.walltime": r"\d\d:\d\d:\d\d",
    **dict.fromkeys(("ctime", "mtime", "qtime", "stime", "etime", "obittime"), TIME),
}
LATE = ("session_id", "jobdir", "resources_used")
"""What PBS tells of a job once its node has reported, and of a very short one not at all."""


def read(text: str) -> Any:
    if text.startswith("{"):
        return json.loads(text)
    if text.startswith("Job Id: "):
        return {"Jobs": dict(blocks(text))}
    return [re.sub(r"at [A-Z][a-z]{2} [A-Z].*? at \d\d:\d\d", "at TIME", line).split() for line in text.splitlines()]


def blocks(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """qstat -f: long values are cut and go on after a tab; NAME.KEY is a part of NAME, as in the JSON."""
    for block in text.replace("\n\t", "").removesuffix("\n\n").split("\n\n"):
        first, *lines = block.split("\n")
        found: dict[str, Any] = {}
        for line in lines:
            name, _, value = line.removeprefix("    ").partition(" = ")
            if name == "Variable_List":
                found[name] = dict(item.split("=", 1) for item in value.split(","))
                found[name].pop("PBS_O_PATH")  # the capture's has lost a part
            elif "." in name:
                outer, inner = name.split(".")
                found.setdefault(outer, {})[inner] = value
            else:
                found[name] = value
        yield first.removeprefix("Job Id: "), found


def assert_same(ours: Any, real: Any, place: str, path: str = "") -> None:
    if not isinstance(real, dict):
        assert_equal(ours, real, path, place)
        return
    running = real.get("job_state") == "R"
    left = {name for name in LATE if name in (ours.keys() ^ real.keys()) and (running or name not in real)}
    assert ours.keys() - left == real.keys() - left, place
    assert [name for name in ours if name in real and name not in left] == [name for name in real if name not in left]
    for name in real.keys() - left:
        assert_same(ours[name], real[name], f"{place} {name}", f"{path}.{name}" if path == "resources_used" else name)


def assert_equal(ours: Any, real: Any, name: str, place: str) -> None:
    if name in VOLATILE:
        assert type(ours) is type(real), place
        for value in (ours, real):
            assert re.fullmatch(VOLATILE[name], str(value)), (place, value)
    elif name == "comment":
        stamp = re.compile(r"at [A-Z][a-z]{2} [A-Z][a-z]{2} \d\d at \d\d:\d\d")
        assert stamp.sub("at TIME", ours) == stamp.sub("at TIME", real), place
    else:
        assert ours == real, place


def test_a_long_line_is_cut_where_pbs_cuts_it(replay: Replay) -> None:
    real = parsed((DATA / "qstat_text_history.txt").read_text()).stdout
    (cut,) = set(re.findall(r"^    comment = Can.*\n\t.*\n", real, re.MULTILINE))
    assert cut in replay.answers["qstat_text_history"].stdout


# ---- what the captures tell only in part: jobs that really run ----


class Desk:
    """A user of a double of one's own."""

    def __init__(self, folder: Path, pbs: PbsServer) -> None:
        self.folder, self.pbs = folder, pbs

    def submit(self, body: str, *options: str, walltime: str = "00:01:00") -> str:
        (self.folder / "my job.sh").write_text(f"#!/bin/bash\n#PBS -l walltime={walltime}\n{body}")
        done = self.run("qsub", *options, "my job.sh")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def run(self, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        own = self.pbs.env({"HOME": str(self.folder), "PATH": os.environ["PATH"], **environment})
        return subprocess.run(words, env=own, cwd=self.folder, capture_output=True, text=True, timeout=30)

    def attributes(self, job_id: str) -> dict[str, Any]:
        done = self.run("qstat", "-x", "-f", "-F", "json", job_id)
        found: dict[str, Any] = json.loads(done.stdout)["Jobs"][job_id]
        return found

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    folder = tmp_path / "at my desk"
    folder.mkdir()
    with PbsServer(tmp_path / "pbs", kill_delay=2) as pbs:
        yield Desk(folder, pbs)


CATCHES = "trap 'echo caught >caught; exit 3' TERM\ntouch ready\nwhile :; do sleep 0.05; done\n"


def test_a_job_over_its_walltime_is_told_to_end_and_leaves_271(desk: Desk) -> None:
    """The status is that of the job's login shell, which SIGTERM kills whatever the script makes of it."""
    job = desk.submit(CATCHES, walltime="00:00:01")
    desk.pbs.wait_state(job, "F")
    assert desk.pbs.exit_status(job) == 271
    assert (desk.folder / "caught").read_text() == "caught\n"
    assert desk.attributes(job)["comment"].endswith("and failed")


def test_a_job_that_hears_no_sigterm_is_killed_after_kill_delay(desk: Desk) -> None:
    job = desk.submit("trap '' TERM\ntouch ready\nwhile :; do sleep 0.05; done\n")
    desk.until((desk.folder / "ready").exists)
    assert desk.run("qdel", job).returncode == 0
    assert desk.pbs.jobs()[job] == "R"
    began = time.monotonic()
    desk.pbs.wait_state(job, "F")
    assert 1 < time.monotonic() - began < 10


def test_output_comes_back_only_at_the_end(desk: Desk) -> None:
    job = desk.submit("echo said; touch ready\nwhile [ ! -e go ]; do sleep 0.05; done\n", "-o", "back", "-j", "oe")
    desk.until((desk.folder / "ready").exists)
    assert not (desk.folder / "back").exists()
    (desk.folder / "go").touch()
    desk.pbs.wait_state(job, "F")
    assert (desk.folder / "back").read_text() == "said\n"
    assert desk.pbs.exit_status(job) == 0


def test_what_a_job_left_behind_is_killed_with_it(desk: Desk) -> None:
    job = desk.submit("sleep 600 & echo $! >left\n")
    desk.pbs.wait_state(job, "F")
    left = (desk.folder / "left").read_text().strip()
    stat = Path("/proc") / left / "stat"
    desk.until(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX")


def test_a_job_killed_from_outside_leaves_265(desk: Desk) -> None:
    job = desk.submit("touch ready\nsleep 600\n")
    desk.until((desk.folder / "ready").exists)
    desk.pbs.kill(job)
    desk.pbs.wait_state(job, "F")
    assert desk.pbs.exit_status(job) == 256 + 9


def test_a_held_job_waits_for_its_release_and_one_that_depends_for_the_other(desk: Desk) -> None:
    first = desk.submit("true\n", "-h")
    second = desk.submit("true\n", "-W", f"depend=afterok:{first}")
    third = desk.submit("true\n", "-W", f"depend=afternotok:{first}")
    assert set(desk.pbs.jobs().values()) == {"H"}
    desk.pbs.release(first)
    for job in (first, second, third):
        desk.pbs.wait_state(job, "F")
    assert [desk.pbs.exit_status(job) for job in (first, second, third)] == [0, 0, None]


def test_a_job_deleted_while_it_waits_stays_in_the_history_and_of_several_the_json_holds_the_first(desk: Desk) -> None:
    big, held = desk.submit("true\n", "-l", "select=50:ncpus=64"), desk.submit("true\n", "-h")
    assert desk.run("qdel", big, held).returncode == 0
    told = desk.attributes(big)
    assert (told["job_state"], told["substate"], "stime" in told, "Exit_status" in told) == ("F", 91, False, False)
    assert told["comment"].startswith("Can Never Run") and told["comment"].endswith(") and terminated")
    assert "comment" not in desk.attributes(held)
    assert desk.run("qselect", "-x", "-u", USER).stdout.split() == [big, held]
    both = desk.run("qstat", "-x", "-f", "-F", "json", "99.vm", big, held)
    assert (both.returncode, list(json.loads(both.stdout)["Jobs"])) == (153, [big])


def moment(when: float) -> str:
    return time.strftime("%Y%m%d%H%M", time.localtime(when))


def test_a_job_waits_until_its_time(desk: Desk) -> None:
    early, late = (desk.submit("true\n", "-a", moment(time.time() + shift)) for shift in (-60, 120))
    desk.pbs.wait_state(early, "F")
    assert desk.pbs.jobs()[late] == "W"


def test_without_history_an_ended_job_is_unknown(desk: Desk) -> None:
    desk.pbs.keep_history(False)
    job = desk.submit("true\n")
    desk.pbs.wait_state(job, None)
    done = desk.run("qstat", "-f", job)
    assert (done.returncode, done.stdout, done.stderr) == (153, "", f"qstat: Unknown Job Id {job}\n")
    done = desk.run("qselect", "-x", "-u", USER)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "qselect: PBS is not configured to maintain job history \n"


@pytest.fixture
def account_server() -> Iterator[tuple[PbsServer, Sshd]]:
    """A server that an account reaches over an sshd: nothing but a PATH tells it where."""
    with PbsServer(STATE / "pbs" / "pbs-one", name="pbs-one") as pbs:
        path = {"PATH": f"{pbs.bin}:/usr/bin:/bin"}
        with Sshd(name="pbs-one", address="127.0.0.60", port=2600, user="flctl-pbs", environment=path) as sshd:
            sshd.account.empty_home()
            yield pbs, sshd
        sshd.account.end_processes()


def test_an_accounts_job_runs_as_that_account(account_server: tuple[PbsServer, Sshd], tmp_path: Path) -> None:
    pbs, sshd = account_server
    home = sshd.account.home
    sshd.account.file(home / "job.sh", "#!/bin/bash\n#PBS -o back\nid -un\npwd\n")
    with connected(site_of(sshd), road_to(tmp_path, sshd)) as connection:
        sent = connection.run(f"cd {home} && qsub job.sh")
        assert (sent.status, sent.stdout) == (0, "1.pbs-one\n"), sent.stderr
        pbs.wait_state("1.pbs-one", "F")
        others = connection.run("qselect -x -u root; qselect -x -u $(id -un)")
    assert others.stdout == "1.pbs-one\n"
    assert (home / "back").read_text() == f"flctl-pbs\n{home}\n"
    assert (home / "back").owner() == "flctl-pbs"


def test_times_are_told_in_the_zone_of_who_asks(desk: Desk) -> None:
    job = desk.submit("true\n")
    told = {
        zone: re.findall(r" ctime = (.*)", desk.run("qstat", "-x", "-f", job, TZ=zone).stdout)[0]
        for zone in ("UTC0", "XST-5:30")
    }
    moments = [time.strptime(text, "%a %b %d %H:%M:%S %Y") for text in told.values()]
    assert time.mktime(moments[1]) - time.mktime(moments[0]) == 5.5 * 3600
