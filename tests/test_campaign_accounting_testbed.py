"""Campaigns at a site with accounting, for real: its rows come late, not at all for a while, and know who cancelled."""

import time
from collections.abc import Iterator

import pytest

from flctl.records import token_of
from tests.federation import Federation
from tests.test_cli_round_testbed import killed
from tests.testbed import Testbed
from tests.testbed.accounting import Accounting
from tests.testbed.slurm import Slurm as Cluster

WINDOW = 20


@pytest.fixture
def bed(testbed: Testbed) -> Iterator[Testbed]:
    testbed.reset()
    yield testbed
    testbed.user.end_processes()


@pytest.fixture
def cluster(bed: Testbed) -> Iterator[Cluster]:
    """Karolina's, which soon forgets a job that ended."""
    cluster = bed.facilities["karolina"].slurm
    cluster.remember(2)
    yield cluster
    cluster.command("scontrol", "update", "PartitionName=qgpu", "State=UP")


@pytest.fixture
def accounting(cluster: Cluster) -> Accounting:
    assert cluster.accounting is not None
    return cluster.accounting


def tick(federation: Federation) -> dict[str, object]:
    """One tick, as cron does it; the run as it is then."""
    federation.json("campaign", "tick", code=None)
    time.sleep(0.5)
    return federation.run("karolina")


def start(federation: Federation, cluster: Cluster, *, waits: bool) -> str:
    """A campaign with one job: it hangs, or (`waits`) its partition is down. The job's id."""
    if waits:
        cluster.command("scontrol", "update", "PartitionName=qgpu", "State=DOWN")
    assert federation.flctl("campaign", "start", "--rounds", "1", "--sites", "karolina").returncode == 0
    federation.wait(lambda: tick(federation).get("stage") in ("queued", "running"))
    job = str(federation.run("karolina")["job"]["id"])
    if not waits:
        cluster.wait_state(job, "RUNNING")
        federation.wait(lambda: federation.jobs_started("karolina"))
    return job


def rows(cluster: Cluster, federation: Federation, job: str) -> str:
    """The job's state in the database, where earlier jobs may have had its id."""
    token = token_of(federation.journal()[0]["id"], "karolina", 1, 1)
    return cluster.command("sacct", "-X", "-n", "-P", "-j", job, f"--name={token}", "-o", "State").strip()


def settled(federation: Federation) -> dict[str, object]:
    """The run once the engine has concluded something: it failed, is held, or has another attempt."""
    found: dict[str, object] = {}

    def concluded() -> bool:
        found.update(tick(federation))
        return found["stage"] == "failed" or bool(found["held"]) or found["attempt"] != 1

    federation.wait(concluded, limit=120)
    return found


@pytest.mark.parametrize("who", ["root", "user"])
def test_who_cancelled_a_job_that_the_queue_has_forgotten_is_known(bed: Testbed, cluster: Cluster, who: str) -> None:
    """A job of ours that somebody else cancelled is for a person: it is not submitted again."""
    federation = Federation(bed, "cancelled")
    account = bed.facilities["karolina"].account
    job = start(federation, cluster, waits=True)
    if who == "root":
        cluster.command("scancel", job)
    else:
        cluster.command("setpriv", f"--reuid={account.uid}", f"--regid={account.gid}", "--clear-groups", "scancel", job)
    cluster.wait_state(job, None, timeout=90)
    uid = 0 if who == "root" else account.uid
    assert rows(cluster, federation, job) == f"CANCELLED by {uid}"
    run = settled(federation)
    assert f"was cancelled at the site by uid {uid}, not by flctl" in str(run["held"])
    assert run["attempt"] == 1
    assert cluster.jobs().keys() & {job} == set()
    assert federation.jobs_started("karolina") == 0


