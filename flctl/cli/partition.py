"""`flctl partition`: one dataset divided among clients that are unlike each other, for experiments."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flctl.cli.output import Grid, console, print_json
from flctl.errors import UsageError
from flctl.words import printable

if TYPE_CHECKING:
    from flctl.dataset.partition import Partition

BAR = 48  # letters of the longest bar
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SHOWN = 12  # classes that the table has room for


def register(app: typer.Typer) -> None:
    app.command()(partition)


def partition(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="The dataset: .jsonl or .parquet files.")],
    clients: Annotated[list[str], typer.Option("--clients", metavar="N | NAME...", help="How many, or their names.")],
    by: Annotated[str, typer.Option("--by", metavar="FIELD", help="The field of a record that is its class.")] = "",
    method: Annotated[
        Literal["dual-dirichlet", "dirichlet", "class"], typer.Option("--method", help="How unlike they are.")
    ] = "dual-dirichlet",
    alpha_size: Annotated[
        str | None,
        typer.Option(metavar="A", help="dual-dirichlet: concentration of the clients' sizes. Default: their number."),
    ] = None,
    alpha_class: Annotated[
        str | None,
        typer.Option(metavar="A", help="dual-dirichlet: concentration of each client's classes. Default: 0.5."),
    ] = None,
    alpha: Annotated[
        str | None, typer.Option(metavar="A", help="dirichlet: of each class's shares. Default: 0.5.")
    ] = None,
    classes_per_client: Annotated[
        str | None, typer.Option(metavar="N-M", help="class: how many a client has. Default: 3-5 (5 clients: 5-6).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed, the same files.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="A new folder: a file per client.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count and show; write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Divide a dataset into one file per client, each record exactly once. Methods: docs/partition.md."""
    from flctl.dataset.partition import check_new, client_names, plan, write

    if out is None and not dry_run:
        raise UsageError("where are the files to go?", hint="--out DIR, or --dry-run")
    if out is not None and not dry_run:
        check_new(out)
    given = {
        "alpha-size": alpha_size,
        "alpha-class": alpha_class,
        "alpha": alpha,
        "classes-per-client": classes_per_client,
    }
    options = {key: value for key, value in given.items() if value is not None}
    source, made = plan(files, by, client_names(clients), method, options, seed)
    if not json:
        _table(made).show()
        _bars(made)
    if dry_run or out is None:
        for name in [] if json else made.empty:
            print(f"note: {name} would get no records")
        paths: list[Path] = []
    else:
        paths = write(source, made, out)
    if json:
        print_json("partition", status="ok", exit_code=0, data=_data(made, paths))
    elif paths:
        print(f"{sum(map(sum, made.counts)):,} records in {len(paths)} files, partition.json, partition.svg  {out}")


def _data(made: "Partition", paths: Sequence[Path]) -> dict[str, Any]:
    return {**made.record(), "paths": [str(path) for path in paths]}


def _table(made: "Partition") -> Grid:
    """Records by client and class; of many classes the largest."""
    sums = [sum(row[place] for row in made.counts) for place in range(len(made.classes))]
    order = sorted(sorted(range(len(sums)), key=lambda place: -sums[place])[:SHOWN])
    rest = len(sums) - len(order)
    grid = Grid(("client", *(_label(made, place) for place in order), *([f"{rest} more"] if rest else []), "records"))
    for name, row in [*zip(made.clients, made.counts, strict=True), ("all", sums)]:
        cells = [row[place] for place in order]
        grid.add(name, *map(str, cells), *([str(sum(row) - sum(cells))] if rest else []), str(sum(row)))
    return grid


def _label(made: "Partition", place: int) -> str:
    name = printable(made.classes[place], 20) or "(none)"
    return name if len(made.classes) == 1 and not made.field else f"{_mark(place)} {name}"


def _mark(place: int) -> str:
    return LETTERS[place % len(LETTERS)]


def _bars(made: "Partition") -> None:
    """A bar per client: colours on a terminal, letters elsewhere."""
    longest, width = max(map(sum, made.counts)), max(map(len, made.clients))
    print()
    for name, row in zip(made.clients, made.counts, strict=True):
        cells, begun = [], 0
        for count in row:
            cells.append((begun + count) * BAR // longest - begun * BAR // longest)
            begun += count
        if sys.stdout.isatty():
            _coloured(name.ljust(width), cells)
        else:
            print(f"{name.ljust(width)}  {''.join(_mark(place) * count for place, count in enumerate(cells))}".rstrip())


def _coloured(name: str, cells: Sequence[int]) -> None:
    from rich.text import Text

    from flctl.dataset.picture import colour

    line = Text(f"{name}  ")
    for place, count in enumerate(cells):
        line.append(_mark(place) * count, style=f"#FFFFFF on {colour(place, len(cells))}")
    console().print(line, no_wrap=True, overflow="crop")
