"""What Slurm knows besides states: times, hopeless jobs, partitions, estimates, accounts; as a real one tells it."""

import pytest

from flctl.facility.profile import Queue, Reservation, Scheduler, Shape, Site
from flctl.facility.scheduler import Activity, Estimate, QueryFailed, QueueSeen, Seen, scheduler_of, together
from flctl.facility.scheduler.listing import duration
from flctl.facility.scheduler.slurm import Slurm
from tests.test_facility_scheduler import capture

HOUR = 3600


def a_slurm(**scheduler: object) -> Slurm:
    table = Scheduler(kind="slurm", **scheduler)  # type: ignore[arg-type]
    site = Site(schema=1, name="here", scheduler=table, shapes={"prod": Shape()}, queues={"batch": Queue()})
    slurm = scheduler_of(site, "/p")
    assert isinstance(slurm, Slurm)
    return slurm


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:00", 0),
        ("0:28", 28),
        ("59:59", 3599),
        ("1:00:00", 3600),
        ("1-02:03:04", 93784),
        ("30-00:00:00", 30 * 86400),
        ("93784", 93784),
        ("12.5", 12.5),
        ("", None),
        ("INVALID", None),
        ("N/A", None),
        ("infinite", None),
        ("-1", None),
        ("1:2", None),
        ("١٢", None),
    ],
)
def test_a_duration_is_read_in_every_way_in_which_slurm_writes_it(text: str, seconds: float | None) -> None:
    assert duration(text) == seconds


def test_the_listing_counts_what_a_job_ran() -> None:
    answer = capture("squeue_all")
    jobs = {job.id: job for job in a_slurm().seen(answer.status, answer.stdout, answer.stderr)}
    assert (jobs["1009"].state, jobs["1009"].elapsed) == ("RUNNING", 6)
    assert (jobs["1005"].state, jobs["1005"].elapsed) == ("SUSPENDED", 3), "30 s less those of its suspension"
    assert (jobs["1003"].state, jobs["1003"].elapsed) == ("TIMEOUT", 28)
    assert (jobs["1004"].state, jobs["1004"].elapsed) == ("CANCELLED", 3)
    assert {job.elapsed for job in jobs.values() if job.activity == Activity.WAITING} == {None}


def test_accounting_counts_it_too() -> None:
    assert "ElapsedRaw" in (a_slurm().accounting(["fa"]) or "")
    (job,) = a_slurm().accounted(0, "17|TIMEOUT|1795250190|1795250190|1795250900|710|0:0|k|fa\n", "") or ()
    assert job.elapsed == 710


def test_only_the_job_whose_words_say_so_can_never_run() -> None:
    answer = capture("squeue_all")
    jobs = a_slurm().seen(answer.status, answer.stdout, answer.stderr)
    assert {job.name: job.never for job in jobs if job.never} == {
        "depnever": "DependencyNeverSatisfied",
        "toolong": "PartitionTimeLimit",
    }
    reasons = {job.reason for job in jobs if job.activity == Activity.WAITING and not job.never}
    assert reasons == {
        *("Resources", "Priority", "BeginTime", "Dependency", "JobHeldUser"),
        *("PartitionNodeLimit", "PartitionConfig"),  # also what a job gets whose nodes are down
    }


def test_where_a_job_may_choose_its_partition_the_limit_of_one_does_not_count() -> None:
    answer = capture("squeue_all")
    jobs = a_slurm(partition="short,batch").seen(answer.status, answer.stdout, answer.stderr)
    assert [job.never for job in jobs if job.never] == ["DependencyNeverSatisfied"]


def never(reason: str, state: str = "PENDING") -> str:
    (job,) = a_slurm().seen(0, f"17|{state}|1|N/A|N/A|0:00|{reason}|fa\n", "")
    return job.never


HOPELESS = """
    DependencyNeverSatisfied BadConstraints PartitionTimeLimit ReservationDeleted InvalidAccount InvalidQOS
    AccountNotAllowed QOSNotAllowed MaxMemPerLimit QOSMaxWallDurationPerJobLimit AssocMaxWallDurationPerJobLimit
    QOSMaxNodePerJobLimit QOSMaxCpuPerJobLimit QOSMaxGRESPerJob QOSMaxGRESPerNode AssocMaxCpuMinutesPerJobLimit
    AssocMaxNodePerJobLimit QOSMinGRES QOSMinNode QOSMinCpuNotSatisfied
"""

