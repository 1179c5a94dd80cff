"""Owns the making of a campaign folder."""

import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flctl.campaign import shipped
from flctl.campaign.config import new_id
from flctl.campaign.frozen import NAME, frozen_of
from flctl.campaign.merging import model_record
from flctl.campaign.profiles import to_fill_in
from flctl.campaign.trainers import FOLDER
from flctl.campaign.workspace import Workspace, fsync_folder, write_atomic, write_json
from flctl.codec import to_data
from flctl.durable import fsync_folders, make_folder, remove
from flctl.errors import ConfigurationError
from flctl.facility.profile import load_site

if TYPE_CHECKING:
    from flctl.model.lora import Lora

CONFIGURATION = """\
# flctl.toml: what this campaign is. Every key is explained in docs/configuration.md.

[campaign]
name = "{name}"
id = "{id}"                 # made by flctl init; part of this campaign's folder name at every site
seed = {seed}
min_sites = 0               # contributions that a new model needs; 0: one of every planned site
{frozen}
[policy]
name = "sync"               # one merge waits for one run of each site

[aggregation]
rule = "fedavg"
weights = "samples"         # samples | tokens | equal
{adapters}
[train]                     # given to the trainer at every site; a profile's own [train] wins
{train}

[evaluation]
cross = {cross}               # true: every site evaluates the others' models too (models travel, data does not)
patience = 0                # a plan ends after so many models without a lower mean loss; 0: none
roll_back = false           # true: and the next model goes on from the best one

[fetch]
kinds = ["*.safetensors", "*.safetensors.index.json"]   # the only files that may come back
size_factor = 1.5           # at most so many times the bytes of the base model per run
"""

FROZEN = """\
frozen = {path}
                            # the frozen base here: it goes to each site once, and only adapters travel in the rounds
"""
ADAPTERS = """\
adapters = "mean"           # mean: of the factors, with any rule | svd: of what they add, with fedavg
"""

LABEL = re.compile(r"([a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?)-([0-9a-f]{8})")
"""NAME-ID, a campaign's folder at every site."""
TRAIN: Mapping[str, object] = {"steps": 100, "lr": 5e-5, "batch": 8, "sequence_length": 1024}


def create(
    folder: Path,
    *,
    profiles: dict[str, str],
    model: Path,
    seed: int = 0,
    train: Mapping[str, object] | None = None,
    cross: bool = False,
    trainer: Path | None = None,
    adapter: "Lora | Path | None" = None,
    told: Callable[[str, int, int], None] | None = None,
) -> Workspace:
    """A new campaign in `folder` (absent or empty): flctl.toml, sites/, templates/, models/0000. `profiles` are the
    texts of the site profiles by name. `trainer`: a program in Python that trains in the place of train.py, and for
    which the model need be no more than safetensors. With an `adapter`, a fresh one or a folder, this is model 0000,
    and `model` its frozen base, which stays where it is; `told` hears how far it is read. Nothing is ever overwritten;
    what fails leaves nothing behind."""
    from flctl.model.folder import check_model, check_weights

    folder = folder.resolve()
    _check_new(folder)
    if trainer is None:
        check_model(model)
        train = {**TRAIN, **(train or {})}
    else:
        check_weights(model)
        train = {"command": f"{FOLDER}/{_program(trainer)}", "steps": TRAIN["steps"], **(train or {})}
    with _drafted(folder) as draft:
        frozen = None if adapter is None else model.absolute()
        _fill(draft, _name_of(folder), new_id(), profiles, seed, train, cross, frozen)
        if trainer is not None:
            write_atomic(draft / FOLDER / trainer.name, trainer.read_bytes())
        if adapter is None:
            adopt_model(model, draft / "models" / "0000")
        else:
            _begin_adapter(draft, model.absolute(), adapter, seed, told)
    workspace = Workspace(folder)
    workspace.journal.append("init", name=workspace.name, id=workspace.id, sites=sorted(profiles))
    return workspace


def _program(trainer: Path) -> str:
    """The name of a trainer's file."""
    if trainer.suffix != ".py" or not re.fullmatch(r"[\w.+-]+", trainer.name, re.ASCII) or not trainer.is_file():
        raise ConfigurationError(
            f"{trainer} is {'no file NAME.py' if trainer.exists() else 'not there'}",
            hint="other programs: name one in Python first, then see train.command in docs/configuration.md",
        )
    return trainer.name


def frame(folder: Path, *, name: str, id_: str, profiles: dict[str, str], seed: int) -> Workspace:
    """The folder of a campaign that the sites know, without a model; as create() otherwise."""
    folder = folder.resolve()
    if (folder / "flctl.toml").is_file():  # an attempt before this one did not find a model
        workspace = Workspace(folder)
        if (workspace.name, workspace.id) == (name, id_) and not workspace.runs():
            return workspace
    _check_new(folder)
    with _drafted(folder) as draft:
        _fill(draft, name, id_, profiles, seed, TRAIN, False)
    workspace = Workspace(folder)
    workspace.journal.append("rebuilt", name=name, id=id_, sites=sorted(profiles))
    return workspace


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} exists and is no empty folder; nothing is overwritten", hint="name another")


