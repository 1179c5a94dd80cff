"""`flctl auth test | store`: how a login goes, and where the secret of one-time codes is kept."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from getpass import getpass
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from flctl.cli.moving import a_person, find, moving, patiently
from flctl.cli.output import print_failures, print_json, say
from flctl.errors import UsageError

if TYPE_CHECKING:
    from flctl.campaign.credentials import LoginTest
    from flctl.facility.profile import Site

app = typer.Typer(
    help="Logins: try one and see what is asked; store the secret of one-time codes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="SITE")]


@app.command()
def test(
    context: typer.Context,
    name: Name,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Log in once and show how it went: the host's key, what was offered, asked and answered (masked)."""
    from flctl.campaign.credentials import try_login

    tell = partial(say, stream=sys.stderr)
    with moving(find(context.obj), tell, "auth test" if json else "", terminal=a_person()) as engine:
        result = patiently(partial(try_login, engine, name), engine.stop)
    errors = [(name, result.failure)] if result.failure else []
    code = result.failure.exit_code if result.failure else 0
    if json:
        status = "error" if errors else "ok"
        print_json("auth test", status=status, exit_code=code, data=_data(result), errors=errors)
    else:
        _print(result)
    print_failures(errors)
    raise typer.Exit(code)


def _data(result: "LoginTest") -> dict[str, Any]:
    from flctl.codec import to_data

    data: dict[str, Any] = to_data(result)
    del data["failure"], data["digits"]
    return {**data, **data.pop("seen")}


def _print(result: "LoginTest") -> None:
    if result.kind == "local":
        print(f"{result.site}: this machine, nobody logs in")
        return
    seen = result.seen
    print(f"{result.site}: {result.host}, {result.kind}" + (f", through {result.jump}" if result.jump else ""))
    if seen.host_key:
        print(f"  host key  {seen.host_key}" + (f", trusted by {seen.trust}" if seen.trust else ", not trusted"))
    for offer in seen.offers:
        until = "" if offer.until is None else f", good until {_clock(offer.until)}"
        print(f"  offered   {offer.kind} {offer.fingerprint}{until}: {'accepted' if offer.accepted else 'refused'}")
    masks = {"password": "********", "code": "*" * result.digits}
    for exchange in seen.dialogue:
        print(f"  asked     {exchange.question} {''.join(masks[kind] for kind in exchange.given) or '(not answered)'}")
    came_in = "not logged in" if result.failure else "logged in"
    print(f"  result    {came_in}; {seen.logins} login{'' if seen.logins == 1 else 's'} used")


def _clock(moment: float) -> str:
    from flctl.facility.certificates import clock

    return clock(moment)


@app.command()
def store(
    context: typer.Context,
    name: Name,
    permission: Annotated[
        str,
        typer.Option(
            "--permission",
            metavar="WHERE",
            help="Where the facility permits codes made by a program. Needed where there is no terminal to ask on.",
        ),
    ] = "",
    keyring: Annotated[bool, typer.Option("--keyring", help="In the system's keyring instead of a file.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="In place of a secret that is stored already.")] = False,
) -> None:
    """Store the secret of a site's one-time codes (base32 or otpauth://): typed without echo, or read from stdin. Asks
    whether the facility's rules allow that."""
    from flctl.campaign.credentials import storable, store

    site = storable(find(context.obj), name)
    permission = _confirmed(site, permission.strip())
    lines = store(site, _secret(name), permission, keyring=keyring, replace=replace)
    print(f"stored; now put this into sites/{name}.toml, then: flctl auth test {name}\n\n{lines}", end="")


def _confirmed(site: "Site", permission: str) -> str:
    """Where the facility permits it, in the user's words; UsageError without them. On a terminal only a typed yes
    counts."""
    try:
        with _terminal() as terminal:
            return _asked(site, permission or site.login.totp.permission, terminal)
    except OSError:
        if permission:
            return permission
        raise _unconfirmed(site.name) from None


def _asked(site: "Site", known: str, terminal: TextIO) -> str:
    def ask(question: str) -> str:
        terminal.write(question)
        terminal.flush()
        return terminal.readline().strip()

    other = {"key+totp": " and your key", "password+totp": " and your password"}.get(site.login.kind, "")
    terminal.write(f"{site.name}: whoever has this secret{other} can log in as you.\n")
    if ask("Do the facility's rules permit codes that a program makes? Type yes or no: ") != "yes":
        raise _unconfirmed(site.name)
    where = ask("Where do they say so (an address, a ticket)?" + (f" [{known}] " if known else " ")) or known
    if not where:
        raise _unconfirmed(site.name)
    return where


@contextmanager
def _terminal() -> Iterator[TextIO]:
    """The user's terminal, whatever stdin and stdout are; OSError if there is none."""
    with io.TextIOWrapper(io.FileIO(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY), "w+")) as terminal:
        yield terminal


def _unconfirmed(name: str) -> UsageError:
    return UsageError(
        "nothing was stored: the facility's rules must permit codes that a program makes, and you must say where",
        hint=f'ask the facility; then flctl auth store {name} in a terminal, or with --permission "WHERE IT SAYS SO"',
        site=name,
    )


def _secret(name: str) -> str:
    """As it is typed, which the terminal does not show, or as stdin brings it."""
    if sys.stdin.isatty():
        text = getpass("The secret, as the facility showed it (it is not shown): ")
    else:
        text = sys.stdin.readline()
    if not text.strip():
        raise UsageError("no secret was given", hint=f"flctl auth store {name}, or: ... | flctl auth store", site=name)
    return text
