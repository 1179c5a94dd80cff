"""`flctl site`: profiles, whether a site is ready, whether its host is the right one."""

import re
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from flctl.cli import profiles, stage
from flctl.cli.moving import a_person, find, moving, patiently
from flctl.cli.output import Grid, print_failures, print_json, say
from flctl.errors import UsageError

if TYPE_CHECKING:
    from flctl.campaign.trial import SiteReport

app = typer.Typer(
    help="Sites: their profiles; test a login and what it finds; trust a host key.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
profiles.register(app)
stage.register(app)


@app.command()
def test(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Default: every site.")] = None,
    batch: Annotated[bool, typer.Option("--batch", help="Also see in a tiny job what jobs find there.")] = False,
    wait: Annotated[str, typer.Option("--wait", help="For the tiny job, at most: 90, 45s, 30m.")] = "10m",
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Log in to each site once and check what a round will need there. Submits nothing, unless --batch is given."""
    from flctl.campaign.trial import examine, outcome
    from flctl.cli.round import duration

    workspace, patience = find(context.obj), duration(wait) if batch else None
    tell = partial(say, stream=sys.stderr)
    with moving(workspace, tell, "site test" if json else "", terminal=a_person()) as engine:
        results = [
            patiently(partial(examine, engine, name, batch=patience), engine.stop)
            for name in names or workspace.profiles
        ]
    status, code, errors = outcome(results)
    if json:
        from flctl.codec import to_data

        print_json("site test", status=status, exit_code=code, data={"sites": to_data(results)}, errors=errors)
    else:
        _print(results)
        print_failures(errors)
    raise typer.Exit(code)


def _print(results: "list[SiteReport]") -> None:
    marks = {"ok": "ok", "warn": "WARN", "fail": "FAIL"}
    for result in results:
        grid = Grid(("check", "", "found"), title=f"\n{result.site}")
        for check in result.checks:
            grid.add(check.name, marks[check.result], check.detail + (f"\n-> {check.fix}" if check.fix else ""))
        grid.show()
        print(result.count)


@app.command()
def trust(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    fingerprint: Annotated[str, typer.Argument(metavar="SHA256:...", help="What the facility publishes.")],
) -> None:
    """Accept a site's host key, if the host shows the one with this fingerprint."""
    from flctl.campaign.trial import trust_host

    if not re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}=?", fingerprint.strip()):
        raise UsageError(
            f"{fingerprint!r} is no fingerprint: SHA256: and 43 letters, digits, + and / are one",
            hint=f"flctl site test {name} shows the host's; compare it with what the facility publishes",
        )
    print(trust_host(find(context.obj), name, fingerprint))
