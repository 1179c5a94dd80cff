"""`flctl export`: a model of the campaign as a folder that any library opens."""

from pathlib import Path
from typing import Annotated

import typer

from flctl.cli.moving import find
from flctl.cli.verify import version_of


def register(app: typer.Typer) -> None:
    app.command()(export)


def export(
    context: typer.Context,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="7, 0007 or newest.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
) -> None:
    """Copy a model, verified, into a folder that AutoModelForCausalLM.from_pretrained opens."""
    from flctl.campaign.rebuilding import export as copy

    files = copy(find(context.obj), version_of(version), out)
    print(f"{len(files)} files, {sum(entry.size for entry in files):,} bytes  {out.resolve()}")
