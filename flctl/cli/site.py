"""`flctl site test | trust`: is a site ready, is its host the right one."""

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from flctl.cli.moving import find, moving, patiently
from flctl.cli.output import Grid, print_failures, print_json

if TYPE_CHECKING:
    from flctl.campaign.trial import SiteReport

app = typer.Typer(
    help="Sites: test a login and what it finds; trust a host key.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def test(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Default: every site.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Log in to each site once and check what a round will need there. Submits nothing."""
    from flctl.campaign.trial import examine, outcome

    workspace = find(context.obj)
    with moving(workspace, command="site test" if json else "") as engine:
        results = [patiently(partial(examine, engine, name), engine.stop) for name in names or workspace.profiles]
    status, code, errors = outcome(results)
    if json:
        from flctl.records import to_data

        print_json("site test", status=status, exit_code=code, data={"sites": to_data(results)}, errors=errors)
    else:
        _print(results)
        print_failures(errors)
    raise typer.Exit(code)


def _print(results: "list[SiteReport]") -> None:
    marks = {"ok": "ok", "warn": "WARN", "fail": "FAIL"}
    for result in results:
        grid = Grid(("check", "", "found"), title=f"{result.site} ({result.logins} logins)")
        for check in result.checks:
            grid.add(check.name, marks[check.result], check.detail + (f"\n-> {check.fix}" if check.fix else ""))
        grid.show()


@app.command()
def trust(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    fingerprint: Annotated[str, typer.Argument(metavar="SHA256:...", help="What the facility publishes.")],
) -> None:
    """Accept a site's host key, if the host shows the one with this fingerprint."""
    from flctl.campaign.trial import trust_host

    print(trust_host(find(context.obj), name, fingerprint))
