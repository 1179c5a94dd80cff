"""`flctl verify`: does a model come out of its recorded contributions again, bit by bit."""

import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from flctl.cli.bar import shown
from flctl.cli.moving import find, heeding
from flctl.cli.output import print_failures, print_json, say
from flctl.errors import AggregationRefused, UsageError
from flctl.records import Failure

if TYPE_CHECKING:
    from flctl.campaign.rebuilding import Rebuilt

SHOWN = 20

Version = Annotated[
    str | None, typer.Argument(metavar="[VERSION]", help="7, 0007 or newest. Default: the newest.", show_default=False)
]


def register(app: typer.Typer) -> None:
    app.command()(verify)


def verify(
    context: typer.Context,
    version: Version = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Rebuild a model from its recorded contributions, and say whether every bit agrees."""
    from flctl.campaign.rebuilding import rebuild

    workspace, stop = find(context.obj), threading.Event()
    with heeding(stop), shown() as tell:
        found = rebuild(workspace, version_of(version), progress=tell, stop=stop.is_set)
    errors = [] if found.agrees else [("", _failure(found))]
    code = errors[0][1].exit_code if errors else 0
    if json:
        data = {**asdict(found), "seconds": round(found.seconds, 3)}
        print_json("verify", status="error" if errors else "ok", exit_code=code, data=data, errors=errors)
    else:
        _print(found)
        print_failures(errors)
    raise typer.Exit(code)


def version_of(text: str | None) -> int | None:
    """None: the newest."""
    if text is None or text == "newest":
        return None
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"{text} is no version of a model", hint="write 7, 0007 or newest")
    return int(text)


def _failure(found: "Rebuilt") -> Failure:
    places = [*found.missing, *found.differing, *found.remade]
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return Failure(
        code=AggregationRefused.code,
        exit_code=AggregationRefused.exit_code,
        message=f"model {found.version:04d} is not what was recorded: {places[0]}{more}",
        hint="restore what is named from a backup of the campaign's folder, then flctl verify again",
    )


def _print(found: "Rebuilt") -> None:
    """What is wrong, each by name; then what was looked at."""
    wrong = (
        ("missing", found.missing),
        ("not what was recorded", found.differing),
        ("comes out otherwise when it is made again", found.remade),
    )
    for what, places in wrong:
        for place in places[:SHOWN]:
            say(f"{place}: {what}")
        if len(places) > SHOWN:
            print(f"... and {len(places) - SHOWN} more")
    if found.agrees:
        print(f"model {found.version:04d}  sha256 {found.sha256[:16]}  every bit agrees")
    looked = f"{found.files} files hashed, {found.bytes:,} bytes, {found.seconds:.1f} s"
    if found.rebuilt and not found.contributions:
        print(f"it has the weights of an earlier version, and the same files; {looked}")
    elif found.rebuilt:
        print(f"made again from {_counted(found.contributions)}; {looked}")
    elif found.collected:
        print(f"not made again, as what it was made from was collected by gc on {found.collected}; {looked}")
    elif found.contributions:
        print(f"not made again, as what it was made from is not what it was; {looked}")
    else:
        print(f"not made again, as it was made of no contributions; {looked}")


def _counted(contributions: int) -> str:
    return "1 contribution" if contributions == 1 else f"{contributions} contributions"
