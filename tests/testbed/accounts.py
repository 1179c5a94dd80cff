"""The testbed's Unix accounts: each with a home that nobody else can read, each without a password."""

import fcntl
import os
import pwd
import shutil
from dataclasses import dataclass
from pathlib import Path

from .procs import STATE, TestbedError, call, kill_all_of

HOMES = STATE / "home"


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    name: str
    uid: int
    gid: int
    home: Path

    def give(self, path: Path, mode: int) -> Path:
        os.chown(path, self.uid, self.gid)
        path.chmod(mode)
        return path

    def folder(self, path: Path, mode: int = 0o700) -> Path:
        path.mkdir(exist_ok=True)
        return self.give(path, mode)

    def file(self, path: Path, text: str, mode: int = 0o600) -> Path:
        """Write a file of this account; never readable by others in between."""
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
            stream.write(text)
        return self.give(path, mode)

    def end_processes(self) -> None:
        kill_all_of(self.uid)

    def empty_home(self) -> None:
        """What tests left in it goes away; the home itself stays."""
        for entry in self.home.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def account(name: str, *, shell: str = "/bin/bash") -> Account:
    """The account of that name, made if it does not exist. An account that is not the testbed's own is refused."""
    home = HOMES / name
    for folder in (STATE, HOMES):
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (STATE / "accounts.lock").open("w") as lock:  # beside another test run's
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _account(name, home, shell)


def _account(name: str, home: Path, shell: str) -> Account:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        # '*' as password: no password fits, and sshd does not take the account for a locked one as it does with '!'.
        call(
            ["useradd", "--home-dir", str(home), "--no-create-home", "--shell", shell, "--user-group", "-p", "*", name]
        )
        entry = pwd.getpwnam(name)
    if Path(entry.pw_dir) != home or entry.pw_uid == 0:
        raise TestbedError(f"the account {name} exists and is not the testbed's: its home is {entry.pw_dir}")
    if entry.pw_shell != shell:
        call(["usermod", "--shell", shell, name])
    made = Account(name=name, uid=entry.pw_uid, gid=entry.pw_gid, home=home)
    made.folder(home)
    return made
