"""The testbed: two facilities with real sshd, PAM codes and Slurm on loopback addresses, and an orchestrator's account.

    bed = Testbed()
    bed.up()
    bed.flctl("init", "campaign", ...)                      # as the unprivileged orchestrator
    bed.profile_toml("leonardo"), bed.known_hosts           # what a campaign needs to know
    bed.facilities["karolina"].slurm.jobs()
    bed.down()

It needs root on Debian 12 and the packages of packages.txt. What it keeps lies in /var/lib/flctl-testbed and
/run/flctl-testbed, with the accounts flctl-leo, flctl-kar and flctl-user and /etc/pam.d/flctl-sshd-*.

FLCTL_TESTBED=N (1 to 9) in the environment: another testbed beside the first, with accounts, addresses and ports of its
own, for two test runs at the same time.
"""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from . import orchestrator, packages, python
from .accounting import Accounting
from .accounts import Account, account
from .facility import Facility, toml
from .procs import RUN, TestbedError, call, wait_until
from .slurm import Munge, Slurm
from .sshd import Sshd

__all__ = ["Facility", "Testbed", "TestbedError"]

NUMBER = int(os.environ.get("FLCTL_TESTBED", "0"))
_MARK = str(NUMBER or "")
ORCHESTRATOR = f"flctl-user{_MARK}"
MIN_JOB_AGE = 300


def _facility(
    *, name: str, language: str, user: str, address: str, port: int, slurm: Slurm, sshd: Mapping[str, Any]
) -> Facility:
    user += _MARK
    home = f"/var/lib/flctl-testbed/home/{user}"
    environment = {**slurm.environment, "WORK": f"{home}/work"}
    server = Sshd(
        name=name + _MARK, address=address, port=port + 100 * NUMBER, user=user, environment=environment, **sshd
    )
    return Facility(name=name, language=language, account_name=user, sshd=server, slurm=slurm)


