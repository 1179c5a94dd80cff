"""`python -m tests.chaos`: run a row, a seeded sample of every row, a part of the full aims, or print the table.

python -m tests.chaos rows                                # what rows there are
python -m tests.chaos "crash matrix" --trials 20 --seed 1 # one row; without --trials its full aim
python -m tests.chaos sample --seed 1                     # a sample of every row: make chaos
python -m tests.chaos all --part 1/3                      # a part of the full aims: make chaos-all PART=1/3
python -m tests.chaos table                               # the results file as one table
python -m tests.chaos page                                # the same, into docs/reliability.md
"""

import argparse
import importlib
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from tests.chaos import results
from tests.chaos.results import ROWS, Result

Row = Callable[..., Result]
PAGE = results.ROOT / "docs" / "reliability.md"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", help='"rows", "table", "page", "sample", "all", or a row')
    parser.add_argument("--trials", type=int, help="of a row: how many (all that its aim asks for)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", default="1/1", help='of "all": k/n')
    asked = parser.parse_args(argv)
    what = " ".join(asked.what).replace("_", " ")
    if what == "rows":
        for name, row in ROWS.items():
            print(f"{name:16} {row.aim}{'' if module(name) else '   (not written yet)'}")
        return 0
    if what == "table":
        print(results.table(results.read()), end="")
        return 0
    if what == "page":
        before, mark, rest = PAGE.read_text(encoding="utf-8").partition("<!-- table -->\n")
        after = rest[rest.index("<!-- /table -->") :]
        PAGE.write_text(before + mark + results.table(results.read()) + after, encoding="utf-8")
        return 0
    if what == "sample":
        return run_all([(name, row.sample, asked.seed, "sample") for name, row in ROWS.items()])
    if what == "all":
        return run_all(list(portion(asked.part)))
    if what not in ROWS:
        parser.error(f"no row {what!r}; there are: {', '.join(ROWS)}")
    return run_all([(what, asked.trials, asked.seed, "" if asked.trials is None else "sample")])


def portion(part: str) -> Iterator[tuple[str, int | None, int, str]]:
    """(row, trials, seed, part) of the k-th of n portions of the full aims. A row of several parts is spread over the
    portions, each with a seed of its own; what an earlier call of this commit has finished is left out."""
    k, n = (int(number) for number in part.split("/"))
    done = {(line["row"], line["part"]) for line in results.read() if line["commit"] == results.commit()}
    pieces = [
        (name, None if row.parts == 1 else -(-row.trials // row.parts), piece, f"{piece}/{row.parts}")
        for name, row in ROWS.items()
        for piece in range(1, row.parts + 1)
    ]
    for index, piece in enumerate(pieces):
        if index % n == k - 1 and (piece[0], piece[3]) not in done:
            yield piece


def run_all(pieces: list[tuple[str, int | None, int, str]]) -> int:
    """Run each and write its line at once; a row that cannot run counts as a failure, the others still run."""
    failures = 0
    for name, trials, seed, part in pieces:
        row = module(name)
        if row is None:
            print(f"{name}: not written yet", flush=True)
            continue
        print(f"{name}: {trials or 'all'} trials, seed {seed} ...", flush=True)
        began = time.monotonic()
        try:
            result = row(seed=seed, trials=trials)
        except Exception as error:
            traceback.print_exc()
            notes = (f"{type(error).__name__}: {error}",)
            result = Result(row=name, trials=0, failures=1, seconds=time.monotonic() - began, notes=notes)
        results.append(result, seed=seed, part=part)
        failures += result.failures
        figures = ", ".join(
            f"{key} {len(value) if isinstance(value, list) else value}" for key, value in result.figures.items()
        )
        print(
            f"{name}: {result.trials} trials, {result.failures} failures, {result.seconds:.0f} s; {figures}", flush=True
        )
        for note in result.notes:
            print(f"  {note}", flush=True)
    return 1 if failures else 0


def module(name: str) -> Row | None:
    """The function of a row; None while nobody has written it."""
    path = f"tests.chaos.{name.replace(' ', '_')}"
    if importlib.util.find_spec(path) is None:
        return None
    run: Row = importlib.import_module(path).run
    return run


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
