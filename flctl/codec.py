"""Owns the codec of records: dataclasses to JSON and back, with their schema and the checksum that each carries."""

import dataclasses
import json
import types
import typing
from enum import StrEnum
from functools import cache
from hashlib import sha256

SCHEMA = 1


def to_data(value: typing.Any) -> typing.Any:
    """A record as JSON-ready data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_data(item) for item in value]
    if isinstance(value, dict):
        return {key: to_data(item) for key, item in value.items()}
    return value


CHECK = "check"
"""The last key of a record on disk: the sha256 of the record without it."""


def sealed(data: "typing.Mapping[str, typing.Any]") -> dict[str, typing.Any]:
    """A record's data as it is written: with its schema and its checksum."""
    record = {**data, "schema": data.get("schema", SCHEMA)}
    record.pop(CHECK, None)
    return {**record, CHECK: checksum(record)}


def unsealed(data: typing.Any) -> dict[str, typing.Any]:
    """The data of a record without its checksum; ValueError if it does not agree. Records of older versions, and those
    from which a person took it, have none."""
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")
    record = {key: value for key, value in data.items() if key != CHECK}
    told = data.get(CHECK)
    if told is None:
        last = next(reversed(record), None)
        rest = {key: value for key, value in record.items() if key != last}
        if last is not None and record[last] == checksum(rest):
            raise ValueError(f"the name of its checksum is {last!r}")
    elif told != checksum(record):
        hint = f'changed by hand? then remove its last key, "{CHECK}"'
        raise ValueError(f"its content does not agree with its checksum ({hint})")
    return record


def checksum(record: "typing.Mapping[str, typing.Any]") -> str:
    """sha256 of a record as JSON: keys sorted, no white space."""
    plain_data = json.loads(json.dumps(record))
    text = json.dumps(plain_data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def from_data(kind: typing.Any, data: typing.Any) -> typing.Any:
    """The record of type `kind` that `to_data` wrote. Unknown keys are dropped (a newer flctl may have added them);
    a missing or wrongly typed one raises ValueError."""
    try:
        return _decode(kind, data)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a {getattr(kind, '__name__', kind)}: {error}") from error


@cache
def _hints(kind: type) -> dict[str, typing.Any]:
    return typing.get_type_hints(kind)


def _decode(kind: typing.Any, data: typing.Any) -> typing.Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is typing.Any:
        return data
    if origin in (types.UnionType, typing.Union):
        inner = [argument for argument in arguments if argument is not type(None)]
        return None if data is None else _decode(inner[0], data)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(arguments[0], item) for item in data)
        return tuple(_decode(argument, item) for argument, item in zip(arguments, data, strict=True))
    if origin is dict:
        return dict(data)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{key: _decode(hints[key], item) for key, item in data.items() if key in hints})
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) and not issubclass(kind, StrEnum):
        raise TypeError(f"{data!r} is not a {kind.__name__}")
    return kind(data)
