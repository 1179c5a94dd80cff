"""The engine: advance a site, decide for the campaign, tick. The only loop; it keeps no truth of its own.

`advance(site)` moves one site's runs as far as they go without waiting, under that site's lock. `decide()` asks the
policy and acts (see deciding.py), under the campaign's lock. `tick()` advances every due site in a thread of its own
and decides after each one. Both re-read the records once they hold their lock.
"""

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from flctl import faults
from flctl.campaign import attempts, budget, contacts, deciding, driver, history, steps
from flctl.campaign.access import Access, Terminal
from flctl.campaign.config import Configuration, load_configuration, load_profile
from flctl.campaign.contacts import failure_of
from flctl.campaign.session import Session
from flctl.campaign.workspace import Workspace
from flctl.errors import FlctlError, Interrupted, Locked, LoginNeeded, LoginTooSoon, defect
from flctl.facility.profile import Site
from flctl.policy import Decision
from flctl.records import Failure, Run, Stage, Work

SUBMITTED = (Stage.CLAIMED, Stage.QUEUED, Stage.RUNNING)
INTERRUPT_PATIENCE = 10.0


@dataclass(slots=True, kw_only=True)
class Doing:
    """What a site's thread does right now, for the live view only."""

    what: str
    since: float
    moved: int = 0
    total: int = 0


