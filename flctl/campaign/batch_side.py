"""Owns the tiny job of `flctl site test --batch`: what a job of the site's shape finds on the machines it gets."""

import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from flctl.campaign.etiquette import may_ask
from flctl.campaign.session import Session
from flctl.campaign.steps.deliver import read_template
from flctl.errors import FlctlError, Interrupted
from flctl.facility import limits
from flctl.facility.probe import Check, python_words, words
from flctl.facility.profile import Shape, Site
from flctl.facility.scheduler import Activity, QueryFailed, Seen
from flctl.facility.script import environment_lines, job_script
from flctl.facility.shell import quote, read_file
from flctl.words import printable

NAME = "python in a job"
WALLTIME = 600
LOOK = 5.0
"""Seconds between two looks at the job's answer, a file; the scheduler is asked as seldom as the profile says."""
LOST_AFTER = 30.0
"""Seconds after a job is gone from the queue until its answer must be seen: file systems are late."""

PROGRAM = """\
import platform, torch, transformers
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
gpus = f'{count} x {torch.cuda.get_device_name(0)}' if count else 'no GPU'
print(f'{platform.node()}: torch {torch.__version__}, transformers {transformers.__version__}, {gpus}')
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """A job of no run of the campaign: its name, and its folder at the site, where batch.py looks for jobs as well."""

    token: str
    folder: str


def try_batch(session: Session, *, wait: float, pause: Callable[[float], bool]) -> Check:
    """Submit a job of one node and few minutes, wait at most `wait` seconds for what it says, and take it away again.
    `pause` sleeps, and returns True when the user stops flctl: Interrupted, and the job is cancelled."""
    token = f"ftest{secrets.token_hex(5)}"
    job = Tiny(token=token, folder=str(session.root / "runs" / f".{token}"))
    try:
        refused = _submit(session, job)
        return refused or _await(session, job, wait, pause)
    finally:
        # Whatever happened; a connection that is lost has said so already.
        with suppress(FlctlError):
            cancel = session.scheduler.cancel(job.token, None)
            session.ask({"cancel": cancel, "remove": f"{_remove(job)}; {_forget_old(session)}"})


def _remove(job: Tiny) -> str:
    """Twice: a cancelled job that is still ending may write into its folder while rm empties it."""
    folder = quote(job.folder)
    return f"rm -rf {folder} 2>/dev/null || {{ sleep 2; rm -rf {folder}; }}"


def _forget_old(session: Session) -> str:
    """Removes what an flctl that was killed has left, an hour ago: a job that begins later and finds no folder ends."""
    return f"find {quote(session.root / 'runs')} -maxdepth 1 -name '.ftest*' -mmin +60 -exec rm -rf {{}} +"


def tiny_script(session: Session, job: Tiny) -> str:
    """The directives of the campaign's own job template, for one node and few minutes; then Python, as a job has it."""
    site = session.site
    shapes = {**site.shapes, site.scheduler.shape: _small(site)}
    rendered = job_script(
        replace(site, shapes=shapes),
        read_template(session.workspace.root / "templates", site.scheduler.kind),
        token=job.token,
        campaign=session.workspace.name,
        run=PurePosixPath(job.folder),
        workdir=session.root,
        payload=session.payload,
        data=session.data,
        now=time.time(),
    )
    head = [line for line in rendered.splitlines() if re.match(r"#!|#SBATCH\s|#PBS\s", line)]
    lines = [
        *head,
        "unset SLURM_EXPORT_ENV",
        "umask 077",
        f"cd {quote(job.folder)} || exit 1",
        "(",
        *environment_lines(site),
        f"exec {python_words(site)} -c {quote(PROGRAM)}",
        ") >answer.part 2>answer.err",
        "printf '%s\\n' \"$?\" >>answer.part",
        "tail -n 1 answer.err >>answer.part",
        "mv answer.part answer",
    ]
    return "\n".join(lines) + "\n"


