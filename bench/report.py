"""The figures as aligned tables, for people; the JSON file has all of them."""

import textwrap
from collections.abc import Sequence
from statistics import median

from bench.comparison import Against, Comparison, Result
from bench.models import Models, trouble_in
from bench.scaling import Point, Scaling, Slope
from bench.workplace import GB

HEAD = (
    "",
    "runs",
    "wall s",
    "import s",
    "the rest s",
    "CPU s",
    "peak GB",
    "read GB",
    "from disk",
    "written GB",
    "error",
)
NOTES = (
    "wall, import, CPU: the medians. import: a process that only imports the same modules.",
    "peak: the largest, of all processes together, mapped pages included.",
    "read, written (GB): through system calls, so without the mapped pages of safetensors' own reader; from disk (GB): "
    "what was not in the page cache, mapped pages included.",
    "error: the worst of the first, middle and last values of every tensor, in 2^-8 of the largest input; correct "
    "rounding gives at most 1.",
    "Only flctl and the plain copy wait for the disk (fsync).",
)
WIDTH = 118


def show_comparison(models: Models, comparison: Comparison) -> None:
    size = f"{len(models.contributions)} x {models.shape.billions} billion bf16 parameters, weights {models.weights}"
    rows = [_row(result) for result in (comparison.flctl, *comparison.rivals)]
    notes = [f"{result.name}: {result.note}" for result in (comparison.flctl, *comparison.rivals)]
    table(f"Average of {size}, inputs in the page cache", HEAD, rows, [*NOTES, *notes])
    rows = [row for against in comparison.against for row in _rows(against)]
    head = ("", "median s", "/ plain", "less import", "by pairs", "all runs, s")
    notes = [
        "plain: every contribution read once, then as much written as the output has, then fsync, with no arithmetic.",
        "by pairs: the median of the quotients of neighbouring runs, less the import.",
        "cold: page cache dropped before each run, the libraries read again.",
        f"sha256 over the contributions, in the page cache: {comparison.hashing:.2f} s; in no figure above.",
    ]
    if len(comparison.against) == 1:
        notes.append("No cold runs: only root may drop the page cache.")
    table("flctl and plain reading and writing, in turn", head, rows, notes)


def show_scaling(scaling: Scaling) -> None:
    head = ("", "sources", "GB moved", "from disk", "wall s", "CPU s", "peak MB", "plain s", "/ plain", "s per GB")
    rows = [_size(point) for point in scaling.points]
    notes = [*scaling.notes, "GB moved: contributions read and output written. The base is the first contribution."]
    table("flctl by size", head, rows, [*notes, *map(_line, scaling.slopes)])


def _row(result: Result) -> tuple[str, ...]:
    name = f"{result.name} {result.version}"
    if trouble := result.trouble or trouble_in(result.runs):
        peaks = [f"peak {done.run.peak / GB:.2f} GB" for done in result.runs]
        return name, "; ".join([trouble, *peaks])
    runs = [done.run for done in result.runs]
    wall = median(run.wall for run in runs)
    return (
        name,
        str(len(runs)),
        f"{wall:.2f}",
        f"{result.import_time:.2f}",
        f"{wall - result.import_time:.2f}",
        f"{median(run.cpu for run in runs):.2f}",
        f"{max(run.peak for run in runs) / GB:.2f}",
        f"{runs[0].read / GB:.2f}",
        f"{max(run.fetched for run in runs) / GB:.2f}",
        f"{runs[0].written / GB:.2f}",
        f"{max(done.error or 0 for done in result.runs):.2f}",
    )


def _rows(against: Against) -> list[tuple[str, ...]]:
    state = "cold" if against.cold else "warm"
    ours, plain = against.our_time, against.floor_time
    walls = " ".join(f"{done.run.wall:.2f}" for done in against.ours)
    totals = " ".join(f"{floor.total:.2f}" for floor in against.floor)
    floor = (f"plain, {state}", f"{plain:.2f}", "", "", "", totals)
    if against.trouble:
        return [floor, (f"flctl, {state}", against.trouble)]
    ratios = (f"{ours / plain:.2f}", f"{against.our_rest / plain:.2f}", f"{against.by_pairs:.2f}")
    return [floor, (f"flctl, {state}", f"{ours:.2f}", *ratios, walls)]


def _size(point: Point) -> tuple[str, ...]:
    name = f"{point.billions} billion, {'cold' if point.cold else 'warm'}"
    if point.trouble:
        return name, point.trouble
    return (
        name,
        str(point.contributions),
        f"{point.moved / GB:.2f}",
        f"{point.fetched / GB:.2f}",
        f"{point.wall:.2f}",
        f"{point.cpu:.2f}",
        f"{point.peak / 1e6:.0f}",
        f"{point.floor_time:.2f}",
        f"{point.wall / point.floor_time:.2f}",
        f"{point.wall / (point.moved / GB):.2f}",
    )


def _line(slope: Slope) -> str:
    return (
        f"{'cold' if slope.cold else 'warm'}: {slope.wall:.3f} s per GB and {slope.fixed:.2f} s besides "
        f"(off by at most {slope.miss:.2f} s), {slope.cpu:.3f} CPU s per GB, {slope.memory:.2f} MB of memory per GB"
    )


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    """The first column to the left, the others to the right. A row of two cells is a name and a remark."""
    whole = [head, *(row for row in rows if len(row) == len(head))]
    widths = [max(len(row[column]) for row in whole) for column in range(len(head))]
    widths[0] = max(len(row[0]) for row in [head, *rows])
    print(f"\n{title}\n")
    for row in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        print("  ".join([row[0].ljust(widths[0]), *(cells if len(row) == len(head) else row[1:])]).rstrip())
    print()
    for note in notes:
        print(textwrap.fill(note, WIDTH, subsequent_indent="  "))
