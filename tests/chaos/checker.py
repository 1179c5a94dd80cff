"""Owns the independent look at a campaign: what the schedulers' own job records, the start fences and trainers' logs
at the sites, the ledger of models and the bytes of files say, and never a word of flctl's.

`collect` gathers the evidence, `violations` judges it (a pure function); `lost`, `leaks` and `strangers` look at what
was acknowledged before a kill, at secrets, and at files outside of where flctl may write.
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

BEGINS = "trainer: begins"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job as its scheduler recorded it."""

    id: str
    name: str
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt's folder at a site. `starts`: how many trainers wrote into its log that they begin."""

    site: str
    number: int
    attempt: int
    order: Mapping[str, Any]
    owner: Mapping[str, Any] | None
    done: Mapping[str, Any] | None
    starts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A model at home: its record, and the sha256 computed from its files."""

    record: Mapping[str, Any]
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was found. `jobs`: by site; None where a site has no records of its own. `brought`: by (site, number,
    attempt), the files that came back with their sha256."""

    jobs: Mapping[str, Sequence[JobRecord] | None]
    attempts: Sequence[Attempt]
    models: Mapping[int, Version]
    brought: Mapping[tuple[str, int, int], Mapping[str, str]]


def collect(place: Path, remotes: Mapping[str, Path], jobs: Mapping[str, Sequence[JobRecord] | None]) -> Evidence:
    """The evidence of the campaign in `place`, whose folder at each site is in `remotes`."""
    models = {
        int(path.parent.name): Version(record=json.loads(path.read_text()), sha256=folder_sha256(path.parent))
        for path in (place / "models").glob("[0-9]*/flctl.json")
    }
    brought = {
        (path.parts[-4], int(path.parts[-3]), int(path.parts[-2])): hashes(path)
        for path in (place / "runs").glob("*/*/*/out")
    }
    attempts = [attempt for site, remote in remotes.items() for attempt in attempts_of(site, remote)]
    return Evidence(jobs=jobs, attempts=attempts, models=models, brought=brought)


def attempts_of(site: str, remote: Path) -> Iterator[Attempt]:
    for folder in sorted((remote / "runs").glob("[0-9]*-[0-9]*")):
        number, attempt = folder.name.split("-")
        log = folder / "log"
        yield Attempt(
            site=site,
            number=int(number),
            attempt=int(attempt),
            order=_json(folder / "order.json") or {},
            owner=_json(folder / "owner"),
            done=_json(folder / "done.json"),
            starts=log.read_text(errors="replace").count(BEGINS) if log.exists() else 0,
        )


def slurm_jobs(records: Path) -> tuple[JobRecord, ...]:
    """The jobs in a controller's job completion file (jobcomp/filetxt), as they ended. Two may have one id: a
    controller that lost its state counts from the beginning, and the file goes on."""
    text = records.read_text() if records.exists() else ""
    found = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines()]
    return tuple(JobRecord(id=job["JobId"], name=job["Name"], state=job["JobState"]) for job in found if "JobId" in job)


def hashes(folder: Path) -> dict[str, str]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in paths}


def folder_sha256(folder: Path) -> str:
    """As docs say: of the sorted lines `<sha256>  <path>` of a model's own files (no record, no rule's state)."""
    own = (item for item in hashes(folder).items() if item[0] != "flctl.json" and not item[0].startswith("state/"))
    return sha256("".join(sorted(f"{digest}  {path}\n" for path, digest in own)).encode()).hexdigest()


def _json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else {}


def violations(
    evidence: Evidence,
    *,
    versions: int,
    sites: Collection[str],
    final: str | None = None,
    attempts_may_fail: bool = False,
) -> list[str]:
    """What is wrong; nothing if all promises were kept. `final`: the sha256 of the last model of the undisturbed
    campaign. `attempts_may_fail`: jobs were killed too, so that a run may have needed several."""
    found = [*_of_jobs(evidence), *_of_starts(evidence, attempts_may_fail), *_of_models(evidence, versions, sites)]
    last = evidence.models.get(versions)
    if final is not None and last is not None and last.sha256 != final:
        found.append(f"model {versions} is another than that of the undisturbed campaign")
    return found


def _of_jobs(evidence: Evidence) -> Iterator[str]:
    """No attempt was submitted twice, and no job belongs to no attempt. One job may have several records: a controller
    that was killed starts it again under its id."""
    for site, jobs in evidence.jobs.items():
        names = [name for name, _ in {(job.name, job.id) for job in jobs or ()}]
        tokens = {str(item.order.get("token")) for item in evidence.attempts if item.site == site}
        for name in sorted(set(names)):
            if name not in tokens:
                yield f"{site}: job {name} belongs to no attempt"
            elif names.count(name) > 1:
                yield f"{site}: {names.count(name)} jobs were submitted for attempt {name}"


def _of_starts(evidence: Evidence, attempts_may_fail: bool) -> Iterator[str]:
    """One start fence, one trainer, one effective attempt per run."""
    for item in evidence.attempts:
        name = f"{item.site}: run {item.number}-{item.attempt}"
        by_job = item.owner is not None and item.owner.get("by") == "job"
        if item.starts > 1:
            yield f"{name}: {item.starts} trainers began"
        if item.starts and not by_job:
            yield f"{name}: a trainer began although no job owns the attempt"
        ids = {job.id for job in evidence.jobs.get(item.site) or ()}
        if by_job and evidence.jobs.get(item.site) is not None and item.owner and item.owner["job_id"] not in ids:
            yield f"{name}: its owner, job {item.owner['job_id']}, is not in the scheduler's records"
    for site, number in sorted({(item.site, item.number) for item in evidence.attempts}):
        of_run = [item for item in evidence.attempts if (item.site, item.number) == (site, number)]
        effective = [item for item in of_run if item.done is not None and item.done.get("outcome") == "done"]
        if len(effective) > 1:
            yield f"{site}: run {number} was trained {len(effective)} times to the end"
        if sum(item.starts for item in of_run) > 1 and not attempts_may_fail:
            yield f"{site}: run {number} was started {sum(item.starts for item in of_run)} times"


