"""A real Slurm cluster of one node on a loopback address: own controller, own node daemon, own ports and state.

with Slurm(name="leonardo", address="127.0.0.11", port=16811, partitions=("boost_usr_prod",)) as cluster:
    cluster.environment["SLURM_CONF"], cluster.jobs(), cluster.wait_state("1000", "COMPLETED")
"""

import contextlib
import fcntl
import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from .accounting import Accounting
from .procs import RUN, STATE, Daemon, TestbedError, call, end, pids, wait_until

MUNGE = RUN / "munge"
_MUNGE_KEY = STATE / "munge" / "munge.key"
_MUNGE_SOCKET = MUNGE / "munge.socket"
_NO_ACCOUNTING = ("AccountingStorageType=accounting_storage/none",)


class Munge:
    """The one munged of all clusters here, with a key and a socket of its own."""

    daemon = Daemon(
        name="flctl-munged",
        argv=(
            *("/usr/sbin/munged", "--foreground", f"--socket={_MUNGE_SOCKET}", f"--key-file={_MUNGE_KEY}"),
            *(f"--log-file={MUNGE}/log", f"--pid-file={MUNGE}/pid", f"--seed-file={MUNGE}/seed", "--num-threads=2"),
        ),
        user="munge",
    )

    @classmethod
    def start(cls) -> None:
        if cls.daemon.pid is not None:
            return
        entry = pwd.getpwnam("munge")
        for folder, mode in ((STATE, 0o755), (RUN, 0o755), (_MUNGE_KEY.parent, 0o700), (MUNGE, 0o755)):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(mode)
        shutil.rmtree(MUNGE)  # munged refuses to start beside the socket and the lock of one that crashed
        MUNGE.mkdir()
        MUNGE.chmod(0o755)
        if not _MUNGE_KEY.exists():
            _MUNGE_KEY.write_bytes(secrets.token_bytes(128))
        _MUNGE_KEY.chmod(0o400)
        for path in (_MUNGE_KEY.parent, _MUNGE_KEY, MUNGE):
            os.chown(path, entry.pw_uid, entry.pw_gid)
        cls.daemon.start()
        wait_until(lambda: _MUNGE_SOCKET.exists() or not cls.daemon.pid, "munged's socket")
        if not cls.daemon.pid:
            raise TestbedError(cls.daemon.failed())

    @classmethod
    def stop_if_unused(cls) -> None:
        """End munged unless a cluster runs, be it of another process on this machine."""
        records = RUN.glob("flctl-slurm*.pid")
        if not any(Daemon(name=record.stem, argv=()).pid for record in records):
            cls.daemon.stop()

    @staticmethod
    @contextlib.contextmanager
    def deciding() -> Iterator[None]:
        """Nobody starts a cluster while another decides that no cluster is left."""
        RUN.mkdir(mode=0o755, parents=True, exist_ok=True)
        with (RUN / "munge.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class Slurm:
    """One cluster. Its controller listens on `port`, its node on `port` + 1; only munge lets anybody in.

    `min_job_age`: seconds for which the controller remembers an ended job (Slurm's own default is 300).
    `accounting`: its slurmdbd and database; None: ended jobs are forgotten for good.
    """

    def __init__(
        self,
        *,
        name: str,
        address: str,
        port: int,
        partitions: Sequence[str],
        cpus: int = 4,
        first_job_id: int = 1000,
        min_job_age: int = 300,
        accounting: Accounting | None = None,
    ) -> None:
        self.name, self.address, self.port = name, address, port
        self.partitions, self.cpus, self.first_job_id = tuple(partitions), cpus, first_job_id
        self.min_job_age = min_job_age
        self.accounting = accounting
        self.folder = STATE / "slurm" / name
        self.configuration = self.folder / "slurm.conf"
        self.job_records = self.folder / "jobs.txt"  # of every job that ended, by the controller itself
        self.environment = {"SLURM_CONF": str(self.configuration)}
        self.controller = Daemon(
            name=f"flctl-slurmctld-{name}", argv=("/usr/sbin/slurmctld", "-D"), environment=self.environment
        )
        self.node = Daemon(name=f"flctl-slurmd-{name}", argv=("/usr/sbin/slurmd", "-D"), environment=self.environment)

    def start(self, *, fresh: bool = True) -> Self:
        """Start what does not run. `fresh`: a controller that has to be started knows no earlier job."""
        if fresh and not self.controller.pid and not self.node.pid:
            self._end_steps()
            shutil.rmtree(self.folder, ignore_errors=True)
            if self.accounting:
                self.accounting.forget()
        for folder in (self.folder, self.folder / "state", self.folder / "spool"):
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.configuration.write_text(self._text(), encoding="ascii")
        with Munge.deciding():
            Munge.start()
            if self.accounting:
                self.accounting.configure(self.folder, _MUNGE_SOCKET)
                self.accounting.start()
            self.controller.start()
            self.node.start()
        wait_until(self._serves, f"cluster {self.name} has an idle node", every=0.1)
        if not self.running:
            raise TestbedError(f"{self.controller.failed()}\n{self.node.failed()}")
        return self

    def stop(self) -> None:
        """End both daemons and what is left of their job steps; the jobs' own processes belong to the account."""
        self.controller.stop()
        self.node.stop()
        self._end_steps()
        if self.accounting:
            self.accounting.stop()
        with Munge.deciding():
            Munge.stop_if_unused()

    @property
    def running(self) -> bool:
        accounted = self.accounting is None or self.accounting.running
        return accounted and self.controller.pid is not None and self.node.pid is not None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def remember(self, seconds: int) -> None:
        """Change MinJobAge of the running cluster."""
        self.min_job_age = seconds
        self.configuration.write_text(self._text(), encoding="ascii")
        self.command("scontrol", "reconfigure")

    @contextlib.contextmanager
    def detour(self, port: int) -> Iterator[None]:
        """The controller alone, started anew, looks for slurmdbd at this port; commands go to it straight."""
        assert self.accounting is not None
        self.controller.stop()
        self.configuration.write_text(self._text(dial=port), encoding="ascii")
        self.controller.start()
        wait_until(self._serves, f"the controller of {self.name} serves", every=0.1)
        self.configuration.write_text(self._text(), encoding="ascii")
        try:
            yield
        finally:
            self.controller.stop()
            self.start(fresh=False)

    @contextlib.contextmanager
    def limited(self, *lines: str) -> Iterator[None]:
        """The controller, started anew, with these lines in slurm.conf besides."""
        self.controller.stop()
        self.configuration.write_text("\n".join([self._text(), *lines, ""]), encoding="ascii")
        self.controller.start()
        wait_until(self._serves, f"the controller of {self.name} serves", every=0.1)
        try:
            yield
        finally:
            self.controller.stop()
            self.start(fresh=False)

    def requests(self, kind: str, uid: int) -> list[float]:
        """When (Unix seconds, the machine's zone) a user's requests of that kind arrived, by the controller's log:
        REQUEST_JOB_USER_INFO is a squeue of his jobs."""
        pattern = rf"^\[(\S+)\] slurmctld_req: received opcode {kind} from \S+ uid {uid}$"
        found = re.findall(pattern, self.log_text(), re.MULTILINE)
        return [datetime.fromisoformat(moment).timestamp() for moment in found]

    def command(self, *argv: str) -> str:
        """A Slurm command on this cluster as root."""
        return call(argv, environment={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **self.environment})

    def jobs(self) -> dict[str, str]:
        """Job id -> state of every job that the controller still remembers."""
        lines = self.command("squeue", "-h", "-t", "all", "-o", "%i|%T").splitlines()
        return dict(line.split("|", 1) for line in lines)

    def state(self, job_id: str) -> str | None:
        return self.jobs().get(job_id)

    def wait_state(self, job_id: str, *states: str | None, timeout: float = 60.0) -> str | None:
        """Wait until the job is in one of the states; None: the controller has forgotten it."""
        wait_until(lambda: self.state(job_id) in states, f"job {job_id} is {states}", timeout=timeout, every=0.2)
        return self.state(job_id)

    def cut_short(self, job_id: str) -> None:
        """Bring a running job's time limit forward to now: Slurm's limits count in minutes, and it looks every 30 s."""
        self.command("scontrol", "update", f"JobId={job_id}", "EndTime=now+1")

    def cancel_all(self) -> None:
        for partition in self.partitions:
            self.command("scancel", f"--partition={partition}")

    def wait_empty(self, *, timeout: float = 30.0) -> None:
        """Wait until no job waits, runs or completes."""
        wait_until(
            lambda: not self.command("squeue", "-h").strip(), f"{self.name} has no job", timeout=timeout, every=0.2
        )

    def log_text(self) -> str:
        return (self.folder / "slurmctld.log").read_text(errors="replace")

    def mend(self) -> None:
        """What operators do after an outage: a node that was left down or drained works again."""
        self._serves()

    def _serves(self) -> bool:
        if not self.running:
            return True  # the caller tells why
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%T"],
            env={"PATH": "/usr/bin", **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        state = (done.stdout.split() or [""])[0]  # a line per partition
        if state.startswith(("drain", "down")):  # a controller began anew: Duplicate jobid, or a node that it missed
            self.command("scontrol", "update", f"NodeName={self.name}01", "State=RESUME")
        return state in ("idle", "mixed", "allocated")

    def _end_steps(self) -> None:
        """slurmstepd leaves its parent; its environment still names the cluster."""
        mark = f"SLURM_CONF={self.configuration}".encode()
        for pid in pids():
            try:
                program = Path(f"/proc/{pid}/exe").readlink().name
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if program == "slurmstepd" and mark in variables:
                end(pid, grace=0)

    def _text(self, *, dial: int | None = None) -> str:
        # Slurm wants the name by which this machine knows itself, and the address it shall use instead.
        host = socket.gethostname().partition(".")[0]
        node = f"{self.name}01"
        partitions = (
            f"PartitionName={name} Nodes={node} Default={'YES' if name == self.partitions[0] else 'NO'}"
            " MaxTime=1-00:00:00 DefaultTime=00:10:00 OverSubscribe=NO State=UP"
            for name in self.partitions
        )
        return "\n".join(
            (
                f"ClusterName={self.name}",
                f"SlurmctldHost={host}({self.address})",
                f"SlurmctldPort={self.port}",
                f"SlurmdPort={self.port + 1}",
                f"AuthInfo=socket={_MUNGE_SOCKET}",
                "SlurmUser=root",
                "SlurmdUser=root",
                f"StateSaveLocation={self.folder}/state",
                f"SlurmdSpoolDir={self.folder}/spool",
                f"SlurmctldLogFile={self.folder}/slurmctld.log",
                "DebugFlags=Protocol",  # every request is in the controller's log
                f"SlurmdLogFile={self.folder}/slurmd.log",
                f"SlurmctldPidFile={self.folder}/slurmctld.pid",
                f"SlurmdPidFile={self.folder}/slurmd.pid",
                "ProctrackType=proctrack/linuxproc",
                "TaskPlugin=task/none",
                "JobAcctGatherType=jobacct_gather/none",
                *(self.accounting.settings(_MUNGE_SOCKET, dial) if self.accounting else _NO_ACCOUNTING),
                "JobCompType=jobcomp/filetxt",
                f"JobCompLoc={self.job_records}",
                "MpiDefault=none",
                "MailProg=/bin/true",
                "SelectType=select/cons_tres",
                "SelectTypeParameters=CR_CPU",
                "PriorityType=priority/basic",
                "SchedulerType=sched/backfill",
                "SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0",
                f"MinJobAge={self.min_job_age}",
                f"FirstJobId={self.first_job_id}",
                "KillWait=5",
                "OverTimeLimit=0",
                "MessageTimeout=5",
                "SlurmdTimeout=10",
                "ReturnToService=2",
                "SlurmdParameters=config_overrides",
                f"NodeName={node} NodeHostname={host} NodeAddr={self.address} CPUs={self.cpus} State=UNKNOWN",
                *partitions,
                "",
            )
        )
