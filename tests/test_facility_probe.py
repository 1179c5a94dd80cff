"""What `flctl site test` asks and what the answers mean: limits in one line, noise told apart, no answer lost."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flctl.facility import limits
from flctl.facility.findings import verdicts
from flctl.facility.local import LocalConnection
from flctl.facility.probe import (
    Want,
    around,
    bounded,
    in_login_shell,
    noise,
    questions,
    space_commands,
    space_left,
    trial_command,
)
from flctl.facility.profile import Budget, Environment, Login, Queue, Reservation, Scheduler, Shape, Site, Storage
from flctl.facility.scheduler import QueueSeen, listing, qstat, scheduler_of
from flctl.facility.shell import Answer, Program
from tests.ssh_campaigns import SshCampaign
from tests.ssh_sites import local_site, road_to
from tests.testbed.sshd import Sshd, remove

DATA = Path(__file__).parent / "data"
HOUR = 3600
NOW = 1_795_250_190.0
FRONTIER = {
    "batch": Queue(max_nodes=91, max_walltime=2 * HOUR),
    "extended": Queue(max_nodes=64, max_walltime=24 * HOUR),
    "debug": Queue(max_walltime=2 * HOUR),
}


def site(kind: str = "slurm", *, queues: dict[str, Queue] | None = None, **shape: object) -> Site:
    fields = {"nodes": 4, "walltime": 6 * HOUR, **shape}
    return Site(
        schema=1,
        name="frontier",
        login=Login(host="frontier.example.org", user="me"),
        scheduler=Scheduler(kind=kind, account="abc123"),  # type: ignore[arg-type]
        shapes={"prod": Shape(**fields)},  # type: ignore[arg-type]
        queues=FRONTIER if queues is None else queues,
        storage=Storage(work="/work", data="/data"),
    )


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ({"partition": "batch"}, ("4 nodes for 6:00:00: batch allows 2:00:00; use extended",)),
        ({"partition": "extended"}, ()),
        ({"partition": "unheard-of"}, ()),
        ({"partition": "batch,extended"}, ()),
        ({"partition": "extended", "nodes": 65}, ("65 nodes for 6:00:00: extended allows 64 nodes",)),
        ({"partition": "batch", "nodes": 100}, ("100 nodes for 6:00:00: batch allows 2:00:00 and allows 91 nodes",)),
        ({"partition": "extended", "qos": "debug"}, ("4 nodes for 6:00:00: debug allows 2:00:00",)),
    ],
)
def test_what_a_queue_does_not_allow_is_one_line_with_the_way_out(shape: dict[str, object], told: tuple[str]) -> None:
    assert limits.too_much(site(**shape), NOW) == told


def test_few_nodes_and_node_hours_have_limits_too() -> None:
    queues = {
        "prod": Queue(min_nodes=10, max_nodes=496),
        "debug": Queue(max_nodes=2, max_walltime=HOUR),
        "capacity": Queue(max_node_hours=20),
    }
    small = site("pbs", queues=queues, queue="prod", nodes=1, walltime=HOUR)
    assert limits.too_much(small, NOW) == ("1 node for 1:00:00: prod wants 10 nodes or more; use debug or capacity",)
    large = site("pbs", queues=queues, queue="capacity", nodes=10, walltime=4 * HOUR)
    assert limits.too_much(large, NOW) == ("10 nodes for 4:00:00: capacity allows 20 node-hours a job; use prod",)


def test_a_reservation_of_pbs_is_a_queue_of_its_own_with_limits_of_its_own() -> None:
    reserved = Reservation(name="R1234", end=NOW + 8 * HOUR)
    within = site("pbs", queue="batch", reservation=reserved)
    assert limits.too_much(within, NOW) == ()
    assert limits.too_much(within, NOW + 3 * HOUR), "it would not end within it, and takes the ordinary queue"
    assert limits.named(within, NOW) == "batch, reservation R1234"
    assert limits.named(within, NOW + 3 * HOUR) == "batch"


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        ((), ""),
        ((QueueSeen(name="batch", open=True),), ""),
        ((QueueSeen(name="batch", open=True, max_walltime=7200),), "4 nodes for 6:00:00: batch allows 2:00:00"),
        ((QueueSeen(name="other", open=True),), "there is no partition batch; there is: other"),
        ((QueueSeen(name="batch", open=False),), "batch takes no jobs now"),
        (
            (QueueSeen(name="batch", open=False), QueueSeen(name="extended", open=True, max_nodes=64)),
            "batch takes no jobs now; use extended",
        ),
        (
            (QueueSeen(name="batch", open=True, max_nodes=2), QueueSeen(name="extended", open=False)),
            "4 nodes for 6:00:00: batch allows 2 nodes",
        ),
    ],
)
def test_what_the_scheduler_itself_says_counts_too(seen: tuple[QueueSeen, ...], told: str) -> None:
    assert limits.too_much_there(site(partition="batch"), seen, NOW) == ((told,) if told else ())


def test_each_of_several_partitions_must_be_there_for_slurm_refuses_the_job_otherwise() -> None:
    seen = (QueueSeen(name="batch", open=True), QueueSeen(name="extended", open=True))
    assert limits.too_much_there(site(partition="batch,extended"), seen, NOW) == ()
    told = ("there is no partition bach; there is: batch, extended",)
    assert limits.too_much_there(site(partition="bach,extended"), seen, NOW) == told


def capture(path: str) -> Answer:
    """A recorded answer: command, stdout, stderr, exit status."""
    text = (DATA / path).read_text()
    match = re.search(r"--- stdout\n(.*?)--- stderr\n(.*?)--- exit (\d+)", text, re.DOTALL)
    assert match is not None
    return Answer(status=int(match[3]), stdout=match[1].rstrip("\n"), stderr=match[2].rstrip("\n"))


GOOD = {
    **dict.fromkeys(("who", "work", "data", "tools"), Answer(status=0, stdout="fine", stderr="")),
    "clock": Answer(status=0, stdout=f"{NOW:.0f}", stderr=""),
    "seal": Answer(status=0, stdout="3.6.8", stderr=""),
    "version": Answer(status=0, stdout="slurm 22.05.8", stderr=""),
    "queue": Answer(status=0, stdout="", stderr=""),
    "space": Answer(status=0, stdout="/dev/x 1000000 1000 900000 1% /work", stderr=""),
    "inodes": Answer(status=0, stdout="/dev/x 1000000 1000 900000 1% /work", stderr=""),
    "python": Answer(status=0, stdout="torch 2.9.0 transformers 5.0.0", stderr=""),
}
WANT = Want(size=1_000_000, files=100)


def found(answers: dict[str, Answer], here: Site | None = None, want: Want = WANT) -> dict[str, tuple[str, str, int]]:
    """Result, detail and exit code of each check by its name."""
    here = here or site()
    scheduler = scheduler_of(here, "/work/payload")
    checks = verdicts(here, scheduler, GOOD | answers, work="/work", data="/data", now=NOW, want=want)
    return {check.name: (check.result, check.detail, check.exit_code) for check in checks}


def test_a_site_that_has_everything_is_ok() -> None:
    checks = found({}, site(partition="extended"))
    assert {check[0] for check in checks.values()} == {"ok"}
    assert checks["partition"][1] == "extended takes 4 nodes for 6:00:00"


def test_accounting_that_is_not_there_is_a_warning_and_one_that_may_not_be_asked_is_none() -> None:
    here = site(partition="extended")
    assert found({"accounting": capture("slurm/sacct_disabled.txt")}, here)["accounting"][:2] == (
        "warn",
        "there is none",
    )
    assert found({}, here)["accounting"][0] == "ok"


def test_an_account_that_is_not_among_the_users_fails_and_no_list_of_them_does_not() -> None:
    here, yours = site(partition="extended"), Answer(status=0, stdout="xyz789\nabc124", stderr="")
    assert found({"accounts": yours}, here)["account"] == ("fail", "abc123 is not among yours: abc124, xyz789", 3)
    assert found({"accounts": replace(yours, stdout="abc123")}, here)["account"][:2] == ("ok", "abc123")
    assert found({"accounts": capture("slurm/sacctmgr_disabled.txt")}, here)["account"][0] == "ok"


def test_the_partition_is_held_against_the_profile_and_against_slurm() -> None:
    told = found({}, site(partition="batch"))["partition"]
    assert told == ("fail", "4 nodes for 6:00:00: batch allows 2:00:00; use extended", 3)
    unlisted = found({"queues": capture("slurm/sinfo.txt")}, site(partition="extended"))["partition"]
    assert unlisted == ("fail", "there is no partition extended; there is: batch, short", 3)
    short = site(partition="short", queues={}, nodes=1)
    assert (
        found({"queues": capture("slurm/sinfo.txt")}, short)["partition"][1]
        == "1 node for 6:00:00: short allows 0:05:00"
    )
    down = found({"queues": capture("slurm/sinfo_no_controller.txt")}, site(partition="extended"))["partition"]
    assert down[0] == "warn"


def test_torque_is_named_as_not_supported(tmp_path: Path) -> None:
    """Torque's qstat prints its version on stderr; Slurm's imitation of qstat has no version at all."""
    here = site("pbs", queues={}, queue="batch")
    for said, told in (
        ("Version: 6.1.2\nCommit: 661e0925", "this is Torque"),
        ("Unknown option: version", "not that of"),
    ):
        program = tmp_path / "qstat"
        program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{said}' >&2\n")
        program.chmod(0o755)
        command = f"PATH={tmp_path}:$PATH; {scheduler_of(here, '/p').version()}"
        result, detail, code = found(ask(tmp_path, {"version": bounded(command)}), here)["scheduler"]
        assert (result, code) == ("fail", 3)
        assert told in detail


def test_a_refused_dry_run_fails_and_an_estimate_is_called_one() -> None:
    here = site(partition="extended")
    refused = found({"trial": capture("slurm/sbatch_test_partition.txt")}, here)["dry-run submit"]
    assert refused[0] == "fail"
    assert refused[2] == 6
    assert "invalid partition" in refused[1]
    taken = found({"trial": capture("slurm/sbatch_test_ok.txt")}, here)["dry-run submit"]
    assert taken[0] == "ok"
    assert "estimate: starts" in taken[1]
    assert found({"trial": capture("slurm/sbatch_test_no_controller.txt")}, here)["dry-run submit"][0] == "warn"


def test_too_little_room_is_a_budget_and_no_number_of_inodes_is_no_check() -> None:
    here = site(partition="extended")
    want = Want(size=10**12, files=10**7)
    checks = found({}, here, want)
    assert (checks["free space"][0], checks["free space"][2]) == ("fail", 9)
    assert (checks["inodes"][0], checks["inodes"][2]) == ("fail", 9)
    lustre = Answer(status=0, stdout="10.0.0.1@tcp:/lus 0 0 0 - /lustre/orion", stderr="")
    assert "inodes" not in found({"inodes": lustre}, here)


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("tmpfs 16384 20 16364 1% /run", 16364),
        ("//server/a share 16384 20 16364 1% /mnt/a b", 16364),
        ("/dev/sdb1 0 0 0 - /btrfs", None),
        ("x 0 0 0 0% /gpfs", None),
        ("df: no such file", None),
        ("/dev/sda1 16384 20 -7 101% /", 0),
        (f"x 16384 20 {'9' * 5000} 1% /", None),
        ("x ١٦ ٢ ٩ 1% /", None),
    ],
)
def test_what_df_tells_is_read_whatever_the_names(line: str, left: int | None) -> None:
    header = "Filesystem 1024-blocks Used Available Capacity Mounted on\n"
    assert space_left(Answer(status=0, stdout=header + line, stderr="")) == left


def test_a_full_file_system_is_told_as_that_and_its_room_with_it() -> None:
    said = Answer(status=2, stdout="", stderr="sh: 1: cannot create .flctl-test: No space left on device")
    none = Answer(status=0, stdout="/dev/x 1000000 1000000 0 100% /work", stderr="")
    checks = found({"work": said, "inodes": none}, site(partition="extended"))
    assert [(checks[name][0], checks[name][2]) for name in ("work folder", "inodes")] == [("fail", 9)] * 2
    assert checks["free space"][0] == "ok"
    said = replace(said, stderr="mkdir: cannot create directory '/work': Permission denied")
    assert found({"work": said}, site(partition="extended"))["work folder"][2] == 3


def test_files_that_are_purged_before_the_plan_ends_are_a_warning() -> None:
    here = replace(site(partition="extended"), storage=Storage(work="/work", data="/data", purge_days=14))
    assert "purge" not in found({}, here)
    assert found({}, here, replace(WANT, seconds=20 * 86400))["purge"][0] == "warn"


def test_modules_that_fail_without_saying_so_fail() -> None:
    """Tcl modules 3.2 prints its error and exits with 0."""
    here = replace(site(partition="extended"), environment=Environment(modules=("cuda/99",)))
    said = "ModuleCmd_Load.c(213):ERROR:105: Unable to locate a modulefile for 'cuda/99'"
    assert found({"modules": Answer(status=0, stdout="", stderr=said)}, here)["modules"][0] == "fail"
    assert found({"modules": Answer(status=0, stdout="", stderr="")}, here)["modules"][:2] == (
        "ok",
        "cuda/99 can be loaded",
    )


def test_words_of_a_site_are_one_printable_capped_line() -> None:
    here = replace(site(partition="extended"), budget=Budget(balance="saldo -b", unit="core-hours"))
    evil = Answer(
        status=0, stdout="\x1b]0;owned\x07account  \x1b[31mleft\n" + "x" * 5000 + "\nabc123 12\x00 000\n", stderr=""
    )
    detail = found({"balance": evil}, here)["balance"][1]
    assert detail.startswith("in core-hours | account left | xxx")
    assert detail.endswith("abc123 12 000")
    assert detail.isprintable()
    assert len(detail) < 400
    broken = found({"balance": Answer(status=127, stdout="", stderr="bash: saldo: not found")}, here)["balance"]
    assert broken[0] == "warn"


def test_a_clock_that_is_off_is_a_warning() -> None:
    late = Answer(status=0, stdout=f"{NOW - 40:.0f}", stderr="")
    assert found({"clock": late}, site(partition="extended"))["clock"][:2] == ("warn", "-40 s from ours")


@pytest.mark.parametrize("text", ["", "Thu Jan 1", "²", "9" * 5000])
def test_a_clock_that_tells_no_time_is_not_within_ten_seconds_of_ours(text: str) -> None:
    told = Answer(status=0, stdout=text, stderr="")
    assert found({"clock": told}, site(partition="extended"))["clock"][0] == "warn"


@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_absurd_numbers_of_a_scheduler_are_no_defect_of_ours(digits: int) -> None:
    """Python refuses to read more than 4300 digits, floats end at 308, clocks before."""
    many = "9" * digits
    slurm_site, pbs_site = site(partition="extended"), site("pbs", queue="extended")
    queues = {"Queue": {"extended": {"resources_max": {"nodect": float("inf"), "walltime": many}}}}
    for here, answers in (
        (slurm_site, {"trial": Answer(status=0, stdout="", stderr=f"sbatch: Job 1 to start at {many} using 1")}),
        (slurm_site, {"queues": Answer(status=0, stdout=f"extended|up|{many}|1-{many}", stderr="")}),
        (slurm_site, {"queues": Answer(status=0, stdout=f"extended|up|{many}|1-infinite", stderr="")}),
        (slurm_site, {"queue": Answer(status=0, stdout="|".join([many] * 8), stderr="")}),
        (pbs_site, {"queues": Answer(status=0, stdout=json.dumps(queues), stderr="")}),
    ):
        assert all(detail.isprintable() for _, detail, _ in found(answers, here).values())
    assert listing.duration(many) is None
    assert qstat.duration(many) is None
    year_zero, epoch = "Thu Jan  1 00:00:00 0000", "Thu Jan  1 00:00:00 1970"
    job = "Job Id: 1.s\n    Job_Name = f\n    job_state = F\n    Exit_status = {}\n    stime = {}\n"
    assert qstat.jobs(job.format(many, year_zero))[0].started_at is None
    assert qstat.jobs(job.format(1, epoch))[0].started_at == 0.0


def ask(tmp_path: Path, commands: dict[str, str]) -> dict[str, Answer]:
    """What a real shell of this machine says."""
    program = Program.of(commands)
    output = LocalConnection(local_site(), road_to(tmp_path)).run(program.script, timeout=30)
    return program.answers(output.stdout, commands, site="home")


def test_a_command_that_hangs_takes_only_its_own_answer_with_it(tmp_path: Path) -> None:
    began = time.monotonic()
    answers = ask(tmp_path, {"hangs": bounded("sleep 60", 1), "answers": bounded("echo 'it'\"'s\" here; exit 3")})
    assert answers["hangs"].status == 124
    assert (answers["answers"].status, answers["answers"].stdout) == (3, "it's here\n")
    assert time.monotonic() - began < 20


def test_space_is_told_where_the_folder_is_not_made_yet(tmp_path: Path) -> None:
    answers = ask(tmp_path, space_commands(str(tmp_path / "not" / "yet 'made'")))
    assert space_left(answers["space"]) is not None
    assert not (tmp_path / "not").exists()


def test_a_command_of_the_sites_own_is_heard_without_its_login_shells_words(tmp_path: Path) -> None:
    (tmp_path / ".bash_profile").write_text("echo welcome; echo oops >&2; export LEFT=17\n")
    answers = ask(tmp_path, {"told": f"HOME={tmp_path} {in_login_shell('echo $LEFT hours')}"})
    assert answers["told"].stdout == "17 hours\n"
    assert answers["told"].stderr == ""


@pytest.mark.parametrize("stream", ["1", "2"])
def test_a_command_of_the_sites_own_that_says_too_much_takes_no_other_answer_with_it(
    tmp_path: Path, stream: str
) -> None:
    talker = tmp_path / "saldo"
    talker.write_text(
        f"#!/bin/sh\n{{ head -c 20000000 /dev/zero | tr '\\0' x; echo; echo 12 left; }} >&{stream}\nexit 3\n"
    )
    talker.chmod(0o755)
    answers = ask(tmp_path, {"balance": bounded(in_login_shell(str(talker))), "after": "echo there"})
    assert (answers["balance"].status, answers["balance"].stdout.splitlines()[-1]) == (3, "12 left")
    assert answers["after"].stdout.strip() == "there"


def test_a_dry_run_that_hangs_leaves_no_script_behind(tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\nsleep 60\n")
    (tmp_path / "sbatch").chmod(0o755)
    command = trial_command(scheduler_of(site(), "/work/payload"), "#!/bin/sh\n")
    folder = re.search(r"mkdir (/tmp/flctl-\w+)", command)
    assert folder is not None
    assert " timeout -k 5 120)" in command
    hurried = f"export PATH={tmp_path}:$PATH; {command.replace('timeout -k 5 120', 'timeout -k 5 1')}"
    assert ask(tmp_path, {"trial": hurried})["trial"].status == 124
    assert not Path(folder[1]).exists()


def test_what_stands_around_the_answers_is_noise_and_nothing_else_is() -> None:
    program = Program.of({"a": "true"})
    frame = f"\n{program.nonce} out a\nanswer\n{program.nonce} err a 0\n\n{program.nonce} end a\n"
    assert around(frame, program.nonce) == ""
    assert around(f"Welcome{frame}", program.nonce) == "Welcome"
    assert around(f"Welcome{frame}bye\n", program.nonce) == "Welcome bye"
    quiet = {"noise": Answer(status=0, stdout="", stderr="")}
    assert noise("", "", quiet).result == "ok"
    assert (noise("Welcome", "", quiet).result, "by hand cannot" in noise("Welcome", "", quiet).fix) == ("warn", True)
    assert (noise("", "Welcome", quiet).result, "by hand cannot" in noise("", "Welcome", quiet).fix) == ("warn", False)


def test_every_answer_that_a_verdict_needs_is_asked_for() -> None:
    here = replace(site(partition="extended"), budget=Budget(balance="saldo -b"))
    scheduler = scheduler_of(here, "/p")
    asked = questions(here, scheduler, work="/work", data="/data", script="#!/bin/sh\n")
    assert asked.keys() >= GOOD.keys() | {"accounting", "accounts", "queues", "trial", "balance", "noise"}


@pytest.fixture
def noisy(tmp_path: Path) -> Iterator[SshCampaign]:
    """A campaign of one site, whose account's shells can be made to print."""
    with Sshd(name="plan-noisy", address="127.0.0.90", port=2900, user="flctl-plan") as server:
        server.account.empty_home()
        campaign = SshCampaign(tmp_path, server)
        try:
            yield campaign
        finally:
            campaign.clear()
            server.account.end_processes()
    remove("plan-noisy")


