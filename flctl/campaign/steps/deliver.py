"""Owns delivery: models, payload, job script and order are at the site, each verified there."""

import json
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path, PurePosixPath

from flctl import faults
from flctl.campaign import shipped
from flctl.campaign.config import Configuration
from flctl.campaign.frozen import place_frozen
from flctl.campaign.merge_files import sizes_of, state_files, state_name
from flctl.campaign.merging import STATE
from flctl.campaign.session import Place, Session
from flctl.campaign.steps.attempt import attempt_name, ordered, remote_folder
from flctl.campaign.steps.check import cancel
from flctl.campaign.trainers import FOLDER, Trainer, options_of, trainer_of
from flctl.campaign.workspace import write_atomic
from flctl.codec import from_data, to_data
from flctl.durable import read_plain
from flctl.errors import ConfigurationError
from flctl.facility.probe import space_commands, space_left
from flctl.facility.script import job_script
from flctl.facility.shell import MISSING, Answer, Plain, quote, read_file
from flctl.records import Cause, FileEntry, Job, Run, Stage, Work, seed_of, token_of

SETTLING = 30.0
"""Seconds before a merge's walltime is over, on top of those for hashing, by which it must be complete."""
SEALING_RATE = 50e6 / 3
"""Bytes per second at which a job's output is flushed, read and hashed at least."""


def deliver(session: Session, run: Run, configuration: Configuration) -> Run:
    """Base (or subjects), payload, job.sh and order.json are at the site, each verified there."""
    _end_earlier(session, run)
    folder = session.workspace.attempt_folder(run)
    target = remote_folder(session, run)
    frozen = place_frozen(session, configuration) if run.order.work != Work.MERGE else None
    trainer = trainer_of(session.workspace.root, configuration, session.site)
    script = render_job(session, run, trainer, frozen).encode()
    order = order_json(session, run, configuration, frozen)
    # A second attempt trusts nothing: the first may have failed because something there is not what it was.
    places = _model_places(session, run)
    if run.order.merge is not None:
        session.place_merger()
        session.place_all(places[:1], hashed=run.attempt > 1)
        _gather_own(session, run, places)
    elif trainer.files:
        session.place_all([(session.workspace.root / FOLDER, trainer.files, trainer.place(session.root))], hashed=True)
    session.place_all(places, hashed=run.attempt > 1)
    answers = session.ask(
        {
            "order": read_file(target / "order.json"),
            "script": f"test -s {quote(target / 'job.sh')}",
            "claim": f"test -e {quote(target / 'claim')}",
            "data": f"test -e {quote(session.data)}",
            "space": space_commands(str(session.root))["space"],
        }
    )
    _remember_space(session, answers["space"])
    there = answers["order"].status != MISSING and bool(answers["order"].stdout)
    if there:
        faults.point("order-adopted", f"{run.site}/{attempt_name(run)}")
        session.note_read(target / "order.json", answers["order"].stdout)
        run, order = _adopt(run, answers["order"], configuration), answers["order"].stdout.encode()
        write_atomic(folder / "order.json", order)
    if answers["data"].status != 0 and answers["claim"].status != 0 and run.order.work != Work.MERGE:
        raise ConfigurationError(
            f"the data is not at the site: there is no {session.data} (purged?)",
            hint=f"put it back there, or set storage.data in sites/{run.site}.toml; no job is submitted before",
            site=run.site,
        )
    # What nobody has claimed yet may be put there anew: a purge takes files, and leaves their folders.
    if answers["claim"].status != 0 and not (there and answers["script"].status == 0):
        write_atomic(folder / "job.sh", script)
        write_atomic(folder / "order.json", order)
        faults.point("attempt-place", f"{run.site}/{attempt_name(run)}")
        session.place(folder, [entry_of(folder / name) for name in ("job.sh", "order.json")], target)
        faults.point("attempt-placed", f"{run.site}/{attempt_name(run)}")
    return replace(run, stage=Stage.DELIVERED)


def _end_earlier(session: Session, run: Run) -> None:
    """An attempt that a person ended may have been one whose site could not be told: no two ever train at once."""
    for past in run.past:
        if past.cause == Cause.CANCELLED_BY_US:
            token = token_of(session.workspace.id, run.site, run.number, past.number)
            cancel(session, replace(run, attempt=past.number, job=Job(token=token, id=past.job_id)))


def _remember_space(session: Session, answer: Answer) -> None:
    free, contact = space_left(answer), session.workspace.contact(session.site.name)
    if free is not None:
        session.workspace.save_contact(session.site.name, replace(contact, free=free * 1024))


def render_job(session: Session, run: Run, trainer: Trainer, frozen: PurePosixPath | None) -> str:
    """The job script of an attempt, from the campaign's template for the site's scheduler."""
    merges = run.order.work == Work.MERGE
    script = job_script(
        session.site,
        read_template(session.workspace.root / "templates", session.site.scheduler.kind),
        token=run.job.token,
        campaign=session.workspace.name,
        run=remote_folder(session, run),
        workdir=session.root,
        payload=session.payload,
        data=session.data,
        now=time.time(),
        command=(Plain(session.merger),) if merges else trainer.command(session.root),
        frozen=str(frozen) if frozen else None,
    )
    _check_script(session, run, script)
    return script