def _small(site: Site) -> Shape:
    """The shape for as few nodes as its queue takes."""
    shape = site.shapes[site.scheduler.shape]
    asked = site.shape
    least = {name: queue.min_nodes for name, queue in site.queues.items()}
    choice = (asked.partition or asked.queue).split(",")
    nodes = max(1, min(least.get(name, 1) for name in choice), least.get(asked.qos, 1))
    select = re.sub(r"^\d+(?=:|$)", str(nodes), shape.select)
    return replace(shape, nodes=nodes, walltime=min(WALLTIME, shape.walltime), select=select, dependency="")


def _submit(session: Session, job: Tiny) -> Check | None:
    script = f"{job.folder}/job.sh"
    made = f"umask 077; mkdir -p {quote(job.folder)} && printf %s {quote(tiny_script(session, job))} >{quote(script)}"
    answer = session.ask({"submit": f"{made} && {session.scheduler.submit(script, job.token)}"}, timeout=180.0)[
        "submit"
    ]
    if session.scheduler.job_id(answer.stdout) is not None:
        return None
    fix = f"change [scheduler] or [shapes.{session.site.scheduler.shape}] in sites/{session.site.name}.toml"
    said = words(answer)
    return Check(name=NAME, result="fail", detail=f"the job was not taken: {said}", fix=fix, exit_code=6)


def _await(session: Session, job: Tiny, wait: float, pause: Callable[[float], bool]) -> Check:
    deadline, look, gone_at = time.monotonic() + wait, time.monotonic(), 0.0
    seen: Seen | None = None
    while True:
        asked = {"answer": read_file(f"{job.folder}/answer", limit=4000)}
        due = time.monotonic() >= look and may_ask(session)
        if due:
            asked["queue"] = session.scheduler.queue([job.token])
            look = time.monotonic() + session.site.poll.every
        answers = session.ask(asked)
        if answers["answer"].status == 0:
            return _said(answers["answer"].stdout, session.site)
        if due:
            with suppress(QueryFailed):
                answer = answers["queue"]
                jobs = session.scheduler.seen(answer.status, answer.stdout, answer.stderr)
                seen = next((found for found in jobs if found.name == job.token), None)
                ended = seen is None or seen.activity == Activity.ENDED
                gone_at = (gone_at or time.monotonic()) if ended else 0.0
        if gone_at and time.monotonic() > gone_at + LOST_AFTER:
            return _lost(session, job, seen)
        if time.monotonic() >= deadline:
            return _late(seen, wait)
        if pause(min(LOOK, session.site.poll.every, max(0.1, deadline - time.monotonic()))):
            raise Interrupted("interrupted; the job is cancelled", site=session.site.name)


def _said(text: str, site: Site) -> Check:
    """The job's answer: what Python printed, its exit status, the last words on stderr."""
    lines = text.splitlines()
    place = next((index for index, line in enumerate(lines) if line.strip().isdigit()), len(lines))
    status = lines[place].strip() if place < len(lines) else "unknown"
    if status == "0" and place:
        return Check(name=NAME, result="ok", detail=printable(lines[place - 1]))
    said = printable(" ".join(lines[place + 1 :])) or f"it ended with status {status}"
    fix = f"see docs/sites.md for building it; [environment] in sites/{site.name}.toml says which one"
    return Check(name=NAME, result="fail", detail=said, fix=fix, exit_code=6)


def _lost(session: Session, job: Tiny, seen: Seen | None) -> Check:
    answer = session.ask({"log": f"tail -n 3 {quote(job.folder + '/log')}"})["log"]
    state = f" ({seen.state}{': ' + seen.reason if seen.reason else ''})" if seen else ""
    detail = f"the job ended without an answer{printable(state)}: {printable(answer.stdout) or 'no log'}"
    fix = "does it see the work folder? try a job by hand there"
    return Check(name=NAME, result="fail", detail=detail, fix=fix, exit_code=6)


def _late(seen: Seen | None, wait: float) -> Check:
    state = f" ({seen.state}{': ' + seen.reason if seen.reason else ''})" if seen else ""
    detail = f"no answer in {limits.clock(int(wait))}{printable(state)}; the job is cancelled"
    return Check(name=NAME, result="warn", detail=detail, fix="--wait gives it longer; the queue may just be full")
