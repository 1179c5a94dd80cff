"""The machine of the double: its jobs, what of them runs, and the rules by which they wait, start and end."""

import time
from pathlib import Path

from .jobs import Job
from .mom import Running


class Machine:
    limit_status: int | None = None

    def __init__(self, folder: Path, name: str, ncpus: int, kill_delay: float, history: bool) -> None:
        self.folder, self.name, self.ncpus, self.kill_delay, self.history = folder, name, ncpus, kill_delay, history
        self.jobs: dict[str, Job] = {}
        self.running: list[Running] = []

    def tick(self) -> None:
        """See who has ended, who may go on waiting no longer, and who has room to start."""
        now = time.time()
        for running in list(self.running):
            job = running.job
            if running.kill_at is None and job.walltime and now - running.began > job.walltime:
                running.late = True
                running.terminate(self.kill_delay)
            if now - running.began > 1 and not job.array:
                job.used = now - running.began
            if running.over():
                self.running.remove(running)
                running.bring_back()
                self._ended(running, now)
        for job in list(self.jobs.values()):
            self._wake(job, now)
            if job.state in "QB":
                self._start(job, now)

    def _wake(self, job: Job, now: float) -> None:
        if job.state == "W" and job.due <= now:
            job.state, job.substate, job.eligible = "Q", 10, now
        if job.state == "H" and job.held == "s":
            kind, _, others = job.options["W"].partition("depend=")[2].partition(":")
            before = [self.jobs.get(one) for one in others.split(":")]
            if any(one is None or (one.state == "F" and not _satisfied(kind, one)) for one in before):
                self._finish(job, 92 if None in before else 91, now)
            elif all(one and one.state == "F" for one in before):
                job.state, job.substate, job.held, job.eligible = "Q", 10, "n", now

    def _start(self, job: Job, now: float) -> None:
        if job.ncpus > self.ncpus:
            need = f"(R: {job.ncpus} A: {self.ncpus} T: {self.ncpus})"
            job.comment = f"Can Never Run: Insufficient amount of resource: ncpus {need}"
            return
        while (not job.array or job.waiting_indices) and job.state in "QB":
            taken = {running.job.slot for running in self.running}
            if sum(running.job.ncpus for running in self.running) + job.ncpus > self.ncpus:
                job.comment = job.comment if job.state == "B" else "Not Running: Not enough free nodes available"
                return
            job.slot = min(set(range(self.ncpus + 1)) - taken)
            self.running.append(Running(job, self.folder, job.waiting_indices.pop(0) if job.array else None))
            when = time.strftime("%a %b %d at %H:%M", time.localtime(now))
            where = f"on ({self.name}:ncpus={job.ncpus})"
            job.comment = f"Job Array Began at {when}" if job.array else f"Job run at {when} {where}"
            job.started, job.changed, job.runs = job.started or now, now, job.runs + 1
            job.state, job.substate = ("B", 93) if job.array else ("R", 42)
            job.session = None if job.array else self.running[-1].shell.pid

    def _ended(self, running: Running, now: float) -> None:
        job = running.job
        job.exit_status = max(job.exit_status or 0, running.status or 0)
        if job.array and (job.waiting_indices or any(other.job is job for other in self.running)):
            return
        if not job.array:
            job.used = now - running.began
        if running.late and self.limit_status is not None:
            job.exit_status, job.comment = self.limit_status, job.comment + " and exceeded resource walltime"
        told = "terminated" in job.comment or "exceeded" in job.comment
        job.comment += "" if told else " and finished" if job.exit_status == 0 else " and failed"
        self._finish(job, 93 if running.late else 91 if told else 92 if job.exit_status == 0 else 93, now)

    def delete(self, job: Job, who: str) -> None:
        under_way = [running for running in self.running if running.job is job]
        if not under_way:
            job.comment += " and terminated" if job.comment else ""
            self._finish(job, 91, time.time())
        elif "terminated" not in job.comment:
            job.comment += f" and terminated by {who}"
            job.waiting_indices = []
            for running in under_way:
                running.terminate(self.kill_delay)

    def _finish(self, job: Job, substate: int, now: float) -> None:
        job.state, job.substate, job.ended, job.changed, job.history = "F", substate, now, now, now
        if not self.history:
            self.jobs.pop(job.id, None)


def _satisfied(kind: str, before: Job) -> bool:
    return {"afterok": before.ended_well, "afternotok": not before.ended_well}.get(kind, True)
