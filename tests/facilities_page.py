"""The tables of docs/facilities.md, for the tests that must agree with them."""

from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "facilities.md"


def facilities() -> dict[str, list[str]]:
    """The row of each facility: itself, login, scheduler, transfer, tested for real, against a double, not here."""
    return {row[0].strip("`"): row for row in _rows("| facility |")}


def logins() -> dict[str, tuple[int, int]]:
    """How many logins two rounds cost at each kind of site: at the login host, at another host."""
    return {kind: (int(here), int(elsewhere or 0)) for kind, here, elsewhere in _rows("| kind of site |")}


def _rows(head: str) -> Iterator[list[str]]:
    """The cells of the table whose first line begins so."""
    lines = iter(PAGE.read_text(encoding="utf-8").splitlines())
    assert any(line.startswith(head) for line in lines), head
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]
