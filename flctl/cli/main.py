"""The `flctl` program: its commands, its argument expansion, and the one place where errors become exit codes."""

import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flctl import __version__
from flctl.cli import (
    adopt,
    aggregate,
    audit,
    auth,
    campaign,
    demo,
    evaluate,
    export,
    gc,
    history,
    init,
    interventions,
    login,
    partition,
    plan,
    round,
    site,
    status,
    verify,
)
from flctl.cli.output import print_error
from flctl.errors import FlctlError, Interrupted, UsageError, defect
from flctl.words import plain

app = typer.Typer(
    help="Train one model across several supercomputers: SSH, rsync and the batch queue are all it needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Typer brings a click of its own since 0.26 and uses the installed one before; this is the one in use.
ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
SETTING = re.compile(r"[a-z]\w*=.*", re.IGNORECASE)
# Options that take several words, and what a word after the first must be to belong to them (None: anything).
LISTS: Mapping[str, re.Pattern[str] | None] = {"--sites": None}
LISTS_OF: Mapping[str, Mapping[str, re.Pattern[str] | None]] = {
    "aggregate": {"--weights": NUMBER, "--steps": NUMBER, "--bases": None, "--option": SETTING},
    "partition": {"--clients": None},
}
HINTS = {
    "--clients": "--clients 4, or --clients a b",
    "--sites": "--sites a b, --sites a,b or --sites all",
    "--option": "--option lr=0.1 dialect=paper",
}
WHOLE = frozenset({"--bases", "--option"})  # their words may hold commas
CAMPAIGN_OPTIONS = frozenset({"-C", "--campaign"})
JSON_COMMANDS = frozenset(
    {
        "round",
        "evaluate",
        "plan",
        "status",
        "history",
        "login",
        "aggregate",
        "verify",
        "partition",
        "audit",
        "gc",
        "campaign tick",
        "auth test",
    }
    | {"site list", "site show", "site test", "site stage"}
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"flctl {__version__}")
        raise typer.Exit


@app.callback()
def flctl(
    context: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Option(
            "-C",
            "--campaign",
            metavar="DIR",
            help="The campaign's folder. Default: $FLCTL_CAMPAIGN, else the nearest one upwards.",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Print the version and exit.")
    ] = False,
) -> None:
    context.obj = folder


for module in (
    init,
    adopt,
    demo,
    plan,
    round,
    evaluate,
    status,
    history,
    login,
    interventions,
    aggregate,
    verify,
    audit,
    export,
    gc,
    partition,
):
    module.register(app)
app.add_typer(site.app, name="site")
app.add_typer(auth.app, name="auth")
app.add_typer(campaign.app, name="campaign")


def expand(arguments: list[str]) -> list[str]:
    """The command line as Typer understands it: `--sites a b` and `--sites a,b` become `--sites a --sites b`, up to the
    next option, and `-C DIR` may stand anywhere. UsageError for a list without a name in it."""
    front, words = _hoisted(arguments)
    lists = {**LISTS, **LISTS_OF.get(_first(words), {})}
    rest: list[str] = []
    while words:
        word = words.pop(0)
        name, separator, value = word.partition("=")
        if word == "--":
            return [*front, *rest, word, *words]
        if name not in lists:
            rest.append(word)
            continue
        values, kind = [value] if separator else [], lists[name]
        while words and not _is_option(name, words[0], kind):
            if values and kind and not all(kind.fullmatch(item) for item in _items(name, words[0])):
                break
            values.append(words.pop(0))
        items = [item for value in values for item in _items(name, value)]
        if not items:
            raise UsageError(f"{name} names nothing", hint=HINTS.get(name, f"{name} a b, or {name} a,b"))
        rest += [part for item in items for part in (name, item)]
    return front + rest


def _is_option(name: str, word: str, kind: re.Pattern[str] | None) -> bool:
    """Whether a word ends a list for certain. Numbers below zero are for the command to refuse, by what they mean."""
    below_zero = kind is NUMBER and all(NUMBER.fullmatch(item) for item in _items(name, word))
    return word.startswith("-") and not below_zero


def _items(name: str, word: str) -> list[str]:
    return [item for item in ([word] if name in WHOLE else word.split(",")) if item]


def _first(words: list[str]) -> str:
    return next((word for word in words if not word.startswith("-")), "")


def _hoisted(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(`-C DIR` wherever it stood before `--`, the rest)."""
    front: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word in CAMPAIGN_OPTIONS:
            front += [word, next(words, "")]
        elif word.startswith("--campaign="):
            front.append(word)
        else:
            rest.append(word)
    return front, rest


def _json_command(arguments: list[str]) -> str:
    """The command that is to answer with one JSON object, or nothing."""
    if "--json" not in arguments:
        return ""
    words = [word for word in _hoisted(arguments)[1] if not word.startswith("-")]
    return next((command for command in JSON_COMMANDS if command.split() == words[: len(command.split())]), "")


def main() -> None:
    """Run flctl; every error ends here as one message and the exit code of the table."""
    os.umask(0o077)
    if sys.stdout is None:  # closed: flctl ... >&-
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  for as long as we live
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupted)
    arguments = sys.argv[1:]
    command = _json_command(arguments)
    try:
        sys.exit(app(expand(arguments), standalone_mode=False, prog_name="flctl") or 0)
    except ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(0)
        usage = UsageError(error.format_message(), hint=f"{_path_of(error)} --help")
        sys.exit(print_error(usage, command))
    except FlctlError as error:
        sys.exit(print_error(error, command))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(print_error(Interrupted("interrupted", hint="the same command goes on from here"), command))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        sys.exit(_internal(error, command))


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _path_of(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context else "flctl"


def _internal(error: Exception, command: str) -> int:
    """A defect: said as one, with where it happened; the whole traceback where FLCTL_DEBUG asks for it."""
    if os.environ.get("FLCTL_DEBUG"):
        import traceback

        print(plain(traceback.format_exc()), end="", file=sys.stderr)
    return print_error(defect(error), command)


if __name__ == "__main__":
    main()
