"""The testbed is what other tests take it for: two separate facilities, real logins, real clusters, private homes."""

import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testbed import NUMBER, Testbed
from tests.testbed.procs import RUN, Daemon, end, start_time
from tests.testbed.python import CHECKOUT, PYTHON
from tests.testbed.sshd import Sshd, remove

JOB = "#!/bin/sh\nid -un\necho $SLURM_CLUSTER_NAME\npwd\n"


@pytest.fixture
def bed(testbed: Testbed) -> Iterator[Testbed]:
    testbed.reset()
    yield testbed


def code(server: Sshd) -> str:
    argv = ["oathtool", "--totp", "-b", f"--time-step-size={server.period}s", server.totp_secret]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def ssh(
    bed: Testbed,
    site: str,
    command: str,
    *,
    answer: str = "",
    key: Path | None = None,
    known_hosts: Path | None = None,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """The system's ssh as the orchestrator's account; it may ask one question and types `answer`."""
    server, user = bed.facilities[site].sshd, bed.user
    known_hosts = known_hosts or user.file(user.home / "known_hosts", bed.known_hosts)
    askpass = user.file(user.home / "askpass", f"#!/bin/sh\necho {answer}\n", 0o700)
    options = ["BatchMode=no" if answer else "BatchMode=yes", "IdentitiesOnly=yes", "NumberOfPasswordPrompts=1"]
    options += [f"UserKnownHostsFile={known_hosts}", "StrictHostKeyChecking=yes"]
    return bed.run(
        *("ssh", "-F", "none", "-i", str(key or bed.key), "-p", str(server.port)),
        *(part for option in options for part in ("-o", option)),
        *(f"{server.user}@{server.address}", command),
        env={"SSH_ASKPASS": str(askpass), "SSH_ASKPASS_REQUIRE": "force"},
        input=stdin,
        timeout=60,
    )


def submit(bed: Testbed, site: str, script: str, *options: str) -> str:
    """Submit over ssh, as flctl does; the job's id."""
    if site == "leonardo":
        bed.reset_codes()
    answer = code(bed.facilities[site].sshd) if site == "leonardo" else ""
    command = " ".join(("sbatch", "--parsable", "--output=out-%j", *options))
    done = ssh(bed, site, command, answer=answer, stdin=script)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_karolina_lets_the_orchestrators_key_in_and_no_other(bed: Testbed) -> None:
    server = bed.facilities["karolina"].sshd
    assert ssh(bed, "karolina", "id -un").stdout == "flctl-kar\n"
    stranger = bed.user.home / "stranger"
    bed.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(stranger))
    refused = ssh(bed, "karolina", "id", key=stranger)
    assert refused.returncode == 255
    assert "Permission denied (publickey)" in refused.stderr
    counted = server.attempts()
    assert (counted.connections, counted.logins, counted.failed_keys) == (2, 1, 1)


def test_a_restarted_server_may_have_another_host_key_but_knows_the_same_users(bed: Testbed) -> None:
    server = bed.facilities["karolina"].sshd
    before = server.host_key_fingerprint
    known = bed.user.file(bed.user.home / "known_before", bed.known_hosts)
    server.restart(new_host_key=True)
    assert server.host_key_fingerprint != before
    refused = ssh(bed, "karolina", "id", known_hosts=known)
    assert refused.returncode == 255
    assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in refused.stderr
    assert ssh(bed, "karolina", "id -un").stdout == "flctl-kar\n"


@pytest.mark.parametrize("period", [30, 5])
def test_leonardo_wants_key_and_code_and_takes_a_code_once(bed: Testbed, period: int) -> None:
    """30 s are checked by pam_oath, 5 s by pam_google_authenticator."""
    server = bed.facilities["leonardo"].sshd
    bed.reset_codes(period=period)
    once = code(server)
    assert ssh(bed, "leonardo", "id -un", answer=once).stdout == "flctl-leo\n"
    assert ssh(bed, "leonardo", "id -un", answer=once).returncode == 255
    assert ssh(bed, "leonardo", "id -un").returncode == 255, "a key alone is not enough"
    assert ssh(bed, "leonardo", "id -un", answer="000000").returncode == 255
    counted = server.attempts()
    assert (counted.connections, counted.logins, counted.codes, counted.failed_codes) == (4, 1, 1, 2)
    bed.reset_codes()
    assert ssh(bed, "leonardo", "id -un", answer=code(server)).returncode == 0, "a new secret counts at once"