PATIENT = """
    None Resources Priority Dependency BeginTime Licenses Reservation Cleaning JobHeldUser JobHeldAdmin
    PartitionDown PartitionInactive PartitionNodeLimit PartitionConfig NodeDown QOSMaxJobsPerUserLimit
    QOSMaxNodePerUserLimit QOSMaxGRESPerUser QOSMaxSubmitJobPerUserLimit MaxNodePerAccount MaxGRESPerAccount
    AssocMaxJobsLimit AssocGrpCPUMinutesLimit AssocGrpNodeLimit QOSGrpNodeLimit QOSGrpCPUMinutesLimit SomethingNew
"""

SENTENCES = (
    "ReqNodeNotAvail, Reserved for maintenance",
    "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
)


@pytest.mark.parametrize("reason", HOPELESS.split())
def test_a_job_that_asks_for_more_than_one_job_may_have_can_never_run(reason: str) -> None:
    assert never(reason) == reason
    assert never(reason, "RUNNING") == never(reason, "FAILED") == ""


@pytest.mark.parametrize("reason", [*PATIENT.split(), *SENTENCES])
def test_what_time_other_jobs_or_a_persons_release_may_mend_is_waited_for(reason: str) -> None:
    assert never(reason) == ""


# ---- partitions ----


def test_real_partitions_are_read() -> None:
    answer = capture("sinfo")
    assert answer.command in (a_slurm().queues() or "")
    assert a_slurm().queues_seen(answer.status, answer.stdout, answer.stderr) == (
        QueueSeen(name="batch", open=True, max_walltime=24 * HOUR, min_nodes=1, max_nodes=None),
        QueueSeen(name="short", open=True, max_walltime=300, min_nodes=1, max_nodes=1),
    )
    down = capture("sinfo_down")
    assert [queue.open for queue in a_slurm().queues_seen(0, down.stdout, "")] == [True, False]


@pytest.mark.parametrize(
    ("line", "walltime", "least", "most"),
    [
        ("p|up|infinite|1-infinite", None, 1, None),
        ("p|up|infinite|infinite", None, None, None),
        ("p|up|30:00|4-64", 1800, 4, 64),
        ("p|up|7-00:00:00|2", 7 * 24 * HOUR, 2, 2),
    ],
)
def test_limits_of_a_partition(line: str, walltime: int | None, least: int | None, most: int | None) -> None:
    (queue,) = a_slurm().queues_seen(0, line + "\n", "")
    assert (queue.max_walltime, queue.min_nodes, queue.max_nodes) == (walltime, least, most)


@pytest.mark.parametrize(
    "text", ["Welcome!\n", "p|up|1:00\n", "p|up|1:00|many\n", "PARTITION|AVAIL|TIMELIMIT|JOB_SIZE\n"]
)
def test_text_that_is_no_list_of_partitions_is_a_failed_query(text: str) -> None:
    with pytest.raises(QueryFailed):
        a_slurm().queues_seen(0, text, "")


def test_a_sinfo_that_could_not_ask_is_a_failed_query() -> None:
    answer = capture("sinfo_no_controller")
    with pytest.raises(QueryFailed, match="Unable to contact"):
        a_slurm().queues_seen(answer.status, answer.stdout, answer.stderr)


# ---- dry runs ----


def test_a_real_dry_run_tells_a_start() -> None:
    """The capture was made in Prague; the moment is in Unix seconds all the same."""
    answer = capture("sbatch_test_ok")
    assert answer.command.replace("j.sh", "/a/j.sh") == a_slurm().trial("/a/j.sh")
    assert a_slurm().estimate(answer.status, answer.stdout, answer.stderr) == Estimate(start=1_795_273_659)


REFUSED = {
    "sbatch_test_nodes": "allocation failure: Requested node configuration is not available",
    "sbatch_test_partition": "sbatch: error: invalid partition specified: nope; "
    "allocation failure: Invalid partition name specified",
    "sbatch_test_reservation": "allocation failure: Requested reservation is invalid",
    "sbatch_test_no_file": "sbatch: error: Unable to open file nofile.sh",
}


