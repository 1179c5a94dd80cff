"""`flctl login`, `flctl logout`: what a person does so that later commands need none."""

import os
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from flctl.cli.moving import find, patiently
from flctl.cli.output import Grid, print_error, print_json, say
from flctl.cli.round import duration
from flctl.errors import ConfigurationError, FlctlError, UsageError, exit_code_of

HINT = "flctl login SITE, or flctl login --status"


def register(app: typer.Typer) -> None:
    app.command()(login)
    app.command()(logout)


def login(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[SITE]...")] = None,
    limit: Annotated[
        str | None,
        typer.Option("--for", help="Keep connections no longer than: 90, 45s, 30m, 4h. Default: login.hold."),
    ] = None,
    status: Annotated[
        bool, typer.Option("--status", help="Show the connections that are kept; log in nowhere.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="With --status: one JSON object on stdout.")] = False,
) -> None:
    """Log in where a person must: answer the site's questions once, and later commands use that connection, or that
    certificate. What you type goes to ssh, not to flctl."""
    if status and not names:
        _show(json)
        return
    if json or status:
        raise UsageError("--status stands alone, and --json belongs to it", hint=HINT)
    if not names:
        raise UsageError("which site?", hint=HINT)
    from flctl.campaign.logins import log_in

    workspace, seconds = find(context.obj), _seconds(limit)
    codes = []
    for name in dict.fromkeys(names):
        try:
            patiently(partial(log_in, workspace, name, seconds, say), threading.Event())
        except FlctlError as error:
            codes.append(print_error(error))
    raise typer.Exit(exit_code_of(codes))


def logout(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[SITE]...", help="Default: every site.")] = None,
) -> None:
    """Close connections that flctl login keeps, and what still uses them."""
    from flctl.campaign.logins import log_out
    from flctl.campaign.workspace import Workspace

    workspace = None
    with suppress(ConfigurationError):  # they belong to the user, not to a campaign
        workspace = Workspace.find(context.obj, os.environ, Path.cwd())
    closed = log_out(workspace, names or [])
    for kept in closed:
        print(f"{kept.site}: the connection to {kept.place} is closed")
    for name in names or []:
        if name not in {kept.site for kept in closed}:
            print(f"{name}: no connection is kept")
    if not closed and not names:
        print("no connection is kept")


def _show(json: bool) -> None:
    from flctl.facility.certificates import clock
    from flctl.facility.holding import everything

    found = everything()
    if json:
        rows = [
            {"site": kept.site, "host": kept.place, "since": kept.since, "until": kept.until, "alive": alive}
            for kept, alive in found
        ]
        print_json("login", status="ok", exit_code=0, data={"connections": rows})
    elif not found:
        print("no connection is kept")
    else:
        grid = Grid(("site", "host", "since", "until", "state"))
        for kept, alive in found:
            state = "open" if alive else "ended" if kept.until <= time.time() else "lost"
            grid.add(kept.site, kept.place, clock(kept.since), clock(kept.until), state)
        grid.show()


def _seconds(text: str | None) -> float | None:
    try:
        seconds = duration(text)
    except UsageError:
        seconds = 0.0
    if seconds is not None and seconds <= 0:
        raise UsageError(f"--for {text} is no duration", hint="write 90, 45s, 30m or 4h")
    return seconds
