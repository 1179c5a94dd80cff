"""Owns one run of the system's rsync: what it is told, what it says of the other side, what its end means.

All that the other rsync is told (-IR, --timeout, --partial-dir, --safe-links, --files-from, --from0) is known
since rsync 2.6.4 of 2005, and by rrsync: nothing has to be asked there before the first file moves.
"""

import functools
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Protocol

from flctl.errors import (
    BudgetRefused,
    ConfigurationError,
    FlctlError,
    Interrupted,
    SiteUnreachable,
    TransferFailed,
)
from flctl.facility import patience
from flctl.facility.openssh import environment
from flctl.facility.profile import Site
from flctl.words import printable

if TYPE_CHECKING:
    from flctl.facility.connection import Progress, Road

PARTIAL = ".flctl-partial"
"""Where rsync keeps the beginning of an interrupted file, within the target folder, to go on from there."""

COMPLAINTS_MOST = 16 << 20
"""Bytes that rsync and ssh may write to stderr, which the site fills."""

PATIENCE = 5.0

ESCAPES_ITSELF = (3, 2, 4)
"""The rsync that began to protect unusual characters of a remote path from the shell there."""

KEEPS_DEBUG = (3, 5)
"""The rsync that began to keep --debug=proto, which tells the other side's protocol, to itself. Before, it was sent
there, and neither rsync 3.0 nor rrsync takes it."""

SOUND = (3, 4, 3)
"""The rsync that closed what a hostile sender could reach (CVE-2026-43618, CVE-2026-43620)."""

GONE = r"(?:(?:mkdir|change_dir|push_dir)\S* .*failed:|rrsync error:.*) No such file or directory"
"""What rsync and rrsync say of a folder that is not there."""

VERSIONS = {29: "2.6", 30: "3.0", 31: "3.1 to 3.3", 32: "3.4 or newer"}
"""The releases that speak each protocol."""

OPTIONS = (
    *("--no-dirs", "--no-links", "--safe-links", "--no-devices", "--no-specials", "--ignore-times", "--from0"),
    *("--files-from=-", "--no-human-readable", "--info=progress2", f"--partial-dir={PARTIAL}"),
    f"--timeout={patience.IDLE}",
    "--chmod=Du=rwx,Dgo=,Fu=rw,Fgo=",
)
"""No --whole-file: for a new file it changes nothing, and with it a partial file would be sent again from its start.
--no-dirs: --files-from alone accepts whatever a site puts below a name that is a folder there. --safe-links: a second
bolt, where --no-links is the first.
Never -a, -r, -L, -s, -z, --mkpath, --append or --inplace."""


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


def remote(site: Site, folder: PurePosixPath) -> PurePosixPath:
    """A folder at the site that rsync takes for that one folder; TransferFailed for one that it might expand."""
    text = str(folder)
    if not folder.is_absolute() or re.search(r"[*?\[\]\\]", text):
        raise TransferFailed(
            f"{printable(text)!r} cannot be named to rsync: a folder there is an absolute path without * ? [ ] and \\",
            hint=f"choose another storage.work in sites/{site.name}.toml",
            site=site.name,
        )
    return folder


def run(
    carrier: Carrier,
    folder: PurePosixPath,
    ends: Callable[[str], Sequence[str]],
    names: Sequence[str],
    progress: "Progress | None",
    *,
    most: int | None = None,
) -> None:
    """Run one rsync of these names to its end; raises what its failure means. `ends`: source and target, of the
    `folder` there as rsync names it. `most`: it writes here, and no file larger than so many bytes."""
    program, version = rsync_program()
    with carrier.open() as shell, tempfile.TemporaryFile() as listing, tempfile.TemporaryFile() as errors:
        argv = [program, *OPTIONS, *_extra(carrier.site, folder, version), "-e", " ".join(map(_rsh_word, shell.argv))]
        if most is not None:
            # The sender may lie about the size of a file; the kernel does not.
            limit = f'ulimit -f {most // 512 + 1} 2>/dev/null; exec "$@"'
            argv = ["/bin/sh", "-c", limit, "sh", *argv, f"--max-size={most}b"]
        # "./" because rsync takes a name that begins with # or ; for a comment.
        listing.write(b"".join(b"./" + os.fsencode(name) + b"\0" for name in names))
        listing.seek(0)
        child = subprocess.Popen(
            [*argv, "--", *ends(f"{shell.host}:{folder}/")],
            stdin=listing,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(**shell.environment),
            pass_fds=_open_ones(carrier.lock_fds),
            start_new_session=True,
        )
        status = _watch(child, carrier, progress, errors.fileno())
        errors.seek(0)
        words = errors.read(65536).decode("utf-8", "replace")
        if status != 0:
            ours = most is not None
            raise carrier.explain(status, words) or _meaning(carrier.site, status, words, ours=ours)