@contextmanager
def _drafted(folder: Path) -> Iterator[Path]:
    """A draft that becomes the folder if the block ends without an error, private to the user, for good."""
    make_folder(folder.parent)
    draft = folder.parent / f".{folder.name}.draft"
    remove(draft)
    draft.mkdir(mode=0o700)
    try:
        yield draft
        fsync_folders(draft)
        if folder.exists():
            folder.chmod(0o700)
            for path in draft.iterdir():  # somebody's shell may stand in the folder
                path.rename(folder / path.name)
            draft.rmdir()
            fsync_folder(folder)
        else:
            draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    fsync_folder(folder.parent)


def _name_of(folder: Path) -> str:
    """The campaign's name from its folder's: lower-case letters, digits and dashes."""
    plain = unicodedata.normalize("NFKD", folder.name.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:40].strip("-") or "campaign"


def _fill(
    draft: Path,
    name: str,
    id_: str,
    profiles: dict[str, str],
    seed: int,
    train: Mapping[str, object],
    cross: bool,
    frozen: Path | None = None,
) -> None:
    text = CONFIGURATION.format(
        name=name,
        id=id_,
        seed=seed,
        train=toml_lines(train),
        cross=_toml(cross),
        frozen=FROZEN.format(path=_toml(str(frozen))) if frozen else "",
        adapters=ADAPTERS if frozen else "",
    )
    write_atomic(draft / "flctl.toml", text.encode())
    for site, profile in profiles.items():
        write_atomic(draft / "sites" / f"{site}.toml", profile.encode())
    for template in sorted(shipped.shipped("templates").glob("*.sh")):
        write_atomic(draft / "templates" / template.name, template.read_bytes())
    write_atomic(draft / "known_hosts", b"")
    (draft / "runs").mkdir(mode=0o700)
    (draft / "models").mkdir(mode=0o700)


def adopt_model(source: Path, target: Path) -> None:
    """Copy a model as version 0000: its weights, config and tokenizer, and nothing else that lies in the folder."""
    from flctl.model.manifest import model_files
    from flctl.model.shards import open_shards

    target.mkdir(mode=0o700)
    _copy(source, target, model_files(open_shards(source)))
    _enter(target)


def _begin_adapter(
    draft: Path, base: Path, adapter: "Lora | Path", seed: int, told: Callable[[str, int, int], None] | None
) -> None:
    """models/0000 is an adapter for the base, and frozen.json says which base that is."""
    from flctl.model.adapter_config import CONFIG, facts_of
    from flctl.model.lora import check_adapter, write_fresh_adapter
    from flctl.model.shards import open_shards

    target = draft / "models" / "0000"
    if isinstance(adapter, Path):
        config, shards = check_adapter(adapter, base), open_shards(adapter)
        target.mkdir(mode=0o700)
        index = [shards.index] if shards.index else []
        _copy(adapter, target, [CONFIG, *index, *(shard.name for shard in shards.files)])
    else:
        config = write_fresh_adapter(base, adapter, target, seed=seed)
    frozen = frozen_of(base, facts_of(config), told)
    write_json(draft / NAME, to_data(frozen))
    _enter(target, frozen=frozen.sha256)


def _copy(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        (target / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _enter(target: Path, **facts: str) -> None:
    """The files of a folder are version 0000."""
    from flctl.model.manifest import hash_folder

    files = hash_folder(target)
    for entry in files:
        with (target / entry.path).open("rb") as file:
            os.fsync(file.fileno())
    record = model_record(version=0, files=files, parents=[], steps=0, contributions=[], **facts)
    write_json(target / "flctl.json", record)
    fsync_folder(target)


def toml_lines(table: Mapping[str, object]) -> str:
    """Keys and values, of printable text, as TOML: whatever they hold, they are nothing but these keys."""
    return "\n".join(_pairs(table))


def _pairs(table: Mapping[str, object]) -> list[str]:
    return [f"{key if re.fullmatch(r'[A-Za-z0-9_-]+', key) else _toml(key)} = {_toml(table[key])}" for key in table]


def _toml(value: object) -> str:
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)  # of printable text, JSON's words and TOML's are the same
    if isinstance(value, Mapping):
        return f"{{{', '.join(_pairs(value))}}}"
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, list | tuple) else repr(value)


def unfilled(workspace: Workspace) -> dict[str, list[str]]:
    """What a person must still write into the profiles, by site."""
    gaps = {name: to_fill_in(load_site(path)) for name, path in workspace.profiles.items()}
    return {name: keys for name, keys in gaps.items() if keys}
