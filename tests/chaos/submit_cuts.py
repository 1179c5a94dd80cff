"""Owns the row "submit cuts": the connection is cut at a random byte of a submission, then the next contact looks.

Reset, closed or frozen, in either direction; with sbatch as it is, with one that sleeps before or after, and with a
controller that is stopped (SIGSTOP) meanwhile. flctl's own steps run over real sshd and real Slurm; how many jobs each
attempt has is counted in the controller's own list. Jobs wait for a time that does not come, so that none runs.
"""

import concurrent.futures
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from flctl.campaign import steps
from flctl.campaign.config import load_profile
from flctl.campaign.session import Session
from flctl.campaign.workspace import Workspace
from flctl.errors import FlctlError
from flctl.facility import patience
from flctl.facility.connection import Road, connect
from flctl.records import Job, Order, Run, Stage, Work, token_of
from tests.campaigns import make_model
from tests.chaos.proxy import Plan, Proxy
from tests.chaos.results import ROOT, ROWS, Result
from tests.testbed.facility import Facility, toml
from tests.testbed.procs import Daemon
from tests.testbed.slurm import Slurm
from tests.testbed.sshd import Sshd

FAILURES = ("reset", "close", "freeze")
KINDS = ("fast", "slow-after", "stalled", "fast", "slow-before")
BATCH = 12
"""Trials that run side by side, each over a connection of its own; a stopped controller is stopped for all of them."""

STALL = (2.0, 7.0)
"""Seconds for which the controller is stopped: within MessageTimeout (5 s), and beyond it."""

RECOVERY = 60.0
"""Seconds after a batch in which every id must be known: sbatch may still be on its way."""

SBATCH = """#!/bin/sh
test ! -e slow-before || sleep 1.5
/usr/bin/sbatch "$@"; status=$?
test ! -e slow-after || sleep 1.5
exit $status
"""
JOB = "#!/bin/sh\n#SBATCH --begin=now+12hours\n#SBATCH --output=/dev/null\ntrue\n"


@dataclass(slots=True, kw_only=True)
class Trial:
    """One attempt of one run, and what is done to its submission. `told`: what flctl was told by it."""

    run: Run
    kind: str
    plan: Plan
    told: str = ""
    contacts: int = 0

    def __str__(self) -> str:
        plan = self.plan
        return f"{self.kind}, {plan.then} after {plan.after} bytes {plan.direction} ({self.told})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """Where the trials happen. `size`: bytes that an undisturbed submission moves, by direction."""

    facility: Facility
    workspace: Workspace
    known_hosts: Path
    root: PurePosixPath
    size: dict[str, int] = field(default_factory=dict)

    def session(self, road: Proxy | None = None) -> Session:
        """An open connection to the site; through the proxy, if there is one."""
        site = load_profile(self.workspace, self.facility.name)
        if road is not None:
            site = replace(site, login=replace(site.login, host=road.address, port=road.port))
        return Session(
            workspace=self.workspace,
            site=site,
            connection=connect(site, Road(known_hosts=self.known_hosts, runtime=self.known_hosts.parent)),
            root=self.root,
            data="/tmp",
            report=lambda *_: None,
        )

    def jobs(self) -> dict[str, list[str]]:
        """The ids of the jobs of each name, as the controller lists them."""
        listed: dict[str, list[str]] = {}
        for line in self.facility.slurm.command("squeue", "-h", "-a", "-t", "all", "-o", "%i|%j").splitlines():
            number, name = line.split("|")
            listed.setdefault(name, []).append(number)
        return listed


def run(*, seed: int, trials: int | None) -> Result:
    began, chance = time.monotonic(), random.Random(seed)
    count = trials or ROWS["submit cuts"].trials
    numbers = itertools.count(1)
    done: list[Trial] = []
    notes: list[str] = []
    with ground() as where:
        _calibrate(where, next(numbers))
        side = min(BATCH, -(-count // len(KINDS)))
        kinds = [KINDS[index % len(KINDS)] for index in range(-(-count // side))]
        for index, kind in enumerate(kinds):
            batch = [_trial(where, next(numbers), kind, chance) for _ in range(min(side, count - len(done)))]
            stall = STALL[index // len(KINDS) % 2] if kind == "stalled" else 0.0
            notes += _judge(where, batch, stall)
            done += batch
        jobs = where.jobs()
    doubles = [trial for trial in done if len(jobs.get(trial.run.job.token, [])) > 1]
    notes += [f"{len(jobs[trial.run.job.token])} jobs: {trial}" for trial in doubles]
    contacts = Counter(trial.contacts for trial in done)
    told = Counter(trial.told.split(":")[0] for trial in done)
    return Result(
        row="submit cuts",
        trials=len(done),
        failures=len(notes),
        seconds=time.monotonic() - began,
        figures={
            "worst": f"{len(doubles)} doubles",
            "contacts": " ".join(f"{n}:{found}" for n, found in sorted(contacts.items())),
            "told": " ".join(f"{what}:{found}" for what, found in sorted(told.items())),
        },
        notes=notes,
    )


def _judge(where: Ground, batch: list[Trial], stall: float) -> list[str]:
    """Cut them all, come back, and compare with the controller's list; what is wrong."""
    _submit(where, batch, stall)
    _recover(where, batch)
    jobs, notes = where.jobs(), []
    for trial in batch:
        ids, known = jobs.get(trial.run.job.token, []), trial.run.job.id
        if ids != [known]:
            notes.append(f"known as {known}, {trial.run.stage}; the controller has {ids}: {trial}")
    return notes