def test_nothing_is_concluded_while_accounting_is_away(bed: Testbed, cluster: Cluster, accounting: Accounting) -> None:
    """The job is dead and forgotten; only accounting could tell, and cannot: a failed query changes nothing."""
    federation = Federation(bed, "outage", karolina={"train": {"behave": "hang"}})
    job = start(federation, cluster, waits=False)
    killed(federation, job)
    cluster.wait_state(job, None, timeout=150)
    with accounting.outage():
        until = time.monotonic() + 12  # four times poll.absence
        while time.monotonic() < until:
            run = tick(federation)
            assert (run["stage"], run["attempt"], run["failure"]) == ("running", 1, None)
        failed = [entry for entry in federation.journal() if entry["event"] == "query failed"]
        assert failed
        assert "sacct ended with status 1" in failed[-1]["reason"]
    run = settled(federation)
    assert run["stage"] == "failed" or run["attempt"] == 2, "it is a lost job now"
    assert "FAILED" in rows(cluster, federation, job) or "CANCELLED" in rows(cluster, federation, job)


def test_no_job_is_lost_before_its_row_could_have_come(bed: Testbed, cluster: Cluster, accounting: Accounting) -> None:
    """The controller cannot reach slurmdbd, sacct can: it answers, and knows nothing of the job. The queue has
    forgotten it. Until the window is over that is no proof; when the row comes it tells."""
    federation = Federation(bed, "late-rows", karolina={"poll": {"claim_window": 600}})
    with cluster.detour(accounting.port + 6):  # where nobody listens
        job = start(federation, cluster, waits=True)
        cluster.command("scancel", job)
        cluster.wait_state(job, None, timeout=90)
        assert rows(cluster, federation, job) == "", "no row, and no error"
        until = time.monotonic() + 12
        while time.monotonic() < until:
            run = tick(federation)
            assert (run["stage"], run["attempt"], run["held"]) == ("queued", 1, None)
        assert rows(cluster, federation, job) == ""
    federation.wait(lambda: rows(cluster, federation, job) or time.sleep(0.5), limit=90)
    run = settled(federation)
    assert "was cancelled at the site" in str(run["held"])
    assert run["attempt"] == 1


def test_a_site_whose_profile_promises_accounting_that_is_not_there(bed: Testbed) -> None:
    """Leonardo has none, and says so: absence from the queue counts alone, as where the profile says false."""
    bed.reset_codes(period=10)
    federation = Federation(
        bed, "no-accounting", leonardo={"scheduler": {"accounting": True}, "train": {"behave": "hang"}}
    )
    slurm = bed.facilities["leonardo"].slurm
    process = federation.popen("round", "--sites", "leonardo")
    federation.wait(lambda: federation.run("leonardo").get("stage") == "running" or process.poll() is not None)
    federation.wait(lambda: federation.jobs_started("leonardo"))
    job = federation.run("leonardo")["job"]["id"]
    slurm.remember(2)
    slurm.command("scancel", "--signal=KILL", "--full", job)
    federation.wait(
        lambda: (run := federation.run("leonardo"))["failure"] or run["held"] or run["attempt"] == 2 or process.poll()
    )
    reasons = [entry["reason"] for entry in federation.journal() if entry["event"] == "query failed"]
    assert not [reason for reason in reasons if "sacct" in reason]
    federation.kill(process)


def test_sacct_is_asked_for_a_job_that_disappeared_and_for_no_other(
    bed: Testbed, cluster: Cluster, accounting: Accounting
) -> None:
    federation = Federation(bed, "seldom")
    uid = bed.facilities["karolina"].account.uid
    before = len(accounting.queries(uid))
    federation.json("round", "--sites", "karolina", "--rounds", "2")
    assert len(accounting.queries(uid)) == before
    assert len(cluster.requests("REQUEST_JOB_USER_INFO", uid)) > 0
    federation.lay("karolina", train={"behave": "hang"})
    assert federation.flctl("campaign", "start", "--rounds", "1", "--sites", "karolina").returncode == 0
    federation.wait(lambda: tick(federation) and federation.run("karolina", 3).get("stage") == "running")
    federation.wait(lambda: federation.jobs_started("karolina") == 3)
    killed(federation, federation.run("karolina", 3)["job"]["id"])
    federation.wait(lambda: tick(federation) and len(accounting.queries(uid)) > before)
