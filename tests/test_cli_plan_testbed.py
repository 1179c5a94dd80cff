"""`flctl site test` and `flctl plan` against two real facilities: real Slurm, real codes, one login each."""

from collections.abc import Iterator

import pytest

from tests.federation import SITES, Federation
from tests.testbed import Testbed


@pytest.fixture
def bed(testbed: Testbed) -> Iterator[Testbed]:
    testbed.reset()
    yield testbed
    testbed.user.end_processes()


def test_site_test_sees_in_one_login_what_slurm_allows_and_what_jobs_find(bed: Testbed) -> None:
    federation = Federation(bed, "site-test-batch")
    for site in SITES:
        before, mark = set(bed.facilities[site].slurm.jobs()), bed.facilities[site].sshd.mark()
        (report,) = federation.json("site", "test", site, "--batch", "--wait", "2m")["data"]["sites"]
        checks = {check["name"]: check for check in report["checks"]}
        assert {name for name, check in checks.items() if check["result"] != "ok"} == set()
        assert len(checks) >= 16
        assert checks["scheduler"]["detail"].startswith("slurm")
        assert "takes 1 node for 0:10:00" in checks["partition"]["detail"]
        assert "estimate: starts" in checks["dry-run submit"]["detail"]
        assert "torch" in checks["python in a job"]["detail"]
        assert report["logins"] == 1
        assert bed.facilities[site].sshd.attempts(mark).logins == 1
        made = set(bed.facilities[site].slurm.jobs()) - before
        assert len(made) == 1, "the tiny job, and no other"
        assert not list(federation.remote(site).glob("runs/.*")), "its folder is gone"


def test_a_job_that_has_to_wait_too_long_is_cancelled(bed: Testbed) -> None:
    federation = Federation(bed, "site-test-wait")
    slurm = bed.facilities["karolina"].slurm
    federation.lay("karolina", environment={"activate": ['test -z "$SLURM_JOB_ID" || sleep 600']})
    before = set(slurm.jobs())
    answer = federation.json("site", "test", "karolina", "--batch", "--wait", "8s")
    checks = {check["name"]: check for check in answer["data"]["sites"][0]["checks"]}
    assert (answer["status"], checks["python in a job"]["result"]) == ("partial", "warn")
    (job,) = set(slurm.jobs()) - before
    slurm.wait_state(job, "CANCELLED")


def test_a_partition_that_there_is_not_is_told_by_site_test_and_by_plan(bed: Testbed) -> None:
    federation = Federation(bed, "plan-partition")
    federation.lay("karolina", scheduler={"partition": "qnone"})
    (error,) = [
        error
        for error in federation.json("site", "test", "karolina", code=3)["errors"]
        if "partition:" in error["message"]
    ]
    assert "there is no partition qnone; there is: qgpu, qgpu_exp" in error["message"]
    errors = federation.json("plan", "--sites", "karolina", code=3)["errors"]
    assert any("there is no partition qnone" in error["message"] for error in errors)
    assert any("the scheduler would refuse the job" in error["message"] for error in errors)


def test_a_plan_has_slurms_estimate_and_the_sites_own_paths_and_submits_nothing(bed: Testbed) -> None:
    federation = Federation(bed, "plan-online")
    before = {site: set(bed.facilities[site].slurm.jobs()) for site in SITES}
    marks = {site: bed.facilities[site].sshd.mark() for site in SITES}
    data = federation.json("plan", "--rounds", "2")["data"]
    for view, path in zip(data["sites"], data["scripts"], strict=True):
        site = view["site"]
        assert view["told"]["asked"]
        assert view["told"]["start"] > 0
        assert view["free"] > view["need"]
        with open(path) as script:
            assert str(federation.remote(site)) in script.read()
        assert set(bed.facilities[site].slurm.jobs()) == before[site]
        assert bed.facilities[site].sshd.attempts(marks[site]).logins == 1
        assert not federation.remote(site).exists(), "nothing was sent"
    planned = {view["site"]: view["logins"] for view in data["sites"]}
    assert planned == {"karolina": 2, "leonardo": 1}
    bed.reset_codes()
    made = federation.json("round", "--rounds", "2")
    assert made["data"]["model"]["version"] == 2
    counted = {site: bed.facilities[site].sshd.attempts(marks[site]).logins - 1 for site in SITES}
    assert counted == planned, "what the plan said"