def _of_models(evidence: Evidence, versions: int, sites: Collection[str]) -> Iterator[str]:
    """Every model is there, is what its record says, and was made of what its sites' records name."""
    merged: list[tuple[str, int]] = []
    for version in range(1, versions + 1):
        model = evidence.models.get(version)
        if model is None:
            yield f"model {version} is missing"
            continue
        given = model.record.get("contributions", [])
        if model.sha256 != model.record.get("sha256"):
            yield f"model {version}: its files are not what its record says"
        parent = evidence.models.get(version - 1)
        if parent is None or [item["sha256"] for item in model.record["parents"]] != [parent.sha256]:
            yield f"model {version} does not follow from model {version - 1}"
        if sorted(item["site"] for item in given) != sorted(sites):
            yield f"model {version} is made of {[item['site'] for item in given]}"
        for item in given:
            yield from _of_contribution(evidence, version, item)
        merged += [(item["site"], item["number"]) for item in given]
    for key in sorted(set(merged)):
        if merged.count(key) > 1:
            yield f"{key[0]}: run {key[1]} was merged {merged.count(key)} times"


def _of_contribution(evidence: Evidence, version: int, item: Mapping[str, Any]) -> Iterator[str]:
    key = (item["site"], item["number"], item["attempt"])
    name = f"model {version}, {key[0]} run {key[1]}-{key[2]}"
    attempt = next((a for a in evidence.attempts if (a.site, a.number, a.attempt) == key), None)
    if attempt is None or attempt.done is None or attempt.done.get("outcome") != "done":
        yield f"{name}: merged without a record of completion at the site"
        return
    told = {entry["path"]: entry["sha256"] for entry in attempt.done["files"]}
    base = evidence.models.get(item["base"])
    carried = {entry["path"]: entry["sha256"] for entry in base.record["files"]} if base else {}
    for path, digest in evidence.brought.get(key, {}).items():
        if told.get(path) != digest and carried.get(path) != digest:
            yield f"{name}: {path} came back, but is not what the site's record names"
    if not any(path.endswith(".safetensors") for path in evidence.brought.get(key, {})):
        yield f"{name}: no weights came back"


# What was acknowledged


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged:
    """What the campaign's folder had acknowledged at a moment: whole journal lines, models, stages of runs."""

    journal: tuple[bytes, ...]
    models: Mapping[str, str]
    stages: Mapping[str, tuple[int, int]] = field(default_factory=dict)


STAGES = ("ordered", "delivered", "claimed", "queued", "running", "ended", "fetched", "failed")


def acknowledged(place: Path) -> Acknowledged:
    journal = place / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    models = {path.parent.name: path.read_text() for path in (place / "models").glob("[0-9]*/flctl.json")}
    stages = {}
    for path in (place / "runs").glob("*/*/run.json"):
        run = json.loads(path.read_text())
        stages["/".join(path.parts[-3:-1])] = (run["attempt"], STAGES.index(run["stage"]))
    return Acknowledged(journal=tuple(lines), models=models, stages=stages)


def lost(before: Acknowledged, after: Acknowledged) -> list[str]:
    """What was acknowledged before and is gone, changed or taken back after. A delivered attempt that its site has lost
    is ordered again, which is no loss."""
    found = []
    if after.journal[: len(before.journal)] != before.journal:
        found.append("the journal does not begin with what it was before the kill")
    for name, record in before.models.items():
        if after.models.get(name) != record:
            found.append(f"model {name} is gone or another")
    for name, (attempt, stage) in before.stages.items():
        now = after.stages.get(name)
        if now is None or (now < (attempt, stage) and STAGES[stage] != "delivered"):
            found.append(f"run {name} was {STAGES[stage]} in attempt {attempt} and is {now}")
    return found


# Secrets, and files


def leaks(folders: Iterable[Path], canaries: Mapping[str, bytes], allowed: Collection[Path] = ()) -> list[str]:
    """Files below the folders that hold one of the canaries (name -> bytes)."""
    found = []
    for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
        if path in allowed or path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        found += [f"{path} holds {name}" for name, canary in canaries.items() if canary in content]
    return found


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def owned(folder: Path, users: Collection[int]) -> set[Path]:
    """What lies in a folder that others use too, such as /tmp, and belongs to these accounts."""
    found = set()
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            if entry.stat(follow_symlinks=False).st_uid in users:
                found.add(Path(entry.path))
    return found


def strangers(before: Collection[Path], after: Collection[Path], allowed: Sequence[Path]) -> list[str]:
    """Files that have come into being outside of the folders in which flctl may write."""
    new = set(after) - set(before)
    inside = {path for path in new for folder in allowed if path == folder or path.is_relative_to(folder)}
    parents = {parent for folder in allowed for parent in folder.parents}
    return sorted(f"{path} is outside of the campaign" for path in new - inside - parents)
