"""The main job on two real facilities: sshd with one-time codes, Slurm, rsync, transformers; an unprivileged user."""

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import load_file

from tests.campaigns import reference
from tests.federation import SITES, Federation
from tests.testbed import Testbed

TRAIN = "steps = 20\nlr = 0.005\nbatch = 8\nsequence_length = 128\nthreads = 1"


@pytest.fixture
def bed(testbed: Testbed) -> Iterator[Testbed]:
    testbed.reset()
    yield testbed
    testbed.user.end_processes()


def equal_bits(made: dict[str, numpy.ndarray], expected: dict[str, numpy.ndarray]) -> bool:
    return made.keys() == expected.keys() and all(made[n].tobytes() == expected[n].tobytes() for n in made)


def test_two_rounds_across_two_facilities(bed: Testbed) -> None:
    """Real training on real text: both jobs ran, the model is numpy's bit for bit, perplexity fell on both languages,
    only weights and records came back, one login with a code served everything. Evaluated by itself a model has the
    loss that the training run which began with it told."""
    federation = Federation(bed, "two-rounds", real=True)
    federation.set("steps = 4\nlr = 5e-05\nbatch = 8\nsequence_length = 1024", TRAIN)
    leonardo = bed.facilities["leonardo"]
    mark = leonardo.sshd.mark()
    before = {site: set(bed.facilities[site].slurm.jobs()) for site in SITES}
    answer = federation.json("round", "--sites", "leonardo", "karolina", "--rounds", "2")
    assert (answer["status"], answer["data"]["model"]["version"], answer["data"]["done"]) == ("ok", 2, True)
    for site in SITES:
        jobs = {run["job_id"] for run in answer["data"]["runs"] if run["site"] == site}
        slurm = bed.facilities[site].slurm.jobs()
        assert len(jobs) == 2
        assert jobs == set(slurm) - before[site]
        assert {slurm[job] for job in jobs} <= {"COMPLETED", "COMPLETING"}
    for version in (1, 2):
        made = load_file(federation.place / "models" / f"{version:04d}" / "model.safetensors")
        assert equal_bits(made, reference(federation.place, version))
    for site in SITES:
        first, second = (federation.run(site, n)["contribution"]["metrics"]["evaluation"]["base"] for n in (1, 2))
        assert second["perplexity"] < 0.7 * first["perplexity"], site
    attempts = leonardo.sshd.attempts(mark)
    assert (attempts.logins, attempts.failed_codes, attempts.failed_keys) == (1, 0, 0)
    (told,) = federation.json("evaluate", "karolina", "--model", "1")["data"]["evaluation"]["sites"].values()
    base = federation.run("karolina", 2)["contribution"]["metrics"]["evaluation"]["base"]
    assert (told["tokens"], told["loss"]) == (base["tokens"], pytest.approx(base["loss"], rel=1e-6))
    shown = federation.json("history")["data"]
    assert (shown["best"], [len(model["sites"]) for model in shown["models"]]) == (1, [2, 2, 0])
    check_border(federation)