def test_a_server_that_wants_a_certificate_refuses_the_bare_key(tmp_path: Path) -> None:
    with Sshd(name="cert", address="127.0.0.13", port=2213, user="flctl-try", kind="certificate") as server:
        bare = tmp_path / "bare"
        bare.write_bytes(server.client_key.read_bytes())
        bare.chmod(0o600)
        known_hosts = tmp_path / "known_hosts"
        known_hosts.write_text(server.known_hosts_line)
        for key, status in ((server.client_key, 0), (bare, 255)):
            argv = ["ssh", "-F", "none", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-i", str(key)]
            argv += ["-o", f"UserKnownHostsFile={known_hosts}", "-p", "2213", "flctl-try@127.0.0.13", "true"]
            assert subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True).returncode == status
        assert server.attempts().logins == 1
    assert not server.running
    remove("cert")


@pytest.mark.parametrize(("site", "other"), [("leonardo", "karolina"), ("karolina", "leonardo")])
def test_sbatch_over_ssh_runs_on_the_sites_own_cluster_as_its_own_account(bed: Testbed, site: str, other: str) -> None:
    facility = bed.facilities[site]
    job = submit(bed, site, JOB, "--account=testbed", f"--partition={facility.slurm.partitions[0]}")
    assert facility.slurm.wait_state(job, "COMPLETED", "FAILED") == "COMPLETED"
    output = (facility.home / f"out-{job}").read_text()
    assert output == f"{facility.account_name}\n{facility.slurm.name}\n{facility.home}\n"
    assert job not in bed.facilities[other].slurm.jobs()


def test_a_job_that_runs_into_its_time_limit_is_shown_as_timeout(bed: Testbed) -> None:
    cluster = bed.facilities["karolina"].slurm
    job = submit(bed, "karolina", "#!/bin/sh\nsleep 600\n", "--time=1")
    cluster.wait_state(job, "RUNNING")
    cluster.cut_short(job)
    shown = ""
    limit = time.monotonic() + 90
    while shown in ("", "RUNNING", "COMPLETING") and time.monotonic() < limit:
        shown = ssh(bed, "karolina", f"squeue -h -t all -j {job} -o %T").stdout.strip()
        time.sleep(1)
    assert shown == "TIMEOUT"


def test_a_cluster_with_a_short_memory_forgets_an_ended_job(bed: Testbed) -> None:
    cluster = bed.facilities["karolina"].slurm
    cluster.remember(2)
    job = submit(bed, "karolina", JOB)
    cluster.wait_state(job, "COMPLETED", None)
    assert cluster.wait_state(job, None, timeout=90) is None


def test_no_account_can_read_anothers_home(bed: Testbed) -> None:
    homes = {facility.account_name: facility.home for facility in bed.facilities.values()} | {
        bed.user.name: bed.user.home
    }
    for home in homes.values():
        assert home.stat().st_mode & 0o777 == 0o700
    for site in bed.facilities.values():
        for path in (site.home, site.workdir, site.data):
            assert bed.run("ls", str(path)).returncode != 0
        for name, home in homes.items():
            readable = subprocess.run(
                ["ls", str(home)], user=site.account.uid, group=site.account.gid, extra_groups=[], capture_output=True
            )
            assert (readable.returncode == 0) == (name == site.account_name)


