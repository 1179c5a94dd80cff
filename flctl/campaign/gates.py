"""Owns the gates before a merge: which contribution is unlike the others, or unlike what its site gave before."""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from flctl.campaign.workspace import Workspace
from flctl.codec import to_data
from flctl.errors import AggregationRefused
from flctl.records import Merge, Run, Work

if TYPE_CHECKING:
    from pathlib import Path

    from flctl.campaign.config import GatesTable
    from flctl.model.job import Source
    from flctl.model.verify import Look

PAST = 10  # of a site's own contributions: norms fall while a model learns


def look(
    workspace: Workspace,
    merge: Merge,
    gates: "GatesTable",
    sources: "Sequence[Source]",
    *,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """What the gates see in the contributions to a merge, as flctl.json tells it. AggregationRefused for the most
    unusual one where a gate refuses: without it the others may look different."""
    from flctl.model.verify import compared

    runs = [workspace.run(site, number) for site, number in merge.runs]
    merged = frozenset(key for model in workspace.models() for key in model.merged)
    norms = {_label(run): float(norm) for run in runs if (norm := _norm(run)) is not None}
    looks = compared(
        norms,
        {_label(run): _past(workspace, run, merged) for run in runs},
        _cosines(workspace.model_folder(merge.base), sources, runs, stop) if gates.cosine != "off" else {},
        norm_limit=None if gates.norm == "off" else gates.norm_limit,
        cosine_limit=None if gates.cosine == "off" else gates.cosine_limit,
    )
    for run in runs:
        if (seen := looks.get(_label(run))) and seen.reasons:
            workspace.journal.append(
                "gate", version=merge.version, site=run.site, number=run.number, reasons=seen.reasons
            )
    _refuse(runs, looks, gates)
    off = gates.norm == gates.cosine == "off"
    rows = [_row(run, looks.get(_label(run)), "off" if off else "too few to judge") for run in runs]
    return {**to_data(gates), "contributions": rows}


def warnings_of(record: Mapping[str, Any]) -> list[str]:
    """What the gates found unusual in the contributions to a model, from its flctl.json."""
    rows = record.get("gates", {}).get("contributions", [])
    return [f"{row['site']}: run {row['number']:04d}: {reason}" for row in rows for reason in row["reasons"].values()]


def _refuse(runs: Sequence[Run], looks: "Mapping[str, Look]", gates: "GatesTable") -> None:
    refused = [
        (seen.worst if gate == "norm" else -2.0 - (seen.cosine or 0.0), run, reason)
        for run in runs
        if (seen := looks.get(_label(run)))
        for gate, reason in seen.reasons.items()
        if {"norm": gates.norm, "cosine": gates.cosine}[gate] == "refuse"
    ]
    if refused:
        _, run, reason = max(refused, key=lambda found: found[0])
        raise AggregationRefused(
            f"run {run.number:04d} is refused: {reason}",
            hint=f"flctl retry {run.site} trains again, flctl skip {run.site} leaves it out; "
            "[gates] in flctl.toml decides what is refused",
            site=run.site,
        )


def _row(run: Run, seen: "Look | None", unjudged: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"site": run.site, "number": run.number}
    if seen is None:
        return {**facts, "verdict": "not measured", "reasons": {}}
    verdict = "unusual" if seen.reasons else "usual" if seen.judged else unjudged
    return {**facts, **to_data(seen), "verdict": verdict}


def _label(run: Run) -> str:
    return f"{run.site}/{run.number}"


def _norm(run: Run) -> float | None:
    """The norm of the run's update, measured at fetch."""
    return run.contribution.gates.get("update_norm") if run.contribution else None


def _past(workspace: Workspace, run: Run, merged: Set[tuple[str, int]]) -> list[float]:
    """The norms of what the site gave to the last models, in as many steps: norms grow with them."""
    earlier = [
        _norm(other)
        for other in workspace.runs(run.site)
        if (other.site, other.number) in merged
        and other.number != run.number
        and other.order.work == Work.TRAIN
        and other.order.steps == run.order.steps
    ]
    return [norm for norm in earlier if norm is not None][-PAST:]


def _cosines(
    base: "Path", sources: "Sequence[Source]", runs: Sequence[Run], stop: Callable[[], bool] | None
) -> dict[str, float]:
    """The cosine of each update to their plain mean, whatever n_k the sites state. Costs a reading of all files."""
    from flctl.model.geometry import cosines_to_mean, gram
    from flctl.model.shards import open_shards
    from flctl.model.verify import match

    ours = open_shards(base)
    theirs = [match(open_shards(source.folder, site=source.site), ours) for source in sources]
    bases = [match(open_shards(source.base), ours) if source.base else None for source in sources]
    equal = [1 / len(sources)] * len(sources)
    return dict(zip(map(_label, runs), cosines_to_mean(gram(ours, theirs, bases, stop=stop), equal), strict=True))
