"""Owns the connection to a site that is this machine: shell programs as children, files copied into place."""

import contextlib
import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from flctl.errors import Interrupted, SiteUnreachable
from flctl.facility.connection import OUTPUT_MOST, Output, Progress, Road, program_of
from flctl.facility.profile import Site
from flctl.facility.rsync import refusal
from flctl.facility.transfer import checked, make_private, sources
from flctl.records import FileEntry

CHUNK = 4 << 20


class LocalConnection:
    """This machine as a site: no login, no network."""

    def __init__(self, site: Site, road: Road) -> None:
        self.site, self.road, self.lock_fds = site, road, road.lock_fds
        self.logins = 0

    def run(self, script: str, *, timeout: float = 60.0) -> Output:
        # Files, not pipes: a daemon that the program leaves behind may hold its output open for ever.
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            stdin.write(program_of(script))
            stdin.seek(0)
            child = subprocess.Popen(
                ["/bin/sh"],
                stdin=stdin,
                stdout=out,
                stderr=err,
                env=_environment(),
                start_new_session=True,
                cwd=_home(),
            )
            try:
                status = child.wait(timeout=timeout)
            except subprocess.TimeoutExpired:
                raise SiteUnreachable(
                    f"a command did not end within {timeout:.0f} s",
                    hint="is this machine overloaded? Rounds and ticks try again by themselves",
                    site=self.site.name,
                ) from None
            finally:
                if child.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
            return Output(status=status, stdout=_text(out), stderr=_text(err))

    def push(self, source: Path, names: Sequence[str], target: PurePosixPath, progress: Progress | None = None) -> None:
        sizes = sources(self.site, source, names)
        self._copy(source, sizes, Path(target), progress)

    def pull(
        self, source: PurePosixPath, files: Sequence[FileEntry], target: Path, progress: Progress | None = None
    ) -> None:
        checked(self.site, [entry.path for entry in files])
        self._copy(Path(source), {entry.path: entry.size for entry in files}, target, progress)

    def close(self) -> None:
        pass

    def _copy(self, source: Path, sizes: dict[str, int], target: Path, progress: Progress | None) -> None:
        moved = 0
        for name, size in sizes.items():
            final = target / name
            try:
                make_private(final.parent)
                with _regular(source / name) as reader:
                    if os.fstat(reader.fileno()).st_size != size:
                        raise OSError(None, "it has not the recorded size")
                    self._place(reader, final, moved, progress)
            except OSError as error:
                what = f"{source / name} cannot be copied to {final}"
                raise refusal(self.site, str(error.strerror or error), what, ours=True) from error
            moved += size

    def _place(self, reader: BinaryIO, final: Path, before: int, progress: Progress | None) -> None:
        """Write a file under a name of its own, then give it its final one: it is there whole or not at all."""
        descriptor, draft = tempfile.mkstemp(prefix=".flctl-", dir=final.parent)
        try:
            with os.fdopen(descriptor, "wb") as writer:
                done = before
                while chunk := reader.read(CHUNK):
                    if self.road.stop():
                        raise Interrupted("copying was interrupted", site=self.site.name)
                    writer.write(chunk)
                    done += len(chunk)
                    if progress:
                        progress(done)
                writer.flush()
                os.fsync(writer.fileno())
            Path(draft).rename(final)
        finally:
            Path(draft).unlink(missing_ok=True)


def _regular(path: Path) -> BinaryIO:
    """A regular file opened for reading; a link, a pipe or a device is refused."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    stream = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        stream.close()
        raise OSError(None, "it is not a regular file")
    return stream


def _environment() -> dict[str, str]:
    """What a login here would have. Jobs inherit it, and nothing else that happens to be in our environment."""
    plain = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TMPDIR", "TZ")
    return {name: value for name, value in os.environ.items() if name in plain or name.startswith("LC_")}


def _home() -> Path:
    """Where a login shell would begin."""
    return home if (home := Path.home()).is_dir() else Path("/")


def _text(stream: BinaryIO) -> str:
    stream.seek(0)
    return stream.read(OUTPUT_MOST).decode("utf-8", "replace")
