"""Owns what a campaign's folder takes back from its sites: runs and models that they know and it does not, because it
was copied, rolled back, damaged or lost."""

import json
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from flctl.campaign.config import load_configuration
from flctl.campaign.driver import Seen
from flctl.campaign.session import HASHING_RATE, Session
from flctl.campaign.signing import record_of
from flctl.campaign.steps.attempt import ordered
from flctl.campaign.testimony import table_of
from flctl.campaign.verdict import contribution_of, times_of
from flctl.campaign.workspace import Workspace, write_json
from flctl.codec import to_data
from flctl.durable import make_folder, move, remove
from flctl.errors import AggregationRefused, ConfigurationError, TransferFailed
from flctl.facility.shell import Answer, quote, read_file
from flctl.records import Failure, FileEntry, Job, Order, Run, Stage, Work, folder_sha256, token_of

AT_ONCE = 16
"""Runs whose records are read by one command."""
READ = (("order", "order.json"), ("done", "done.json"), ("sig", "done.json.sig"))
"""What is read of each; the signature, which appears before its record, after it."""
FILE = re.compile(r"([0-9a-f]{64}) [ *]\./([A-Za-z0-9_][A-Za-z0-9_./+-]{0,250})")
ADOPTED = "it is from before this folder was rebuilt"


@dataclass(frozen=True, slots=True, kw_only=True)
class There:
    """One run as its site knows it: its newest attempt, the order, whether it was claimed, the completion record as far
    as it counts (`signing.record_of`)."""

    number: int
    attempt: int
    order: dict[str, Any]
    claimed: bool
    done: dict[str, Any] | None


def reconcile(session: Session, seen: Seen) -> list[Run]:
    """Recreate the runs, and the attempts of runs, that the site knows and we do not: it has them from us. What was
    done there is not ordered again. Nothing is asked where there are none."""
    workspace, site = session.workspace, session.site.name
    known = {run.number: run for run in workspace.runs(site)}
    strange = {n: a for n, a in seen.attempts.items() if n not in known or a > known[n].attempt}
    if not strange:
        return []
    newest, merged = workspace.newest_model().version, {key for model in workspace.models() for key in model.merged}
    recreated = []
    for there in whats_there(session, strange):
        before = known.get(there.number)
        if before is not None and ((site, there.number) in merged or before.order.round <= newest):
            continue
        try:
            run = _recreated(workspace, site, there, before, newest)
        except TransferFailed as error:
            workspace.journal.append("not adopted", site=site, number=there.number, reason=error.message)
            continue
        workspace.save_run(run)
        workspace.journal.append(
            "adopted", site=site, number=run.number, attempt=run.attempt, work=run.order.work, stage=run.stage,
            base=run.order.base, round=run.order.round,
        )  # fmt: skip
        recreated.append(run)
    return recreated


def whats_there(session: Session, attempts: dict[int, int]) -> Iterable[There]:
    """The records of these attempts at a site, each journaled as it came; folders that hold no order of this campaign
    are passed over."""
    workspace, site = session.workspace, session.site.name
    wanted = sorted(attempts)
    for start in range(0, len(wanted), AT_ONCE):
        numbers, commands = wanted[start : start + AT_ONCE], {}
        for number in numbers:
            folder = _folder(session, number, attempts[number])
            commands[f"claim{number}"] = f"test -d {quote(folder / 'claim')}"
            for name, file in READ:
                commands[f"{name}{number}"] = read_file(folder / file)
        answers = session.ask(commands)
        for number in numbers:
            attempt, text = attempts[number], {name: _text(answers[f"{name}{number}"]) for name, _ in READ}
            for name, file in READ:
                if text[name]:
                    session.note_read(_folder(session, number, attempt) / file, text[name])
            order, token = table_of(text["order"]), token_of(workspace.id, site, number, attempt)
            if order is not None and (order.get("token"), order.get("campaign_id")) == (token, workspace.id):
                claimed, done = (
                    answers[f"claim{number}"].status == 0,
                    record_of(session.site, text["done"], text["sig"]),
                )
                yield There(number=number, attempt=attempt, order=order, claimed=claimed, done=done)


def _folder(session: Session, number: int, attempt: int) -> PurePosixPath:
    return session.root / "runs" / f"{number:04d}-{attempt}"


def _text(answer: Answer) -> str:
    return answer.stdout if answer.status == 0 else ""


def _recreated(workspace: Workspace, site: str, there: There, before: Run | None, newest: int) -> Run:
    """The run as it was, as far as the site tells; TransferFailed if its order cannot be read."""
    now, plan = time.time(), workspace.plan()
    blank = Run(
        number=there.number,
        attempt=there.attempt,
        order=Order(site=site, work=Work.TRAIN, base=0, round=0),
        job=Job(token=token_of(workspace.id, site, there.number, there.attempt)),
        created_at=before.created_at if before else now,
        changed_at=now,
        stage=Stage.CLAIMED if there.claimed else Stage.DELIVERED,
    )
    following = 1 if plan is None else plan.number if newest < plan.target else plan.number + 1
    text, configuration = json.dumps(there.order), load_configuration(workspace)
    run = replace(blank, order=ordered(blank, text, plan=following, configuration=configuration))
    ended = run.order.round < newest or (run.order.round == newest and run.order.work != Work.EVALUATE)
    return _closed(run, there.done) if ended else run


