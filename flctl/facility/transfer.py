"""Owns pushing and pulling named files with the system's rsync: what it is told, what it is believed, when it ends.

rsync's exit status 0 does not mean that a file arrived (links, pipes and files over the size are skipped silently), so
every pulled file is looked at. Times are never compared. Only named files are asked for; rsync itself refuses others.
"""

import functools
import os
import re
import selectors
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from flctl.errors import BudgetRefused, ConfigurationError, FlctlError, Interrupted, SiteUnreachable, TransferFailed
from flctl.facility.openssh import environment, printable
from flctl.facility.profile import Site
from flctl.records import FileEntry

if TYPE_CHECKING:
    from flctl.facility.connection import Progress, Road

PARTIAL = ".flctl-partial"
"""Where rsync keeps the beginning of an interrupted file, within the target folder, to go on from there."""

INCOMING = ".flctl-incoming"
"""Where pulled files land within the target folder until they have been looked at: an older rsync than 3.2.5 lets a
site send files that nobody asked for."""

IDLE_TIMEOUT = 600
"""Seconds without any data after which rsync gives up; a dead peer is noticed sooner, by ssh or by our connection."""

PATIENCE = 5.0

_OPTIONS = (
    *("--no-dirs", "--no-links", "--no-devices", "--no-specials", "--ignore-times", "--from0", "--files-from=-"),
    *("--no-human-readable", "--info=progress2", f"--partial-dir={PARTIAL}", f"--timeout={IDLE_TIMEOUT}"),
    "--chmod=Du=rwx,Dgo=,Fu=rw,Fgo=",
)
"""No --whole-file: for a new file it changes nothing, and with it a partial file would be sent again from its start.
--no-dirs: --files-from alone accepts whatever a site puts below a name that is a folder there.
Never -a, -r, -L, --append or --inplace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shell:
    """How rsync reaches the other side: its --rsh as an argv, the host it names, variables of its environment."""

    argv: Sequence[str]
    host: str
    environment: Mapping[str, str]


class Carrier(Protocol):
    """A road for rsync to one site."""

    site: Site
    road: "Road"
    lock_fds: tuple[int, ...]

    @property
    def refusal(self) -> FlctlError | None:
        """Why rsync must be ended at once, if it must."""

    def open(self) -> AbstractContextManager[Shell]:
        """The road, open for one rsync. An error found on the way is raised at its end, instead of rsync's own."""

    def explain(self, status: int, words: str) -> FlctlError | None:
        """Why rsync failed, where the road itself was the reason."""

    def close(self) -> None: ...


def push(
    carrier: Carrier, source: Path, names: Sequence[str], target: PurePosixPath, progress: "Progress | None" = None
) -> None:
    if sources(carrier.site, source, names):
        with carrier.open() as shell:
            argv = [f"{source}/", f"{shell.host}:{target}/"]
            _rsync(carrier, shell, argv, _option_for(target), names, progress, ours=False)


def pull(
    carrier: Carrier,
    source: PurePosixPath,
    files: Sequence[FileEntry],
    target: Path,
    progress: "Progress | None" = None,
) -> None:
    checked(carrier.site, [entry.path for entry in files])
    if not files:
        return
    incoming = target / INCOMING
    make_private(incoming)
    _sweep(incoming, files)
    most = max(entry.size for entry in files)
    options = [f"--max-size={most}b", *_option_for(source)]
    names = [entry.path for entry in files]
    try:
        with carrier.open() as shell:
            argv = [f"{shell.host}:{source}/", f"{incoming}/"]
            _rsync(carrier, shell, argv, options, names, progress, ours=True, most=most)
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


def refusal(site: Site, words: str, what: str, *, ours: bool) -> FlctlError:
    """A failed copy as an error: a full disk or quota is BudgetRefused, anything else TransferFailed."""
    words = printable(words)
    if re.search(r"No space left|quota exceeded|File too large", words, re.IGNORECASE):
        where = "here" if ours else f"at {site.name}"
        return BudgetRefused(f"{what}: {words}", hint=f"make room {where}; it goes on where it stopped", site=site.name)
    return TransferFailed(f"{what}: {words}", hint="it is tried again at the next contact", site=site.name)


def _rsync(
    carrier: Carrier,
    shell: Shell,
    ends: Sequence[str],
    options: Sequence[str],
    names: Sequence[str],
    progress: "Progress | None",
    *,
    ours: bool,
    most: int | None = None,
) -> None:
    """Run one rsync to its end; raises what its failure means."""
    remote_shell = " ".join(_rsh_word(word) for word in shell.argv)
    argv = [rsync_program(), *_OPTIONS, *options, "-e", remote_shell, "--", *ends]
    if most is not None:
        # The sender may lie about the size of a file; the kernel does not.
        argv = ["/bin/sh", "-c", f'ulimit -f {most // 512 + 1} 2>/dev/null; exec "$@"', "sh", *argv]
    with tempfile.TemporaryFile() as listing, tempfile.TemporaryFile() as errors:
        # "./" because rsync takes a name that begins with # or ; for a comment.
        listing.write(b"".join(b"./" + os.fsencode(name) + b"\0" for name in names))
        listing.seek(0)
        child = subprocess.Popen(
            argv,
            stdin=listing,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(**shell.environment),
            pass_fds=_open_ones(carrier.lock_fds),
            start_new_session=True,
        )
        status = _watch(child, carrier, progress)
        errors.seek(0)
        words = errors.read(65536).decode("utf-8", "replace")
    if status != 0:
        raise carrier.explain(status, words) or _meaning(carrier.site, status, words, ours=ours)


