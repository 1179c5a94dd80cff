"""Owns a campaign under fault: processes of flctl one after the other, what each acknowledged, and the final look."""

import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.chaos import checker
from tests.federation import SITES, Federation
from tests.testbed import Testbed
from tests.testbed.python import FLCTL

_HIT = re.compile(r"^\d+ +(?P<call>\w+)\((?P<words>.*?)\)?(?: += \?.*| <unfinished \.\.\.>)$")


class Driven:
    """A campaign of `rounds` rounds that is run to its end by as many processes as its faults leave."""

    def __init__(self, federation: Federation, *, rounds: int) -> None:
        self.federation, self.rounds = federation, rounds
        self.bed: Testbed = federation.bed
        self.place = federation.place
        self.log = self.bed.user.home / f"{self.place.name}.points"
        self.trace = self.bed.user.home / f"{self.place.name}.trace"
        self.notes: list[str] = []
        self.processes = 0
        self._seen = checker.acknowledged(self.place)
        self._jobs = {site: len(self._slurm(site)) for site in SITES}
        self._marks = {site: self.bed.facilities[site].sshd.mark() for site in SITES}
        self._trees = self._files()

    # Processes

    def round(self, *, fault: str = "", timeout: float = 240.0) -> bool:
        """One `flctl round`; true if it was killed. `fault`: what FLCTL_FAULT says."""
        environment = {"FLCTL_FAULT_LOG": str(self.log)} | ({"FLCTL_FAULT": fault} if fault else {})
        return self._ran(self._words(), environment, timeout)

    def tick(self, *, fault: str = "", timeout: float = 120.0) -> bool:
        """One `flctl campaign tick`, as cron would start it; true if it was killed."""
        environment = {"FLCTL_FAULT_LOG": str(self.log)} | ({"FLCTL_FAULT": fault} if fault else {})
        if not (self.place / "plan.json").exists():
            return self._ran(("campaign", "start", "--rounds", str(self.rounds)), environment, timeout)
        return self._ran(("campaign", "tick"), environment, timeout)

    def round_killed_at(self, call: str, count: int, *, timeout: float = 240.0) -> str | None:
        """One `flctl round` under strace, killed at a thread's n-th system call of this name; what it was about to do.
        None if no thread came so far."""
        self.trace.unlink(missing_ok=True)
        inject = f"inject={call}:signal=SIGKILL:when={count}"
        traced = ("strace", "-f", "-y", "-o", str(self.trace), "-e", f"trace={call}", "-e", inject)
        killed = self._ran((*traced, str(FLCTL), *self._words()), {}, timeout, program=False)
        return self._hit(call) if killed else None

    def _words(self) -> tuple[str, ...]:
        return ("round", "--rounds", str(self.rounds))

    def _ran(self, words: tuple[str, ...], env: Mapping[str, str], timeout: float, *, program: bool = True) -> bool:
        self.processes += 1
        try:
            if program:
                ran = self.federation.flctl(*words, env=env, timeout=timeout)
            else:
                ran = self.bed.run(*words, env=env, cwd=self.place, timeout=timeout)
        except subprocess.TimeoutExpired:
            self.notes.append(f"{' '.join(words)} did not end within {timeout:g} s")
            self.bed.user.end_processes()
            return True
        self._look(ran)
        return ran.returncode < 0

    def _look(self, ran: subprocess.CompletedProcess[str]) -> None:
        """Nothing that was acknowledged before is gone, and whoever was not killed ended in order."""
        now = checker.acknowledged(self.place)
        self.notes += checker.lost(self._seen, now)
        self._seen = now
        if "Traceback" in ran.stderr or "internal error" in ran.stdout + ran.stderr:
            self.notes.append(f"a process ended by a defect: {(ran.stdout + ran.stderr)[-400:]}")

    def _hit(self, call: str) -> str:
        """The call that the kill forestalled, in the words of strace, with what differs from run to run left out."""
        hits = (_HIT.match(line) for line in self.trace.read_text(errors="replace").splitlines())
        found = [hit["words"] for hit in hits if hit and hit["call"] == call]
        words = found[-1] if found else "?"
        return f"{call} {normal(words)}"

    # The end

    @property
    def version(self) -> int:
        return max(int(path.parent.name) for path in (self.place / "models").glob("[0-9]*/flctl.json"))

    @property
    def done(self) -> bool:
        return self.version >= self.rounds

    def finish(self, *, limit: float = 240.0) -> None:
        """Undisturbed now, until all rounds are made."""
        self.finish_with(self.round, limit=limit)

    def finish_with(self, step: Callable[[], object], *, limit: float = 240.0) -> None:
        """The same, by a command of the caller's; then wait for the last jobs to be gone."""
        deadline = time.monotonic() + limit
        while not self.done:
            if time.monotonic() > deadline:
                self.notes.append(f"the campaign did not complete: {self.federation.flctl('status').stdout[-600:]}")
                break
            step()
        for site in SITES:
            self.bed.facilities[site].slurm.wait_empty()

    @property
    def final(self) -> str:
        """The sha256 of the last model, computed from its files."""
        return checker.folder_sha256(self.place / "models" / f"{self.rounds:04d}")

    def judged(self, *, final: str | None, attempts_may_fail: bool = False) -> list[str]:
        """Everything that is wrong with the campaign, now that it has ended. `attempts_may_fail`: connections were cut
        and jobs killed too."""
        remotes = {site: self.federation.remote(site) for site in SITES}
        jobs = {site: self._slurm(site)[self._jobs[site] :] for site in SITES}
        evidence = checker.collect(self.place, remotes, jobs)
        found = [*self.notes]
        found += checker.violations(
            evidence, versions=self.rounds, sites=SITES, final=final, attempts_may_fail=attempts_may_fail
        )
        return [*found, *self._secrets(remotes), *self._strangers(remotes), *self._budget(cut=attempts_may_fail)]

    def _secrets(self, remotes: Mapping[str, Path]) -> list[str]:
        home = self.bed.user.home
        canaries = {"the secret of the codes": self.bed.totp_file.read_text().strip().encode()}
        canaries["a private key"] = self.bed.key.read_bytes().splitlines()[2]
        found = checker.leaks([self.place, home / ".local", *remotes.values()], canaries)
        for site in SITES:
            text = next(path for path in sorted(self.bed.facilities[site].data.rglob("*")) if path.is_file())
            phrase = max(text.read_bytes().splitlines()[:200], key=len)
            found += checker.leaks([self.place], {f"data of {site}": phrase})
        return found

    def _strangers(self, remotes: Mapping[str, Path]) -> list[str]:
        home = self.bed.user.home
        allowed = [self.place, home / ".local/state/flctl", self.log, self.trace, *remotes.values()]
        return checker.strangers(self._trees, self._files(), allowed)

    def _budget(self, *, cut: bool) -> list[str]:
        """No login failed, and no process logged in more often than it needed: for commands, and for files; where
        connections were `cut` it may have."""
        found = []
        for site in SITES:
            attempts = self.bed.facilities[site].sshd.attempts(self._marks[site])
            if attempts.failed_codes or attempts.failed_keys:
                found.append(f"{site}: {attempts.failed_codes} codes and {attempts.failed_keys} keys were refused")
            if attempts.logins > 2 * self.processes and not cut:
                found.append(f"{site}: {attempts.logins} logins of {self.processes} processes")
        return found

    def _files(self) -> set[Path]:
        """What is in the homes of the orchestrator and of the accounts at the sites, and what is theirs in /tmp."""
        accounts = [self.bed.user, *(self.bed.facilities[site].account for site in SITES)]
        homes = (checker.tree(account.home) for account in accounts)
        return checker.owned(Path("/tmp"), [account.uid for account in accounts]).union(*homes)

    def _slurm(self, site: str) -> tuple[checker.JobRecord, ...]:
        return checker.slurm_jobs(self.bed.facilities[site].slurm.job_records)

    def remove(self) -> None:
        """Its folders at home and at the sites."""
        for site in SITES:
            shutil.rmtree(self.federation.remote(site), ignore_errors=True)
        for path in (self.place, self.place.with_name(f"{self.place.name}-in")):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.log, self.trace):
            path.unlink(missing_ok=True)

    def points(self) -> Counter[str]:
        """The fault points passed, by the line that each leaves in its log."""
        return Counter(self.log.read_text().splitlines() if self.log.exists() else ())


def normal(words: str) -> str:
    """The words of a system call without descriptors, pids, addresses and random names."""
    text = re.sub(r"^\d+<(.*?)>", r"\1", words)
    text = re.sub(r"0x[0-9a-f]+|\.\d+\.\d{6,}|socket:\[\d+\]|pipe:\[\d+\]|-[0-9a-f]{8}\b", "", text)
    text = re.sub(r"/tmp/\S+?(?=[\",/]|$)", "/tmp/..", text)
    return text[:160]


def durable(hit: str, home: Path) -> bool:
    """Whether a system call that was hit is about the campaign's or the user's own files, or begins something."""
    return str(home) in hit or hit.startswith(("connect ", "vfork "))
