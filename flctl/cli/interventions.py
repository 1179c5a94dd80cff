"""`flctl retry | skip | cancel | release | log`: what a person decides."""

import sys
from functools import partial
from typing import Annotated

import typer

from flctl.cli.moving import find, moving, patiently
from flctl.cli.output import print_error
from flctl.errors import FlctlError, Interrupted, Locked, exit_code_of

Site = Annotated[str | None, typer.Argument(metavar="[SITE]", help="One site. Default: all that it concerns.")]
OneSite = Annotated[str, typer.Argument(metavar="SITE")]


def register(app: typer.Typer) -> None:
    for command in (retry, skip, cancel, release, log):
        app.command()(command)


def retry(context: typer.Context, site: Site = None) -> None:
    """Try again what failed, or whose job was cancelled at its site. `flctl round` or the next tick then moves it."""
    from flctl.campaign import planning

    workspace = find(context.obj)
    with moving(workspace) as engine:
        for run in planning.retry(engine, site):
            print(f"{run.site}: run {run.number:04d} will be tried again (attempt {run.attempt})")
    print("-> flctl round, or wait for the next tick")


def skip(context: typer.Context, site: OneSite) -> None:
    """Leave a site out of the model that is being made."""
    from flctl.campaign import planning

    workspace = find(context.obj)
    with moving(workspace) as engine:
        version, trouble = patiently(partial(planning.skip, engine, site), engine.stop)
    print(f"model {version:04d} will be made without {site}\n-> flctl round, or wait for the next tick")
    if trouble is not None:
        print(f"its job could not be cancelled ({trouble.message}); what it still makes is not merged")


def cancel(context: typer.Context, site: Site = None) -> None:
    """Cancel a site's run and its job. Without a site: every run, and the plan."""
    from flctl.campaign import planning

    workspace = find(context.obj)
    targets = planning.open_targets(workspace, site)
    if site is None:
        planning.end_plan(workspace)
        targets = planning.open_targets(workspace, site)  # a tick may have ordered the next round meanwhile
    troubles: list[FlctlError] = []
    with moving(workspace) as engine:
        for run in targets:
            try:
                patiently(partial(planning.cancel_run, engine, run), engine.stop)
            except (Interrupted, Locked):
                raise
            except FlctlError as error:
                if site is not None:
                    raise
                planning.give_up_run(engine, run)
                troubles.append(error)
            print(f"{run.site}: run {run.number:04d} is cancelled")
    if site is None:
        print("no plan is open any more")
    for trouble in troubles:
        print_error(trouble)
        print(
            f"  -> its job may still run at {trouble.site or 'the site'}; what it makes is not merged", file=sys.stderr
        )
    raise typer.Exit(exit_code_of([trouble.exit_code for trouble in troubles]))


def release(context: typer.Context, site: Site = None) -> None:
    """Lift a hold: the site is contacted again at the next round or tick. After a foreign scancel: retry or skip."""
    from flctl.campaign import planning

    for name in planning.release(find(context.obj), site):
        print(f"{name} is released")


def log(
    context: typer.Context,
    site: OneSite,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=10000, help="How many of its last lines.")] = 50,
) -> None:
    """Show the end of the log of the site's last job."""
    from flctl.campaign.logs import read_log

    workspace = find(context.obj)
    with moving(workspace) as engine:
        print(patiently(lambda: read_log(engine, site, lines), engine.stop))