def _watch(child: "subprocess.Popen[bytes]", carrier: Carrier, progress: "Progress | None") -> int:
    """Follow rsync to its end, or end it, with all that it started, when the user stops flctl."""
    assert child.stdout is not None
    heard = b""
    try:
        with selectors.DefaultSelector() as selector, child.stdout as stream:
            selector.register(stream, selectors.EVENT_READ)
            while True:
                if carrier.refusal is not None:
                    raise carrier.refusal
                if carrier.road.stop():
                    raise Interrupted(
                        "the transfer was interrupted", hint="it goes on where it stopped", site=carrier.site.name
                    )
                if not selector.select(timeout=0.2):
                    continue
                data = os.read(stream.fileno(), 65536)
                if not data:
                    return child.wait(timeout=30)
                heard = (heard + data)[-4096:]
                if progress and (numbers := re.findall(rb"[\r\n]\s*(\d+)\s+\d+%", b"\n" + heard)):
                    progress(int(numbers[-1]))
    finally:
        end(child)


def end(child: "subprocess.Popen[bytes]") -> None:
    """End a child and what it started, if it still runs; rsync keeps the partial file when it is asked politely."""
    if child.poll() is not None:
        return
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, PATIENCE)):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=patience)
            return


def _meaning(site: Site, status: int, words: str, *, ours: bool) -> FlctlError:
    """rsync's exit status and last words as an error; see EXIT VALUES in its manual."""
    said = printable(re.sub(r"rsync error: .*", "", words), 400) or f"rsync ended with status {status}"
    if status in (11, 23, 12) and re.search(r"No space left|quota exceeded|File too large", words, re.IGNORECASE):
        return refusal(site, said, "a file could not be written", ours=ours)
    if status == 127 or re.search(r"rsync: (command )?not found|rsync: No such file", words):
        return TransferFailed(
            f"rsync cannot be run at the site: {said}", hint="it must be in the PATH of a login there", site=site.name
        )
    if status == 2 or "is your shell clean" in words:
        return TransferFailed(
            f"something in the login there prints text into rsync's conversation: {said}",
            hint="~/.bashrc and its like must print nothing when the shell is not interactive",
            site=site.name,
        )
    if status in (10, 12, 30, 35, 255) or status < 0:
        return SiteUnreachable(
            f"the connection was lost while files moved: {said}",
            hint="the next contact goes on where it stopped",
            site=site.name,
        )
    return refusal(site, said, "rsync failed", ours=ours)


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


def _sweep(target: Path, files: Sequence[FileEntry]) -> None:
    """Remove what an rsync that was killed left beside the files under temporary names; the caller's lock says that
    none runs."""
    for entry in files:
        final = target / entry.path
        if final.parent.is_dir():
            for path in final.parent.iterdir():
                if re.fullmatch(rf"\.{re.escape(final.name)}\.[A-Za-z0-9]{{6}}", path.name):
                    path.unlink()


def _option_for(path: PurePosixPath) -> list[str]:
    """Unusual paths are sent over the connection, not on a command line; some restricted servers do not know how."""
    return [] if re.fullmatch(r"[A-Za-z0-9_./+@%=:,-]+", str(path)) else ["--protect-args"]


def _rsh_word(word: str) -> str:
    """A word of --rsh, which rsync splits at blanks; within quotes a doubled quote is one."""
    return word if re.fullmatch(r"[A-Za-z0-9_./+@%=:,\[\]-]+", word) else "'" + word.replace("'", "''") + "'"


def _open_ones(descriptors: Sequence[int]) -> tuple[int, ...]:
    found = []
    for descriptor in descriptors:
        with suppress(OSError):
            os.fstat(descriptor)
            found.append(descriptor)
    return tuple(found)


@functools.cache
def rsync_program() -> str:
    """The rsync to call: 3.1 or newer. macOS brings one that only claims to be rsync 2.6.9."""
    seen = []
    for candidate in ("rsync", "/opt/homebrew/bin/rsync", "/usr/local/bin/rsync"):
        program = shutil.which(candidate)
        if program is None:
            continue
        done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", check=False)
        match = re.search(r"^rsync\s+version v?(\d+)\.(\d+)", done.stdout, re.MULTILINE)
        if match and (int(match[1]), int(match[2])) >= (3, 1):
            return program
        seen.append(f"{program} ({match[0] if match else 'of unknown version'})")
    raise ConfigurationError(
        f"rsync 3.1 or newer is needed; found: {', '.join(seen) or 'none'}",
        hint="Debian: apt-get install rsync; macOS: brew install rsync",
    )
