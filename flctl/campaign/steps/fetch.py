"""Owns fetching: what the record names, of the kinds and within the size allowed, verified, and through the gates."""

import os
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from flctl import faults
from flctl.campaign.config import Configuration
from flctl.campaign.merge_files import allowed, check_made, own_files
from flctl.campaign.session import HASHING_RATE, Differs, Session
from flctl.campaign.steps.attempt import attempt_name, remote_folder
from flctl.codec import to_data
from flctl.durable import fsync_folders, move
from flctl.errors import AggregationRefused, BudgetRefused, JobFailed, SiteUnreachable, TransferFailed
from flctl.facility.shell import quote
from flctl.records import Contribution, FileEntry, Run, Stage, Work, folder_sha256
from flctl.words import printable

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
HASH = re.compile(r"[0-9a-f]{64}")
FILES_MOST = 10_000


def fetch(session: Session, run: Run, configuration: Configuration) -> Run:
    """What the record names, of the kinds and within the size the campaign allows, is here, verified, and has passed
    the gates. An evaluation's metrics are in its record already."""
    contribution = run.contribution
    if contribution is None:
        raise JobFailed(f"run {attempt_name(run)} has no completion record", site=run.site)
    if run.order.work == Work.EVALUATE:
        return replace(run, stage=Stage.FETCHED)
    from flctl.model.manifest import hash_folder
    from flctl.model.verify import check as gate

    if run.order.work == Work.MERGE:
        return _fetch_merge(session, run, contribution)
    workspace = session.workspace
    folder, base = workspace.attempt_folder(run), workspace.model_folder(run.order.base)
    draft = folder / ".out.part"
    files = _allowed(run, contribution.files, configuration, workspace.model_record(run.order.base))
    if not (folder / "out").exists():
        _bring(session, run, files, draft)
        session.report("checking", 0, 0)
        report = gate(draft, base, site=run.site)
        _refuse_others(run, files, draft)
        faults.point("gated", f"{run.site}/{attempt_name(run)}")
        carry(base, draft)
        fsync_folders(draft)
        faults.point("out-rename", f"{run.site}/{attempt_name(run)}")
        move(draft, folder / "out")
        faults.point("out-renamed", f"{run.site}/{attempt_name(run)}")
    else:
        report = gate(folder / "out", base, site=run.site)
    entries = hash_folder(folder / "out")
    contribution = replace(contribution, files=entries, sha256=folder_sha256(entries), gates=to_data(report))
    return replace(run, stage=Stage.FETCHED, contribution=contribution)


def _fetch_merge(session: Session, run: Run, contribution: Contribution) -> Run:
    """The model that a site made, and its rule's state: verified, checked, through the gates."""
    from flctl.model.manifest import hash_folder
    from flctl.model.verify import check as gate

    workspace = session.workspace
    folder, base = workspace.attempt_folder(run), workspace.model_folder(run.order.base)
    out, draft = folder / "out", folder / ".out.part"
    if not out.exists():
        _bring(session, run, allowed(workspace, run, contribution.files), draft)
        carry(base, draft, index=True)
    place = out if out.exists() else draft
    session.report("checking", 0, 0)
    report = gate(place, base, site=run.site)
    files = hash_folder(place)
    check_made(workspace, run, place, files)
    if place == draft:
        fsync_folders(draft)
        faults.point("merge-rename", f"{run.site}/{attempt_name(run)}")
        move(draft, out)
        faults.point("merge-renamed", f"{run.site}/{attempt_name(run)}")
    contribution = replace(contribution, files=files, sha256=folder_sha256(own_files(files)), gates=to_data(report))
    return replace(run, stage=Stage.FETCHED, contribution=contribution)


def _bring(session: Session, run: Run, files: tuple[FileEntry, ...], draft: Path) -> None:
    """JobFailed if what the run made is gone from its site, or is there no more what its record says: it can be trained
    again, but never fetched."""
    try:
        session.bring(remote_folder(session, run) / "out", files, draft)
    except TransferFailed as error:
        with suppress(SiteUnreachable):
            if session.ask({"gone": gone(session, run)})["gone"].status == 0:
                raise JobFailed(
                    f"what run {attempt_name(run)} made is gone from the site: purged, or taken by a later flctl gc",
                    hint=f"flctl retry {run.site} trains it again; but if this folder was put back from a backup: "
                    "flctl adopt brings the newest model that a site has",
                    site=run.site,
                ) from None
        if isinstance(error, Differs) and _is_spoilt(session, run, error.entry):
            raise JobFailed(
                f"{error.entry.path} of run {attempt_name(run)} is not what its record says, at the site itself",
                hint=f"see who wrote to it after the job's end; flctl retry {run.site} trains it again",
                site=run.site,
            ) from None
        raise


