"""`flctl adopt`: go on with a campaign whose folder was lost, damaged, or moved to another host."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flctl.cli.moving import a_person, find, moving, patiently
from flctl.cli.output import print_error, say
from flctl.errors import UsageError, exit_code_of

if TYPE_CHECKING:
    from flctl.campaign.salvage import Adopted


def register(app: typer.Typer) -> None:
    app.command()(adopt)


def adopt(
    context: typer.Context,
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A new folder. Default: mend the campaign that is here.")
    ] = None,
    sites: Annotated[
        list[str] | None, typer.Option("--sites", help="Of a new folder: profiles of the campaign's sites: a b | a,b.")
    ] = None,
    label: Annotated[
        str | None, typer.Option("--id", metavar="NAME-ID", help="Of a new folder: the campaign's folder at the sites.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of a new folder: the campaign's seed.")] = 0,
    takeover: Annotated[
        bool, typer.Option("--takeover", help="Make this host the campaign's driver; the other is refused then.")
    ] = False,
) -> None:
    """Rebuild a campaign's folder, or its damaged records, from what the sites know; or move it to this host."""
    from flctl.campaign import salvage
    from flctl.campaign.profiles import texts_of

    if folder is None:
        if sites or label:
            raise UsageError("--sites and --id make a new folder: DIR is missing", hint="flctl adopt DIR --sites ...")
        workspace = find(context.obj)
    elif not sites or not label:
        raise UsageError("a new folder needs --sites and --id", hint="flctl adopt DIR --sites a.toml b.toml --id ID")
    else:
        workspace, takeover = salvage.new_folder(folder, label, texts_of(sites), seed), True
    with moving(workspace, say, terminal=a_person()) as engine:
        found = patiently(partial(salvage.adopt, engine, takeover=takeover, is_new=folder is not None), engine.stop)
    for path in found.aside:
        print(f"{'damaged, ' if path.name.endswith('.damaged') else ''}put aside: {path}")
    for run in found.runs:
        work = "" if run.order.work == "train" else f" ({run.order.work})"
        print(f"{run.site}: run {run.number:04d}{work} of model {run.order.round:04d}: {run.stage}")
    _print_new(found, is_new=folder is not None)
    for _, error in found.unasked:
        print_error(error)
    if not any(error.code == "locked" for _, error in found.unasked):
        print(f"the campaign is in {workspace.root}\n-> flctl status; then flctl round")
    raise typer.Exit(exit_code_of([error.exit_code for _, error in found.unasked]))


def _print_new(found: "Adopted", *, is_new: bool) -> None:
    from flctl.campaign.salvage import LOST

    if found.epoch:
        print(f"this host drives the campaign now (epoch {found.epoch})")
    if found.model is not None:
        model, site = found.model
        print(f"model {model.version:04d}  sha256 {model.sha256[:16]}  came from {site}")
        print("what no site can tell:")
        for what in LOST if is_new else LOST[1:3]:
            print(f"  - {what}")