def results(campaign: SshCampaign, *arguments: str, code: int) -> dict[str, dict[str, str]]:
    (report,) = campaign.json("site", "test", *arguments, code=code)["data"]["sites"]
    assert report["logins"] == 1
    return {check["name"]: check for check in report["checks"]}


def test_a_login_shell_that_prints_disturbs_nothing(noisy: SshCampaign) -> None:
    account = noisy.servers["plan-noisy"].account
    account.file(account.home / ".profile", "echo 'HOME=/nowhere is \x1b[31mred'; echo aside >&2\n")
    mark = noisy.servers["plan-noisy"].mark()
    checks = results(noisy, code=0)
    assert len(checks) >= 12
    assert {name for name, check in checks.items() if check["result"] != "ok"} == set()
    assert "HOME=/nowhere is red aside" in checks["shell noise"]["detail"]
    assert "SHA256:" in checks["host key"]["detail"]
    assert noisy.servers["plan-noisy"].attempts(mark).logins == 1
    assert noisy.json("round")["data"]["done"]


def test_a_shell_that_prints_for_every_command_is_named_and_the_rest_still_asked(noisy: SshCampaign) -> None:
    account = noisy.servers["plan-noisy"].account
    results(noisy, code=0)  # batch.py is there now
    account.file(account.home / ".bashrc", "echo Message of the day; echo aside >&2\n")
    checks = results(noisy, "--batch", code=0)
    assert {name for name, check in checks.items() if check["result"] != "ok"} == {"shell noise"}
    assert "Message of the day aside" in checks["shell noise"]["detail"]
    assert "torch" in checks["python in a job"]["detail"]
    runs = noisy.remote("plan-noisy") / "runs"
    assert not runs.exists() or list(runs.iterdir()) == [], "the job's folder is gone"