@pytest.mark.parametrize(("name", "words"), REFUSED.items())
def test_a_refusal_of_a_real_dry_run_is_told_in_its_words(name: str, words: str) -> None:
    answer = capture(name)
    assert a_slurm().estimate(answer.status, answer.stdout, answer.stderr) == Estimate(refusal=words)


@pytest.mark.parametrize(
    ("status", "stderr"),
    [
        (1, capture("sbatch_test_no_controller").stderr),
        (0, ""),
        (0, "sbatch: Job 7 to start at 2026-11-21T15:02:42 using 1 processors on nodes n in partition p\n"),
        (255, "Connection reset by peer\n"),
        (127, "sh: 1: sbatch: not found\n"),
    ],
)
def test_a_dry_run_that_says_nothing_is_a_failed_query(status: int, stderr: str) -> None:
    """A start in local time, whose zone only the site knows, is one of them."""
    with pytest.raises(QueryFailed):
        a_slurm().estimate(status, "", stderr)


# ---- accounts ----


def test_without_slurmdbd_nobody_can_tell_the_accounts() -> None:
    answer = capture("sacctmgr_disabled")
    assert answer.command == a_slurm().accounts()
    assert a_slurm().accounts_seen(answer.status, answer.stdout, answer.stderr) is None
    assert a_slurm().accounts_seen(127, "", "sh: 1: sacctmgr: not found\n") is None
    assert a_slurm(accounting=False).accounts() is None


def test_the_accounts_of_all_associations_are_told_once() -> None:
    assert a_slurm().accounts_seen(0, "proj_b\nproj_a\nproj_b\n", "") == ("proj_a", "proj_b")
    assert a_slurm().accounts_seen(0, "", "") == ()


@pytest.mark.parametrize(("status", "stdout"), [(1, ""), (0, "Welcome to the machine!\n"), (1, "proj_a\n")])
def test_accounts_that_could_not_be_asked_for_are_a_failed_query(status: int, stdout: str) -> None:
    with pytest.raises(QueryFailed):
        a_slurm().accounts_seen(status, stdout, "sacctmgr: error: slurmdbd: Connection refused")


# ---- reservations ----


@pytest.mark.parametrize(
    ("now", "holds"),
    [(999, False), (1000, True), (1400, True), (1401, False), (2000, False), (3000, False)],
)
def test_a_reservation_holds_a_job_that_would_end_within_it(now: float, holds: bool) -> None:
    assert Reservation(name="r", start=1000, end=2000).holds(now, 600) == holds


def test_a_window_open_on_a_side_has_no_edge_there() -> None:
    assert Reservation(name="r", end=2000).holds(0, 600)
    assert Reservation(name="r", start=1000).holds(1e12, 600)
    assert Reservation(name="r").holds(0, 600)
    assert not Reservation(start=1000, end=2000).holds(1000, 600), "without a name there is none"


# ---- accounting, as a real one told it ----

NAMES = ["fdone", "fbad", "fmine", "froots", "flimit", "fpend", "farr", "fheld", "fheldgone"]


def rows(name: str) -> list[Seen]:
    answer = capture(name)
    return list(a_slurm().accounted(answer.status, answer.stdout, answer.stderr) or ())


def test_real_rows_of_accounting_are_read() -> None:
    """Of jobs of known ids every row; who cancelled one is known by his uid; others' arrays are not taken for ours."""
    found = {job.id: (job.name, job.state, job.activity, job.cancelled_by) for job in rows("sacct_by_id")}
    assert found == {
        "5022": ("fheldgone", "CANCELLED", Activity.ENDED, 1035),
        "5023": ("fdone", "COMPLETED", Activity.ENDED, None),
        "5024": ("fbad", "FAILED", Activity.ENDED, None),
        "5025": ("fmine", "CANCELLED", Activity.ENDED, 1035),
        "5026": ("froots", "CANCELLED", Activity.ENDED, 0),
        "5027": ("flimit", "TIMEOUT", Activity.ENDED, None),
        "5028": ("fpend", "PENDING", Activity.WAITING, None),
        "5031": ("fheld", "PENDING", Activity.WAITING, None),
        "5029_1": ("farr", "RUNNING", Activity.ACTIVE, None),
        "5029_[2-3%1]": ("farr", "PENDING", Activity.WAITING, None),
    }
    assert {job.cluster for job in rows("sacct_by_id")} == {"karolina2"}
    (failed,) = [job for job in rows("sacct_by_id") if job.name == "fbad"]
    assert (failed.reason, failed.submitted_at, failed.elapsed) == ("3:0", 1795285686.0, 0.0)


