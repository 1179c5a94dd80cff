"""`flctl demo`: the main job on this machine alone: two sites, two languages, three rounds."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from flctl.cli.output import Grid, number


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A new folder. Default: a temporary one.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How many rounds.")] = 3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of model and texts.")] = 0,
) -> None:
    """Train one tiny real model at two sites of this machine: one has Italian text, one Czech, neither shows it."""
    from flctl.campaign.demonstration import build, matrix, verdict
    from flctl.campaign.planning import open_plan
    from flctl.cli.round import run_round

    place = folder or Path(tempfile.mkdtemp(prefix="flctl-demo-"))
    workspace = build(place, python=sys.executable, seed=seed)
    print(f"Two sites on this machine, a model of its own for each language, and one model for both: {place}")
    plan = open_plan(workspace, [], rounds, None)
    code = run_round(workspace, plan, None)
    if code:
        raise typer.Exit(code)
    for version in range(1, rounds + 1):
        print()
        _grid(version, matrix(workspace, version)).show()
    print()
    for line in verdict(workspace):
        print(line)
    print(f"Look into {workspace.root}: models/, runs/, journal.jsonl; or type: flctl -C {workspace.root} status")
    print("It may be deleted when you have seen enough.")


def _grid(version: int, rows: dict[str, dict[str, float]]) -> Grid:
    """Perplexity of each language under each model; lower is better."""
    columns = list(next(iter(rows.values())))
    grid = Grid(("text of", *columns), title=f"perplexity after round {version} (lower is better)")
    for language, scores in rows.items():
        grid.add(language, *(number(scores[column], 2) for column in columns))
    return grid
