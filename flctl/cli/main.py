"""The `flctl` program: its commands, its argument expansion, and the one place where errors become exit codes."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flctl import __version__
from flctl.cli import campaign, demo, init, interventions, round, site, status
from flctl.cli.output import print_error
from flctl.errors import FlctlError, Interrupted, UsageError, defect

app = typer.Typer(
    help="Train one model across several supercomputers: SSH, rsync and the batch queue are all it needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Typer brings a click of its own since 0.26 and uses the installed one before; this is the one in use.
ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
LIST_OPTIONS = frozenset({"--sites"})
CAMPAIGN_OPTIONS = frozenset({"-C", "--campaign"})
JSON_COMMANDS = frozenset({"round", "status", "site test", "campaign tick"})


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
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"flctl {__version__}")
        raise typer.Exit
    context.obj = folder


for module in (init, demo, round, status, interventions):
    module.register(app)
app.add_typer(site.app, name="site")
app.add_typer(campaign.app, name="campaign")


def expand(arguments: list[str]) -> list[str]:
    """The command line as Typer understands it: `--sites a b` and `--sites a,b` become `--sites a --sites b`, up to the
    next option, and `-C DIR` may stand anywhere. UsageError for a list without a name in it."""
    front, words = _hoisted(arguments)
    rest: list[str] = []
    while words:
        word = words.pop(0)
        name, separator, value = word.partition("=")
        if word == "--":
            return [*front, *rest, word, *words]
        if name not in LIST_OPTIONS:
            rest.append(word)
            continue
        values = [value] if separator else []
        while words and not words[0].startswith("-"):
            values.append(words.pop(0))
        items = [item for value in values for item in value.split(",") if item]
        if not items:
            raise UsageError(f"{name} names nothing", hint=f"{name} a b, {name} a,b or {name} all")
        rest += [part for item in items for part in (name, item)]
    return front + rest


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
    words = [word for word in arguments if not word.startswith("-")]
    return next((command for command in JSON_COMMANDS if command.split()[0] in words), "")


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

        traceback.print_exc()
    return print_error(defect(error), command)


if __name__ == "__main__":
    main()