def _is_spoilt(session: Session, run: Run, entry: FileEntry) -> bool:
    """Whether a file at the site has another sha256 than its record says: to bring it again, and again, is no use."""
    command = f"sha256sum <{quote(remote_folder(session, run) / 'out' / entry.path)}"
    with suppress(SiteUnreachable):
        answer = session.ask({"sum": command}, timeout=60 + entry.size / HASHING_RATE)["sum"]
        return answer.status == 0 and answer.stdout.split()[:1] != [entry.sha256]
    return False


def gone(session: Session, run: Run) -> str:
    """A shell command that succeeds if the run's record of completion is at the site, and what it made is not."""
    folder = remote_folder(session, run)
    return f"test -f {quote(folder / 'done.json')} && test ! -e {quote(folder / 'out')}"


def _allowed(
    run: Run, files: tuple[FileEntry, ...], configuration: Configuration, base: dict[str, Any]
) -> tuple[FileEntry, ...]:
    """The files that may come back. Names that are no plain names, or are there twice, what is no hash, and more bytes
    than allowed, are refused."""
    chosen = tuple(entry for entry in files if any(fnmatch(entry.path, kind) for kind in configuration.fetch.kinds))
    for entry in chosen:
        if not PLAIN_NAME.fullmatch(entry.path) or entry.size < 0 or not HASH.fullmatch(entry.sha256):
            raise AggregationRefused(
                f"the completion record names a file {printable(entry.path)!r} of {entry.size} bytes; only plain names "
                "with a size and a sha256 are fetched",
                hint=f"see what the trainer writes to FLCTL_OUT, then flctl retry {run.site}",
                site=run.site,
            )
    if len({entry.path for entry in chosen}) != len(chosen) or len(chosen) > FILES_MOST:
        raise AggregationRefused(
            f"the completion record names {len(chosen)} files, some of them twice or more of them than {FILES_MOST}",
            hint=f"see what the trainer writes to FLCTL_OUT, then flctl retry {run.site}",
            site=run.site,
        )
    size, limit = sum(e.size for e in chosen), configuration.fetch.size_factor * sum(f["size"] for f in base["files"])
    if size > limit:
        raise BudgetRefused(
            f"run {attempt_name(run)} would bring {size:,} bytes; [fetch] size_factor allows {limit:,.0f}",
            hint="raise it in flctl.toml if that is right, then flctl round",
            site=run.site,
        )
    return chosen


def _refuse_others(run: Run, files: tuple[FileEntry, ...], folder: Path) -> None:
    """What came must be the model and nothing else: no gate looks into a file that is no part of it, and it would go on
    to other sites."""
    from flctl.model.shards import open_shards

    shards = open_shards(folder, site=run.site)
    own = {shard.name for shard in shards.files} | {shards.index}
    if others := [entry.path for entry in files if entry.path not in own]:
        raise AggregationRefused(
            f"the contribution brought {', '.join(others[:3])}, which no index names as a part of the model",
            hint=f"let the trainer write nothing else of these kinds to FLCTL_OUT, then flctl retry {run.site}; "
            "or leave it out with [fetch] kinds in flctl.toml",
            site=run.site,
        )


def carry(base: Path, folder: Path, *, index: bool = False) -> None:
    """Copy what travels with a model (config, tokenizer) from its base, so that any library can open the folder.
    `index`: and the index of the weights, where their shards are the base's."""
    from flctl.model.manifest import carried_files, check_plain
    from flctl.model.shards import open_shards

    check_plain(base)
    draft = folder.parent / f"{folder.name}.carried"  # beside it: a kill must not leave half a file that looks whole
    for name in carried_files(open_shards(base)):
        if (index or not name.endswith(".index.json")) and not (folder / name).exists():
            (folder / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copyfile(base / name, draft)
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            draft.rename(folder / name)