def test_without_ids_accounting_shows_only_what_was_once_eligible() -> None:
    assert {job.name for job in rows("sacct_rows")} == {*NAMES} - {"fheld", "fheldgone"}
    assert rows("sacct_none") == []


def test_of_two_rows_of_an_id_and_name_the_later_counts_and_of_two_names_each() -> None:
    """-D shows a requeued job once for each time, and an id of before the controller lost its state."""
    text = "17|REQUEUED|5|5|6|1|0:0|k|fa\n17|COMPLETED|7|7|9|2|0:0|k|fa\n17|RUNNING|8|8|Unknown|1|0:0|k|fb\n"
    for lines in (text.splitlines(keepends=True), reversed(text.splitlines(keepends=True))):
        found = {job.name: (job.state, job.submitted_at) for job in a_slurm().accounted(0, "".join(lines), "") or ()}
        assert found == {"fa": ("COMPLETED", 7.0), "fb": ("RUNNING", 8.0)}


def test_accounting_is_asked_by_id_where_all_are_known_and_no_other_word_gets_into_the_command() -> None:
    ids = capture("sacct_by_id").command.split(" -j ")[1].split()[0].split(",")
    captured = capture("sacct_by_id").command.replace("-X", "-X -D").replace(" --format", ",allocation --format")
    assert a_slurm().accounting(NAMES, ids) == captured
    by_time = capture("sacct_rows").command.replace("-X", "-X -D")
    assert a_slurm().accounting(NAMES) == by_time
    for bad in (None, "", "17; id", "$(id)", "17\n", "-1", "17_4", "١٧", "4711.pbs"):
        assert a_slurm().accounting(NAMES, [bad, *ids[1:]]) == by_time, bad


@pytest.mark.parametrize("name", ["sacct_no_slurmdbd", "sacct_no_database"])
def test_accounting_that_is_down_is_a_failed_query(name: str) -> None:
    with pytest.raises(QueryFailed, match="sacct ended with status 1"):
        rows(name)


def test_real_associations_are_read() -> None:
    answer = capture("sacctmgr_accounts")
    assert answer.command == a_slurm().accounts()
    assert a_slurm().accounts_seen(answer.status, answer.stdout, answer.stderr) == ("testbed",)
    down = capture("sacctmgr_no_slurmdbd")
    with pytest.raises(QueryFailed):
        a_slurm().accounts_seen(down.status, down.stdout, down.stderr)


def test_held_jobs_arrays_and_names_of_two_lines_of_others_do_not_hide_ours() -> None:
    answer = capture("squeue_with_others")
    jobs = {job.id: job for job in a_slurm().seen(answer.status, answer.stdout, answer.stderr)}
    assert len(jobs) == 30
    assert (jobs["5006"].name, jobs["5007"].name) == ("two\nlines", "a,fself,b|c")
    assert (jobs["5029_[2-3%1]"].name, jobs["5029_[2-3%1]"].activity) == ("farr", Activity.WAITING)
    assert (jobs["5019"].state, jobs["5019"].reason) == ("CANCELLED", "JobHeldUser")


def test_what_accounting_adds_to_a_queue() -> None:
    """The queue tells of a job that it shows; who cancelled it only accounting knows."""
    slurm = a_slurm()
    queue = slurm.seen(0, "17|CANCELLED|1|1|2|0:01|None|fa\n18|RUNNING|1|1|N/A|0:01|None|fb\n", "")
    text = "17|CANCELLED by 0|1|1|2|1|0:0|k|fa\n18|FAILED|1|1|2|1|1:0|k|fb\n16|FAILED|1|1|2|1|0:0|k|fb\n"
    past = slurm.accounted(0, text + "19|TIMEOUT|1|1|2|1|0:0|k|fc\n", "") or ()
    found = [(job.id, job.state, job.cluster, job.cancelled_by) for job in together(queue, past)]
    assert found == [("17", "CANCELLED", "k", 0), ("18", "RUNNING", "k", None), ("19", "TIMEOUT", "k", None)]
