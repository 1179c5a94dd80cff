"""Owns reading a TOML file into frozen dataclasses: unknown keys, types and values, told all at once and by key."""

import dataclasses
import difflib
import json
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from flctl.errors import ConfigurationError

T = TypeVar("T")

_ADAPTERS: dict[Any, Any] = {}

SECRET = re.compile(r"-----BEGIN [A-Z0-9 ]*-----|otpauth(-migration)?://", re.IGNORECASE)
REFERENCES = "command:PROGRAM ARGUMENTS, file:PATH, env:NAME or keyring:SERVICE/NAME"


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """Marks a field, in `Annotated[str, Check(...)]`, with a function that gives the value back (or what it stands
    for) or raises ValueError with the reason. `before`: it sees the value before its type is checked."""

    function: Callable[[Any], Any]
    before: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        if self.before:
            return core_schema.no_info_before_validator_function(self.function, handler(source))
        return core_schema.no_info_after_validator_function(self.function, handler(source))


def like(pattern: str, what: str, *, empty: bool = True) -> Check:
    """The text matches the pattern as a whole, or is empty where that is allowed."""
    compiled = re.compile(pattern, re.ASCII)

    def check(value: str) -> str:
        if not (empty and value == "") and not compiled.fullmatch(value):
            raise ValueError(f"{value!r} is not {what}")
        return value

    return Check(check)


def between(least: float, most: float = 1 << 31) -> Check:
    def check(value: float) -> float:
        if not least <= value <= most:
            raise ValueError(f"{value} is not between {least} and {most}")
        return value

    return Check(check)


def load_table(path: Path, kind: type[T]) -> T:
    """The file as a `kind`; ConfigurationError naming the file and, one per line, each key that is wrong and why."""
    data = _parse(path)
    problems = [*_unknown(kind, data, ()), *_unfit(data, ())]
    if problems:
        raise refused(path, problems)
    from pydantic import ValidationError

    try:
        # Through JSON, since strict types then still let an array be a tuple and a table a dataclass.
        read: T = _adapter(kind).validate_json(json.dumps(data), strict=True)
        return read
    except ValidationError as error:
        problems = [f"{dotted(item['loc'])}: {_reason(item)}" for item in error.errors(include_url=False)]
        raise refused(path, problems) from None  # pydantic's own text repeats the values, secrets among them


def _adapter(kind: Any) -> Any:
    """Made once for each kind: it costs several milliseconds."""
    if kind not in _ADAPTERS:
        from pydantic import TypeAdapter

        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def refused(path: Path, problems: list[str]) -> ConfigurationError:
    if len(problems) == 1:
        text = f"{path}: {problems[0]}"
    else:
        text = f"{path}: {len(problems)} problems\n" + "\n".join(f"  {problem}" for problem in problems)
    return ConfigurationError(text, hint=f"correct {path}")


def nearest(name: str, known: typing.Iterable[str]) -> str | None:
    known = list(known)
    longer = [word for word in known if len(name) > 3 and name in word]
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or longer
    return found[0] if found else None


def dotted(place: typing.Iterable[str | int]) -> str:
    """A key as TOML writes it: `shapes.prod.nodes`, `login.host_keys (item 1)`."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f" (item {part + 1})"
        else:
            word = part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else json.dumps(part)
            text += f".{word}" if text else word
    return text or "the file"


def keys_of(kind: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key that a file of this kind may hold; `*` stands for a name of the user's own."""
    for name, inner in _fields(kind).items():
        here = (*place, name)
        yield here
        item = _item(inner)
        if dataclasses.is_dataclass(inner):
            yield from keys_of(inner, here)
        elif item is not None:
            yield from keys_of(item, (*here, "*"))


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}", hint="is the path right?") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text (byte {error.start})", hint="save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}", hint=f"correct {path}") from None


def _fields(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _item(annotation: Any) -> Any:
    """The dataclass that a table of tables (`dict[str, Shape]`) holds, or None."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict and dataclasses.is_dataclass(arguments[1]):
        return arguments[1]
    return None


def _unknown(kind: Any, data: Mapping[str, Any], place: tuple[str, ...]) -> Iterator[str]:
    fields = _fields(kind)
    for key, value in data.items():
        here = (*place, key)
        if key not in fields:
            yield f"{dotted(here)}: unknown key; {_advice(kind, key, place)}"
        elif dataclasses.is_dataclass(fields[key]) and not isinstance(value, dict):
            yield f"{dotted(here)}: must be a table, which may hold: {', '.join(_fields(fields[key]))}"
        elif isinstance(value, dict):
            inner = fields[key]
            item = _item(inner)
            if dataclasses.is_dataclass(inner):
                yield from _unknown(inner, value, here)
            elif item is not None:
                for name, table in value.items():
                    if isinstance(table, dict):
                        yield from _unknown(item, table, (*here, name))


def _advice(kind: Any, key: str, place: tuple[str, ...]) -> str:
    close = nearest(key, _fields(kind))
    if close:
        return f"did you mean {dotted((*place, close))}?"
    return f"known here: {', '.join(_fields(kind))}"


def _unfit(value: Any, place: tuple[str | int, ...]) -> Iterator[str]:
    """What no value may be, whatever its key: text with control characters, a secret, a date, not a finite number."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not key.isprintable():
                yield f"{dotted(place)}: {key!r} holds a control character; names are printable"
            yield from _unfit(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unfit(item, (*place, index))
    elif isinstance(value, str):
        if SECRET.search(value):
            yield f"{dotted(place)}: holds a secret; profiles hold references only: {REFERENCES}"
        elif not value.isprintable():
            bad = next(character for character in value if not character.isprintable())
            yield f"{dotted(place)}: holds the control character {bad!r}; text is one printable line"
    elif isinstance(value, float) and value - value != 0:
        yield f"{dotted(place)}: {value} is not a finite number"
    elif not isinstance(value, (bool, int, float)):
        yield f"{dotted(place)}: dates and times are not used here; write text in quotes"


def _reason(item: Any) -> str:
    kind, message = item["type"], str(item["msg"])
    if kind in ("missing", "missing_keyword_only_argument"):
        return "is missing"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    words = {
        "Input should be": "must be",
        "an object": "a table",
        "a valid integer": "a whole number",
        "a valid ": "a ",
    }
    for theirs, ours in words.items():
        message = message.replace(theirs, ours)
    return message
