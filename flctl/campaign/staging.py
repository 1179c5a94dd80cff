"""Owns `flctl site stage`: files, folders and images in place at a site before any round needs them, verified there.

They lie in `<storage.work>/staged`, which all campaigns at the site share, under the names they have here. What is in
place there is never changed, since jobs may be using it; `replaces` says otherwise, and is done by rename. A model goes
where the campaign's own rounds look for it.
"""

import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from flctl.campaign.config import load_configuration, whole_profile
from flctl.campaign.engine import Engine
from flctl.campaign.frozen import place_of, source_of
from flctl.campaign.session import HASHING_RATE, SHARED, Session
from flctl.codec import from_data
from flctl.errors import BudgetRefused, ConfigurationError, Interrupted, LoginTooSoon, TransferFailed, UsageError
from flctl.facility.probe import space_left
from flctl.facility.shell import quote
from flctl.records import FileEntry
from flctl.words import printable

MOST_FILES = 2000
"""In one folder. Parallel file systems bear few small files; an image or an archive holds any number."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@-]{0,200}")

Tell = Callable[[str, int, int], None]
"""What is being done, bytes so far, bytes in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What is to be in place: files of a local folder, at `target`. `single`: one file, which becomes the target."""

    source: Path
    files: tuple[FileEntry, ...]
    target: PurePosixPath
    single: bool = False

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.files)

    @property
    def landing(self) -> PurePosixPath:
        """The folder in which its files arrive."""
        return self.target.parent / f".{self.target.name}.staged" if self.single else self.target


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """What is in place at the site now. `sent`: it was not there before."""

    name: str
    path: str
    files: int
    size: int
    sent: bool


def stage(
    engine: Engine, name: str, paths: Sequence[Path], *, model: bool, replaces: bool = False, tell: Tell
) -> tuple[Staged, ...]:
    """Put these at the site unless they are there. UsageError or ConfigurationError for what may not be staged, before
    anything is sent; BudgetRefused if it does not fit."""
    if not paths and not model:
        raise UsageError("nothing to stage", hint=f"flctl site stage {name} PATH..., or --model")
    profile = whole_profile(engine.workspace, name)
    found = [_read(path, tell, engine.stop.is_set) for path in paths]
    _check_names(found)
    with engine.workspace.lock_site(name) as lock:
        try:
            session = replace(engine.access.session(profile, lock, equip=False), report=tell)
            base = session.root.parent / SHARED
            items = [Item(source=source, files=files, target=base / to, single=one) for source, files, to, one in found]
            if model:
                items += [*_frozen(session), _model(session)]
            return _place(session, items, replaces=replaces)
        except (LoginTooSoon, Interrupted):
            raise
        finally:
            engine.access.drop(name)


def _model(session: Session) -> Item:
    workspace = session.workspace
    version = workspace.newest_model().version
    files = tuple(from_data(FileEntry, item) for item in workspace.model_record(version)["files"])
    folder = workspace.model_folder(version)
    return Item(source=folder, files=files, target=session.root / "models" / folder.name)


def _frozen(session: Session) -> list[Item]:
    """The frozen base of adapters, unless the site has it in a folder of its own."""
    frozen = session.workspace.frozen()
    if frozen is None or session.site.storage.frozen:
        return []
    source = source_of(session.workspace, load_configuration(session.workspace), frozen)
    return [Item(source=source, files=frozen.files, target=place_of(session.root, frozen))]


def _place(session: Session, items: Sequence[Item], *, replaces: bool) -> tuple[Staged, ...]:
    """Look what is there, see that the rest fits, bring it."""
    there = _look(session, items)
    lacking = [item for item in items if not there[item.target]]
    for item in lacking:
        if there[item.target] is None and not replaces and item.target.parent.name == SHARED:
            raise ConfigurationError(
                f"{item.target} is there already, with another content",
                hint="give the new one another name; or --replace, once no job uses the old one",
                site=session.site.name,
            )
    _check_space(session, lacking)
    # A file that arrived has its name only after one more command.
    landed = _look(session, [replace(item, target=item.landing, single=False) for item in lacking if item.single])
    for item in lacking:
        if not landed.get(item.landing):
            session.place(item.source, item.files, item.landing)
        if item.single:
            _name(session, item)
    return tuple(
        Staged(
            name=item.target.name,
            path=str(item.target),
            files=len(item.files),
            size=item.size,
            sent=item in lacking,
        )
        for item in items
    )


def _look(session: Session, items: Sequence[Item]) -> dict[PurePosixPath, bool | None]:
    """Whether each is there, by sha256; None: something else is in its place."""
    commands = {}
    for index, item in enumerate(items):
        where, one = (item.target.parent, item.target.name) if item.single else (item.target, "")
        manifest = "".join(f"{entry.sha256}  {entry.path}\n" for entry in item.files)
        # Links are not followed: what they lead to may be changed by anybody.
        commands[f"i{index}"] = (
            f"test -e {quote(item.target)} || test -L {quote(item.target)} || exit 48\n"
            f"cd {quote(where)} && test -{'f' if one else 'd'} {quote(item.target)} || exit 49\n"
            f"test $(find {quote(f'./{one}')} -type f | wc -l) -eq {len(item.files)} || exit 49\n"
            f"test $(find {quote(f'./{one}')} ! -type d ! -type f | wc -l) -eq 0 || exit 49\n"
            f"sha256sum -c --status - <<'MANIFEST' || exit 49\n{manifest}MANIFEST"
        )
    answers = (
        {} if not commands else session.ask(commands, timeout=60 + sum(item.size for item in items) / HASHING_RATE)
    )
    states = {0: True, 48: False, 49: None}
    found: dict[PurePosixPath, bool | None] = {}
    for index, item in enumerate(items):
        answer = answers[f"i{index}"]
        if answer.status not in states:
            raise TransferFailed(
                f"{item.target} cannot be looked at: {printable(answer.stderr)}",
                hint="see the site's work folder",
                site=session.site.name,
            )
        found[item.target] = states[answer.status]
    return found


def _check_space(session: Session, lacking: Sequence[Item]) -> None:
    """BudgetRefused if the site's disk has not enough room, as `df` tells; what arrived before counts as arrived."""
    if not lacking:
        return
    folder = session.root.parent
    parts = " ".join(quote(item.landing.parent / f".{item.landing.name}.part") for item in lacking)
    answers = session.ask(
        {
            "df": f"mkdir -p {quote(folder)} && df -Pk {quote(folder)}",
            "parts": f"du -sk {parts} 2>/dev/null | awk '{{ kib += $1 }} END {{ print kib + 0 }}'",
        }
    )
    kib = space_left(answers["df"])
    if kib is None:
        return
    contact = session.workspace.contact(session.site.name)
    session.workspace.save_contact(session.site.name, replace(contact, free=kib * 1024))
    parted = re.fullmatch(r"\s*(\d{1,18})\s*", answers["parts"].stdout, re.ASCII)
    came = int(parted[1]) * 1024 if parted else 0
    need, free = max(0, sum(item.size for item in lacking) - came), kib * 1024
    if need > free:
        raise BudgetRefused(
            f"{need:,} bytes are to be sent, and {folder} has {free:,} bytes left",
            hint=f"make room at {session.site.name}, or set another storage.work in sites/{session.site.name}.toml",
            site=session.site.name,
        )