def refusal(site: Site, words: str, what: str, *, ours: bool) -> FlctlError:
    """A failed copy as an error: a full disk or quota is BudgetRefused, anything else TransferFailed."""
    words = printable(words)
    if re.search(r"No space left|quota exceeded|File too large", words, re.IGNORECASE):
        where = "here" if ours else f"at {site.name}"
        return BudgetRefused(f"{what}: {words}", hint=f"make room {where}; it goes on where it stopped", site=site.name)
    return TransferFailed(f"{what}: {words}", hint="it is tried again at the next contact", site=site.name)


def _watch(child: "subprocess.Popen[bytes]", carrier: Carrier, progress: "Progress | None", complaints: int) -> int:
    """Follow rsync to its end, or end it, with all that it started, when the user stops flctl, or when too little moves
    for too long: its own --timeout is not kept where its ssh is stuck, and never where a link trickles."""
    assert child.stdout is not None
    heard, spoken = b"", None
    moved, known, since = 0, 0, time.monotonic()
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
                if os.fstat(complaints).st_size > COMPLAINTS_MOST:
                    raise _stuck(carrier.site, "the site complains without end")
                if moved - known >= patience.SLOW_BYTES:
                    known, since = moved, time.monotonic()
                if time.monotonic() - since > patience.SLOW_WINDOW:
                    raise _stuck(carrier.site, f"{moved - known:,} bytes moved in {patience.SLOW_WINDOW / 60:.0f} min")
                if not selector.select(timeout=0.2):
                    continue
                data = os.read(stream.fileno(), 65536)
                if not data:
                    return _status(child, carrier.site)
                heard = (heard + data)[-4096:]
                if spoken is None and (spoken := re.search(rb"Protocol versions: remote=(\d+)", heard)):
                    number = int(spoken[1])
                    carrier.road.on_rsync(f"{VERSIONS.get(number, 'of an unknown release')} (protocol {number})")
                if numbers := re.findall(rb"[\r\n]\s*(\d+)\s+\d+%", b"\n" + heard):
                    moved = int(numbers[-1])
                    if progress:
                        progress(moved)
    finally:
        end(child)


def _status(child: "subprocess.Popen[bytes]", site: Site) -> int:
    """The exit status of an rsync that has said its last word."""
    try:
        return child.wait(timeout=patience.ENDING)
    except subprocess.TimeoutExpired:
        raise _stuck(site, "rsync does not end") from None


def _stuck(site: Site, why: str) -> SiteUnreachable:
    return SiteUnreachable(
        f"the files do not get through: {why}", hint="the next contact goes on where it stopped", site=site.name
    )


def end(child: "subprocess.Popen[bytes]") -> None:
    """End a child and what it started, if it still runs; rsync keeps the partial file when it is asked politely."""
    if child.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=PATIENCE)
            return


