"""Owns the making of a campaign folder."""

import os
import re
import shutil
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from flctl.campaign import shipped
from flctl.campaign.config import new_id
from flctl.campaign.merging import model_record
from flctl.campaign.profiles import to_fill_in
from flctl.campaign.workspace import Workspace, fsync_folder, write_atomic, write_json
from flctl.errors import ConfigurationError
from flctl.facility.profile import load_site

CONFIGURATION = """\
# flctl.toml: what this campaign is. Every key is explained in docs/configuration.md.

[campaign]
name = "{name}"
id = "{id}"                 # made by flctl init; part of this campaign's folder name at every site
seed = {seed}
min_sites = 0               # contributions that a new model needs; 0: one of every planned site

[policy]
name = "sync"               # one merge waits for one run of each site

[aggregation]
rule = "fedavg"
weights = "samples"         # samples | tokens | equal

[train]                     # given to the trainer at every site; a profile's own [train] wins
{train}

[evaluation]
cross = {cross}               # true: every site evaluates the others' models too (models travel, data does not)

[fetch]
kinds = ["*.safetensors", "*.safetensors.index.json"]   # the only files that may come back
size_factor = 1.5           # at most so many times the bytes of the base model per run
"""

TRAIN = {"steps": 100, "lr": 5e-5, "batch": 8, "sequence_length": 1024}


def create(
    folder: Path,
    *,
    profiles: dict[str, str],
    model: Path,
    seed: int = 0,
    train: Mapping[str, object] | None = None,
    cross: bool = False,
) -> Workspace:
    """A new campaign in `folder` (absent or empty): flctl.toml, sites/, templates/, models/0000. `profiles` are the
    texts of the site profiles by name. Nothing is ever overwritten; what fails leaves nothing behind."""
    from flctl.model.folder import check_model

    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(
            f"{folder} exists and is no empty folder; flctl init never overwrites", hint="name another folder"
        )
    check_model(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.parent / f".{folder.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    try:
        _fill(draft, _name_of(folder), profiles, model, seed, {**TRAIN, **(train or {})}, cross)
        if folder.exists():
            for path in draft.iterdir():  # somebody's shell may stand in the folder
                path.rename(folder / path.name)
            draft.rmdir()
        else:
            draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    fsync_folder(folder.parent)
    workspace = Workspace(folder)
    workspace.journal.append("init", name=workspace.name, id=workspace.id, sites=sorted(profiles))
    return workspace


def _name_of(folder: Path) -> str:
    """The campaign's name from its folder's: lower-case letters, digits and dashes."""
    plain = unicodedata.normalize("NFKD", folder.name.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:40].strip("-") or "campaign"


def _fill(
    draft: Path,
    name: str,
    profiles: dict[str, str],
    model: Path,
    seed: int,
    train: Mapping[str, object],
    cross: bool,
) -> None:
    lines = "\n".join(f"{key} = {_toml(value)}" for key, value in train.items())
    text = CONFIGURATION.format(name=name, id=new_id(), seed=seed, train=lines, cross=_toml(cross))
    write_atomic(draft / "flctl.toml", text.encode())
    for site, profile in profiles.items():
        write_atomic(draft / "sites" / f"{site}.toml", profile.encode())
    for template in sorted(shipped.shipped("templates").glob("*.sh")):
        write_atomic(draft / "templates" / template.name, template.read_bytes())
    write_atomic(draft / "known_hosts", b"")
    (draft / "runs").mkdir(mode=0o700)
    (draft / "models").mkdir(mode=0o700)
    adopt_model(model, draft / "models" / "0000")


def adopt_model(source: Path, target: Path) -> None:
    """Copy a model as version 0000: its weights, config and tokenizer, and nothing else that lies in the folder."""
    from flctl.model.manifest import hash_folder, model_files
    from flctl.model.shards import open_shards

    target.mkdir(mode=0o700)
    for name in model_files(open_shards(source)):
        (target / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
        with (target / name).open("rb") as file:
            os.fsync(file.fileno())
    files = hash_folder(target)
    write_json(target / "flctl.json", model_record(version=0, files=files, parents=[], steps=0, contributions=[]))
    fsync_folder(target)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def unfilled(workspace: Workspace) -> dict[str, list[str]]:
    """What a person must still write into the profiles, by site."""
    gaps = {name: to_fill_in(load_site(path)) for name, path in workspace.profiles.items()}
    return {name: keys for name, keys in gaps.items() if keys}
