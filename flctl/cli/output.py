"""Owns what is printed: the JSON object, error lines, tables."""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from flctl.errors import FlctlError
from flctl.records import Failure
from flctl.words import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCHEMA_VERSION = 1

Errors = Iterable[tuple[str, Failure]]


def print_json(command: str, *, status: str, exit_code: int, data: Any, errors: Errors = ()) -> None:
    """The one object on stdout."""
    listed = [
        {"code": failure.code, "site": site or None, "message": failure.message, "hint": failure.hint}
        for site, failure in errors
    ]
    answer = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "status": status,
        "exit_code": exit_code,
        "data": data,
        "errors": listed,
    }
    print(_escaped(json.dumps(answer, indent=1, ensure_ascii=False)))


def _escaped(text: str) -> str:
    """JSON in which every letter that is not printable is an escape: JSON itself lets most of them stand."""
    return re.sub(r"[^\n]", _escape, text) if not text.replace("\n", "").isprintable() else text


def _escape(found: re.Match[str]) -> str:
    if found[0].isprintable():
        return found[0]
    units = found[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[place : place + 4]}" for place in range(0, len(units), 4))


def print_error(error: FlctlError, command: str = "") -> int:
    """Say what failed, why, and what to type next; as JSON if `command` was to answer so. Returns the exit code."""
    failure = Failure(code=error.code, exit_code=error.exit_code, message=error.message, hint=error.hint)
    if command:
        print_json(command, status="error", exit_code=error.exit_code, data=None, errors=[(error.site or "", failure)])
    print_failures([(error.site or "", failure)])
    return error.exit_code


def print_failures(errors: Errors) -> None:
    for site, failure in errors:
        print(plain(f"flctl: {site + ': ' if site else ''}{failure.message}"), file=sys.stderr)
        if failure.hint:
            print(plain(f"  -> {failure.hint}"), file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: by rich on a terminal, as plain aligned lines elsewhere (which spares rich's import, too)."""

    columns: tuple[str, ...]
    title: str = ""
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append(tuple(map(plain, cells)))

    def show(self) -> None:
        if sys.stdout.isatty():
            console().print(self.rich())
        else:
            print("\n".join(self._lines()))

    def rich(self) -> "Table":
        from rich.box import SIMPLE
        from rich.markup import escape
        from rich.table import Table

        table = Table(*self.columns, title=self.title or None, box=SIMPLE, title_justify="left", pad_edge=False)
        for row in self.rows:
            table.add_row(*(escape(cell) for cell in row))
        return table

    def _lines(self) -> list[str]:
        cells = [self.columns, *(tuple(cell.replace("\n", " ") for cell in row) for row in self.rows)]
        widths = [max(len(row[place]) for row in cells) for place in range(len(self.columns))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        return [self.title, *lines] if self.title else lines


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line now. A reader that has gone (`flctl round | head`) must not end what is being done."""
    with suppress(OSError, ValueError):
        print(plain(line), file=stream or sys.stdout, flush=True)


@contextmanager
def unheard() -> Iterator[None]:
    """What is printed in here may fail to arrive (a reader that has gone, a full log): what was done is done."""
    try:
        yield
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> "Console":
    """The terminal, with colours and tables."""
    from rich.console import Console

    return Console(highlight=False)


def number(value: float | None, places: int = 1) -> str:
    return "" if value is None else f"{value:.{places}f}"


def seconds(value: float | None) -> str:
    """A duration for a table."""
    if value is None:
        return ""
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"
