"""`flctl gc`: makes room, at home and at the sites."""

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from flctl.campaign.workspace import Workspace
from flctl.cli.moving import a_person, find, moving, patiently
from flctl.cli.output import Grid, print_failures, print_json
from flctl.codec import to_data
from flctl.errors import exit_code_of
from flctl.records import Failure

if TYPE_CHECKING:
    from flctl.campaign.growth import Item


def register(app: typer.Typer) -> None:
    app.command()(gc)


def gc(
    context: typer.Context,
    keep: Annotated[int, typer.Option("--keep", min=1, help="How many of the newest models stay whole.")] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; remove nothing.")] = False,
    home: Annotated[bool, typer.Option("--home", help="Only here: log in to no site.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Remove old models, contributions and runs, at home and at the sites. All records stay, and whatever is needed to
    go on, to verify the models that stay, or to go back to them; also the first model. Logs in to each site once."""
    from flctl.campaign.growth import Collected, collect_at, collect_home, troubled

    workspace = find(context.obj)
    items = collect_home(workspace, keep, dry=dry_run)
    troubles: list[tuple[str, Failure]] = []
    with moving(workspace, command="gc" if json else "", terminal=a_person()) as engine:
        for name in [] if home else _used(workspace):
            action = partial(collect_at, engine, name, keep, dry=dry_run)
            more, trouble = patiently(partial(troubled, action, name), engine.stop)
            items, troubles = items + more, troubles + trouble
    found = Collected(items=tuple(items), troubles=tuple(troubles))
    code = exit_code_of([failure.exit_code for _, failure in troubles])
    if json:
        data = {"dry_run": dry_run, "items": to_data(found.items)}
        print_json("gc", status="partial" if troubles else "ok", exit_code=code, data=data, errors=troubles)
    else:
        _print(found.items, dry_run)
        print_failures(troubles)
    raise typer.Exit(code)


def _used(workspace: Workspace) -> list[str]:
    """The sites that were ever logged in to: there is nothing of this campaign elsewhere."""
    return [name for name in workspace.profiles if workspace.contact(name).workdir]


def _print(items: "tuple[Item, ...]", dry: bool) -> None:
    from flctl.facility.limits import size

    grid = Grid(("where", "what", "bytes"))
    for item in items:
        grid.add(item.site or "home", item.path, f"{item.bytes:,}")
    if items:
        grid.show()
    total = size(sum(item.bytes for item in items))
    print(f"{len(items)} folders, {total}: " + ("nothing was removed" if dry else "removed; the records are kept"))