def _closed(run: Run, done: dict[str, Any] | None) -> Run:
    """A run of a model that is made: what it brought and how long it ran is told by its record, and not fetched."""
    with suppress(ValueError, KeyError, TypeError):
        began, ended = times_of(done or {})
        job = replace(run.job, started_at=began, ended_at=ended, elapsed=max(0.0, ended - began))
        run = replace(run, job=job)
    try:
        if done is None or done["outcome"] != "done":
            raise ValueError((done or {}).get("reason") or "it was not done")
        return replace(run, stage=Stage.FETCHED, contribution=contribution_of(run, done, done["base"]["sha256"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        failure = Failure(code="job_failed", exit_code=6, message=f"{ADOPTED}: {error}")
        return replace(run, stage=Stage.FAILED, failure=failure, skipped=True)


# Models


def bases(orders: Iterable[tuple[str, dict[str, Any]]]) -> dict[int, tuple[str, int]]:
    """(sha256, optimizer steps) of each version of the model that orders at the sites name as their base, newest first.
    ConfigurationError if two sites name different ones: both have it from us."""
    found: dict[int, tuple[str, int, str]] = {}
    for site, order in orders:
        try:
            version, digest, steps = order["base"]["version"], order["base"]["sha256"], order["global_step"]
        except (KeyError, TypeError):
            continue
        if type(version) is not int or type(steps) is not int or not re.fullmatch(r"[0-9a-f]{64}", str(digest)):
            continue
        other = found.setdefault(version, (digest, steps, site))
        if other[0] != digest:
            raise ConfigurationError(
                f"model {version:04d} is {other[0][:16]} at {other[2]} and {digest[:16]} at {site}",
                hint="one of the two holds other orders than flctl gave; adopt without that site",
            )
    return {version: found[version][:2] for version in sorted(found, reverse=True)}


def bring_model(session: Session, version: int, digest: str, steps: int) -> bool:
    """Bring a version of the model from a site, if all of it is there. What arrives is what the orders of all sites
    name by its hash."""
    workspace, target = session.workspace, session.workspace.model_folder(version)
    files = _files_there(session, version)
    if folder_sha256(files) != digest:
        return False
    draft = target.parent / f".{target.name}.draft"
    remove(draft)
    session.bring(session.root / "models" / target.name, files, draft)
    _check_model(draft, files, session.site.name)
    by = {"site": session.site.name, "at": round(time.time(), 3)}
    write_json(draft / "flctl.json", record_without_history(version, digest, steps, files, by))
    make_folder(target.parent)
    move(draft, target)
    workspace.journal.append("adopted", model=version, site=session.site.name, sha256=digest)
    return True


def _check_model(folder: Path, files: tuple[FileEntry, ...], site: str) -> None:
    """AggregationRefused unless these are the files of a model, whose headers are sound: who owns the account at the
    site may have put others beside them."""
    from flctl.model.manifest import model_files
    from flctl.model.shards import open_shards

    own = model_files(open_shards(folder, site=site))
    if others := [entry.path for entry in files if entry.path not in own]:
        raise AggregationRefused(
            f"the model {folder.name.split('.')[1]} there holds {', '.join(others[:3])}, which is no part of a model",
            hint="look at it there; without these files it can be brought",
            site=site,
        )


def record_without_history(
    version: int, digest: str, steps: int, files: tuple[FileEntry, ...], by: dict[str, Any]
) -> dict[str, Any]:
    """The flctl.json of a version of which nobody tells how it was made."""
    return {
        "schema": 1,
        "version": version,
        "sha256": digest,
        "parents": [],
        "steps": steps,
        "contributions": [],
        "adopted": by,
        "created_at": time.time(),
        "files": to_data(files),
    }


def _files_there(session: Session, version: int) -> tuple[FileEntry, ...]:
    """The files of a model at a site, hashed there; none where something among them has no plain name."""
    folder = quote(session.root / "models" / f"{version:04d}")
    look = f"cd {folder} && find . -type f -exec stat -c '%s %n' {{}} +"
    sizes: dict[str, int] = {}
    for line in session.ask({"sizes": look})["sizes"].stdout.splitlines():
        size, _, path = line.partition(" ./")
        if size.isdigit():
            sizes[path] = int(size)
    command = f"cd {folder} && find . -type f -exec sha256sum {{}} +"
    answer = session.ask({"hashes": command}, timeout=60 + sum(sizes.values()) / HASHING_RATE)["hashes"]
    found = []
    for line in filter(None, answer.stdout.splitlines()):
        match = FILE.fullmatch(line)
        if match is None or match[2] not in sizes or ".." in match[2].split("/"):
            return ()
        found.append(FileEntry(path=match[2], size=sizes[match[2]], sha256=match[1]))
    return tuple(sorted(found, key=lambda entry: entry.path))