def test_the_orchestrator_runs_an_installed_flctl_and_not_the_checkout(bed: Testbed) -> None:
    program = "import os, flctl, torch, transformers; print(os.getuid(), flctl.__file__, torch.__file__)"
    done = bed.run(str(PYTHON), "-c", program, timeout=120)
    uid, *files = done.stdout.split()
    assert int(uid) == bed.user.uid != 0
    assert [Path(file).is_relative_to(PYTHON.parents[1]) for file in files] == [True, True]
    assert str(CHECKOUT) not in "".join(path.read_text() for path in PYTHON.parents[1].rglob("*.pth"))
    assert bed.flctl("--help").returncode == 0


def test_the_orchestrator_has_a_terminal_only_when_asked_for(bed: Testbed) -> None:
    program = "import os, sys; print([os.isatty(number) for number in range(3)], sys.stdin.readline())"
    assert bed.run("/usr/bin/python3", "-c", program, input="x\n").stdout.split("]")[0] == "[False, False, False"
    shown = bed.run("/usr/bin/python3", "-c", program, input="typed\n", tty=True).stdout
    assert "[True, True, True] typed" in shown


@pytest.mark.parametrize(
    ("site", "words"), [("leonardo", (" che ", " è ", " della ")), ("karolina", (" se ", " je ", " který "))]
)
def test_each_site_holds_private_plain_text_in_its_language(bed: Testbed, site: str, words: tuple[str, ...]) -> None:
    facility = bed.facilities[site]
    texts = [path.read_text(encoding="utf-8") for path in facility.data.iterdir()]
    whole = " ".join(texts)
    assert 100_000 < len(whole.encode()) <= 310_000
    assert all(word in whole for word in words)
    assert not [line for line in whole.splitlines() if line.startswith((".SH", ".TP"))]
    assert facility.data.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in facility.data.iterdir()} == {0o600}


@pytest.mark.parametrize("site", ["leonardo", "karolina"])
def test_a_profile_of_the_testbed_is_a_complete_profile(bed: Testbed, site: str, tmp_path: Path) -> None:
    from flctl.facility.profile import load_site, missing

    path = tmp_path / f"{site}.toml"
    path.write_text(bed.profile_toml(site, poll={"every": 2}, shapes={"prod": {"walltime": "00:01:00"}}))
    loaded = load_site(path)
    assert missing(loaded) == []
    assert (loaded.name, loaded.login.host, loaded.login.port) == (
        site,
        bed.facilities[site].sshd.address,
        bed.facilities[site].sshd.port,
    )
    assert tomllib.loads(path.read_text())["poll"]["absence"] == 3


def test_up_mends_what_was_killed_and_down_leaves_no_process(bed: Testbed) -> None:
    karolina = bed.facilities["karolina"]
    mark = str(NUMBER or "")
    names = [f"flctl-{program}-karolina{mark}" for program in ("sshd", "slurmctld", "slurmdbd", "mariadbd")]
    for record in (*names, "flctl-munged"):
        end(int((RUN / f"{record}.pid").read_text().split()[0]), grace=0)  # SIGKILL
    assert not bed.is_up
    bed.up()
    assert bed.is_up
    assert ssh(bed, "karolina", "squeue -h").returncode == 0
    left = bed.run("sh", "-c", "setsid sleep 600 > /dev/null 2>&1 & echo $!").stdout.strip()
    records = [path for site in bed.facilities for path in RUN.glob(f"flctl-*-{site}{mark}.pid")]
    daemons = [int(path.read_text().split()[0]) for path in records]
    assert len(daemons) == 8
    bed.down()
    try:
        assert [pid for pid in (*daemons, int(left)) if start_time(pid)] == []
        assert not karolina.running
    finally:
        bed.up()


def test_a_record_of_an_earlier_boot_never_ends_another_process() -> None:
    with subprocess.Popen(["sleep", "600"]) as bystander:
        (RUN / "flctl-stale.pid").write_text(f"{bystander.pid} 1\n")
        daemon = Daemon(name="flctl-stale", argv=("/bin/false",))
        assert daemon.pid is None
        daemon.stop()
        assert bystander.poll() is None
        bystander.kill()
    assert not (RUN / "flctl-stale.pid").exists()
