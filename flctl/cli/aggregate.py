"""`flctl aggregate`: the merge on any checkpoint folders, without a campaign."""

import json as codec
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flctl.cli.bar import shown
from flctl.cli.moving import heeding
from flctl.cli.output import Grid, print_error, print_json
from flctl.errors import FlctlError, UsageError, defect

if TYPE_CHECKING:
    from flctl.model.ranks import Ranks
    from flctl.model.request import Request
    from flctl.model.standalone import Aggregated


def register(app: typer.Typer) -> None:
    app.command()(aggregate)


def aggregate(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Checkpoints, or LoRA adapters.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the model.")],
    weights: Annotated[
        list[float] | None, typer.Option("--weights", help="One for each folder: 5,3,2 | 5 3 2. Default: equal.")
    ] = None,
    rule: Annotated[str, typer.Option("--rule", help="How they become one model.")] = "fedavg",
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE ...", help="Options of the rule.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="The model they were trained from; rules that move it need it.")
    ] = None,
    bases: Annotated[
        list[Path] | None, typer.Option("--bases", help="What each folder was trained from, where they differ.")
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option("--steps", min=1, help="Local steps of each folder, for fednova: 10,30.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option("--state", help="Keep the rule's state here. Default: beside each model.")
    ] = None,
    master: Annotated[
        bool, typer.Option("--master", help="Keep float32 weights beside a model of less precision.")
    ] = False,
    adapters: Annotated[
        Literal["mean", "svd", "stack"], typer.Option("--adapters", help="LoRA: factors apart, or their products.")
    ] = "mean",
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="With --adapters svd: the rank to keep.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, max=256, help="Of the arithmetic.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Merge checkpoint folders into one model. Rules, options, state: docs/aggregation.md."""
    from flctl.model.ranks import world
    from flctl.model.request import Request

    ranks = world()
    try:
        request = ranks.together(
            lambda: Request(
                folders=tuple(folders),
                out=out,
                weights=tuple(weights or ()),
                steps=tuple(steps or ()),
                bases=tuple(bases or ()),
                base=base,
                rule=rule,
                options=dict(_setting(text) for text in option or ()),
                master=master,
                state=state,
                adapters=adapters,
                rank=rank,
                threads=threads,
            )
        )
        made = _made(request, ranks)
    except Exception as error:
        raise typer.Exit(_failed(error, ranks, json)) from error
    if ranks.first and json:
        print_json("aggregate", status="ok", exit_code=0, data=_data(request, made, ranks))
    elif ranks.first:
        _print(request, made, ranks)


def _made(request: "Request", ranks: "Ranks") -> "Aggregated":
    from flctl.model.standalone import aggregate as make

    stop = threading.Event()
    with heeding(stop, tell=ranks.first), shown(silent=not ranks.first) as tell:
        return make(request, ranks=ranks, progress=partial(tell, "merging"), stop=stop.is_set)


def _failed(error: Exception, ranks: "Ranks", json: bool) -> int:
    """The exit code of an error that all ranks have, once the first has told it: mpiexec ends them with the first that
    goes. One on which they did not agree may be one rank's alone, for which the others would wait for ever."""
    if ranks.size == 1:
        raise error
    known = error if isinstance(error, FlctlError) else defect(error)
    alone = known is not error or not getattr(error, "agreed", False)
    if ranks.first or alone:
        print_error(known, "aggregate" if json else "")
    if alone:
        ranks.world.Abort(known.exit_code)
    ranks.shared(None)
    return known.exit_code


def _setting(text: str) -> tuple[str, Any]:
    """`lr=0.1`, `dialect=paper`, `nesterov=true` as key and value."""
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise UsageError(f"--option {text} sets nothing", hint="--option lr=0.1 dialect=paper")
    try:
        parsed = codec.loads(value)
    except ValueError:
        return key, value
    return key, parsed if isinstance(parsed, (bool, int, float, str)) else value


def _data(request: "Request", made: "Aggregated", ranks: "Ranks") -> dict[str, Any]:
    from flctl.model.standalone import adapter_data

    return {
        "path": str(made.folder),
        "sha256": made.sha256,
        "bytes": made.bytes,
        "seconds": round(made.seconds, 3),
        "rule": request.rule,
        "base": str(made.base),
        "weights": "given" if request.weights else "equal",
        "contributions": [
            {
                "site": part.label,
                "path": str(part.folder),
                "weight": part.weight,
                "coefficient": made.coefficients[part.label],
            }
            for part in made.parts
        ],
        "state": str(made.state) if made.state else None,
        "adapters": adapter_data(request, made),
        "threads": made.threads,
        "ranks": ranks.size,
        "notes": made.notes,
    }


def _print(request: "Request", made: "Aggregated", ranks: "Ranks") -> None:
    grid = Grid(("contribution", "weight", "coefficient", "folder"))
    for part in made.parts:
        grid.add(part.label, f"{part.weight:g}", f"{made.coefficients[part.label]:.6g}", str(part.folder))
    grid.show()
    for note in made.notes:
        print(f"note: {note}")
    if made.adapters and made.adapters.lost is not None:
        print(f"share of the updates' squared norm that was lost: {made.adapters.lost:.2e}")
    crew = "1 thread" if made.threads == 1 else f"{made.threads} threads"
    crew += f" in each of {ranks.size} ranks" if ranks.size > 1 else ""
    print(f"{request.rule}: {made.bytes:,} bytes in {made.seconds:.1f} s by {crew}")
    if made.state:
        print(f"state of the rule: {made.state}")
    print(f"model  sha256 {made.sha256[:16]}  {made.folder}")
