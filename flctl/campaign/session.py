"""Owns one site's session: its paths, its programs, and every file that crosses its border (each is journaled)."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath

from flctl.campaign import shipped
from flctl.campaign.workspace import Workspace, fsync_folder
from flctl.errors import ConfigurationError, TransferFailed
from flctl.facility.connection import Connection
from flctl.facility.profile import Site
from flctl.facility.scheduler import Scheduler, scheduler_of
from flctl.facility.shell import Answer, Program, quote
from flctl.records import FileEntry

VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")
HASHING_RATE = 20e6
"""Bytes per second that a busy login node is trusted to hash at least."""

Report = Callable[[str, int, int], None]
"""What is being moved, bytes so far, bytes in all."""


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
    def scheduler(self) -> Scheduler:
        return scheduler_of(self.site, str(self.payload))

    def ask(self, commands: Mapping[str, str], *, timeout: float = 60.0) -> dict[str, Answer]:
        """Run named shell commands at the site in one go."""
        return ask(self.connection, self.site.name, commands, timeout=timeout)

    def place_payload(self) -> None:
        """Put this flctl's payload there unless it was: an upgrade in the middle of a campaign brings its own."""
        contact, current = self.workspace.contact(self.site.name), shipped.payload_sha256()
        if contact.payload != current:
            if self.ask({"there": f"test -d {quote(self.payload)}"})["there"].status != 0:
                self.place(shipped.payload_folder(), shipped.payload_manifest(), self.payload)
            self.workspace.save_contact(self.site.name, replace(contact, payload=current))

    def place(self, source: Path, files: Sequence[FileEntry], target: PurePosixPath) -> None:
        """Copy the named files of a local folder to a new folder of the site: pushed under another name, verified there
        by sha256, renamed. What was pushed before an interruption is not pushed again."""
        part = target.parent / f".{target.name}.part"
        total = sum(entry.size for entry in files)
        for entry in files:
            self._journal("out", f"{target.relative_to(self.root)}/{entry.path}", entry)
        self.connection.push(
            source,
            [entry.path for entry in files],
            part,
            progress=lambda done: self.report(f"pushing {target.name}", done, total),
        )
        manifest = "".join(f"{entry.sha256}  {entry.path}\n" for entry in files)
        names = "".join(f"{entry.path}\n" for entry in files)
        # An interrupted push may have left temporary files behind: what the manifest does not name goes away.
        command = (
            f"cd {quote(part)} || exit 1\n"
            "sha256sum -c --quiet - >/dev/null <<'MANIFEST' || "
            f"{{ rm -rf {quote(part)}; exit 46; }}\n{manifest}MANIFEST\n"
            f"names=$(cat <<'NAMES'\n{names}NAMES\n)\n"
            "find . ! -type d | while IFS= read -r path; do\n"
            '  printf \'%s\\n\' "$names" | grep -qxF -e "${path#./}" || rm -f "$path"\n'
            "done\n"
            "find . -mindepth 1 -type d -empty -delete\n"
            f"test -e {quote(target)} || mv {quote(part)} {quote(target)}"
        )
        answer = self.ask({"place": command}, timeout=60 + total / HASHING_RATE)["place"]
        if answer.status != 0:
            raise TransferFailed(
                f"{target} could not be put in place: "
                + (
                    "a file's sha256 differs there" if answer.status == 46 else clean(answer.stderr) or "unknown reason"
                ),
                hint="it is pushed again at the next contact; see the site's free space and quota",
                site=self.site.name,
            )

    def bring(self, source: PurePosixPath, files: Sequence[FileEntry], target: Path) -> None:
        """Copy exactly these files of a site's folder into a local one, each verified by size and sha256."""
        total = sum(entry.size for entry in files)
        for entry in files:
            self._journal("in", f"{source.relative_to(self.root)}/{entry.path}", entry)
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        missing = [entry for entry in files if not _same(target / entry.path, entry)]
        self.connection.pull(
            source, missing, target, progress=lambda done: self.report("fetching", total and done, total)
        )
        for entry in missing:
            path = target / entry.path
            if not _same(path, entry):
                path.unlink(missing_ok=True)
                raise TransferFailed(
                    f"{entry.path} of {source} did not arrive as the completion record says: its sha256 differs",
                    hint="it is fetched again at the next contact",
                    site=self.site.name,
                )
        fsync_folder(target)

    def note_read(self, path: PurePosixPath, content: str) -> None:
        """Journal a record that came back as a command's answer rather than by rsync."""
        raw = content.encode()
        entry = FileEntry(path=path.name, size=len(raw), sha256=sha256(raw).hexdigest())
        self._journal("in", str(path.relative_to(self.root)), entry)

    def _journal(self, direction: str, path: str, entry: FileEntry) -> None:
        self.workspace.journal.append(
            "file", direction=direction, site=self.site.name, path=path, size=entry.size, sha256=entry.sha256
        )


def ask(connection: Connection, site: str, commands: Mapping[str, str], *, timeout: float = 60.0) -> dict[str, Answer]:
    """Run named shell commands over a connection; SiteUnreachable unless every one of them answered."""
    program = Program.of(commands)
    output = connection.run(program.script, timeout=timeout)
    return program.answers(output.stdout, commands, site=site)


def open_session(workspace: Workspace, site: Site, connection: Connection, report: Report) -> Session:
    """The session of a connected site. Its paths are resolved once, in a login shell, and remembered."""
    contact = workspace.contact(site.name)
    if contact.workdir is None or contact.data is None:
        work, data = resolve(connection, site, [site.storage.work, site.storage.data])
        contact = replace(workspace.contact(site.name), workdir=f"{work}/{workspace.label}", data=data)
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
    if not text.startswith("/") or clean(text) != text:
        raise ConfigurationError(
            f"sites/{site.name}.toml: {path!r} is {text!r} there, not an absolute path",
            hint="paths at a site are absolute, or begin with one of its variables",
            site=site.name,
        )
    return text.rstrip("/")


def clean(text: str) -> str:
    """Words of a site as one printable line of at most 500 characters; escape sequences are removed."""
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07", "", text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:500]


def _same(path: Path, entry: FileEntry) -> bool:
    """Whether the file is there, regular, of the right size and content."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.size:
        return False
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == entry.sha256
