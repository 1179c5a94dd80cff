"""Owns one site's session: its paths, its programs, and every file that crosses its border (each is journaled)."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Literal

from flctl import faults
from flctl.campaign import shipped
from flctl.campaign.workspace import Workspace
from flctl.durable import fsync_folders, make_folder
from flctl.errors import ConfigurationError, TransferFailed
from flctl.facility import scratch
from flctl.facility.connection import Connection
from flctl.facility.profile import Site
from flctl.facility.rsync import refusal
from flctl.facility.scheduler import Scheduler, scheduler_of
from flctl.facility.shell import Answer, Program, quote
from flctl.records import FileEntry, Stage
from flctl.words import printable

VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")
HASHING_RATE = 20e6
"""Bytes per second that a busy login node is trusted to hash at least."""
SHARED = "staged"
"""The folder in `storage.work` that all campaigns at a site share."""

Place = tuple[Path, Sequence[FileEntry], PurePosixPath]
"""A local folder, the files of it that count, and where they belong at the site."""

Report = Callable[[str, int, int], None]
"""What is being moved, bytes so far, bytes in all."""


class Differs(TransferFailed):
    """A file came, and is not what its record says: `entry`."""

    def __init__(self, message: str, *, hint: str, site: str, entry: FileEntry) -> None:
        super().__init__(message, hint=hint, site=site)
        self.entry = entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A site reached through an open connection; `root` and `data` are absolute paths there."""

    workspace: Workspace
    site: Site
    connection: Connection
    root: PurePosixPath
    data: str
    report: Report

    @property
    def payload(self) -> PurePosixPath:
        return self.root / "payload" / shipped.payload_sha256()

    @property
    def merger(self) -> PurePosixPath:
        """The zip that merges."""
        return self.root / "payload" / shipped.merger_sha256() / shipped.MERGER

    @property
    def scheduler(self) -> Scheduler:
        return scheduler_of(self.site, str(self.payload))

    def ask(self, commands: Mapping[str, str], *, timeout: float = 60.0) -> dict[str, Answer]:
        """Run named shell commands at the site in one go."""
        return ask(self.connection, self.site.name, commands, timeout=timeout)

    def place_payload(self) -> None:
        """Put this flctl's payload there unless it is there whole: an upgrade in the middle of a campaign brings its
        own, and a purge may have taken it away."""
        self.place_all([(shipped.payload_folder(), shipped.payload_manifest(), self.payload)], hashed=True)

    def place_all(self, places: Sequence[Place], *, hashed: bool = False) -> None:
        """Put folders in place that are not there whole, by names and sizes, or by hash. What is there and differs is
        moved aside."""
        commands = {f"p{index}": _is_whole(files, place, hashed) for index, (_, files, place) in enumerate(places)}
        total = sum(entry.size for _, files, _ in places for entry in files) if hashed else 0
        answers = self.ask(commands, timeout=60 + total / HASHING_RATE) if places else {}
        for index, (source, files, place) in enumerate(places):
            if answers[f"p{index}"].status != 0:
                self.place(source, files, place)

    def place_merger(self) -> None:
        """Put the zip that merges there, unless it is there whole."""
        with scratch.folder() as folder:
            (folder / shipped.MERGER).write_bytes(shipped.merger())
            self.place_all([(folder, shipped.merger_manifest(), self.merger.parent)], hashed=True)

    def gather(self, files: Sequence[FileEntry], near: Sequence[PurePosixPath], target: PurePosixPath) -> None:
        """Make a new folder of files that lie in other folders of the site, hard links where it can, if each is there
        with the right sha256. If not, or if there is such a folder, nothing is done: `place` brings what lacks."""
        manifest = "".join(f"{entry.sha256} {entry.path}\n" for entry in files)
        part = target.parent / f".{target.name}.gathered"
        command = (
            f"test ! -e {quote(target)} || exit 0\n"
            f"rm -rf {quote(part)} && mkdir -p {quote(part)} && cd {quote(part)} || exit 1\n"
            "while read -r digest path; do\n"
            '  mkdir -p "$(dirname "./$path")"\n'
            f"  for folder in {' '.join(map(quote, near))}; do\n"
            '    test -f "$folder/$path" && test ! -L "$folder/$path" || continue\n'
            '    test "$(sha256sum <"$folder/$path")" = "$digest  -" || continue\n'
            '    ln "$folder/$path" "$path" || cp "$folder/$path" "$path"\n'
            "    break\n"
            "  done\n"
            f'  test -f "$path" || {{ rm -rf {quote(part)}; exit 1; }}\n'
            f"done <<'MANIFEST'\n{manifest}MANIFEST\n"
            f"mv {quote(part)} {quote(target)}"
        )
        self.ask({"gather": command}, timeout=60 + 2 * sum(entry.size for entry in files) / HASHING_RATE)

    def place(self, source: Path, files: Sequence[FileEntry], target: PurePosixPath, *, aside: bool = True) -> None:
        """Copy the named files of a local folder to a new folder of the site: pushed under another name, verified there
        by sha256, renamed. What was pushed before an interruption is not pushed again. `aside`: a folder that is
        there already makes room; else that is an error."""
        for entry in files:
            if not _same(source / entry.path, entry):
                raise ConfigurationError(
                    f"{source / entry.path} is missing, or is not what it was when it was recorded",
                    hint=f"flctl adopt makes the newest model again; else restore {source} from a backup",
                )
        part = target.parent / f".{target.name}.part"
        total = sum(entry.size for entry in files)
        for entry in files:
            self._journal("out", f"{self._named(target)}/{entry.path}", entry)
        faults.point("push", self._named(target))
        self.connection.push(
            source,
            [entry.path for entry in files],
            part,
            progress=lambda done: self.report(f"pushing {target.name}", done, total),
        )
        manifest = "".join(f"{entry.sha256}  {entry.path}\n" for entry in files)
        # Their last line is no name of a file: it ends with a slash.
        names = "".join(f"{entry.path}\n" for entry in files)
        old = f"mv {quote(target)} {quote(part)}.old.$$" if aside else "false"
        # An interrupted push may have left temporary files behind: what the manifest does not name goes away.
        command = (
            f"cd {quote(part)} || exit 1\n"
            "sha256sum -c --quiet - >/dev/null <<'MANIFEST' || "
            f"{{ rm -rf {quote(part)}; exit 46; }}\n{manifest}MANIFEST\n"
            f"names=$(cat <<'NAMES/'\n{names}NAMES/\n)\n"
            "find . ! -type d | while IFS= read -r path; do\n"
            '  printf \'%s\\n\' "$names" | grep -qxF -e "${path#./}" || rm -f "$path"\n'
            "done\n"
            "find . -mindepth 1 -type d -empty -delete\n"
            f"test ! -e {quote(target)} || {old} || exit 1\n"
            f"mv {quote(part)} {quote(target)} && rm -rf {quote(part)}.old.*"
        )
        faults.point("pushed", self._named(target))
        answer = self.ask({"place": command}, timeout=60 + total / HASHING_RATE)["place"]
        if answer.status != 0:
            words = "a file's sha256 differs there" if answer.status == 46 else answer.stderr or "unknown reason"
            raise refusal(self.site, words, f"{target} could not be put in place", ours=False)
        faults.point("placed", self._named(target))

    def bring(self, source: PurePosixPath, files: Sequence[FileEntry], target: Path) -> None:
        """Copy exactly these files of a site's folder into a local one, each verified by size and sha256."""
        total = sum(entry.size for entry in files)
        if target.is_symlink():
            target.unlink()
        make_folder(target)
        missing = [entry for entry in files if not _same(target / entry.path, entry)]
        for entry in missing:
            self._journal("in", f"{source.relative_to(self.root)}/{entry.path}", entry)
        faults.point("pull", str(source.relative_to(self.root)))
        self.connection.pull(
            source, missing, target, progress=lambda done: self.report("fetching", total and done, total)
        )
        faults.point("pulled", str(source.relative_to(self.root)))
        for entry in missing:
            path = target / entry.path
            if not _same(path, entry):
                path.unlink(missing_ok=True)
                raise Differs(
                    f"{entry.path} of {source} did not arrive as the completion record says: its sha256 differs",
                    hint="it is fetched again at the next contact",
                    site=self.site.name,
                    entry=entry,
                )
        fsync_folders(target)
        faults.point("brought", str(source.relative_to(self.root)))

    def note_read(self, path: PurePosixPath, content: str) -> None:
        """Journal a record that came back as a command's answer rather than by rsync."""
        raw = content.encode()
        entry = FileEntry(path=path.name, size=len(raw), sha256=sha256(raw).hexdigest())
        self._journal("in", str(path.relative_to(self.root)), entry)

    def note_moved(self, direction: Literal["in", "out"], path: str, entry: FileEntry) -> None:
        """Journal a file that crosses the border by other ways than place and bring."""
        self._journal(direction, path, entry)

    def _named(self, folder: PurePosixPath) -> str:
        """A folder of the site in the journal: what lies outside of the campaign's own folder has its whole path."""
        return str(folder.relative_to(self.root) if folder.is_relative_to(self.root) else folder)

    def _journal(self, direction: str, path: str, entry: FileEntry) -> None:
        self.workspace.journal.append(
            "file", direction=direction, site=self.site.name, path=path, size=entry.size, sha256=entry.sha256
        )