def _name(session: Session, item: Item) -> None:
    """Give a file that has arrived, alone in its folder, its name: at once, whatever was there."""
    file, target = quote(item.landing / item.files[0].path), quote(item.target)
    # A folder in the way would take the file in.
    aside = f"test ! -d {target} || mv {target} {target}.old.$$ || exit 1"
    command = f"{aside}\nmv -f {file} {target} && rm -rf {quote(item.landing)} {target}.old.$$"
    answer = session.ask({"name": command})["name"]
    if answer.status != 0:
        raise TransferFailed(
            f"{item.target} could not be put in place: {printable(answer.stderr) or 'unknown reason'}",
            hint="the same command goes on from here",
            site=session.site.name,
        )


def _read(path: Path, tell: Tell, stopped: Callable[[], bool]) -> tuple[Path, tuple[FileEntry, ...], str, bool]:
    """(folder, its files, the name at the site, whether it is one file) of what a user named."""
    from flctl.model.manifest import hash_file

    path = Path(os.path.normpath(Path.cwd() / path))  # resolve() would follow a link
    single, names = _listed(path)
    source = path.parent if single else path
    total, done = sum((source / name).lstat().st_size for name in names), 0
    files = []
    for name in names:

        def told(size: int, before: int = done) -> None:
            if stopped():
                raise Interrupted("interrupted")
            tell(f"reading {path.name}", before + size, total)

        files.append(hash_file(source, name, told))
        done += files[-1].size
    return source, tuple(files), path.name, single


def _listed(path: Path) -> tuple[bool, list[str]]:
    """(is it one file, the names of its files); plain files and folders only."""
    if not NAME.fullmatch(path.name):
        raise UsageError(
            f"{path.name!r} cannot be a name at the site: letters, digits and _ . + @ -", hint="rename it here first"
        )
    if _kind(path) == "file":
        return True, [path.name]
    names: list[str] = []
    for folder, folders, files in os.walk(path, onerror=_unreadable):
        for name in sorted([*folders, *files]):
            inner = Path(folder) / name
            kind, within = _kind(inner), inner.relative_to(path).as_posix()
            if kind == "file":
                names.append(within)
            if not within.isprintable() or "\\" in within:
                raise UsageError(f"{within!r} cannot be a name at the site", hint="rename it here first")
    if not names:
        raise UsageError(f"{path} holds no file", hint="name a file, or a folder with files")
    if len(names) > MOST_FILES:
        raise UsageError(
            f"{path} holds {len(names):,} files, more than {MOST_FILES:,}",
            hint="stage one image or archive of it: file systems of supercomputers are slow with small files",
        )
    return False, sorted(names)


def _kind(path: Path) -> str:
    """`file` or `folder`; UsageError for anything else."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="name files or folders of this machine") from None
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISLNK(mode):
        raise UsageError(f"{path} is a link", hint=f"name what it leads to: {Path(os.path.realpath(path))}")
    raise UsageError(f"{path} is neither a file nor a folder", hint="only these are staged")


def _unreadable(error: OSError) -> None:
    raise UsageError(f"{error.filename}: {error.strerror}")


def _check_names(found: Sequence[tuple[Path, tuple[FileEntry, ...], str, bool]]) -> None:
    names = [name for _, _, name, _ in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(
            f"{', '.join(sorted(twice))} is named twice", hint="what lies at the site needs a name of its own"
        )
