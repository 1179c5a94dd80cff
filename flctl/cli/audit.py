"""`flctl audit`: what crossed each border, and whether everything is what was recorded."""

import threading
from typing import TYPE_CHECKING, Annotated

import typer

from flctl.cli.bar import shown
from flctl.cli.moving import find, heeding
from flctl.cli.output import Grid, print_failures, print_json, say
from flctl.codec import to_data
from flctl.errors import AggregationRefused
from flctl.records import Failure

if TYPE_CHECKING:
    from flctl.campaign.audit import Audit
    from flctl.campaign.look import Difference

SHOWN = 50


def register(app: typer.Typer) -> None:
    app.command()(audit)


def audit(
    context: typer.Context,
    by_model: Annotated[bool, typer.Option("--by-model", help="A line for each model that was made.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show what crossed each site's border, and check every record, model and journal line against the chain that binds
    them. Asks no site, changes nothing."""
    from flctl.campaign.audit import audit as look

    workspace, stop = find(context.obj), threading.Event()
    with heeding(stop), shown() as tell:
        found = look(workspace, progress=tell, stop=stop.is_set)
    errors = [("", _failure(found.differences))] if found.differences else []
    code = errors[0][1].exit_code if errors else 0
    if json:
        data = {**to_data(found), "seconds": round(found.seconds, 3)}
        print_json("audit", status="error" if errors else "ok", exit_code=code, data=data, errors=errors)
    else:
        _print(found, by_model)
        print_failures(errors)
    raise typer.Exit(code)


def _failure(differences: "tuple[Difference, ...]") -> Failure:
    more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
    first = differences[0]
    return Failure(
        code=AggregationRefused.code,
        exit_code=AggregationRefused.exit_code,
        message=f"not everything is what was recorded: {first.file}{_round(first)}: {first.what}{more}",
        hint="restore what is named from a backup of the campaign's folder, then flctl audit again",
    )


def _round(difference: "Difference") -> str:
    return "" if difference.round is None else f" (model {difference.round:04d})"


def _table(found: "Audit", by_model: bool) -> Grid:
    rows: dict[tuple[str, str, str, str], list[int]] = {}
    for row in found.crossings:
        key = (row.site, row.direction, f"{row.round:04d}" if by_model else "", row.kind)
        files, size = rows.get(key, [0, 0])
        rows[key] = [files + row.files, size + row.bytes]
    grid = Grid(("site", "direction", *(["for model"] if by_model else []), "kind", "files", "bytes"))
    for (site, direction, version, kind), (files, size) in sorted(rows.items()):
        grid.add(site, direction, *([version] if by_model else []), kind, f"{files:,}", f"{size:,}")
    return grid


def _print(found: "Audit", by_model: bool) -> None:
    if found.crossings:
        _table(found, by_model).show()
    for site in found.logins:
        came = sum(row.bytes for row in found.crossings if (row.site, row.direction) == (site, "in"))
        went = sum(row.bytes for row in found.crossings if (row.site, row.direction) == (site, "out"))
        say(f"{site}: {went:,} bytes there, {came:,} bytes back, logins: {found.logins[site]}")
    for note in found.notes:
        say(note)
    if found.collected:
        print(f"collected by gc, records kept: models {', '.join(f'{version:04d}' for version in found.collected)}")
    for difference in found.differences[:SHOWN]:
        say(f"{difference.file}{_round(difference)}: {difference.what}")
    if len(found.differences) > SHOWN:
        print(f"... and {len(found.differences) - SHOWN} more")
    looked = f"{found.models} models, {found.lines} lines of the journal, {found.files} files, {found.bytes:,} bytes"
    print(f"{looked}; {found.seconds:.1f} s")
    if not found.differences:
        print(f"every byte is what was recorded; the chain ends in {found.head}")
