"""Whole campaigns of two rounds at every kind of facility: real sshds, real Slurm, real rsync; logins are counted.

How many logins that may cost is read from the table in docs/facilities.md."""

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file

from tests import facilities_page
from tests.campaigns import reference
from tests.doors import PERMISSION, agent_of, door, gate, login_at
from tests.federation import SITES, Federation
from tests.pbs_double import PbsServer
from tests.testbed import Testbed
from tests.testbed.procs import STATE

PBS = {"kind": "pbs", "account": "testbed", "partition": "", "queue": "workq", "accounting": True}
LOGINS = facilities_page.logins()
NOISE = "Welcome to the machine: quotas are `full`\n*** maintenance on Monday ***\n"


@pytest.fixture
def bed(testbed: Testbed) -> Iterator[Testbed]:
    testbed.reset()
    yield testbed
    testbed.user.end_processes()


def two_rounds(federation: Federation, **options: Any) -> None:
    """Two rounds make the models that numpy makes, at both sites, each run trained once."""
    ran = federation.flctl("round", "--sites", *SITES, "--rounds", "2", **options)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for version in (1, 2):
        made = load_file(federation.place / "models" / f"{version:04d}" / "model.safetensors")
        expected = reference(federation.place, version)
        assert made.keys() == expected.keys()
        assert all(numpy.array_equal(made[name], expected[name]) for name in made)
    assert [federation.jobs_started(site) for site in SITES] == [2, 2]


def logins(federation: Federation, site: str) -> int:
    return sum(entry["event"] == "login" and entry["site"] == site for entry in federation.journal())


def test_a_key(bed: Testbed) -> None:
    federation = Federation(bed, "by-key")
    mark = bed.facilities["karolina"].sshd.mark()
    coded = bed.facilities["leonardo"].sshd.mark()
    two_rounds(federation)
    seen = bed.facilities["karolina"].sshd.attempts(mark).logins
    assert (seen, logins(federation, "karolina") - seen) == LOGINS["key"]
    seen = bed.facilities["leonardo"].sshd.attempts(coded).logins
    assert (seen, logins(federation, "leonardo") - seen) == LOGINS["key and code"]


def test_a_certificate_through_an_agent(bed: Testbed) -> None:
    with door(bed, "karolina", "by-certificate", 2221, kind="certificate") as server:
        federation = Federation(bed, "by-certificate", karolina={"login": login_at(server, key="agent")})
        with agent_of(bed, server.client_key) as address:
            two_rounds(federation, env={"SSH_AUTH_SOCK": address})
        attempts = server.attempts()
        assert attempts.failed_keys == 0
        assert (attempts.logins, logins(federation, "karolina") - attempts.logins) == LOGINS["certificate, by an agent"]
        text = server.log_text()
        assert text.count("Accepted publickey") == text.count("Accepted publickey for flctl-kar") == 2
        assert text.count("ED25519-CERT") >= 2


def test_a_password_and_a_code(bed: Testbed) -> None:
    with door(bed, "karolina", "by-password", 2222, kind="password+totp") as server:
        codes = bed.user.file(bed.user.home / "totp-karolina", server.totp_secret + "\n")
        words = bed.user.file(bed.user.home / "password-karolina", server.password + "\n")
        login = login_at(
            server,
            password={"secret": f"file:{words}"},
            totp={"automation": "permitted", "permission": PERMISSION, "secret": f"file:{codes}"},
        )
        federation = Federation(bed, "by-password", karolina={"login": login})
        two_rounds(federation)
        attempts = server.attempts()
        assert attempts.failed_codes == 0
        assert (attempts.logins, logins(federation, "karolina") - attempts.logins) == LOGINS["password and code"]
        for path in federation.place.rglob("*"):
            assert not path.is_file() or server.password.encode() not in path.read_bytes(), path


def test_a_transfer_host_without_a_shell(bed: Testbed) -> None:
    """The login host gets the commands, the other one nothing but rsync."""
    only = ("ForceCommand /usr/bin/rrsync /",)
    with door(bed, "karolina", "mover", 2223, options=only) as server:
        transfer = {
            "host": server.address,
            "port": server.port,
            "host_keys": [server.host_key_fingerprint],
            "shell": False,
        }
        federation = Federation(bed, "mover", karolina={"transfer": transfer})
        mark = bed.facilities["karolina"].sshd.mark()
        two_rounds(federation)
        seen = (bed.facilities["karolina"].sshd.attempts(mark).logins, server.attempts().logins)
        assert seen == LOGINS["key, with a transfer host without a shell"]
        assert logins(federation, "karolina") == sum(seen)


def test_a_jump_host(bed: Testbed) -> None:
    with gate(bed, "gate", "127.0.0.13", 2224) as server:
        jump = f"{server.user}@{server.address}:{server.port}"
        federation = Federation(bed, "jump", karolina={"login": {"proxy_jump": jump}})
        trusted = federation.flctl("site", "trust", "karolina", server.host_key_fingerprint)
        assert trusted.returncode == 0, trusted.stderr
        mark = bed.facilities["karolina"].sshd.mark()
        two_rounds(federation)
        seen = (bed.facilities["karolina"].sshd.attempts(mark).logins, server.attempts().logins)
        assert seen == LOGINS["key, through a jump host"]
        assert logins(federation, "karolina") == sum(seen)


def test_a_noisy_login_shell(bed: Testbed) -> None:
    """What a shell prints, for a login or for any command, is taken neither for an answer nor for the other rsync."""
    account = bed.facilities["karolina"].account
    noisy = [
        account.file(account.home / name, f"cat <<'NOISE'\n{NOISE}NOISE\necho careful >&2\n")
        for name in (".bash_profile", ".bashrc")
    ]
    try:
        with door(bed, "karolina", "noisy", 2225, options=("Banner /etc/issue.net",)) as server:
            federation = Federation(
                bed,
                "noisy",
                karolina={"login": login_at(server), "storage": {"work": "$HOME/work", "data": "$HOME/data"}},
            )
            two_rounds(federation)
            seen = server.attempts().logins
            assert (seen, logins(federation, "karolina") - seen) == LOGINS["key, with a shell that prints"]
    finally:
        for path in noisy:
            path.unlink()


def test_one_slurm_and_one_pbs(bed: Testbed) -> None:
    """Leonardo is Slurm with codes; Karolina's account finds PBS's commands in its PATH, as it would on a real one."""
    with PbsServer(STATE / "pbs" / "brno", name="brno") as pbs:
        path = f"{pbs.bin}:/usr/bin:/bin"
        environment = {**bed.facilities["karolina"].sshd.environment, "PATH": path}
        with door(bed, "karolina", "brno", 2226, environment=environment) as server:
            federation = Federation(bed, "pbs", karolina={"login": login_at(server), "scheduler": PBS})
            before = set(bed.facilities["karolina"].slurm.jobs())
            two_rounds(federation)
            jobs = [federation.run("karolina", number)["job"]["id"] for number in (1, 2)]
            assert [pbs.exit_status(job) for job in jobs] == [0, 0]
            assert set(bed.facilities["karolina"].slurm.jobs()) == before
            seen = server.attempts().logins
            assert (seen, logins(federation, "karolina") - seen) == LOGINS["key, with PBS"]
