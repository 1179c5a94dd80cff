"""`flctl export`: a model of the campaign as a folder that any library opens."""

import threading
from pathlib import Path
from typing import Annotated

import typer

from flctl.campaign.workspace import Workspace
from flctl.cli.bar import shown
from flctl.cli.moving import find, heeding
from flctl.cli.verify import version_of
from flctl.records import FileEntry


def register(app: typer.Typer) -> None:
    app.command()(export)


def export(
    context: typer.Context,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="7, 0007 or newest.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Of an adapter: the frozen base with the adapter added to its weights.")
    ] = False,
) -> None:
    """Copy a model, verified, into a folder that AutoModelForCausalLM.from_pretrained opens; of an adapter, peft."""
    from flctl.campaign.rebuilding import export as copy

    workspace = find(context.obj)
    files = _merged(workspace, version_of(version), out) if merged else copy(workspace, version_of(version), out)
    print(f"{len(files)} files, {sum(entry.size for entry in files):,} bytes  {out.resolve()}")


def _merged(workspace: Workspace, version: int | None, out: Path) -> tuple[FileEntry, ...]:
    from flctl.campaign.rebuilding import export_merged

    stop = threading.Event()
    with heeding(stop), shown() as tell:
        return export_merged(workspace, version, out, progress=tell, stop=stop.is_set)
