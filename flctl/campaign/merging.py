"""Owns the making of a model version: contributions through a rule into a draft, then the rename that makes it real."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flctl import __version__, faults
from flctl.campaign import chain, gates
from flctl.campaign.config import Configuration
from flctl.campaign.privacy import privacy_of, privacy_settings, shown
from flctl.campaign.workspace import Workspace, write_json
from flctl.codec import to_data
from flctl.durable import move
from flctl.errors import ConfigurationError
from flctl.records import FileEntry, Merge, folder_sha256

if TYPE_CHECKING:
    from flctl.model.job import Recipe, Source
    from flctl.model.merge import Made
    from flctl.model.state import State

SCHEMA = 1
STATE = "state"
"""The folder of what the rule remembers, beside the model's files and none of them."""
SVD = "svd"
"""Of `aggregation.adapters`: the average of what adapters add."""


def merge_model(
    workspace: Workspace, merge: Merge, configuration: Configuration, *, stop: Callable[[], bool] | None = None
) -> list[str]:
    """Make `models/<version>` of the runs a policy chose. Until the rename there is no such version; a draft left by an
    interruption is made anew. Returns what the gates warn of."""
    from flctl.model.manifest import check_plain

    check_plain(workspace.model_folder(merge.base))
    given = contributions_of(workspace, merge)
    sources = sources_of(workspace, merge.base, given)
    settings = {**settings_of(configuration), "privacy": privacy_settings(workspace, merge.base, configuration)}
    seen = gates.look(workspace, merge, configuration.gates, sources, stop=stop)
    draft = draft_folder(workspace, merge.version)
    if draft.is_symlink():
        draft.unlink()
    shutil.rmtree(draft, ignore_errors=True)
    began = time.time()
    faults.point("merge", f"{merge.version:04d}")
    wanted = {**settings, "adapters": {"method": configuration.aggregation.adapters}}
    made, became = combined(workspace, merge.base, sources, draft, wanted, stop=stop)
    faults.point("merged", f"{merge.version:04d}")
    facts = {**settings, **became, "gates": seen, "made_by": {"flctl": __version__, "torch": version_of("torch")}}
    return publish(workspace, merge, given, made, seconds=time.time() - began, **facts)