def check_border(federation: Federation) -> None:
    """The journal names every file that crossed; nothing of the corpora is anywhere in the orchestrator's home."""
    crossed = [entry for entry in federation.journal() if entry["event"] == "file"]
    inbound = {entry["path"].rsplit("/", 1)[-1] for entry in crossed if entry["direction"] == "in"}
    assert {"model.safetensors", "done.json"} <= inbound <= {"model.safetensors", "done.json", "job.id", "owner"}
    assert all(entry["size"] > 0 and re.fullmatch("[0-9a-f]{64}", entry["sha256"]) for entry in crossed)
    for site in SITES:
        texts = sorted(federation.bed.facilities[site].data.rglob("*"))
        phrases = [
            line.encode()
            for path in texts
            if path.is_file()
            for line in path.read_text().splitlines()
            if len(line) > 60
        ]
        assert len(phrases) > 100
        for path in federation.place.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert not any(phrase in content for phrase in phrases[:: len(phrases) // 50]), path


def test_ticks_alone_from_a_bare_environment(bed: Testbed) -> None:
    """No terminal, no environment, no agent: only `campaign tick`, as cron would call it."""
    bed.reset_codes(period=10)
    federation = Federation(bed, "ticks")
    federation.bare("status")
    assert federation.flctl("campaign", "start", "--rounds", "2", "--sites", "leonardo,karolina").returncode == 0
    federation.wait(lambda: federation.bare("campaign", "tick")["data"]["done"] or time.sleep(1), limit=240)
    assert federation.bare("status")["data"]["model"]["version"] == 2
    for version in (1, 2):
        made = load_file(federation.place / "models" / f"{version:04d}" / "model.safetensors")
        assert equal_bits(made, reference(federation.place, version))
    assert [federation.jobs_started(site) for site in SITES] == [2, 2]


Ending = Callable[[Federation, str], None]


def out_of_time(federation: Federation, job: str) -> None:
    federation.bed.facilities["karolina"].slurm.cut_short(job)


def cancelled(federation: Federation, job: str) -> None:
    federation.bed.facilities["karolina"].slurm.command("scancel", job)


def killed(federation: Federation, job: str) -> None:
    """SIGKILL to every process of the job, its script first: no trap runs, nobody writes a record."""
    mark, owner = f"SLURM_JOB_ID={job}".encode(), federation.bed.facilities["karolina"].account_name
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda folder: int(folder.name)):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0") and folder.owner() == owner:
                os.kill(int(folder.name), signal.SIGKILL)


@pytest.mark.parametrize(
    ("ending", "words", "cause"),
    [
        (out_of_time, "SIGTERM", "time"),
        (cancelled, "cancelled at the site by uid 0", "cancelled at the site"),
        (killed, "ended without a record", "program"),
    ],
    ids=["time-limit", "cancelled", "sigkill"],
)
@pytest.mark.parametrize("forgotten", [False, True], ids=["remembered", "forgotten"])
def test_a_job_that_did_not_end_well_is_never_averaged(
    bed: Testbed, ending: Ending, words: str, cause: str, forgotten: bool
) -> None:
    """Also when Slurm has forgotten the job before anybody looks: accounting knows. A new attempt, which a person asks
    for, then completes the round."""
    federation = Federation(bed, "bad-end", karolina={"train": {"behave": "hang"}})
    slurm = bed.facilities["karolina"].slurm
    if forgotten:
        slurm.remember(2)
    assert federation.flctl("campaign", "start", "--rounds", "1", "--sites", "karolina").returncode == 0
    federation.json("campaign", "tick")
    job = federation.run("karolina")["job"]["id"]
    slurm.wait_state(job, "RUNNING")
    federation.wait(lambda: federation.jobs_started("karolina"))
    ending(federation, job)
    slurm.wait_state(job, *((None,) if forgotten else ("TIMEOUT", "CANCELLED", "FAILED")), timeout=150)
    federation.wait(lambda: tick(federation) == "failed" or federation.run("karolina")["held"], limit=180)
    failure = federation.run("karolina")["failure"]
    assert (failure["cause"], words in failure["message"]) == (cause, True)
    assert not (federation.place / "models" / "0001").exists()
    federation.lay("karolina", train={"behave": "good"})
    assert federation.flctl("retry", "karolina").returncode == 0
    answer = federation.json("round")
    assert answer["data"]["model"]["version"] == 1
    assert [(run["attempt"], run["stage"]) for run in answer["data"]["runs"]] == [(2, "fetched")]


def tick(federation: Federation) -> str:
    federation.json("campaign", "tick", code=None)
    time.sleep(1)
    return federation.run("karolina")["stage"]


def test_a_wrong_secret_costs_exactly_one_attempt(bed: Testbed) -> None:
    federation = Federation(bed, "wrong-secret")
    bed.user.file(bed.totp_file, "JBSWY3DPEHPK3PXP\n")
    sshd = bed.facilities["leonardo"].sshd
    mark = sshd.mark()
    for _ in range(2):
        answer = federation.json("round", "--wait", "60s", code=4)
        (error,) = [error for error in answer["errors"] if error["site"] == "leonardo"]
        assert "flctl release leonardo" in error["hint"]
    ticked = federation.json("campaign", "tick")
    assert [row["site"] for row in ticked["data"]["waiting"] if row["held"]] == ["leonardo"]
    assert "HELD" in ticked["errors"][0]["message"]
    for command in (("site", "test", "leonardo"), ("log", "leonardo")):
        assert federation.flctl(*command).returncode == 4, "nobody logs in to a held site, whatever is typed"
    attempts = sshd.attempts(mark)
    assert (attempts.failed_codes, attempts.logins) == (1, 0)
    assert federation.run("karolina")["stage"] == "fetched", "the other site goes on"
    assert "HELD" in federation.flctl("status").stdout
    bed.reset_codes()
    assert federation.flctl("release", "leonardo").returncode == 0
    assert federation.json("round")["data"]["model"]["version"] == 1


STAGES = {
    "ordered": "ordered leonardo/1",
    "delivering": "pushed models/0000",
    "delivered": "run-recorded leonardo/1.1 delivered",
    "claimed": "submitted leonardo/0001-1",
    "queued": "run-recorded leonardo/1.1 queued",
    "looking": "checked leonardo",
    "ended": "run-recorded leonardo/1.1 ended",
    "fetching": "pulled runs/0001-1/out",
    "fetched": "run-recorded leonardo/1.1 fetched",
    "merging": "merged 0001",
}
"""The fault point at which a round is killed in each stage."""


def test_killed_in_every_stage_the_round_completes_and_each_job_was_submitted_once(bed: Testbed) -> None:
    """kill -9 at a point of each stage, each time the same command again; the crash matrix takes other ones."""
    often = {"login": {"per_day": 100}}
    federation = Federation(bed, "killed", leonardo=often, karolina=often)
    before = {site: set(bed.facilities[site].slurm.jobs()) for site in SITES}
    words = ("round", "--sites", "leonardo", "karolina")
    points, log = list(STAGES.values()), bed.user.home / "killed.points"
    log.unlink(missing_ok=True)
    while points:
        killed = federation.flctl(*words, env={"FLCTL_FAULT": points[0], "FLCTL_FAULT_LOG": str(log)})
        assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
        assert log.read_text().splitlines()[-1] == points.pop(0)
        bed.reset_codes()
    assert federation.json(*words)["data"]["model"]["version"] == 1
    for site in SITES:
        assert len(set(bed.facilities[site].slurm.jobs()) - before[site]) == 1
        assert federation.jobs_started(site) == 1
    made = load_file(federation.place / "models" / "0001" / "model.safetensors")
    assert equal_bits(made, reference(federation.place, 1))


def test_an_unknown_host_is_refused_until_a_person_trusts_its_key(bed: Testbed) -> None:
    federation = Federation(bed, "host-key", karolina={"login": {"host_keys": []}})
    sshd = bed.facilities["karolina"].sshd
    mark = sshd.mark()
    answer = federation.json("round", "--sites", "karolina", code=12)
    (error,) = answer["errors"]
    assert sshd.host_key_fingerprint in error["message"]
    assert f"flctl site trust karolina {sshd.host_key_fingerprint}" in error["hint"]
    assert sshd.attempts(mark).keys == 0, "no key is offered to a stranger"
    wrong = federation.flctl("site", "trust", "karolina", "SHA256:" + "A" * 43)
    assert wrong.returncode == 12
    assert federation.flctl("site", "trust", "karolina", sshd.host_key_fingerprint).returncode == 0
    assert federation.json("round", "--sites", "karolina")["data"]["done"]


def test_one_unreachable_site_does_not_stop_the_other(bed: Testbed) -> None:
    federation = Federation(bed, "unreachable", karolina={"login": {"port": 2299}})
    answer = federation.json("round", code=5)
    assert [error["site"] for error in answer["errors"] if error["code"] == "site_unreachable"] == ["karolina"]
    assert federation.run("leonardo")["stage"] == "fetched"
    assert federation.flctl("skip", "karolina").returncode == 0
    assert federation.json("round")["data"]["model"]["version"] == 1


def test_a_refused_job_fails_with_slurms_words(bed: Testbed) -> None:
    federation = Federation(bed, "refused", karolina={"scheduler": {"partition": "nosuch"}})
    answer = federation.json("round", "--sites", "karolina", code=6)
    assert "invalid partition" in answer["errors"][0]["message"].lower()
    assert "sites/karolina.toml" in answer["errors"][0]["hint"]
    federation.lay("karolina", scheduler={"partition": "qgpu"})
    federation.flctl("retry")
    assert federation.json("round")["data"]["done"]


def test_site_test_tells_that_a_site_is_ready_and_what_is_not(bed: Testbed) -> None:
    federation = Federation(bed, "site-test")
    answer = federation.json("site", "test", "karolina")
    (site,) = answer["data"]["sites"]
    assert {check["name"]: check["result"] for check in site["checks"] if check["result"] != "ok"} == {}
    assert len(site["checks"]) >= 9
    assert site["logins"] >= 1
    federation.lay("karolina", storage={"data": "/nonexistent/data"})
    shutil.rmtree(federation.place / "runs" / "karolina")
    failed = federation.json("site", "test", "karolina", code=3)
    assert "data" in failed["errors"][0]["message"]


def test_a_machine_without_a_batch_system_is_a_site_too(bed: Testbed) -> None:
    """connection = "ssh" with scheduler = "local": a plain machine or a cloud VM."""
    federation = Federation(bed, "plain", karolina={"scheduler": {"kind": "local"}})
    assert federation.json("round", "--sites", "karolina", "--rounds", "2")["data"]["model"]["version"] == 2


def test_sigterm_leaves_with_130_and_says_what_still_runs(bed: Testbed) -> None:
    federation = Federation(bed, "live", karolina={"train": {"seconds": 60}})
    process = federation.popen("round", "--sites", "karolina")
    federation.wait(lambda: federation.run("karolina").get("stage") == "running")
    process.terminate()
    text, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "karolina: run 0001 is running" in text
    assert federation.flctl("cancel").returncode == 0


def test_the_log_of_a_job_can_be_read(bed: Testbed) -> None:
    federation = Federation(bed, "log")
    federation.json("round", "--sites", "karolina")
    assert "trainer: begins" in federation.flctl("log", "karolina").stdout


def test_nothing_at_a_site_is_readable_by_others(bed: Testbed) -> None:
    federation = Federation(bed, "umask")
    federation.json("round", "--sites", "karolina")
    for path in [federation.remote("karolina"), *federation.remote("karolina").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path
    for path in [federation.place, *federation.place.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_the_secret_and_the_codes_are_in_no_file_of_a_campaign(bed: Testbed) -> None:
    federation = Federation(bed, "canary")
    secret = bed.totp_file.read_text().strip()
    federation.json("round")
    for root in (federation.place, federation.remote("leonardo"), Path(bed.user.home) / ".local"):
        for path in root.rglob("*"):
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path