def _check_script(session: Session, run: Run, script: str) -> None:
    """ConfigurationError unless the campaign's template, which may be an older one, does what its profile asks for."""
    site = session.site
    template, ranks = session.workspace.root / "templates" / f"{site.scheduler.kind}.sh", site.shape.ranks
    if run.order.work == Work.MERGE and str(session.merger) not in script:
        raise ConfigurationError(
            f"{template} names no {{{{trainer}}}}, so its jobs cannot merge",
            hint='put it where the program is run, or merge here: aggregate_at = "" in flctl.toml',
        )
    if site.signing.signers and " --sign " not in script:
        raise ConfigurationError(
            f"{template} signs no records, and sites/{run.site}.toml pins who must",
            hint="let it call seal.py finish with --sign {{signing_key}}, as the template that flctl ships does",
        )
    if site.scheduler.kind == "slurm" and ranks > 1 and f"--ntasks-per-node={ranks}\n" not in script:
        raise ConfigurationError(
            f"{template} asks for other processes than ranks = {ranks} of sites/{run.site}.toml",
            hint="put #SBATCH --ntasks-per-node={{ranks}} there, as the template that flctl ships has it",
        )


def read_template(folder: Path, kind: str) -> str:
    path = folder / f"{kind}.sh"
    try:
        return read_plain(path).decode().replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise ConfigurationError(f"the job template {path} is not UTF-8 text", hint="save it as UTF-8") from None
    except OSError as error:
        raise ConfigurationError(
            f"the job template {path} cannot be read: {error.strerror}",
            hint=f"copy it from {shipped.shipped('templates')}",
        ) from error


def order_json(session: Session, run: Run, configuration: Configuration, frozen: PurePosixPath | None) -> bytes:
    """The order as the site sees it; see "The contract of a job" in the documentation."""
    order, workspace = run.order, session.workspace
    data = {
        "schema": 1,
        "token": run.job.token,
        "campaign": workspace.name,
        "campaign_id": workspace.id,
        "site": run.site,
        "number": run.number,
        "attempt": run.attempt,
        "work": order.work,
        "base": {"version": order.base, "sha256": workspace.model_record(order.base)["sha256"]},
        "round": order.round,
        "steps": order.steps,
        "global_step": order.global_step,
        "total_steps": order.total_steps,
        "continues": order.continues,
        "seed": seed_of(configuration.campaign.seed, run.site, run.number),
        "train": options_of(configuration, session.site),
        "subjects": to_data(order.subjects),
    }
    if frozen and (base := workspace.frozen()):
        data["frozen"] = {"folder": str(frozen), "sha256": base.sha256, "files": to_data(base.files)}
    if order.merge is not None:
        data["merge"] = to_data(order.merge)
        data["margin"] = SETTLING + sum(sizes_of(workspace, order).values()) / SEALING_RATE
    return (json.dumps(data, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _model_places(session: Session, run: Run) -> list[Place]:
    """(local folder, its files, place at the site) of every model the run needs."""
    workspace = session.workspace
    names = [subject.name for subject in run.order.subjects] or [f"{run.order.base:04d}"]
    places: list[Place] = []
    for name in names:
        if name == state_name(run.order.base):
            source, entries = workspace.model_folder(run.order.base) / STATE, state_files(workspace, run.order.base)
        elif name.isdigit():
            source, files = workspace.model_folder(int(name)), workspace.model_record(int(name))["files"]
            entries = tuple(from_data(FileEntry, item) for item in files)
        else:
            site, number, attempt = name.rsplit("-", 2)
            contribution = workspace.run(site, int(number)).contribution
            source = workspace.run_folder(site, int(number)) / attempt / "out"
            entries = contribution.files if contribution else ()
        places.append((source, entries, session.root / "models" / name))
    return places


def _gather_own(session: Session, run: Run, places: list[Place]) -> None:
    """What the site itself contributed to the merge need not travel: its weights lie in its run's folder, the rest is
    the base's."""
    parts = {part.name: part for part in run.order.merge.parts} if run.order.merge else {}
    for _, entries, place in places:
        part = parts.get(place.name)
        if part is not None and part.site == run.site:
            number, attempt = place.name.rsplit("-", 2)[1:]
            made = session.root / "runs" / f"{number}-{attempt}" / "out"
            session.gather(entries, (made, places[0][2]), place)


def _adopt(run: Run, answer: Answer, configuration: Configuration) -> Run:
    """The run as the site knows it: a folder that is already there was ordered by us before (the campaign's folder was
    rolled back or rebuilt), and the site's order wins over ours."""
    return replace(run, order=ordered(run, answer.stdout, plan=run.order.plan, configuration=configuration))


def entry_of(path: Path) -> FileEntry:
    content = path.read_bytes()
    return FileEntry(path=path.name, size=len(content), sha256=sha256(content).hexdigest())
