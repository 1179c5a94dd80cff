"""Owns what trains at a site: train.py, or the words of `train.command` and what they need of the campaign's folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from flctl.campaign.config import Configuration
from flctl.durable import read_plain
from flctl.errors import ConfigurationError
from flctl.facility.profile import Site
from flctl.facility.script import PYTHON
from flctl.facility.shell import Plain
from flctl.records import FileEntry, folder_sha256

FOLDER = "trainer"
"""The campaign's folder of a trainer's files. In a command, `trainer/NAME` is such a file."""

MOST = 64 << 20
"""Bytes of that folder: it is read, and hashed at the site, for each run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """The words that a job runs in train.py's place (none: train.py), and the files that go to the site for them."""

    words: tuple[str, ...] = ()
    files: tuple[FileEntry, ...] = ()

    def place(self, root: PurePosixPath) -> PurePosixPath:
        """Where the files lie at the site; other files, another place."""
        return root / "payload" / folder_sha256(self.files)

    def command(self, root: PurePosixPath) -> tuple[str, ...]:
        """The words, with the campaign's files as what they are at the site."""
        return tuple(
            Plain(self.place(root) / word.removeprefix(f"{FOLDER}/")) if word.startswith(f"{FOLDER}/") else word
            for word in self.words
        )


def trainer_of(root: Path, configuration: Configuration, site: Site) -> Trainer:
    """What trains at the site: the profile's train.command, else that of flctl.toml. `root`: the campaign's folder.
    ConfigurationError if that cannot be run there."""
    command, old = options_of(configuration, site).get("command", ""), site.environment.trainer
    if not command:
        python = () if not old or PurePosixPath(old).suffix in PYTHON else (site.environment.python,)
        return Trainer(words=(*python, old) if old else ())
    words, folder = tuple(str(command).split()), root / FOLDER
    if not words:
        return Trainer()
    file = root / (f"sites/{site.name}.toml" if site.train.get("command") else "flctl.toml")
    files = _files(folder)
    names = {f"{FOLDER}/{entry.path}" for entry in files}
    for word in words:
        if f"{FOLDER}/{word}" in names:
            raise _wrong(file, f"{word} is a file of {folder}: write {FOLDER}/{word}")
        if word.startswith(f"{FOLDER}/") and word not in names:
            raise _wrong(file, f"there is no file {root / word}", hint=f"put it there; {_KINDS}")
    first, suffix = words[0], PurePosixPath(words[0]).suffix
    if first in names and suffix not in PYTHON:
        raise _wrong(file, f"nothing says what runs {first}: write bash {first}, or the like")
    if suffix in PYTHON and first not in names and not first.startswith(("/", "~/", "$")):
        raise _wrong(file, f"{first} is no path of the site", hint=_KINDS)
    return Trainer(words=words, files=files if names & {*words} else ())


def options_of(configuration: Configuration, site: Site) -> dict[str, Any]:
    """[train] as it holds at the site. An empty `command` is none."""
    options = configuration.train | site.train
    return {key: value for key, value in options.items() if key != "command" or value}


_KINDS = f"the campaign's own files are {FOLDER}/NAME, those of a site absolute paths"


def _files(folder: Path) -> tuple[FileEntry, ...]:
    """All files of the folder, if there is one, but hidden ones and Python's caches."""
    try:
        paths = [path for path in _below(folder) if path.is_symlink() or not path.is_dir()]
        for path in paths:
            name = path.relative_to(folder.parent).as_posix()
            if path.is_symlink() or not path.is_file() or not name.isprintable() or "\\" in name:
                raise ConfigurationError(
                    f"{str(path)!r} is no plain file with a plain name", hint=f"{folder} holds what goes to the sites"
                )
        if sum(path.stat().st_size for path in paths) > MOST:
            raise ConfigurationError(
                f"{folder} holds more than {MOST >> 20} MiB",
                hint="bring large files to the sites by flctl site stage, and name them by their paths there",
            )
        contents = {path.relative_to(folder).as_posix(): read_plain(path) for path in paths}
    except OSError as error:
        raise ConfigurationError(f"{error.filename}: {error.strerror}", hint=f"see {folder}") from error
    return tuple(
        FileEntry(path=name, size=len(content), sha256=sha256(content).hexdigest())
        for name, content in sorted(contents.items())
    )


def _below(folder: Path) -> Iterator[Path]:
    """The folder's files and folders, at any depth; the folder itself if it is none."""
    if folder.is_symlink() or folder.is_file():
        yield folder
    elif folder.exists():
        for path in folder.iterdir():
            if not path.name.startswith(".") and path.name != "__pycache__":
                yield path
                if path.is_dir():
                    yield from _below(path)


def _wrong(file: Path, reason: str, *, hint: str = "") -> ConfigurationError:
    return ConfigurationError(f"{file}: train.command: {reason}", hint=hint or f"correct {file}")
