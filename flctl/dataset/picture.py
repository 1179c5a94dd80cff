"""Owns the picture of a partition as SVG: one bar per client, as long as it has records, coloured by class."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

from flctl.words import printable

WIDTH, BAR, GAP, LEFT, ROW = 720, 22, 8, 150, 18
_LONGEST = 18  # letters of a name
# Okabe and Ito's palette, which the colour-blind can tell apart; more classes than these go round the colour circle.
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def colour(place: int, classes: int) -> str:
    """Of the class at `place`, for SVG and terminal alike."""
    if classes <= len(_PALETTE):
        return _PALETTE[place]
    return _rgb(place / classes, 0.45 if place % 2 else 0.62)


def _rgb(hue: float, light: float) -> str:
    """A colour of the circle; whole-number arithmetic after one rounding, so that it is the same everywhere."""
    part = round(hue * 6 * 255)
    rise, side = part % 255, part // 255
    red, green, blue = [
        (255, rise, 0), (255 - rise, 255, 0), (0, 255, rise), (0, 255 - rise, 255), (rise, 0, 255), (255, 0, 255 - rise)
    ][side % 6]  # fmt: skip
    return "#" + "".join(f"{round(value * light + 255 * (light - 0.45) * 0.5):02X}" for value in (red, green, blue))


def picture(clients: Sequence[str], classes: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """The SVG document, with the counts as tooltips."""
    longest = max(1, *(sum(row) for row in counts))
    bars = [_bar(place, clients[place], classes, row, longest) for place, row in enumerate(counts)]
    top = 30 + len(clients) * (BAR + GAP)
    legend, bottom = _legend(classes, top + 14)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 90}" height="{bottom + 20}" '
        'font-family="sans-serif" font-size="13">\n'
        '<rect width="100%" height="100%" fill="#FFFFFF"/>\n'
        f'<text x="{LEFT}" y="18">records by client and class</text>\n' + "".join(bars) + legend + "</svg>\n"
    )


def _bar(place: int, client: str, classes: Sequence[str], row: Sequence[int], longest: int) -> str:
    y = 30 + place * (BAR + GAP)
    text = y + BAR - 6
    parts = [f'<text x="{LEFT - 8}" y="{text}" text-anchor="end">{_words(client)}</text>\n']
    begun = 0
    for number, count in enumerate(row):
        left, right = (LEFT + at * WIDTH // longest for at in (begun, begun + count))
        begun += count
        if count:
            title = f"{_words(client)}: {count} of {_words(classes[number])}"
            parts.append(
                f'<rect x="{left}" y="{y}" width="{max(1, right - left)}" height="{BAR}" '
                f'fill="{colour(number, len(classes))}"><title>{title}</title></rect>\n'
            )
    parts.append(f'<text x="{LEFT + begun * WIDTH // longest + 6}" y="{text}">{begun}</text>\n')
    return "".join(parts)


def _legend(classes: Sequence[str], top: int) -> tuple[str, int]:
    """(what the colours mean, where it ends)"""
    columns, parts = 5, []
    for place, name in enumerate(classes):
        x, y = LEFT + place % columns * (WIDTH // columns), top + place // columns * ROW
        parts.append(
            f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour(place, len(classes))}"/>'
            f'<text x="{x + 18}" y="{y + 11}">{_words(name) or "all"}</text>\n'
        )
    return "".join(parts), top + -(-len(classes) // columns) * ROW


def _words(text: str) -> str:
    return escape(printable(text, _LONGEST))
