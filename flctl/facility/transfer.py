"""Owns pushing and pulling named files by rsync: what may be named, and what is believed of what came.

rsync's exit status 0 does not mean that a file arrived (links, pipes and files over the size are skipped silently), so
every pulled file is looked at. Times are never compared. Only named files are asked for; rsync itself refuses others.
"""

import os
import re
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from flctl.errors import TransferFailed
from flctl.facility.profile import Site
from flctl.facility.rsync import PARTIAL, Carrier, remote, run
from flctl.facility.shell import quote
from flctl.records import FileEntry
from flctl.words import printable

if TYPE_CHECKING:
    from flctl.facility.connection import Progress

INCOMING = ".flctl-incoming"
"""Where pulled files land within the target folder until they have been looked at: an older rsync than 3.2.5 lets a
site send files that nobody asked for."""


PART = ".part"
"""How the names of folders end in which files arrive."""


def landing(site: Site, folder: PurePosixPath) -> str:
    """A shell command that makes a folder ready to be pushed to. What an rsync there that was killed, or that still
    waits for a link that has fallen silent, has of a file under a temporary name, is kept as the beginning of that
    file: only where nothing but a push ever writes, for its name says nothing for certain."""
    made = f"umask 077 && mkdir -p {quote(remote(site, folder))}"
    if not folder.name.endswith(PART):
        return made
    return f"""{made} && cd {quote(folder)} || exit 1
find . -type f -name '.*.{"[A-Za-z0-9]" * 6}' | while IFS= read -r left; do
  name=${{left##*/.}}; name=${{name%.*}}; kept=${{left%/*}}/{PARTIAL}
  test "$(stat -c %s "$left")" -gt "$(stat -c %s "$kept/$name" 2>/dev/null || echo 0)" || continue
  mkdir -p "$kept" && mv -f "$left" "$kept/$name"
done
:"""


def push(
    carrier: Carrier, source: Path, names: Sequence[str], target: PurePosixPath, progress: "Progress | None" = None
) -> None:
    folder = remote(carrier.site, target)
    if sources(carrier.site, source, names):
        run(carrier, folder, lambda there: (f"{source}/", there), names, progress)


def pull(
    carrier: Carrier,
    source: PurePosixPath,
    files: Sequence[FileEntry],
    target: Path,
    progress: "Progress | None" = None,
) -> None:
    checked(carrier.site, [entry.path for entry in files])
    folder = remote(carrier.site, source)
    if not files:
        return
    incoming = target / INCOMING
    make_private(incoming)
    _keep(incoming, files)
    most = max(entry.size for entry in files)
    names = [entry.path for entry in files]
    try:
        run(carrier, folder, lambda there: (there, f"{incoming}/"), names, progress, most=most)
    finally:
        # rsync gives a file its name when it is whole: what came before an interruption need not come again.
        missing = [(entry, why) for entry in files if (why := _arrived(incoming, target, entry))]
        if not missing:
            shutil.rmtree(incoming, ignore_errors=True)
    # What is left there by an rsync that says that all went well is nothing that was asked for.
    shutil.rmtree(incoming, ignore_errors=True)
    for entry, why in missing:
        raise TransferFailed(
            f"{printable(entry.path)} did not arrive: {why}",
            hint="it is fetched again at the next contact",
            site=carrier.site.name,
        )


def checked(site: Site, names: Sequence[str]) -> None:
    """TransferFailed if a name is not a plain path below a folder."""
    for name in names:
        parts = name.split("/")
        if (
            not name
            or "\0" in name
            or any(part in ("", ".", "..") for part in parts)
            or parts[0] in (PARTIAL, INCOMING)
        ):
            raise TransferFailed(
                f"{printable(name)!r} is not the name of a file within a folder",
                hint="only files below the folder itself are moved",
                site=site.name,
            )


def sources(site: Site, folder: Path, names: Sequence[str]) -> dict[str, int]:
    """The sizes of files to push; TransferFailed if one is not a regular file really within the folder."""
    checked(site, names)
    sizes, inside = {}, folder.resolve()
    for name in names:
        path = folder / name
        found = path.lstat() if path.parent.exists() and os.path.lexists(path) else None
        if found is None or not stat.S_ISREG(found.st_mode) or path.parent.resolve() != (inside / name).parent:
            what = "does not exist" if found is None else "is not a regular file within its folder"
            raise TransferFailed(f"{path} {what}", hint="it was changed while flctl worked on it", site=site.name)
        sizes[name] = found.st_size
    return sizes


def make_private(folder: Path) -> None:
    """Make a folder and its parents where they do not exist, open to nobody else."""
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)


def _arrived(incoming: Path, target: Path, entry: FileEntry) -> str:
    """Move a file that came to its place if it is what was asked for; else why it is not."""
    path, final = incoming / entry.path, target / entry.path
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                return "what came is not a regular file"
            if found.st_size != entry.size:
                return f"it is {found.st_size:,} bytes here and {entry.size:,} in the record"
            os.fsync(stream.fileno())
        make_private(final.parent)
        path.rename(final)
    except OSError:
        return "there it is missing, a link, not a regular file, or larger than in the record"
    return ""


def _keep(target: Path, files: Sequence[FileEntry]) -> None:
    """Keep what an rsync that was killed left under temporary names as the beginnings of the files, to go on from
    there; the caller's lock says that none runs."""
    for entry in files:
        final = target / entry.path
        partial = final.parent / PARTIAL / final.name
        for path in final.parent.iterdir() if final.parent.is_dir() else ():
            if not re.fullmatch(rf"\.{re.escape(final.name)}\.[A-Za-z0-9]{{6}}", path.name):
                continue
            found, had = path.lstat(), partial.lstat().st_size if os.path.lexists(partial) else 0
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and had < found.st_size <= entry.size:
                make_private(partial.parent)
                path.rename(partial)
            else:
                path.unlink()