def _meaning(site: Site, status: int, words: str, *, ours: bool) -> FlctlError:
    """rsync's exit status and last words as an error; see EXIT VALUES in its manual."""
    said = printable(re.sub(r"(?m)^rsync error: .*", "", words), 400) or f"rsync ended with status {status}"
    if status == 11 and said.endswith(" 11"):
        # The other side's own words are lost now and then when it ends: only its status comes.
        said = words = "rsync does not say why; most often it is: No space left on device"
    if status in (11, 23, 12) and re.search(r"No space left|quota exceeded|File too large", words, re.IGNORECASE):
        return refusal(site, said, "a file could not be written", ours=ours)
    if status == 127 or re.search(r"rsync: (command )?not found|rsync: No such file", words):
        return TransferFailed(
            f"rsync cannot be run at the site: {said}",
            hint=f"it must be in the PATH of a login there; else set transfer.rsync in sites/{site.name}.toml",
            site=site.name,
        )
    if site.transfer.host and re.search(GONE, words):
        return TransferFailed(
            f"{site.transfer.host} does not find a folder that {site.login.host} has: {said}",
            hint="paths are absolute and the same on both: if it sees other file systems, or rrsync takes paths for "
            f"ones below a folder of its own, set another transfer.host in sites/{site.name}.toml, or none",
            site=site.name,
        )
    if re.search(r"unknown option|rrsync(?: error)?:(?! Another instance)|SSH_ORIGINAL_COMMAND", words):
        return TransferFailed(
            f"the host does not let rsync do that: {said}",
            hint=f"ask the facility what rsync may do there, or set another transfer.host in sites/{site.name}.toml",
            site=site.name,
        )
    if not site.transfer.shell and (status in (1, 2) or "is your shell clean" in words):
        return TransferFailed(
            f"{site.transfer.host} does not answer as rsync does: {said}",
            hint=f"may your account use it? This lists what is there: rsync {site.transfer.host}:/",
            site=site.name,
        )
    if status == 2 or "is your shell clean" in words:
        return TransferFailed(
            f"something in the login there prints text into rsync's conversation: {said}",
            hint="~/.bashrc and its like must print nothing when the shell is not interactive",
            site=site.name,
        )
    if (status in (10, 12, 30, 35, 255) or status < 0) and "Another instance of rrsync" not in words:
        return SiteUnreachable(
            f"the connection was lost while files moved: {said}",
            hint="the next contact goes on where it stopped",
            site=site.name,
        )
    return refusal(site, said, "rsync failed", ours=ours)


def _extra(site: Site, folder: PurePosixPath, version: tuple[int, ...]) -> list[str]:
    """Options that depend on the site, the folder there, and our rsync: one that does not escape sends an unusual path
    over the connection, not on a command line, which rrsync forbids."""
    found = [f"--rsync-path={shlex.quote(site.transfer.rsync)}"] if site.transfer.rsync else []
    if version >= KEEPS_DEBUG:
        found.append("--debug=proto")
    if version < ESCAPES_ITSELF and not re.fullmatch(r"[A-Za-z0-9_./+@%=:,-]+", str(folder)):
        found.append("--protect-args")
    return found


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


def holes(version: str) -> str:
    """What is to be said of an rsync of this version, or of such releases (as in VERSIONS), if anything for certain.
    Distributions close holes and leave the version as it was."""
    found = re.match(r"(?:\d\.\d to )?(\d+)\.(\d+)(?:\.(\d+))?(?! or newer)(?![.\d])", version)
    if found is None or tuple(int(part or 0) for part in found.groups()) >= SOUND:
        return ""
    return f"older than {'.'.join(map(str, SOUND))}, which closed holes (SECURITY.md), unless its distribution did"


@functools.cache
def rsync_program() -> tuple[str, tuple[int, ...]]:
    """The rsync to call, and its version: 3.1 or newer. macOS brings one that only claims to be rsync 2.6.9."""
    seen = []
    for candidate in ("rsync", "/opt/homebrew/bin/rsync", "/usr/local/bin/rsync"):
        program = shutil.which(candidate)
        if program is None:
            continue
        told = ""
        with suppress(OSError, subprocess.TimeoutExpired):
            told = subprocess.run(
                [program, "--version"],
                env=environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=patience.ENDING,
                check=False,
            ).stdout
        match = re.search(r"^rsync\s+version v?(\d+)\.(\d+)(?:\.(\d+))?", told, re.MULTILINE)
        version = tuple(int(part or 0) for part in match.groups()) if match else ()
        if version >= (3, 1):
            return program, version
        seen.append(f"{program} ({match[0] if match else 'of unknown version'})")
    raise ConfigurationError(
        f"rsync 3.1 or newer is needed; found: {', '.join(seen) or 'none'}",
        hint="Debian: apt-get install rsync; macOS: brew install rsync",
    )