def combined(
    workspace: Workspace,
    base: int,
    sources: "Sequence[Source]",
    draft: Path,
    settings: Mapping[str, Any],
    *,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> "tuple[Made, dict[str, Any]]":
    """A draft of the model that these settings, which may be those of a flctl.json, make of the sources; and what
    flctl.json is to say besides. Adapters take the same road as whole models unless their products are averaged."""
    from flctl.model.merge import merge as stream

    folder = workspace.model_folder(base)
    if (settings.get("adapters") or {}).get("method") == SVD:
        from flctl.model.adapters import merge_adapters

        made, report = merge_adapters(sources, draft, method=SVD, base=folder, stop=stop, progress=progress)
        return made, {"adapters": {"method": SVD, "lost": report.lost}}
    recipe, state = recipe_of(settings), state_of(workspace, base)
    return stream(folder, sources, draft, recipe=recipe, state=state, stop=stop, progress=progress), {}


def publish(
    workspace: Workspace, merge: Merge, given: list[dict[str, Any]], made: "Made", *, seconds: float, **facts: Any
) -> list[str]:
    """A finished draft becomes `models/<version>`, with all in its flctl.json that is needed to make it again. Returns
    what the gates warn of."""
    target, draft = workspace.model_folder(merge.version), draft_folder(workspace, merge.version)
    parent, frozen = workspace.model_record(merge.base), workspace.frozen()
    record = model_record(
        version=merge.version,
        files=made.files,
        parents=[{"version": merge.base, "sha256": parent["sha256"]}],
        steps=parent.get("steps", 0) + max(item["steps"] for item in given),
        contributions=[{**item, **_entered(made, item["site"], item["number"])} for item in given],
        **chain.links(workspace, merge.version),
        state=state_record(made.state),
        **({"frozen": frozen.sha256, "adapters": {"method": "mean"}} if frozen else {}) | facts,
    )
    write_json(draft / "flctl.json", {**record, "seconds": round(seconds, 3)})
    faults.point("model-rename", target.name)
    move(draft, target)
    faults.point("model-durable", target.name)
    journal_model(workspace, merge.version)
    return gates.warnings_of(record)


def journal_model(workspace: Workspace, version: int) -> None:
    """Say in the journal how a model version was made, once it is there for good."""
    record = workspace.model_record(version)
    workspace.journal.append(
        "model",
        version=version,
        sha256=record["sha256"],
        record=chain.sha_of(workspace.model_folder(version) / "flctl.json"),
        rule=record.get("rule"),
        rule_step=(record.get("state") or {}).get("step"),
        contributions=[f"{item['site']}/{item['number']}" for item in record.get("contributions", [])],
        warnings=gates.warnings_of(record),
        privacy=shown(record),
        seconds=record.get("seconds"),
        **{key: record[key] for key in ("rolled_back_to",) if key in record},
    )


def _entered(made: "Made", site: str, number: int) -> dict[str, float]:
    """What a contribution was multiplied with; `scale` is what clipped its update."""
    key = (site, number)
    return {"coefficient": made.coefficients[key], **({"scale": made.scales[key]} if made.scales else {})}


def settings_of(configuration: Configuration) -> dict[str, Any]:
    """How a model is to be made, as its flctl.json records it; defaults are written out, since they may change."""
    from flctl.model.rules import options_of

    table = configuration.aggregation
    options = dataclasses.asdict(options_of(table.rule, table.options))
    return {"rule": table.rule, "options": options, "weights": table.weights, "master": table.master}


def recipe_of(settings: Mapping[str, Any]) -> "Recipe":
    """The recipe of such settings, which may be those of a flctl.json."""
    from flctl.model.job import Recipe

    return Recipe(
        rule=settings["rule"],
        options=settings.get("options", {}),
        master=settings.get("master", False),
        privacy=privacy_of(settings.get("privacy")),
    )


def contributions_of(workspace: Workspace, merge: Merge) -> list[dict[str, Any]]:
    """The contributions to a merge as flctl.json tells them."""
    given = []
    for (site, number), weight in zip(merge.runs, merge.weights, strict=True):
        run = workspace.run(site, number)
        if run.contribution is None:
            raise ValueError(f"run {number} of {site} has no contribution")
        given.append(
            {
                "site": site,
                "number": number,
                "attempt": run.attempt,
                "base": run.order.base,
                "sha256": run.contribution.sha256,
                "weight": weight,
                "steps": run.contribution.steps,
                "samples": run.contribution.samples,
                "tokens": run.contribution.tokens,
                "records": chain.records_of(workspace, run),
            }
        )
    return given


def sources_of(workspace: Workspace, base: int, given: Sequence[Mapping[str, Any]]) -> "list[Source]":
    """What a merge on `base` reads of the contributions of a flctl.json."""
    from flctl.model.job import Source

    return [
        Source(
            site=item["site"],
            number=item["number"],
            folder=contribution_folder(workspace, item),
            weight=item["weight"],
            steps=item["steps"],
            base=workspace.model_folder(item["base"]) if item["base"] != base else None,
        )
        for item in given
    ]


def contribution_folder(workspace: Workspace, item: Mapping[str, Any]) -> Path:
    return workspace.run_folder(item["site"], item["number"]) / str(item["attempt"]) / "out"


def draft_folder(workspace: Workspace, version: int) -> Path:
    target = workspace.model_folder(version)
    return target.parent / f".{target.name}.draft"


def state_of(workspace: Workspace, version: int) -> "State | None":
    """What the rule of a model version left beside it; None where it left nothing. ConfigurationError if that is not
    what the version's flctl.json says, by names and sizes; `flctl verify` looks at every byte."""
    from flctl.model.state import read_state

    record, folder = workspace.model_record(version), workspace.model_folder(version) / STATE
    told = record.get("state")
    if told is None:
        return None
    state = read_state(folder)
    if reason := _fault(state, told, record["sha256"]):
        raise ConfigurationError(
            f"{folder}: the rule's state {reason}",
            hint=f"restore it from a backup of the campaign's folder; or begin without what the rule remembers: "
            f'remove {folder}, and "state" from {folder.parent / "flctl.json"}',
        )
    return state


def _fault(state: "State | None", told: Mapping[str, Any], model: str) -> str:
    """What is wrong with a state by its own record and by its files' sizes; nothing, if it is what is `told`."""
    from flctl.model.state import RECORD

    if state is None:
        return "is missing"
    if state.model != model:
        return "belongs to another model"
    files = [entry for entry in told["files"] if entry["path"] != RECORD]
    if (state.rule, state.step, to_data(state.files)) != (told["rule"], told["step"], files):
        return "is not what flctl.json says"
    for entry in state.files:
        path = state.folder / entry.path
        if not path.is_file() or path.stat().st_size != entry.size:
            return f"lacks {entry.path}, or its size is wrong"
    return ""


def state_record(state: "State | None") -> dict[str, Any] | None:
    """What flctl.json says of the state beside a model: its folder's files and sha256 among it."""
    from flctl.model.manifest import hash_file
    from flctl.model.state import RECORD

    if state is None:
        return None
    files = (*state.files, hash_file(state.folder, RECORD))
    return {"rule": state.rule, "step": state.step, "sha256": folder_sha256(files), "files": to_data(files)}


def model_record(*, version: int, files: tuple[FileEntry, ...], **facts: object) -> dict[str, object]:
    """What flctl.json of a model version says."""
    return {
        "schema": SCHEMA,
        "version": version,
        "sha256": folder_sha256(files),
        **facts,
        "created_at": time.time(),
        "files": to_data(files),
    }