def _is_whole(files: Sequence[FileEntry], place: PurePosixPath, hashed: bool) -> str:
    """A command that succeeds if a folder holds these files."""
    if hashed:
        manifest = "".join(f"{entry.sha256}  {entry.path}\n" for entry in files)
        return f"cd {quote(place)} && sha256sum -c --status - <<'MANIFEST'\n{manifest}MANIFEST"
    sizes = "\n".join(str(entry.size) for entry in files)
    names = " ".join(quote(f"./{entry.path}") for entry in files)
    return f'cd {quote(place)} && test "$(stat -c %s {names})" = {quote(sizes)}'


def ask(connection: Connection, site: str, commands: Mapping[str, str], *, timeout: float = 60.0) -> dict[str, Answer]:
    """Run named shell commands over a connection; SiteUnreachable unless every one of them answered."""
    program = Program.of(commands)
    output = connection.run(program.script, timeout=timeout)
    return program.answers(output.stdout, commands, site=site)


def open_session(workspace: Workspace, site: Site, connection: Connection, report: Report) -> Session:
    """The session of a connected site. Its paths are resolved in a login shell, once for what the profile
    says, and remembered."""
    contact, asked = workspace.contact(site.name), (site.storage.work, site.storage.data)
    if contact.resolved != asked:
        work, data = resolve(connection, site, asked)
        workdir = f"{work}/{workspace.label}"
        if contact.workdir not in (None, workdir) and any(
            run.open and run.stage != Stage.ORDERED for run in workspace.runs(site.name)
        ):
            raise ConfigurationError(
                f"sites/{site.name}.toml: storage.work changed while a run is under way in {contact.workdir}",
                hint=f"put it back until the run has ended, or flctl cancel {site.name} before you change it",
                site=site.name,
            )
        contact = replace(workspace.contact(site.name), workdir=workdir, data=data, resolved=asked)
        workspace.save_contact(site.name, contact)
    return Session(
        workspace=workspace,
        site=site,
        connection=connection,
        root=PurePosixPath(contact.workdir or ""),
        data=contact.data or "",
        report=report,
    )


