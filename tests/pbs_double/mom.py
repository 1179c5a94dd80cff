"""The execution side of the double: a job is a login shell that reads the name of its script, in a session of its own.

As pbs_mom does it (start_exec.c, mom_start.c, mom_mach.c of OpenPBS 23.06): a signal goes to every process of the
session, the shell's end is the job's end, and what is left of the session is killed then, unless the job was told to
end: so it has kill_delay seconds."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path

from .jobs import Job


class Running:
    """One job under way, or one task of an array."""

    def __init__(self, job: Job, folder: Path, index: int | None = None) -> None:
        owner = pwd.getpwnam(job.user)
        label = f"{job.number}{'' if index is None else f'[{index}]'}.{job.server}"
        self.job, self.index, self.began = job, index, time.time()
        self.kill_at: float | None = None
        self.status: int | None = None
        self.late = False
        self.spool = folder / "spool" / f"{label}.OU"
        script = folder / "jobs" / f"{label}.SC"
        script.write_text(job.script, encoding="utf-8", errors="surrogateescape")
        for path in (script, self.spool):
            path.touch()
            path.chmod(0o700)
            os.chown(path, owner.pw_uid, owner.pw_gid)
        shell = job.options.get("S", owner.pw_shell)
        home = job.environment.get("HOME", owner.pw_dir)
        own = {name: value for name, value in job.variables().items() if not name.startswith("PBS_O_INTER")}
        environment = {
            **own,
            "HOME": home,
            "USER": job.user,
            "LOGNAME": job.user,
            "SHELL": shell,
            "PATH": "/usr/bin:/bin",
            "PBS_JOBID": label,
            "PBS_JOBNAME": job.name,
            "PBS_QUEUE": "workq",
            "PBS_JOBDIR": home,
            "PBS_ENVIRONMENT": "PBS_BATCH",
            "ENVIRONMENT": "BATCH",
            "NCPUS": str(job.ncpus),
            **({} if index is None else {"PBS_ARRAY_INDEX": str(index)}),
        }
        identity = {
            "user": owner.pw_uid,
            "group": owner.pw_gid,
            "extra_groups": os.getgrouplist(job.user, owner.pw_gid),
        }
        with self.spool.open("ab") as spool:
            self.shell = subprocess.Popen(
                [f"-{Path(shell).name}"],
                executable=shell,
                env=environment,
                cwd=home,
                stdin=subprocess.PIPE,
                stdout=spool,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=0o077,
                **(identity if os.getuid() == 0 else {}),  # type: ignore[arg-type]
            )
        assert self.shell.stdin
        with contextlib.suppress(BrokenPipeError):
            self.shell.stdin.write(str(script).replace("[", "\\[").replace("]", "\\]").encode() + b"\n")
            self.shell.stdin.close()

    def terminate(self, delay: float) -> None:
        self.kill_at = time.time() + delay
        self.signal(signal.SIGTERM)

    def signal(self, number: int) -> None:
        """To the shell's process group at once, as good as at once for PBS; then to those with a group of their own."""
        leader = self.shell.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, number)
        for pid, group in _session(leader).items():
            with contextlib.suppress(ProcessLookupError):
                if group != leader:
                    os.kill(pid, number)

    def over(self) -> bool:
        """Whether it has ended; what is left of it has been killed then."""
        if self.status is None and (code := self.shell.poll()) is not None:
            self.status = 256 - code if code < 0 else code
        late = self.kill_at is not None and time.time() >= self.kill_at
        if late or (self.status is not None and self.kill_at is None):
            self.signal(signal.SIGKILL)
        if self.kill_at is not None and self.status is not None:
            return late or not _session(self.shell.pid)
        return self.status is not None

    def bring_back(self) -> None:
        """The spooled output, to where the job wanted it, as its owner."""
        target = Path(self.job.spooled_to)
        owner = pwd.getpwnam(self.job.user)
        with contextlib.suppress(OSError):
            shutil.copyfile(self.spool, target)
            target.chmod(0o600)
            os.chown(target, owner.pw_uid, owner.pw_gid)
        self.spool.unlink()


def _session(leader: int) -> dict[int, int]:
    """The living processes of a session, with their groups."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] not in "ZX":
                    found[int(entry.name)] = int(fields[2])
    return found