def test_an_unknown_host_key_is_told_before_any_login(noisy: SshCampaign) -> None:
    noisy.profile("plan-noisy", host_keys=[])
    server = noisy.servers["plan-noisy"]
    mark = server.mark()
    answer = noisy.json("site", "test", code=12)
    assert "flctl site trust plan-noisy SHA256:" in answer["errors"][0]["hint"]
    assert server.attempts(mark).logins == 0
    server.stop()
    assert "address: 127.0.0.90" in noisy.json("site", "test", code=5)["errors"][0]["message"]


def test_a_transfer_host_and_a_jump_host_are_looked_at_too(noisy: SshCampaign) -> None:
    server = noisy.servers["plan-noisy"]
    key = server.client_key.with_suffix(".pub").read_text()
    with (
        Sshd(name="plan-files", address="127.0.0.91", port=2901, user="flctl-plan") as files,
        Sshd(name="plan-gate", address="127.0.0.92", port=2902, user="flctl-plan-gate") as gate,
    ):
        files.authorize(key)
        gate.authorize(key)
        profile = noisy.place / "sites" / "plan-noisy.toml"
        table = f'host = "{files.address}"\nport = {files.port}\nhost_keys = ["{files.host_key_fingerprint}"]\n'
        profile.write_text(profile.read_text() + f"\n[transfer]\n{table}")
        (report,) = noisy.json("site", "test")["data"]["sites"]
        checks = {check["name"]: check["detail"] for check in report["checks"]}
        assert report["logins"] == 2
        assert "port 2901 answers" in checks["transfer host's address"]
        assert files.host_key_fingerprint in checks["transfer host's key"]
        assert "[127.0.0.91]:2901" in checks["transfer"]
        noisy.profile("plan-noisy", proxy_jump=f"{gate.user}@{gate.address}:{gate.port}")
        known = noisy.place / "known_hosts"
        known.write_text(known.read_text() + gate.known_hosts_line)
        (report,) = noisy.json("site", "test")["data"]["sites"]
        checks = {check["name"]: check["detail"] for check in report["checks"]}
        assert report["logins"] == 2, "the jump host's is one"
        assert "port 2902 answers" in checks["jump host's address"]
        assert server.host_key_fingerprint in checks["host key"]
        assert gate.attempts().logins >= 1
    remove("plan-files")
    remove("plan-gate")
