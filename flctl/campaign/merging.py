"""Owns the making of a model version: contributions through a rule into a draft, then the rename that makes it real."""

import shutil
import time
from collections.abc import Callable
from typing import Any

from flctl.campaign.config import Configuration
from flctl.campaign.workspace import Workspace, fsync_folder, write_json
from flctl.records import FileEntry, Merge, folder_sha256, to_data

SCHEMA = 1


def merge_model(
    workspace: Workspace, merge: Merge, configuration: Configuration, *, stop: Callable[[], bool] | None = None
) -> None:
    """Make `models/<version>` of the runs a policy chose. Until the rename there is no such version; a draft left by an
    interruption is made anew."""
    from flctl.model.merge import Source
    from flctl.model.merge import merge as stream

    base = workspace.model_folder(merge.base)
    target = workspace.model_folder(merge.version)
    draft = target.parent / f".{target.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    runs = [workspace.run(site, number) for site, number in merge.runs]
    sources = [
        Source(site=run.site, number=run.number, folder=workspace.attempt_folder(run) / "out", weight=weight)
        for run, weight in zip(runs, merge.weights, strict=True)
    ]
    began = time.time()
    files = stream(base, sources, draft, stop=stop).files
    parent = workspace.model_record(merge.base)
    total = sum(merge.weights)
    contributions: list[dict[str, Any]] = []
    for run, weight in zip(runs, merge.weights, strict=True):
        given = run.contribution
        if given is None:
            raise ValueError(f"run {run.number} of {run.site} has no contribution")
        contributions.append(
            {
                "site": run.site,
                "number": run.number,
                "attempt": run.attempt,
                "base": run.order.base,
                "sha256": given.sha256,
                "weight": weight,
                "share": weight / total,
                "steps": given.steps,
                "samples": given.samples,
                "tokens": given.tokens,
            }
        )
    record = model_record(
        version=merge.version,
        files=files,
        parents=[{"version": merge.base, "sha256": parent["sha256"]}],
        steps=parent.get("steps", 0) + max(item["steps"] for item in contributions),
        rule=configuration.aggregation.rule,
        weights=configuration.aggregation.weights,
        contributions=contributions,
    )
    write_json(draft / "flctl.json", record)
    workspace.journal.append(
        "model",
        version=merge.version,
        sha256=record["sha256"],
        contributions=[f"{item['site']}/{item['number']}" for item in contributions],
        seconds=round(time.time() - began, 3),
    )

    draft.rename(target)
    fsync_folder(target.parent)


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
