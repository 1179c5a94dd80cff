"""Owns `flctl gc`: old models, contributions and runs go, at home and at the sites; what is needed and records stay.

At home a version or an attempt counts as collected from the moment that its note says so, so that a crash leaves
nothing half; at a site each folder gets a hidden name before it is removed.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flctl import faults
from flctl.campaign import adoption, driver, shipped
from flctl.campaign.chain import KEPT
from flctl.campaign.collected import NAME, collected_on, note_collected
from flctl.campaign.config import load_profile
from flctl.campaign.contacts import failure_of
from flctl.campaign.engine import Engine
from flctl.campaign.needed import Needed, needed
from flctl.campaign.session import Session
from flctl.campaign.workspace import LOCK_PATIENCE, Workspace, lock
from flctl.durable import remove
from flctl.errors import FlctlError, Interrupted, LoginTooSoon, TransferFailed
from flctl.facility.shell import quote
from flctl.records import Failure
from flctl.words import printable

KEEP = 2
"""Newest versions that stay whole: the one that the next round starts from, and the one to go back to."""
AT_ONCE = 100
"""Folders that one program at a site looks at, or removes."""
PARTS = ("out", "checkpoint", "reserve")
"""What of a closed run's folder at a site is no record; the last one only a job that was killed leaves."""
PATIENCE = 600.0
"""Seconds for that."""
MODEL = re.compile(r"(\d{4,})(?:-state)?")
CONTRIBUTION = re.compile(r"([a-z0-9][a-z0-9_-]*)-(\d{4,})-(\d+)")
ATTEMPT = re.compile(r"(\d{4,})-(\d+)")
PAYLOAD = re.compile(r"[0-9a-f]{64}")
LEFT_OVER = re.compile(r"\.(.+?)\.(?:part|gathered|staged)(?:\.old\.\d+)?")
GONE = re.compile(r"\.gone\.[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A folder that goes, or would: at a site (empty: at home), its path in the campaign's folder there, its bytes."""

    site: str
    path: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What went, or would go; `troubles`: sites where nothing could be done now, and why."""

    items: tuple[Item, ...]
    troubles: tuple[tuple[str, Failure], ...]


def collect_home(workspace: Workspace, keep: int, *, dry: bool) -> list[Item]:
    """The home's part, under the campaign's lock: nobody decides meanwhile, and nobody verifies. Locked on a host that
    does not drive the campaign."""
    driver.ours(workspace)
    with workspace.lock_campaign(), lock(workspace.root / "verify.lock", "verification", LOCK_PATIENCE):
        return [_taken(workspace, folder, paths, dry=dry) for folder, paths in _doomed_here(workspace, keep)]


def _doomed_here(workspace: Workspace, keep: int) -> Iterator[tuple[Path, list[Path]]]:
    """(the folder whose record stays, what goes of it)."""
    wanted = needed(workspace, keep)
    for model in workspace.models():
        if model.version not in wanted.versions:
            folder = workspace.model_folder(model.version)
            yield from _rest(folder, [path for path in folder.iterdir() if path.name not in ("flctl.json", NAME)])
    for run in workspace.runs():
        if run.open or wanted.lives(run.site, run.number):
            continue
        for folder in sorted(workspace.run_folder(run.site, run.number).glob("*/")):
            if folder.name.isdigit() and (run.site, run.number, int(folder.name)) not in wanted.contributions:
                yield from _rest(folder, [path for path in folder.iterdir() if path.name not in (*KEPT, NAME)])


def _rest(folder: Path, paths: list[Path]) -> Iterator[tuple[Path, list[Path]]]:
    if paths:
        yield folder, sorted(paths)


def _taken(workspace: Workspace, folder: Path, paths: list[Path], *, dry: bool) -> Item:
    files = [file for path in paths for file in ((path, *path.rglob("*")) if path.is_dir() else (path,))]
    sizes = [file.lstat().st_size for file in files if not file.is_dir()]
    place = folder.relative_to(workspace.root).as_posix()
    if not dry:
        faults.point("collect", place)
        if not collected_on(folder):
            workspace.journal.append("collected", site="", path=place, files=len(sizes), size=sum(sizes))
            faults.point("collect", place)
            note_collected(folder, files=len(sizes), size=sum(sizes))
        for path in paths:
            faults.point("collect", place)
            remove(path)
    return Item(site="", path=place, bytes=sum(sizes))


def collect_at(engine: Engine, name: str, keep: int, *, dry: bool) -> list[Item]:
    """A site's part, under its lock: nothing is delivered there meanwhile."""
    with engine.workspace.lock_site(name) as lock:
        session = engine.access.session(load_profile(engine.workspace, name), lock, equip=False)
        if dry:
            driver.check(session)
        else:  # what this folder does not know, as it was put back from a backup, is no room to be made
            adoption.reconcile(session, driver.begin(session))
        paths = _doomed_there(session, needed(engine.workspace, keep))
        items: list[Item] = []
        for begin in range(0, len(paths), AT_ONCE):
            items += _taken_there(session, paths[begin : begin + AT_ONCE], dry=dry)
        return items


def _doomed_there(session: Session, wanted: Needed) -> list[str]:
    """Paths below the campaign's folder at the site."""
    names = {folder: _listed(session, folder) for folder in ("models", "runs", "payload")}
    site, workspace = session.site.name, session.workspace
    runs = {run.number: run for run in workspace.runs(site)}
    payloads = {shipped.payload_sha256(), shipped.merger_sha256(), *_payloads_in_use(session)}
    fetched = {(run.site, run.number): run for run in workspace.runs()}

    def old_model(name: str) -> bool:
        if match := MODEL.fullmatch(name):
            return name not in wanted.models and int(match[1]) < wanted.from_version
        match = CONTRIBUTION.fullmatch(name)
        run = fetched.get((match[1], int(match[2]))) if match else None
        return run is not None and name not in wanted.models and not wanted.lives(run.site, run.number)

    def closed(name: str) -> bool:
        match = ATTEMPT.fullmatch(name)
        run = runs.get(int(match[1])) if match else None
        if match is None or run is None or run.open or wanted.lives(site, run.number):
            return False
        # A lost home begins anew from what the sites have: the newest contributions stay there, too.
        return (site, run.number, int(match[2])) not in wanted.contributions

    doomed = [f"models/{name}" for name in names["models"] if _goes(name, old_model)]
    doomed += [f"payload/{name}" for name in names["payload"] if _goes(name, lambda n: _is_old(n, payloads))]
    for name in names["runs"]:
        if closed(name):
            doomed += [f"runs/{name}/{gone}{part}" for gone in ("", ".gone.") for part in PARTS]
        elif not ATTEMPT.fullmatch(name) and _goes(name, closed):
            doomed.append(f"runs/{name}")
    return doomed


def _is_old(name: str, payloads: set[str]) -> bool:
    return PAYLOAD.fullmatch(name) is not None and name not in payloads


def _goes(name: str, old: Callable[[str], bool]) -> bool:
    """Whether a folder goes: an old one, or what an interruption left of one, or of what made room for a new one."""
    if GONE.fullmatch(name) or (LEFT_OVER.fullmatch(name) and ".old." in name):
        return True
    left = LEFT_OVER.fullmatch(name)
    return old(left[1] if left else name)


def _payloads_in_use(session: Session) -> Iterator[str]:
    """Those that jobs which are not over were told to use."""
    for run in session.workspace.runs(session.site.name):
        if run.open:
            with suppress(OSError):
                script = (session.workspace.attempt_folder(run) / "job.sh").read_text()
                yield from re.findall(r"/payload/([0-9a-f]{64})", script)


def _listed(session: Session, folder: str) -> list[str]:
    place = quote(session.root / folder)
    answer = session.ask({"names": f"test -d {place} || exit 0; cd {place} && ls -A1"})["names"]
    if answer.status != 0:
        raise TransferFailed(
            f"{session.root / folder} cannot be listed: {printable(answer.stderr)}",
            hint="see the site's work folder",
            site=session.site.name,
        )
    return [name for name in answer.stdout.splitlines() if re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*", name)]


def _taken_there(session: Session, paths: list[str], *, dry: bool) -> list[Item]:
    """Measure what is there of these, journal it, take it away."""
    root = quote(session.root)
    sizes = {
        f"s{index}": f"cd {root} && test -e {quote(path)} || exit 0; du -sk {quote(path)}"
        for index, path in enumerate(paths)
    }
    answers = session.ask(sizes, timeout=PATIENCE)
    told = [re.match(r"\s*(\d{1,15})\s", answers[f"s{index}"].stdout, re.ASCII) for index in range(len(paths))]
    site = session.site.name
    items = [
        Item(site=site, path=path, bytes=int(size[1]) * 1024) for path, size in zip(paths, told, strict=True) if size
    ]
    if dry or not items:
        return items
    for item in items:
        session.workspace.journal.append("collected", site=site, path=item.path, size=item.bytes)
    faults.point("collect-at", site)
    _remove_there(session, [item.path for item in items])
    faults.point("collected-at", site)
    return items


def _remove_there(session: Session, paths: Iterable[str]) -> None:
    def command(path: str) -> str:
        folder, _, name = path.rpartition("/")
        gone = name if GONE.fullmatch(name) else f".gone.{name.lstrip('.')}"
        moved = "" if gone == name else f"rm -rf {quote(gone)} && mv {quote(name)} {quote(gone)} && "
        return f"cd {quote(session.root / folder)} && {moved}rm -rf {quote(gone)}"

    answers = session.ask({f"r{index}": command(path) for index, path in enumerate(paths)}, timeout=PATIENCE)
    failed = next((answer for answer in answers.values() if answer.status != 0), None)
    if failed is not None:
        raise TransferFailed(
            f"not everything could be removed: {printable(failed.stderr)}",
            hint="flctl gc again goes on from here",
            site=session.site.name,
        )


def troubled(action: Callable[[], list[Item]], site: str) -> tuple[list[Item], list[tuple[str, Failure]]]:
    """A site's part, or why it could not be done now. Raises LoginTooSoon (the caller may wait) and Interrupted."""
    try:
        return action(), []
    except (LoginTooSoon, Interrupted):
        raise
    except FlctlError as error:
        return [], [(site, failure_of(error))]