class Testbed:
    """Two facilities and an orchestrator.

    `code_period`: seconds for which leonardo's one-time code is valid. Real facilities use 30, which pam_oath checks
    here; a shorter one (see Sshd) lets a test log in again sooner. `reset_codes` changes it until the next `reset`.
    """

    __test__ = False

    def __init__(self, *, code_period: int = 30) -> None:
        leonardo, karolina = f"127.0.{NUMBER}.11", f"127.0.{NUMBER}.12"
        self.facilities = {
            "leonardo": _facility(
                name="leonardo",
                language="it",
                user="flctl-leo",
                address=leonardo,
                port=2211,
                slurm=Slurm(
                    name="leonardo" + _MARK,
                    address=leonardo,
                    port=16811 + 100 * NUMBER,
                    partitions=("boost_usr_prod", "lrd_all_serial"),
                    first_job_id=1000,
                    min_job_age=MIN_JOB_AGE,
                ),
                sshd={"kind": "key+totp", "period": code_period},
            ),
            "karolina": _facility(
                name="karolina",
                language="cs",
                user="flctl-kar",
                address=karolina,
                port=2212,
                slurm=Slurm(
                    name="karolina" + _MARK,
                    address=karolina,
                    port=16821 + 100 * NUMBER,
                    partitions=("qgpu", "qgpu_exp"),
                    first_job_id=5000,
                    min_job_age=MIN_JOB_AGE,
                    accounting=Accounting(
                        name="karolina" + _MARK,
                        address=karolina,
                        port=16823 + 100 * NUMBER,
                        account="testbed",
                        users=(f"flctl-kar{_MARK}",),
                    ),
                ),
                sshd={"kind": "key"},
            ),
        }
        self.code_period = code_period
        self._lock: int | None = None

    def up(self, *, fresh: bool = False) -> Self:
        """Bring up what is not up; after a crash as well. `fresh`: all of it anew, with empty homes."""
        self._check()
        if fresh:
            self.down()
            for owner in (self.user, *(facility.account for facility in self.facilities.values())):
                owner.empty_home()
        python.prepare()
        for facility in self.facilities.values():
            facility.start()
        self._settle_user()
        return self

    def down(self) -> None:
        """End every process of the testbed and of its accounts; files stay."""
        self.user.end_processes()
        for facility in self.facilities.values():
            facility.stop()

    @property
    def is_up(self) -> bool:
        return all(facility.running for facility in self.facilities.values()) and Munge.daemon.pid is not None

    def reset(self) -> None:
        """Between tests: no process of flctl, no job, fresh codes, every daemon up, Slurm's usual memory; and flctl
        remembers no login, so that one refused in a test closes no site in the next."""
        self.user.end_processes()
        shutil.rmtree(self.user.home / ".local" / "state" / "flctl", ignore_errors=True)
        for facility in self.facilities.values():
            facility.slurm.start(fresh=False)
            facility.sshd.stop()
            facility.slurm.cancel_all()
            facility.account.end_processes()
            facility.slurm.wait_empty()
            facility.sshd.start(fresh=True)
            if facility.slurm.min_job_age != MIN_JOB_AGE:
                facility.slurm.remember(MIN_JOB_AGE)
        self._settle_user()

    def lock(self, *, wait: float = 0.0) -> None:
        """Have the testbed for this process alone until it ends or calls `unlock`."""
        RUN.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._lock = os.open(RUN / f"lock{_MARK}", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            wait_until(self._take, "another process on this machine uses the testbed", timeout=wait, every=0.5)
        except TestbedError:
            self.unlock()
            raise

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def user(self) -> Account:
        return account(ORCHESTRATOR)

    @property
    def key(self) -> Path:
        """The orchestrator's private key, known to both facilities."""
        return self.user.home / ".ssh" / "id_ed25519"

    @property
    def totp_file(self) -> Path:
        """Where the orchestrator keeps leonardo's secret (base32), 0600."""
        return self.user.home / "totp-leonardo"

    def reset_codes(self, *, period: int | None = None, digits: Literal[6, 8] = 6) -> str:
        """A new secret at leonardo and in the orchestrator's file: the next login need not wait for the next code."""
        secret = self.facilities["leonardo"].sshd.reset_codes(period=period, digits=digits)
        self.user.file(self.totp_file, secret + "\n")
        return secret

    def flctl(
        self, *args: str, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """`flctl ARGS` to the end; options: cwd, tty, input, timeout. `env` is added to the minimal environment."""
        return self.run(str(python.FLCTL), *args, env=env, **options)

    def run(self, *argv: str, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        """Any program as the orchestrator, like `flctl`."""
        user = self.user
        return orchestrator.run(user, argv, env=orchestrator.environment(user, env), **options)

    def popen(self, *args: str, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
        """`flctl ARGS` under way, in a process group of its own; options: cwd and those of subprocess.Popen."""
        user = self.user
        argv = (str(python.FLCTL), *args)
        return orchestrator.popen(user, argv, env=orchestrator.environment(user, env), **options)

    @property
    def known_hosts(self) -> str:
        return "".join(facility.sshd.known_hosts_line for facility in self.facilities.values())

    def profile_toml(self, site: str, **tables: Mapping[str, Any]) -> str:
        """The site's profile for the orchestrator, with `tables` laid over it (see Facility.profile)."""
        secret = f"file:{self.totp_file}" if site == "leonardo" else ""
        return toml(self.facilities[site].profile(key=self.key, secret=secret, **tables))

    def _take(self) -> bool:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _check(self) -> None:
        if os.geteuid() != 0:
            raise TestbedError("the testbed needs root: it makes accounts and starts sshd and Slurm")
        if names := packages.missing():
            raise TestbedError(f"Debian packages are missing: {' '.join(names)} (python -m tests.testbed packages)")

    def _settle_user(self) -> None:
        user = self.user
        user.folder(self.key.parent)
        public = self.key.with_suffix(".pub")
        if not self.key.exists():
            call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", user.name, "-f", str(self.key)])
            for path in (self.key, public):
                user.give(path, 0o600)
        for facility in self.facilities.values():
            facility.sshd.authorize(public.read_text())
        self.reset_codes(period=self.code_period)