def _submit(where: Ground, batch: list[Trial], stall: float) -> None:
    ready = threading.Barrier(len(batch) + 1, timeout=120)

    def one(trial: Trial) -> None:
        with Proxy(where.facility.sshd.address, where.facility.sshd.port) as road, _trusted(where, road):
            session = where.session(road)
            try:
                session.connection.run("true")
                ready.wait()
                ready.wait()
                road.arm(trial.plan)
                trial.run = steps.submit(session, trial.run)
                trial.told = str(trial.run.stage)
            except FlctlError as error:
                trial.told = f"{error.code}: {error.message[-80:]}"
                _again(where, trial)
            finally:
                with contextlib.suppress(FlctlError):
                    session.connection.close()

    with concurrent.futures.ThreadPoolExecutor(max_workers=len(batch)) as pool:
        running = [pool.submit(one, trial) for trial in batch]
        ready.wait()  # all are connected
        with _stopped(where.facility.slurm.controller if stall else None, stall):
            ready.wait()
        for future in running:
            future.result()


def _again(where: Ground, trial: Trial) -> None:
    """The next contact, at once: sbatch may still be on its way."""
    session = where.session()
    trial.contacts += 1
    trial.run = steps.submit(session, trial.run)
    session.connection.close()


@contextlib.contextmanager
def _stopped(controller: Daemon | None, seconds: float) -> Iterator[None]:
    """Stop the controller, for so long from the end of the block on."""
    if controller is None:
        yield
        return
    pid = controller.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
        time.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)


def _recover(where: Ground, batch: list[Trial]) -> None:
    """As the engine does: what is submitted is looked at, until every id is known."""
    session, deadline = where.session(), time.monotonic() + RECOVERY
    while (left := [trial for trial in batch if trial.run.stage != Stage.QUEUED]) and time.monotonic() < deadline:
        for trial in left:
            trial.contacts += 1
        contact = where.workspace.contact(where.facility.name)
        where.workspace.save_contact(where.facility.name, replace(contact, ask_after=0.0))
        for trial, after in zip(left, steps.check(session, [t.run for t in left]), strict=True):
            trial.run = after
        time.sleep(0.2)
    session.connection.close()


# What is tried


def _trial(where: Ground, number: int, kind: str, chance: random.Random) -> Trial:
    direction: Any = chance.choice(("up", "down"))
    plan = Plan(after=chance.randrange(where.size[direction] + 1), direction=direction, then=chance.choice(FAILURES))
    return Trial(run=_ordered(where, number, kind), kind=kind, plan=plan)


