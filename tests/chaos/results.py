"""Owns the results of the chaos rows: one JSON line per part of a row that was run, and the table of them all."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "tests" / "chaos" / "results.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the table. `trials`: how many the full aim asks for; `sample`: how many of them `make chaos` runs;
    `parts`: into how many runs of at most 90 minutes `make chaos-all` divides the aim."""

    aim: str
    trials: int
    sample: int
    parts: int = 1


ROWS: dict[str, Row] = {
    "crash matrix": Row(aim="300 points: 0 doubles, 0 lost rounds, same hash", trials=600, sample=40, parts=6),
    "submit cuts": Row(aim="600 trials: 0 doubles, every id recovered", trials=600, sample=60, parts=2),
    "power cuts": Row(aim="200 cuts: 0 acknowledged transitions lost", trials=200, sample=40),
    "black holes": Row(aim="60 points, none longer than 90 s", trials=60, sample=20),
    "controller down": Row(aim="1 h: completes without a person", trials=1, sample=1),
    "site away": Row(aim="24 h: completes without a person", trials=1, sample=1),
    "login week": Row(aim="7 days: at most 12 logins a day, 0 lock-outs", trials=7, sample=7),
    "hostile files": Row(aim="60 files, none accepted, each <= 2 s and 256 MB", trials=60, sample=60),
    "hostile sender": Row(aim="15 attacks, none succeeds", trials=15, sample=15),
    "injection": Row(aim="100,000 strings, 0 escapes", trials=100_000, sample=10_000),
    "etiquette": Row(aim="<= 1 query per site and 60 s", trials=1, sample=1),
    "restart": Row(aim="20 restarts <= 2 s plus the login", trials=20, sample=20),
    "soak": Row(aim="30 rounds, all committed, memory and files flat", trials=30, sample=5),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one run of a row came to. `figures`: what else was measured (numbers or short texts); `worst`, if there, is
    what the table shows; `notes`: one line per failure."""

    row: str
    trials: int
    failures: int
    seconds: float
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.row not in ROWS:
            raise ValueError(f"no row {self.row!r}; there are: {', '.join(ROWS)}")


def record(row: str, *, trials: int, failures: int, seconds: float, **figures: Any) -> Result:
    """Append one line for a row to the results file, with commit, time and machine."""
    result = Result(row=row, trials=trials, failures=failures, seconds=seconds, figures=figures)
    append(result)
    return result


def append(result: Result, *, seed: int | None = None, part: str = "", path: Path | None = None) -> None:
    """One line of the results file; `part`: "k/n" of a row that is run in parts."""
    line = {
        "row": result.row,
        "trials": result.trials,
        "failures": result.failures,
        "seconds": round(result.seconds, 1),
        "figures": dict(result.figures),
        "notes": list(result.notes)[:20],
        "seed": seed,
        "part": part,
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
    }
    with (path or results_file()).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def results_file() -> Path:
    """FLCTL_CHAOS_RESULTS, else tests/chaos/results.jsonl."""
    return Path(os.environ.get("FLCTL_CHAOS_RESULTS") or DEFAULT)


def commit() -> str:
    """The short commit, with a `+` where the checkout differs from it."""

    def git(*argv: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *argv], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read(path: Path | None = None) -> list[dict[str, Any]]:
    path = path or results_file()
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: of each row the lines of its newest commit, added up over its parts."""
    shown = ["| row | aim | trials | failures | worst | commit |", "|---|---|---|---|---|---|"]
    for name, row in ROWS.items():
        of_row = [line for line in lines if line["row"] == name]
        newest = [line for line in of_row if line["commit"] == of_row[-1]["commit"]]
        parts = list({(line["part"], line["seed"]): line for line in newest}.values())
        trials, failures = (sum(line[key] for line in parts) for key in ("trials", "failures"))
        worst = _worst([line["figures"]["worst"] for line in parts if "worst" in line["figures"]])
        if distinct := set().union(*(line["figures"].get("distinct", ()) for line in parts)):
            worst = f"{len(distinct)} distinct points; {worst}"
        cells = (f"{trials:,}", str(failures), worst, newest[-1]["commit"]) if parts else ("not run", "", "", "")
        shown.append(f"| {name} | {row.aim} | {' | '.join(cells)} |")
    return "\n".join(shown) + "\n"


def _worst(found: Sequence[Any]) -> str:
    numbers = [item for item in found if isinstance(item, (int, float))]
    if len(numbers) == len(found):
        return f"{max(numbers):g}" if numbers else ""
    return "; ".join(dict.fromkeys(str(item) for item in found))
