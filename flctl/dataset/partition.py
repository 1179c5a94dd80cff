"""Owns a partition: counted, divided, and written as one file per client, with a record and a picture of it."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path

from flctl.dataset.draws import stream
from flctl.dataset.methods import ByClass, Counts, Dirichlet, DualDirichlet, Method, divide
from flctl.dataset.picture import picture
from flctl.dataset.sources import Choose, Source, open_source
from flctl.durable import fsync_folder, fsync_folders, make_folder, move, remove
from flctl.errors import ConfigurationError, UsageError

CLIENTS, CLASSES = 500, 1000  # the most
ALPHA = (Decimal("1e-6"), Decimal("1e6"))
NAMES: Mapping[type[Method], str] = {DualDirichlet: "dual-dirichlet", Dirichlet: "dirichlet", ByClass: "class"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """`counts` are records by client and class; `classes` are sorted by name."""

    clients: Sequence[str]
    classes: Sequence[str]
    counts: Counts
    method: Method
    seed: int
    field: str
    files: Sequence[Path]

    @property
    def empty(self) -> list[str]:
        return [name for name, row in zip(self.clients, self.counts, strict=True) if not any(row)]

    def record(self) -> dict[str, object]:
        """As JSON; nothing in it depends on the machine."""
        options = {key: float(value) if isinstance(value, Decimal) else value for key, value in _options(self.method)}
        return {
            "schema": 1,
            "method": NAMES[type(self.method)],
            "options": options,
            "seed": self.seed,
            "by": self.field or None,
            "files": [path.name for path in self.files],
            "classes": list(self.classes),
            "clients": {name: list(row) for name, row in zip(self.clients, self.counts, strict=True)},
        }


def method_of(name: str, clients: int, classes: int, options: Mapping[str, str]) -> Method:
    """The method of that name with `options` as the user gave them, the rest as published. UsageError."""
    known = {
        "dual-dirichlet": ("alpha-size", "alpha-class"),
        "dirichlet": ("alpha",),
        "class": ("classes-per-client",),
    }
    if foreign := [key for key in options if key not in known[name]]:
        raise UsageError(
            f"--{foreign[0]} says nothing to --method {name}", hint=f"it has --{' and --'.join(known[name])}"
        )
    if name == "class":
        return _by_class(options.get("classes-per-client", ""), clients, classes)
    if name == "dirichlet":
        return Dirichlet(alpha=_alpha("alpha", options.get("alpha", "0.5")))
    return DualDirichlet(
        alpha_size=_alpha("alpha-size", options.get("alpha-size", str(clients))),
        alpha_class=_alpha("alpha-class", options.get("alpha-class", "0.5")),
    )


def _alpha(key: str, text: str) -> Decimal:
    try:
        value = Decimal(text)
    except ArithmeticError:
        raise UsageError(f"--{key} {text} is no number", hint=f"--{key} 0.5") from None
    if not (value.is_finite() and ALPHA[0] <= value <= ALPHA[1]):
        raise UsageError(f"--{key} {text} is not between {ALPHA[0]:f} and {ALPHA[1]:f}", hint=f"--{key} 0.5")
    return value


def _by_class(text: str, clients: int, classes: int) -> ByClass:
    """Without a word of the user's as published for 10 classes, 5-6 for 5 clients and 3-5 for more, as far as these
    classes allow."""
    if not text:
        least, most = (5, 6) if clients == 5 else (3, 5)
        return ByClass(least=min(least, classes), most=min(classes, max(most, -(-classes // clients))))
    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise UsageError(f"--classes-per-client {text} is no range", hint="--classes-per-client 3-5")
    return ByClass(least=least, most=most)


def client_names(words: Sequence[str]) -> list[str]:
    """`4` is client-1 to client-4; else the names themselves. UsageError."""
    if len(words) == 1 and words[0].isdecimal():
        count = int(words[0][:6])
        names = [f"client-{number:0{len(words[0])}}" for number in range(1, min(count, CLIENTS + 1) + 1)]
    else:
        names = list(words)
    if not 1 <= len(names) <= CLIENTS:
        raise UsageError(f"--clients asks for {' '.join(words)[:40]}, but 1 to {CLIENTS} are possible")
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", name) or names.count(name) > 1:
            raise UsageError(
                f"--clients: {name[:80]} is {'there twice' if names.count(name) > 1 else 'no name of a client'}",
                hint="--clients 4, or names of letters, digits, - and _: --clients leonardo karolina",
            )
    return names


def plan(
    files: Sequence[Path], field: str, clients: Sequence[str], method: str, options: Mapping[str, str], seed: int
) -> tuple[Source, Partition]:
    """Count the records and divide them; nothing is written. ConfigurationError, UsageError."""
    if method == "class" and not field:
        raise UsageError("--method class needs to know the classes", hint="--by FIELD")
    source = open_source(files, field)
    found: Counter[str] = Counter()
    for name in source.classes():
        found[name] += 1
        if len(found) > CLASSES:
            raise ConfigurationError(
                f'"{field}" has more than {CLASSES} different values: it names no class', hint="--by another field"
            )
    if not found:
        raise ConfigurationError(f"there are no records in {', '.join(map(str, files))}")
    classes = sorted(found)
    chosen = method_of(method, len(clients), len(classes), options)
    counts = divide(chosen, [found[name] for name in classes], len(clients), seed)
    return source, Partition(
        clients=clients, classes=classes, counts=counts, method=chosen, seed=seed, field=field, files=files
    )


def write(source: Source, partition: Partition, out: Path) -> list[Path]:
    """Make the folder `out` (absent or empty): a file per client, partition.json and partition.svg. Returns the
    clients' files. The same dataset and seed give the same bytes; a failure leaves nothing. ConfigurationError."""
    if partition.empty:
        raise ConfigurationError(
            f"{', '.join(partition.empty)} would get no records",
            hint="larger alphas, another --seed, fewer clients; --dry-run shows the counts",
        )
    check_new(out)
    draft = out.with_name(f".{out.name}.draft")
    names = [f"{client}{source.suffix}" for client in partition.clients]
    try:
        remove(draft)
        make_folder(draft)
        source.write([draft / name for name in names], _assigner(partition))
        (draft / "partition.json").write_text(json.dumps(partition.record(), indent=1, ensure_ascii=False) + "\n")
        (draft / "partition.svg").write_text(picture(partition.clients, partition.classes, partition.counts))
        for path in draft.iterdir():
            _flush(path)
        fsync_folders(draft)
        if out.exists():
            out.rmdir()
        move(draft, out)
        fsync_folder(out.parent)
    except OSError as error:
        remove(draft)
        raise ConfigurationError(f"cannot write {out}: {error}") from None
    except BaseException:
        remove(draft)
        raise
    return [out / name for name in names]


def check_new(out: Path) -> None:
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigurationError(f"{out} exists and is no empty folder; nothing is overwritten", hint="name another")


def _assigner(partition: Partition) -> Choose:
    """Deals the records of each class at random, as they come, until every client has what it is to get."""
    left = {name: [row[place] for row in partition.counts] for place, name in enumerate(partition.classes)}
    dice = {name: stream(partition.seed, "records", place) for place, name in enumerate(partition.classes)}

    def choose(name: str) -> int:
        rest = left.get(name, [])
        if not (total := sum(rest)):
            raise ConfigurationError("the dataset changed while it was read", hint="the same command again")
        place = int(dice[name].random() * total)
        for client, count in enumerate(rest):
            if place < count:
                rest[client] -= 1
                return client
            place -= count
        raise AssertionError("a place below the sum is in one of its parts")

    return choose


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _options(method: Method) -> list[tuple[str, object]]:
    return sorted(asdict(method).items())