def _ordered(where: Ground, number: int, kind: str = "fast") -> Run:
    """A run that is delivered: its folder is at the site."""
    name, owner = where.facility.name, where.facility.account
    folder = owner.folder(Path(where.root) / "runs" / f"{number:04d}-1")
    owner.file(folder / "job.sh", JOB)
    owner.file(folder / "order.json", "{}")
    if kind.startswith("slow"):
        owner.file(folder / kind, "")
    job = Job(token=token_of(where.workspace.id, name, number, 1))
    order = Order(site=name, work=Work.TRAIN, base=0, round=1, steps=1)
    now = time.time()
    return Run(number=number, order=order, stage=Stage.DELIVERED, job=job, created_at=now, changed_at=now)


def _calibrate(where: Ground, number: int) -> None:
    with Proxy(where.facility.sshd.address, where.facility.sshd.port) as road, _trusted(where, road):
        session = where.session(road)
        session.connection.run("true")
        up, down = road.up, road.down
        submitted = steps.submit(session, _ordered(where, number))
        assert submitted.job.id is not None, submitted
        where.size.update(up=road.up - up, down=road.down - down)
        session.connection.close()


# Where


@contextlib.contextmanager
def ground() -> Iterator[Ground]:
    """A cluster, an sshd and a campaign of our own."""
    cluster = Slurm(
        name="cuts", address="127.0.93.11", port=24311, partitions=("all",), first_job_id=1, min_job_age=86400
    )
    environment = {**cluster.environment, "PATH": "/var/lib/flctl-testbed/home/flctl-cuts/bin:/usr/bin:/bin"}
    options = ("MaxStartups 200", "MaxSessions 100")
    server = Sshd(
        name="cuts", address="127.0.93.4", port=24304, user="flctl-cuts", environment=environment, options=options
    )
    facility = Facility(language="it", name="cuts", account_name="flctl-cuts", sshd=server, slurm=cluster)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_patient())
        stack.enter_context(cluster)
        stack.enter_context(server)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cuts-", dir="/tmp")))
        stack.enter_context(_state(folder / "state"))
        owner = facility.account
        owner.empty_home()
        owner.folder(owner.home / "bin")
        owner.file(owner.home / "bin" / "sbatch", SBATCH, 0o700)
        workspace = _campaign(folder, facility)
        root = Path(facility.workdir)
        for path in (root, root / workspace.label, root / workspace.label / "runs"):
            owner.folder(path)
        known_hosts = folder / "known_hosts"
        known_hosts.write_text(server.known_hosts_line)
        stack.callback(cluster.cancel_all)
        where = Ground(
            facility=facility,
            workspace=workspace,
            known_hosts=known_hosts,
            root=PurePosixPath(root / workspace.label),
        )
        session = where.session()
        for path in (Path(session.payload).parent, Path(session.payload)):
            owner.folder(path)
        session.connection.close()
        yield where


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """A black hole is noticed soon."""
    before = patience.ALIVE_INTERVAL, patience.ALIVE_COUNT
    patience.ALIVE_INTERVAL, patience.ALIVE_COUNT = 1, 5
    try:
        yield
    finally:
        patience.ALIVE_INTERVAL, patience.ALIVE_COUNT = before


@contextlib.contextmanager
def _state(folder: Path) -> Iterator[None]:
    folder.mkdir(mode=0o700)
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("XDG_STATE_HOME")
        if before is not None:
            os.environ["XDG_STATE_HOME"] = before


def _campaign(folder: Path, facility: Facility) -> Workspace:
    profile = facility.profile(
        key=facility.sshd.client_key,
        login={"per_day": 100_000},
        poll={"claim_window": 3600, "absence": 3600},
        storage={"data": "/tmp"},
    )
    (folder / "cuts.toml").write_text(toml(profile))
    make_model(folder / "start")
    argv = [sys.executable, "-m", "flctl.cli.main", "init", str(folder / "camp")]
    argv += ["--sites", str(folder / "cuts.toml"), "--model", str(folder / "start")]
    made = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return Workspace(folder / "camp")


_trusting = threading.Lock()


@contextlib.contextmanager
def _trusted(where: Ground, road: Proxy) -> Iterator[None]:
    with _trusting, where.known_hosts.open("a") as file:
        file.write(road.known_hosts_line(where.facility.sshd.host_key_line))
    yield


if __name__ == "__main__":
    print(json.dumps(run(seed=1, trials=int(sys.argv[1])).figures))
