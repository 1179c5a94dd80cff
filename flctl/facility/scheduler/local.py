"""Owns the commands of a site without a batch system: the delivered batch.py, in the same shape as a scheduler's."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from flctl.facility.profile import Shape
from flctl.facility.scheduler import Activity, Estimate, QueryFailed, QueueSeen, Seen, listing

STATES = {
    "RUNNING": Activity.ACTIVE,
    "COMPLETED": Activity.ENDED,
    "FAILED": Activity.ENDED,
    "TIMEOUT": Activity.ENDED,
    "CANCELLED": Activity.ENDED,
    "LOST": Activity.ENDED,  # no process of the job holds its lock, and nobody wrote down how it ended
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """`payload`: absolute path of the folder that holds batch.py; the jobs are those in its campaign's runs folder."""

    python: str
    payload: str
    shape: Shape

    def submit(self, script: str, token: str) -> str:
        shape = self.shape
        return self._batch(
            *("submit", "--name", token, "--walltime", str(shape.walltime), "--warn", str(shape.warning), script)
        )

    def job_id(self, stdout: str) -> str | None:
        text = stdout.strip()
        return text if re.fullmatch(r"[0-9]+\.[0-9]+", text) else None

    def refusal(self, text: str) -> str | None:
        """Nothing was started: no such Python, no such batch.py, or a command that it does not know."""
        definite = r"not found|can't open file|SyntaxError|batch\.py submit: error:"
        words = [line.strip() for line in text.splitlines() if re.search(definite, line)]
        return "; ".join(words)[:500] or None

    def full(self, text: str) -> bool:
        return False

    def queue(self, tokens: Sequence[str] = ()) -> str:
        """No runs folder, no jobs: so it is before the first delivery, when batch.py is not there either."""
        return f"test ! -e {shlex.quote(self._runs)} || {self._batch('list', self._runs)}"

    def seen(self, status: int, stdout: str, stderr: str) -> tuple[Seen, ...]:
        if status != 0:
            raise QueryFailed(f"batch.py ended with status {status}: {stderr.strip()[-300:] or 'without a word'}")
        return listing.jobs(stdout, activity_of)

    def accounting(self, tokens: Sequence[str], ids: Sequence[str | None] = ()) -> str | None:
        return None  # batch.py never forgets a job

    def accounted(self, status: int, stdout: str, stderr: str) -> tuple[Seen, ...] | None:
        return None

    def cancel(self, token: str, job_id: str | None) -> str:
        return f"test ! -e {shlex.quote(self._runs)} || {self._batch('cancel', self._runs, '--name', token)}"

    def version(self) -> str:
        return "echo no batch system"

    def trial(self, script: str) -> str | None:
        return None

    def estimate(self, status: int, stdout: str, stderr: str) -> Estimate:
        return Estimate()

    def queues(self) -> str | None:
        return None

    def queues_seen(self, status: int, stdout: str, stderr: str) -> tuple[QueueSeen, ...]:
        return ()

    def accounts(self) -> str | None:
        return None

    def accounts_seen(self, status: int, stdout: str, stderr: str) -> tuple[str, ...] | None:
        return None

    @property
    def _runs(self) -> str:
        return str(PurePosixPath(self.payload).parent.parent / "runs")

    def _batch(self, *arguments: str) -> str:
        return shlex.join([self.python, str(PurePosixPath(self.payload) / "batch.py"), *arguments])


def activity_of(state: str) -> Activity:
    return STATES.get(state, Activity.ACTIVE)
