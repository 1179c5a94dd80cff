"""What an aggregation without a campaign is asked for, and all that can be refused before anything is written.

Nothing here needs torch, so that a slip of the pen is answered at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flctl.errors import AggregationRefused, ConfigurationError, UsageError
from flctl.model.adapter_config import CONFIG as ADAPTER
from flctl.model.adapter_config import compare, is_adapter, read_config
from flctl.model.folder import check_model
from flctl.model.rules import Rule, averaging, find_rule, options_of, robust

# What these make of values does not depend on the model that the values came from; a rule that is not among them gets
# no base without being given one.
WITHOUT_BASE = frozenset({"fedavg", "median", "trimmed_mean", "krum", "multikrum"})
FINAL = (averaging.final, averaging.convex)
ALIKE = (robust.alike, robust.krum_choice, robust.multikrum_choice)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """`weights`, `steps` and `bases` follow `folders`; without them: equal weights, no steps known, all trained from
    `base`. `state`: where the rule's state is kept, if not beside the models. All paths as typed."""

    folders: tuple[Path, ...]
    out: Path
    weights: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    bases: tuple[Path, ...] = ()
    base: Path | None = None
    rule: str = "fedavg"
    options: Mapping[str, Any] = field(default_factory=dict)
    master: bool = False
    state: Path | None = None
    adapters: str = "mean"
    rank: int | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One contribution. `label`: its folder's name, with as much of the path as tells it from the others."""

    label: str
    folder: Path
    weight: float
    steps: int
    base: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A request that can be tried: all paths resolved, `parts` in the order of their labels, whatever was typed first.
    `keeps`: the rule leaves a state. `notes`: what was decided where nothing was said."""

    parts: tuple[Part, ...]
    base: Path
    out: Path
    state: Path | None
    rule: Rule
    options: Any
    keeps: bool
    notes: tuple[str, ...]


def checked(request: Request) -> Checked:
    """UsageError for what cannot be meant, ConfigurationError for a folder that is no model or in the way,
    AggregationRefused for so many contributions, or for adapters that are too different."""
    try:
        options = options_of(request.rule, request.options)
        rule = find_rule(request.rule).with_options(options)
    except ConfigurationError as error:
        raise UsageError(error.message, hint="every rule and its options: docs/aggregation.md") from error
    _check_counts(request, rule)
    if reason := rule.refusal(len(request.folders), options):
        raise AggregationRefused(f"{request.rule}: {reason}")
    _check_base(request)
    _check_adapters(request)
    given = (*request.folders, *request.bases, *([request.base] if request.base else []))
    for folder in given:
        _check_weights(folder)
    _check_configs(request)
    out, state = request.out.resolve(), request.state.resolve() if request.state else None
    _check_places(out, state, [folder.resolve() for folder in given])
    parts = _parts(request)
    notes = []
    if not request.weights:
        notes.append("no --weights: all are equal")
    elif rule.coefficients in ALIKE:
        notes.append(f"{request.rule} looks at no weights: all count alike")
    if request.base is None:
        notes.append(f"no --base: files and headers are those of {parts[0].label}")
    return Checked(
        parts=parts,
        base=request.base.resolve() if request.base else parts[0].folder,
        out=out,
        state=state,
        rule=rule,
        options=options,
        keeps=bool(rule.state) or request.master,
        notes=tuple(notes),
    )


def _check_counts(request: Request, rule: Rule) -> None:
    count = len(request.folders)
    for name, given in (("weights", request.weights), ("steps", request.steps), ("bases", request.bases)):
        if given and len(given) != count:
            raise UsageError(
                f"--{name} names {len(given)} for {count} contributions", hint="one for each, in their order"
            )
    if not request.weights and rule.coefficients in FINAL:
        raise UsageError(
            f"the rule {request.rule} takes the weights as they are, so it needs them",
            hint="--weights: for each contribution the coefficient it enters with, staleness included",
        )
    if not request.steps and rule.coefficients is averaging.fednova_coefficients:
        raise UsageError(
            f"the rule {request.rule} needs the number of local steps of every contribution",
            hint="--steps 10,30: one number for each, in their order",
        )


def _check_base(request: Request) -> None:
    if request.base is not None:
        return
    if request.bases:
        raise UsageError(
            "--bases says what each contribution was trained from, so their updates are summed: to which model?",
            hint="--base FOLDER: the newest model",
        )
    if request.rule not in WITHOUT_BASE:
        raise UsageError(
            f"the rule {request.rule} moves a model by the contributions' updates, so it needs that model",
            hint="--base FOLDER: the model that the contributions were trained from",
        )
    if request.state is not None:
        raise UsageError(
            "a rule's state belongs to a model, and none is given", hint="--base FOLDER: the model it belongs to"
        )


def _check_adapters(request: Request) -> None:
    if request.rank is not None and request.adapters != "svd":
        raise UsageError("--rank is the rank that --adapters svd re-factors to", hint="add --adapters svd")
    if request.adapters == "mean":
        return
    if request.rule != "fedavg" or request.master or request.bases or request.state:
        raise UsageError(
            f"--adapters {request.adapters} averages what the factors' products add to one base, which no rule but "
            "fedavg can, without --master, --bases and --state",
            hint="--adapters mean takes every rule",
        )
    for folder in request.folders:
        if folder.is_dir() and not (folder / ADAPTER).is_file():
            raise UsageError(
                f"--adapters {request.adapters} is for LoRA adapters; {folder} has no {ADAPTER}",
                hint="leave --adapters out, or give folders of adapters",
            )


def _check_configs(request: Request) -> None:
    """Adapters may only be averaged if their configs agree (AggregationRefused); the exact methods see to it."""
    given = (*([request.base] if request.base else []), *request.folders, *request.bases)
    some, others = ([folder for folder in given if is_adapter(folder) is kind] for kind in (True, False))
    if some and others:
        raise AggregationRefused(
            f"{some[0]} is an adapter, {others[0]} is not",
            hint="give adapters only, or whole models only: peft's merge_and_unload() makes one of both",
        )
    if request.adapters == "mean" and any((folder / ADAPTER).exists() for folder in given):
        compare(
            [read_config(folder, site=None if folder is request.base else folder.name) for folder in given], exact=False
        )


def _check_weights(folder: Path) -> None:
    """There is something to open: check_model says of everything else what it is, and how to convert it."""
    if not any((folder / name).exists() for name in WEIGHTS):
        check_model(folder)


def _check_places(out: Path, state: Path | None, inputs: Sequence[Path]) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(
            f"{out} exists and is no empty folder; flctl aggregate never overwrites", hint="name another folder"
        )
    for place, name in ((out, "--out"), (state, "--state")):
        if place is not None and (file := _file_of(place)):
            raise ConfigurationError(f"{name} {place}: {file} is a file", hint="name a folder that is not below a file")
    if out == Path.cwd():
        raise UsageError(f"--out {out} is the folder you stand in", hint="name a new folder")
    for place, name in ((out, "--out"), (state, "--state")):
        for folder in inputs:
            if place is not None and place.is_relative_to(folder):
                raise UsageError(
                    f"{name} {place} lies in {folder}, which is only read", hint="name a folder outside of it"
                )
    if state is not None and (state.is_relative_to(out) or out.is_relative_to(state)):
        raise UsageError("--state must lie apart from --out", hint="without --state it lies beside the model by itself")


def _file_of(place: Path) -> Path | None:
    """The place itself or what it would lie in, where that is no folder."""
    there = next(path for path in (place, *place.parents) if path.exists())
    return None if there.is_dir() else there


def _parts(request: Request) -> tuple[Part, ...]:
    folders = [folder.resolve() for folder in request.folders]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise UsageError(f"{folder} is given twice", hint="give it once, with the sum of the weights")
    parts = [
        Part(
            label=_label(folder, folders),
            folder=folder,
            weight=request.weights[place] if request.weights else 1.0,
            steps=request.steps[place] if request.steps else 0,
            base=request.bases[place].resolve() if request.bases else None,
        )
        for place, folder in enumerate(folders)
    ]
    return tuple(sorted(parts, key=lambda part: part.label))


def _label(folder: Path, folders: Sequence[Path]) -> str:
    """The shortest end of the path that no other of the folders has."""
    depth = 1
    while sum(other.parts[-depth:] == folder.parts[-depth:] for other in folders) > 1:
        depth += 1
    return "/".join(folder.parts[-depth:])