def resolve(connection: Connection, site: Site, paths: Sequence[str]) -> list[str]:
    """Paths with the site's variables replaced by what a login shell there says they are. The shell only prints its
    environment: no text of the profile is ever evaluated."""
    names = sorted({match[1] or match[2] for path in paths for match in VARIABLE.finditer(path)} | {"HOME"})
    pattern = "|".join(names)
    command = f'echo env | "${{SHELL:-/bin/sh}}" -l 2>/dev/null | grep -E "^({pattern})="'
    answer = ask(connection, site.name, {"env": command})["env"]
    found = dict(line.split("=", 1) for line in answer.stdout.splitlines() if "=" in line)
    return [_expand(path, found, site) for path in paths]


def _expand(path: str, found: Mapping[str, str], site: Site) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not found.get(name):
            raise ConfigurationError(
                f"sites/{site.name}.toml: the path {path!r} uses ${name}, which a login shell there does not set",
                hint=f"write the path out; flctl site test {site.name} shows what it finds",
                site=site.name,
            )
        return found[name]

    text = VARIABLE.sub(value, re.sub(r"^~(?=/|$)", "$HOME", path))
    if not text.startswith("/") or printable(text, 4096) != text:
        raise ConfigurationError(
            f"sites/{site.name}.toml: {path!r} is {text!r} there, not an absolute path",
            hint="paths at a site are absolute, or begin with one of its variables",
            site=site.name,
        )
    return text.rstrip("/") or "/"


def _same(path: Path, entry: FileEntry) -> bool:
    """Whether the file is there, regular, of the right size and content."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.size:
        return False
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == entry.sha256
