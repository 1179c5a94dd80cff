"""Owns the files of a dataset: JSON lines and Parquet, read twice (to count, to write) and never held whole."""

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from flctl.errors import ConfigurationError, UsageError

SUFFIXES = (".jsonl", ".parquet")
_ROWS = 4096  # of a Parquet file that are in memory at once

Choose = Callable[[str], int]
"""The place of the client that gets the next record of a class."""


class Source(Protocol):
    suffix: str

    def classes(self) -> Iterator[str]:
        """The class of each record, in order. ConfigurationError."""
        ...

    def write(self, paths: Sequence[Path], choose: Choose) -> None:
        """Write each record into the file of the client that is chosen for it, in order. OSError."""
        ...


def open_source(files: Sequence[Path], field: str) -> Source:
    """The dataset that the files make up, in this order; `field` of a record is its class (empty: all are of one)."""
    suffixes = {path.suffix.lower() for path in files}
    for path in files:
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            raise ConfigurationError(
                f"{path}: {'no file of ' + ' or '.join(SUFFIXES) if path.exists() else 'is not there'}",
                hint="one JSON object per line in a .jsonl file, or a .parquet file",
            )
    if len(suffixes) > 1:
        raise UsageError("the files are of several kinds", hint="divide .jsonl and .parquet files apart")
    return JsonLines(files, field) if suffixes == {".jsonl"} else Parquet(files, field)


class JsonLines:
    """Lines travel byte for byte; blank ones are left out."""

    suffix = ".jsonl"

    def __init__(self, files: Sequence[Path], field: str) -> None:
        self._files, self._field = files, field

    def classes(self) -> Iterator[str]:
        for name, _ in self._records():
            yield name

    def write(self, paths: Sequence[Path], choose: Choose) -> None:
        with ExitStack() as open_files:
            files = [open_files.enter_context(path.open("xb")) for path in paths]
            for name, line in self._records():
                files[choose(name)].write(line.rstrip(b"\r\n") + b"\n")

    def _records(self) -> Iterator[tuple[str, bytes]]:
        for path in self._files:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield self._class(line, f"{path}:{number}"), line

    def _class(self, line: bytes, place: str) -> str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{place}: not JSON: {error}", hint="one JSON object per line") from None
        if not isinstance(record, dict):
            raise ConfigurationError(f"{place}: not a JSON object", hint="one JSON object per line")
        if not self._field:
            return ""
        if self._field not in record:
            raise _no_field(place, self._field, list(record))
        return _name(record[self._field], place, self._field)


class Parquet:
    """Rows travel with the first file's schema. Needs pyarrow."""

    suffix = ".parquet"

    def __init__(self, files: Sequence[Path], field: str) -> None:
        try:
            self._arrow, self._parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
        except ImportError:
            raise ConfigurationError(
                "reading Parquet needs pyarrow, which is not installed", hint="pip install pyarrow"
            ) from None
        self._files, self._field = files, field
        self._schema = self._opened(files[0]).schema_arrow
        for path in files:
            schema = self._opened(path).schema_arrow
            if field and field not in schema.names:
                raise _no_field(str(path), field, schema.names)
            if not schema.equals(self._schema):
                raise ConfigurationError(f"{path}: its columns are not those of {files[0]}", hint="divide them apart")

    def classes(self) -> Iterator[str]:
        for path, batch in self._batches([self._field] if self._field else []):
            yield from self._classes(path, batch)

    def write(self, paths: Sequence[Path], choose: Choose) -> None:
        with ExitStack() as open_files:
            writers = [open_files.enter_context(self._parquet.ParquetWriter(path, self._schema)) for path in paths]
            for path, batch in self._batches(None):
                chosen = [choose(name) for name in self._classes(path, batch)]
                for client in sorted(set(chosen)):
                    rows = self._arrow.array([place for place, one in enumerate(chosen) if one == client])
                    writers[client].write_batch(batch.take(rows))

    def _opened(self, path: Path) -> Any:
        try:
            return self._parquet.ParquetFile(path)
        except (self._arrow.ArrowException, OSError) as error:
            raise ConfigurationError(f"{path}: not a Parquet file: {error}") from None

    def _batches(self, columns: list[str] | None) -> Iterator[tuple[Path, Any]]:
        for path in self._files:
            for batch in self._opened(path).iter_batches(_ROWS, columns=columns):
                yield path, batch

    def _classes(self, path: Path, batch: Any) -> list[str]:
        if not self._field:
            return [""] * batch.num_rows
        return [_name(value, str(path), self._field) for value in batch.column(self._field).to_pylist()]


def _name(value: object, place: str, field: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise ConfigurationError(
        f'{place}: "{field}" is {"null" if value is None else "no word and no number"}, which names no class',
        hint="--by another field, or leave such records out",
    )


def _no_field(place: str, field: str, names: list[str]) -> ConfigurationError:
    return ConfigurationError(f'{place}: there is no "{field}"', hint=f"--by one of: {', '.join(names)}")