@dataclass(slots=True, kw_only=True)
class Engine:
    """Moves one campaign in this process. `stop` set: no new step begins, our rsync ends, Interrupted is raised.
    `errors`: what went wrong in this process, by site. `stays`: this process comes back to its connections.
    `abandoned`: a thread still waits for a site although it was told to stop. `tell` hears each change as a line;
    `terminal` lends ours to a program that asks a person (None: nobody is there). `busy`: another flctl had what this
    one wanted to move; `worked`: this one moved something, or looked at it."""

    workspace: Workspace
    runtime: Path
    stop: threading.Event = field(default_factory=threading.Event)
    doing: dict[str, Doing] = field(default_factory=dict)
    errors: list[tuple[str, Failure]] = field(default_factory=list)
    stays: bool = False
    abandoned: bool = False
    tell: Callable[[str], None] = lambda line: None
    terminal: Terminal | None = None
    busy: bool = False
    worked: bool = False
    access: Access = field(init=False)
    _warned: dict[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.access = Access(
            workspace=self.workspace,
            runtime=self.runtime,
            stopped=self.stop.is_set,
            note=self.note,
            terminal=self.terminal,
            tell=self.tell,
        )

    # One site

    def advance(self, site: str, *, patience: float = 0.0) -> bool:
        """Move the site's open runs as far as they go. Trouble is written into the site's contact record, never
        raised (except Interrupted). False if another flctl has the site."""
        try:
            with self.workspace.lock_site(site, patience=patience) as lock:
                self.worked = True
                self._advance_locked(site, lock)
        except Locked:
            self.busy = True
            return False
        finally:
            self.doing.pop(site, None)
        return True

    def _advance_locked(self, site: str, lock: int) -> None:
        if not self._is_due(site):
            return
        began = time.time()
        try:
            profile = load_profile(self.workspace, site)
            configuration = load_configuration(self.workspace)
            self._move(self.access.session(profile, lock, automatic=True), configuration)
        except Interrupted:
            raise
        except LoginTooSoon as early:
            self._postpone(site, early)
        except FlctlError as error:
            self._note_trouble(site, error)
        except Exception as error:  # one site's defect must not end what the others do
            self._note_trouble(site, defect(error))
        else:
            self._note_contact(profile, began)

    def _move(self, session: Session, configuration: Configuration) -> None:
        """Step after step until every open run of the site has to wait."""
        site = session.site.name
        looked = False
        self._tell_late(session)
        while True:
            self.check_stop()
            runs = [run for run in self.workspace.runs(site) if run.open and not contacts.is_held(run.held)]
            # A run that was adopted from the site waits for its base to be made again.
            runs = [run for run in runs if self.workspace.has_model(run.order.base)]
            submitted = [run for run in runs if run.stage in SUBMITTED or run.job.ending]
            if submitted and not looked:
                looked = True
                self.note(site, "asking the scheduler")
                for before, after in zip(submitted, steps.check(session, submitted), strict=True):
                    self.record(before, self._followed(session, configuration, after))
                continue
            ready = next((run for run in runs if run not in submitted), None)
            if ready is None:
                return
            after = self._step(session, ready, configuration)
            self.record(ready, after)
            looked = looked or after.stage == Stage.QUEUED

    def _tell_late(self, session: Session) -> None:
        """End at the site what was given up while it could not be told to."""
        for run in self.workspace.runs(session.site.name):
            if run.stage == Stage.FAILED and run.job.ending:
                steps.cancel(session, run)
                self.workspace.save_run(replace(run, job=replace(run.job, ending="")))

    def _followed(self, session: Session, configuration: Configuration, run: Run) -> Run:
        stays = self.stays or self.access.is_kept(run.site)
        return attempts.followed(self.workspace, configuration, session.site, run, stays=stays)

    def _step(self, session: Session, run: Run, configuration: Configuration) -> Run:
        """The one step that the run's stage calls for; a run that fails for good is failed here."""
        run = replace(run, held=None)  # until a time that is over
        try:
            if run.stage == Stage.ORDERED or (run.stage == Stage.DELIVERED and run.job.rate is None):
                run = budget.admitted(self.workspace, configuration, session.site, run)
                if run.held is not None:
                    return run
            if run.stage in (Stage.ORDERED, Stage.DELIVERED):
                self.workspace.check_room()
            if run.stage == Stage.ORDERED:
                self.note(run.site, "delivering")
                return steps.deliver(session, run, configuration)
            if run.stage == Stage.DELIVERED:
                self.note(run.site, "submitting")
                return steps.submit(session, run)
            self.note(run.site, "fetching")
            return steps.fetch(session, run, configuration)
        except FlctlError as error:
            if error.code in ("aggregation_refused", "job_failed") and run.stage == Stage.ENDED:
                return replace(run, stage=Stage.FAILED, failure=failure_of(error))
            raise

    def record(self, before: Run, after: Run) -> None:
        """Write a run's new record, and the change of its stage into the journal."""
        if after == before:
            return
        if (after.stage, after.attempt) != (before.stage, before.attempt):
            after = replace(after, changed_at=time.time())
        faults.point("run-record", subject_of(after))
        self.workspace.save_run(after)
        faults.point("run-recorded", subject_of(after))
        if after.failure is not None and after.failure != before.failure:
            self.errors.append((after.site, after.failure))
        if after.held is not None and contacts.for_a_person(after.held) and after.held != before.held:
            if after.failure is None:
                self.errors.append((after.site, budget.held_by_budget(after)))
            self.workspace.journal.append("held", site=after.site, number=after.number, reason=after.held.reason)
            self.tell(f"{after.site}: run {after.number:04d} is HELD: {after.held.reason}")
        if after.stage != before.stage or after.attempt != before.attempt:
            self.workspace.journal.append(
                "run",
                site=after.site,
                number=after.number,
                attempt=after.attempt,
                work=after.order.work,
                stage=after.stage,
                job_id=after.job.id,
                reason=after.failure.message if after.failure else "",
            )
            faults.point("run-journaled", subject_of(after))
            follows = after.attempt > before.attempt and after.past[-1].automatic
            self.tell(attempts.line_of_next(after) if follows else line_of(after))

    # Contact with a site

    def _is_due(self, site: str) -> bool:
        return contacts.is_due(self.workspace.contact(site), self.open_runs(site), time.time())

    def open_runs(self, site: str) -> list[Run]:
        """Those that something may be done for: not what waits for a model that is not made yet."""
        return [run for run in self.workspace.runs(site) if run.open and self.workspace.has_model(run.order.base)]

    def _note_contact(self, profile: Site, began: float) -> None:
        """The site was reached: when it is next looked at depends on its jobs and on what a login costs."""
        runs, now = self.open_runs(profile.name), time.time()
        due = contacts.next_due(profile, runs, now, stays=self.stays or self.access.is_kept(profile.name))
        contact = contacts.reached(self.workspace.contact(profile.name), profile, began, due)
        self.workspace.save_contact(profile.name, contact)
        faults.point("contact-recorded", profile.name)
        warning = contacts.outlives(contact, profile, runs, now)
        if warning and self.stays and self._warned.get(profile.name) != contact.login_until:
            self._warned[profile.name] = contact.login_until
            self.tell(warning)

    def _note_trouble(self, site: str, error: FlctlError) -> None:
        """The contact failed: say why, and come back later, or wait for a person."""
        self.access.drop(site)
        before = self.workspace.contact(site)
        self.workspace.save_contact(site, contacts.failed(before, error, time.time()))
        if isinstance(error, LoginNeeded) and not error.attempted and before.trouble == failure_of(error):
            return
        faults.point("trouble-recorded", site)
        self.errors.append((site, failure_of(error)))
        self.tell(f"{site}: {error.message}")
        self.workspace.journal.append("trouble", site=site, code=error.code, message=error.message)

    def _postpone(self, site: str, early: LoginTooSoon) -> None:
        """No login is tried now; the site is due when one may be."""
        before = self.workspace.contact(site)
        after = contacts.postponed(before, early, time.time())
        self.workspace.save_contact(site, after)
        faults.point("postponed", site)
        if after.trouble is not None and after.trouble != before.trouble:
            self.tell(f"{site}: {early.message}")
            self.workspace.journal.append("trouble", site=site, code=early.code, message=early.message)

    def close(self) -> None:
        self.access.close()
        shutil.rmtree(self.runtime, ignore_errors=True)

    # The campaign

    def decide(self, *, patience: float = 5.0) -> Decision | None:
        """Ask the policy and act until it has nothing more to say. None without a plan, or if another flctl decides."""
        try:
            with self.workspace.lock_campaign(patience=patience):
                return deciding.decide(self)
        except Locked:
            self.busy = True
            return None

    def tick(self, *, stays: bool = False, deadline: float | None = None) -> Decision | None:
        """Advance every due site, each in a thread of its own, and decide after each; also those that become due by
        what was decided. `stays`: this process keeps its connections for the next tick. Interrupted when `stop` is set
        or the monotonic clock passes `deadline`; what runs then is given INTERRUPT_PATIENCE seconds to end."""
        self.stays = self.access.stays = stays
        driver.ours(self.workspace)
        history.look_back(self.workspace, self.tell)
        self.workspace.check_room()
        decision = self.decide(patience=0.0)
        running: dict[Future[bool], str] = {}
        skipped: set[str] = set()
        pool = ThreadPoolExecutor(max_workers=32, thread_name_prefix="site")
        try:
            while True:
                if deadline is not None and time.monotonic() > deadline and running:
                    self.stop.set()
                self.check_stop()
                for site in self.due_sites():
                    if site not in running.values() and site not in skipped:
                        running[pool.submit(self.advance, site)] = site
                if not running:
                    return decision
                ended, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in ended:
                    site = running.pop(future)
                    if not future.result():
                        skipped.add(site)
                    decision = self.decide()
        except Interrupted:
            self.abandoned = bool(wait(running, timeout=INTERRUPT_PATIENCE).not_done)
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def due_sites(self) -> list[str]:
        return [site for site in self.sites_with_open_runs() if self._is_due(site)]

    def sites_with_open_runs(self) -> list[str]:
        return sorted(
            {run.site for run in self.workspace.runs() if run.open and self.workspace.has_model(run.order.base)}
        )

    def check_stop(self) -> None:
        if self.stop.is_set():
            raise Interrupted("interrupted", hint="flctl round, or the next flctl campaign tick, goes on from here")

    def note(self, site: str, what: str, moved: int = 0, total: int = 0) -> None:
        doing = self.doing.get(site)
        if doing is None or doing.what != what:
            self.doing[site] = Doing(what=what, since=time.time(), moved=moved, total=total)
        else:
            doing.moved, doing.total = moved, total


def subject_of(run: Run) -> str:
    return f"{run.site}/{run.number}.{run.attempt} {run.stage}"


def line_of(run: Run) -> str:
    """A run's new stage as a line of text."""
    work = "" if run.order.work == Work.TRAIN else f" ({run.order.work})"
    job = f", job {run.job.id}" if run.job.id and run.stage in SUBMITTED else ""
    why = f": {run.failure.message}" if run.failure else ""
    return f"{run.site}: run {run.number:04d}{work} {run.stage}{job}{why}"
