"""`make bench-aggregate`: what one average of three 1.1-billion-parameter checkpoints costs, flctl beside its rivals
and beside plain reading and writing. `--scaling`: how flctl's cost grows with the size of the model.

Linux only. Where root runs it, it drops the machine's page cache."""

import argparse
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from bench.checkpoints import SMALL, TINYLLAMA
from bench.comparison import Comparison, compare
from bench.measure import can_drop_caches
from bench.models import Models, made
from bench.report import show_comparison, show_scaling
from bench.rivals import RIVALS
from bench.scaling import THREE, scale
from bench.workplace import GB, machine, require, workplace

NAMES = [rival.name.lower() for rival in RIVALS]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.aggregate", description=__doc__)
    parser.add_argument("--scaling", action="store_true", help="flctl by size instead of the comparison")
    parser.add_argument("--folder", type=Path, help="where to make the checkpoints; they are kept there and used again")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--repetitions", type=int, help="of flctl and of the plain copy (5; with --scaling 3)")
    parser.add_argument("--rival-repetitions", type=int, default=1, help="of each rival (%(default)s)")
    parser.add_argument("--rivals", default=",".join(NAMES), help="which ones, by comma (%(default)s)")
    parser.add_argument("--small", action="store_true", help="0.27 billion parameters, to try the benchmark itself")
    return parser.parse_args()


def main() -> None:
    try:
        sys.exit(measured(arguments()))
    except KeyboardInterrupt:
        sys.exit("stopped")


def measured(options: argparse.Namespace) -> bool:
    """Whether flctl failed; a rival's failure is a figure."""
    began = datetime.now(UTC).isoformat(timespec="seconds")
    record: dict[str, object] = {"began": began, "machine": machine()}
    with workplace(options.folder) as root:
        if options.scaling:
            scaling = scale(root, options.repetitions or 3)
            _keep(options.json, record | {"scaling": asdict(scaling)})
            show_scaling(scaling)
            return any(point.trouble for point in scaling.points)
        models, comparison = compared(root, options)
        _keep(options.json, record | {"comparison": asdict(comparison)})
        show_comparison(models, comparison)
        return any(against.trouble for against in comparison.against)


def compared(root: Path, options: argparse.Namespace) -> tuple[Models, Comparison]:
    shape = SMALL if options.small else TINYLLAMA
    chosen = [name for name in options.rivals.lower().split(",") if name]
    if unknown := set(chosen) - set(NAMES):
        sys.exit(f"no rival is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    require(root, 6 * shape.size)
    print(f"four checkpoints of {shape.size / GB:.1f} GB each, in {root}", file=sys.stderr, flush=True)
    models = made(root, shape, THREE)
    times = options.repetitions or 5, options.rival_repetitions
    return models, compare(models, chosen, *times, cold=can_drop_caches())


def _keep(file: Path | None, record: dict[str, object]) -> None:
    if file:
        file.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
