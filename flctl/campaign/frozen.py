"""Owns the frozen base of a campaign of adapters: what it is (frozen.json), where it lies here and at each site, and
that a site has it before the first job. It is brought there once; only adapters travel in the rounds."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from flctl.campaign.config import Configuration, load_configuration
from flctl.campaign.session import HASHING_RATE, SHARED, Session, resolve
from flctl.campaign.workspace import Workspace
from flctl.codec import from_data, to_data
from flctl.errors import ConfigurationError, TransferFailed, UsageError
from flctl.facility.profile import Site
from flctl.facility.shell import quote
from flctl.records import FileEntry, Frozen, folder_sha256
from flctl.words import printable

NAME = "frozen.json"
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,200}")
WRONG = 76
"""The exit status of seal.py where the base is not there, or another one is."""


def frozen_of(base: Path, adapter: dict[str, Any], told: Callable[[str, int, int], None] | None = None) -> Frozen:
    """The record of a base that stays where it is: its weights, config and tokenizer, hashed. `adapter`: facts."""
    from flctl.model.manifest import hash_file, model_files
    from flctl.model.shards import open_shards

    names = model_files(open_shards(base))
    if links := [name for name in names if (base / name).is_symlink()]:
        raise ConfigurationError(
            f"{base / links[0]}: a link; the frozen base must hold the files themselves",
            hint=f"cp -rLl {base} NEW makes a folder of the same files (hard links), which takes no room",
        )
    total, done, files = sum((base / name).stat().st_size for name in names), 0, list[FileEntry]()
    for name in names:

        def tell(size: int, before: int = done) -> None:
            if told:
                told("reading the base", before + size, total)

        files.append(hash_file(base, name, tell))
        done += files[-1].size
    return Frozen(sha256=folder_sha256(files), files=tuple(files), adapter=adapter)


def frozen_told(orders: Iterable[tuple[str, Mapping[str, Any]]], adapter: dict[str, Any]) -> Frozen | None:
    """The frozen base that orders at the sites name, the same in all; None if none does. ConfigurationError if two
    name different ones: both have it from us."""
    found: dict[str, str] = {}
    frozen = None
    for site, order in orders:
        try:
            files = tuple(from_data(FileEntry, item) for item in order["frozen"]["files"])
        except (KeyError, TypeError, ValueError):
            continue
        if not all(FILE.fullmatch(entry.path) and ".." not in entry.path.split("/") for entry in files):
            continue
        frozen = Frozen(sha256=folder_sha256(files), files=files, adapter=adapter)
        found.setdefault(frozen.sha256, site)
    if len(found) > 1:
        (one, its), (other, theirs) = list(found.items())[:2]
        raise ConfigurationError(
            f"the frozen base is {one[:16]} at {its} and {other[:16]} at {theirs}",
            hint="one of the two holds other orders than flctl gave; adopt without that site",
        )
    return frozen


def base_of(workspace: Workspace) -> tuple[Frozen, Path]:
    """The frozen base, and its folder here. UsageError where the campaign has none."""
    frozen = workspace.frozen()
    if frozen is None:
        raise UsageError("the models of this campaign are no adapters", hint="flctl export without --merged")
    return frozen, source_of(workspace, load_configuration(workspace), frozen)


def known(workspace: Workspace) -> Frozen | None:
    """The frozen base; None where whole models travel. ConfigurationError if its record is lost: jobs would take the
    adapter for a model."""
    from flctl.model.adapter_config import is_adapter

    frozen = workspace.frozen()
    if frozen is None and is_adapter(workspace.model_folder(workspace.newest_model().version)):
        raise ConfigurationError(
            f"{workspace.root / NAME} is missing: it says what the base of the campaign's adapters is",
            hint="flctl adopt makes it again from what the sites know; or restore it from a backup",
        )
    return frozen


def source_of(workspace: Workspace, configuration: Configuration, frozen: Frozen) -> Path:
    """Where the frozen base lies here. ConfigurationError unless its files are there, by their sizes."""
    told, file = configuration.campaign.frozen, workspace.root / "flctl.toml"
    hint = f"set campaign.frozen in {file} to the folder that holds the base now (sha256 {frozen.sha256[:16]})"
    if not told:
        raise ConfigurationError(f"{file} names no folder of the frozen base", hint=hint)
    folder = Path(told)
    for entry in frozen.files:
        path = folder / entry.path
        if not path.is_file() or path.stat().st_size != entry.size:
            raise ConfigurationError(f"{path} of the frozen base is missing, or has another size", hint=hint)
    return folder


def place_of(root: PurePosixPath, frozen: Frozen) -> PurePosixPath:
    """Where flctl puts it at a site: beside the campaigns' folders, which share it."""
    return root.parent / SHARED / f"frozen-{frozen.sha256}"


def is_there(workspace: Workspace, site: Site) -> bool:
    """Whether the site has the frozen base already, as far as is known here."""
    return bool(site.storage.frozen or workspace.contact(site.name).frozen)


def place_frozen(session: Session, configuration: Configuration) -> PurePosixPath | None:
    """The frozen base is at the site, whole; its folder there (None: the campaign has none). Nothing is hashed again
    while its files look as they did. ConfigurationError if the profile's own folder holds another one."""
    workspace, site = session.workspace, session.site
    frozen = known(workspace)
    if frozen is None:
        return None
    given = site.storage.frozen
    folder = PurePosixPath(*resolve(session.connection, site, [given])) if given else place_of(session.root, frozen)
    problem = _ask(session, frozen, folder)
    if problem and given:
        raise ConfigurationError(
            f"storage.frozen is not the base of this campaign's adapters: {problem}",
            hint=f"put the same files there, or correct storage.frozen in sites/{site.name}.toml; without it flctl "
            f"brings the base ({frozen.size:,} bytes)",
            site=site.name,
        )
    if problem:
        session.place(source_of(workspace, configuration, frozen), frozen.files, folder)
        problem = _ask(session, frozen, folder, placed=True)
    if problem:
        raise TransferFailed(problem, hint="it is brought again at the next contact", site=site.name)
    contact = workspace.contact(site.name)
    if contact.frozen != str(folder):
        workspace.save_contact(site.name, replace(contact, frozen=str(folder)))
    return folder


def _ask(session: Session, frozen: Frozen, folder: PurePosixPath, *, placed: bool = False) -> str:
    """What is wrong with the base in that folder of the site; nothing, if it is whole. `placed`: it was hashed there
    just now."""
    seal = f"{quote(session.site.environment.seal_python)} {quote(session.payload / 'seal.py')}"
    told = json.dumps({"folder": str(folder), "files": to_data(frozen.files)})
    command = f"{seal} frozen --workdir {quote(session.root)} {'--placed ' * placed}<<'TOLD/'\n{told}\nTOLD/"
    answer = session.ask({"frozen": command}, timeout=60 + frozen.size / HASHING_RATE)["frozen"]
    if answer.status not in (0, WRONG):
        raise TransferFailed(
            f"the frozen base at {folder} could not be looked at: {printable(answer.stderr, 300)}",
            hint=f"is {session.site.environment.seal_python} a Python 3.6 or newer on the login host?",
            site=session.site.name,
        )
    return "" if answer.status == 0 else printable(answer.stdout, 300) or "it is not there"
