"""The accounting of one cluster: its own MariaDB on a private socket, its own slurmdbd, its accounts and users.

slurmdbd listens on `port` of the address, MariaDB on no port at all.
"""

import contextlib
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from .procs import STATE, Daemon, TestbedError, call, wait_until

_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_LOG_SIZE = "--innodb-log-file-size=8M"


class Accounting:
    """`users` may charge the account `account` at the cluster `name`."""

    def __init__(self, *, name: str, address: str, port: int, account: str, users: tuple[str, ...]) -> None:
        self.name, self.address, self.port, self.account, self.users = name, address, port, account, users
        self.folder = STATE / "accounting" / name
        self.log = self.folder / "slurmdbd.log"
        self._data, self._socket = self.folder / "data", self.folder / "socket"
        self._environment = {"SLURM_CONF": str(STATE / "slurm" / name / "slurm.conf")}
        self.database = Daemon(
            name=f"flctl-mariadbd-{name}",
            argv=(
                *("/usr/sbin/mariadbd", "--no-defaults", "--user=root", f"--datadir={self._data}", _LOG_SIZE),
                *(f"--socket={self._socket}", f"--pid-file={self.folder}/mariadbd.pid", "--skip-networking"),
                # The socket lies in a folder of root's own: there is nobody else to be kept out.
                *("--skip-grant-tables", "--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0"),
                *("--performance-schema=off", "--skip-log-bin"),
            ),
        )
        self.daemon = Daemon(
            name=f"flctl-slurmdbd-{name}",
            argv=("/usr/sbin/slurmdbd", "-D"),
            environment={**self._environment, "MYSQL_UNIX_PORT": str(self._socket)},  # slurmdbd.conf knows no socket
        )

    def settings(self, munge_socket: Path, dial: int | None = None) -> tuple[str, ...]:
        """Lines of slurm.conf. `dial`: another port than slurmdbd's own."""
        return (
            "AccountingStorageType=accounting_storage/slurmdbd",
            f"AccountingStorageHost={self.address}",
            f"AccountingStoragePort={dial or self.port}",
            f"AccountingStoragePass={munge_socket}",
        )

    def configure(self, folder: Path, munge_socket: Path) -> None:
        """slurmdbd.conf, which lies beside slurm.conf; slurmdbd refuses one that others may read."""
        path = folder / "slurmdbd.conf"
        path.touch(mode=0o600)
        lines = (
            *("AuthType=auth/munge", f"AuthInfo=socket={munge_socket}", "SlurmUser=root"),
            *(f"DbdHost={socket.gethostname().partition('.')[0]}", f"DbdAddr={self.address}", f"DbdPort={self.port}"),
            *(f"LogFile={self.log}", f"PidFile={self.folder}/slurmdbd.pid", "DebugLevel=debug2", "MessageTimeout=5"),
            *("StorageType=accounting_storage/mysql", "StorageHost=localhost", "StorageUser=root", "StorageLoc=slurm"),
        )
        path.write_text("\n".join(lines) + "\n", encoding="ascii")

    def queries(self, uid: int) -> list[float]:
        """When (Unix seconds) a user asked for jobs, by slurmdbd's log: each sacct has a connection of its own."""
        found, users = list[float](), dict[str, int]()
        for line in self.log.read_text(errors="replace").splitlines():
            if opened := re.search(r"REQUEST_PERSIST_INIT: .* UID:(\d+) .* CONN:(\d+)$", line):
                users[opened[2]] = int(opened[1])
                continue
            asked = re.match(r"\[(\S+)\] .*DBD_GET_JOBS_COND: called in CONN (\d+)$", line)
            if asked and users.get(asked[2]) == uid:
                found.append(datetime.fromisoformat(asked[1]).timestamp())
        return found

    def forget(self) -> None:
        """Of ended daemons, everything that they knew."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start what does not run; munged runs already."""
        self._install()
        if not self.database.pid:
            self._socket.unlink(missing_ok=True)
        self.database.start()
        wait_until(lambda: self._socket.exists() or not self.database.pid, "MariaDB's socket")
        self.daemon.start()
        wait_until(lambda: self._listens() or not self.daemon.pid, f"slurmdbd of {self.name} listens")
        if not self.running:
            raise TestbedError(f"{self.database.failed()}\n{self.daemon.failed()}")
        self._associate()

    def stop(self) -> None:
        self.daemon.stop()
        self.database.stop(grace=10.0)

    @property
    def running(self) -> bool:
        return self.database.pid is not None and self.daemon.pid is not None

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """slurmdbd is killed, and comes back at the end."""
        self.daemon.stop(grace=0)
        try:
            yield
        finally:
            self.start()

    def _install(self) -> None:
        made = self._data / "made"
        if made.exists():
            return
        shutil.rmtree(self._data, ignore_errors=True)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        call(
            [
                *("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={self._data}", _LOG_SIZE),
                *("--skip-test-db", "--auth-root-authentication-method=normal"),
            ],
            environment={"PATH": _PATH},
        )
        made.touch()

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self.address, self.port), timeout=5):
            return True
        return False

    def _associate(self) -> None:
        if set(self.users) <= set(self._sacctmgr("show", "associations", "format=User").split()):
            return
        self._sacctmgr("add", "cluster", self.name)
        self._sacctmgr("add", "account", self.account, f"Cluster={self.name}")
        for user in self.users:
            self._sacctmgr("add", "user", user, f"Account={self.account}", f"Cluster={self.name}")

    def _sacctmgr(self, *words: str) -> str:
        """Its status is 1 also where there was nothing left to do."""
        argv = ["sacctmgr", "-i", "-n", "-P", *words]
        environment = {"PATH": _PATH, "LANG": "C.UTF-8", **self._environment}
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode and "Nothing" not in done.stdout:
            raise TestbedError(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout
