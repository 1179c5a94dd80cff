"""`flctl site stage`: files, folders, images and the model in place at a site, ahead of the first round."""

from pathlib import Path
from typing import Annotated

import typer

from flctl.cli import bar
from flctl.cli.moving import a_person, find, moving, patiently
from flctl.cli.output import print_json


def register(app: typer.Typer) -> None:
    app.command()(stage)


def stage(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    paths: Annotated[list[Path] | None, typer.Argument(metavar="[PATH]...", help="Files or folders of yours.")] = None,
    model: Annotated[bool, typer.Option("--model", help="Also the campaign's newest model.")] = False,
    replaces: Annotated[
        bool, typer.Option("--replace", help="In place of what has the same name there and another content.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Put a container image, files or the model in place at a site, verified there. What is there is not sent again."""
    from flctl.campaign.staging import stage as put

    workspace = find(context.obj)
    with (
        moving(workspace, command="site stage" if json else "", terminal=a_person()) as engine,
        bar.shown(silent=json) as tell,
    ):
        staged = patiently(
            lambda: put(engine, name, paths or [], model=model, replaces=replaces, tell=tell), engine.stop
        )
    if json:
        from flctl.codec import to_data

        data = {"site": name, "staged": to_data(staged)}
        print_json("site stage", status="ok", exit_code=0, data=data)
        return
    for item in staged:
        print(f"{item.path}  ({item.size:,} bytes, {'sent' if item.sent else 'was there'})")
