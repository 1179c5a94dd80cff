"""Owns reading the records that a site wrote: strict JSON, or none at all. A site's program may write what it likes."""

import json
import math
import re
from typing import Any

MOST = 1 << 20
"""Letters of a record."""

DEEPEST = 12
"""Tables within tables; flctl's own records have at most 9."""

DIGITS = 18
"""Of a whole number."""

_PLAIN_WORD = re.compile(r"[A-Za-z0-9:._-]{1,40}")
_PLAIN_NAME = re.compile(r"[\w./:-]{1,80}")


def table_of(text: str) -> dict[str, Any] | None:
    """The JSON object that a site wrote; None if it is none, or is too long, too deep, holds a key twice (two readers
    could differ) or a number beyond all measure. NaN and the infinities, which JSON does not have, are null."""
    if len(text) > MOST:
        return None
    try:
        data = json.loads(
            text, object_pairs_hook=_table, parse_int=_whole, parse_float=_finite, parse_constant=lambda word: None
        )
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) and not _deeper(data, DEEPEST) else None


def numbers_only(value: Any) -> Any:
    """What of a site's metrics is kept: numbers by name, and short plain words such as a device's; never text. The
    site's own seal.py says the same, but it is the site's."""
    if isinstance(value, dict):
        kept = {key: numbers_only(item) for key, item in value.items() if _PLAIN_NAME.fullmatch(key)}
        return {key: item for key, item in kept.items() if item is not None}
    if isinstance(value, bool | int | float):
        return value
    return value if isinstance(value, str) and _PLAIN_WORD.fullmatch(value) else None


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError("a number beyond all measure")
    return int(digits)


def _finite(digits: str) -> float | None:
    return value if math.isfinite(value := float(digits)) else None


def _deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
    return any(isinstance(item, dict | list) for item in level)
