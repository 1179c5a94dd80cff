"""`make bench`: how long flctl takes to say something, next to importing typer; medians of 11 pairs."""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PAIRS = 11
LIMIT = 2.5


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def pairs(command: list[str], rival: list[str]) -> tuple[float, float]:
    """Medians of both, measured in turn so that a busy machine slows both."""
    seconds(command), seconds(rival)
    times = [(seconds(command), seconds(rival)) for _ in range(PAIRS)]
    return statistics.median(ours for ours, _ in times), statistics.median(theirs for _, theirs in times)


def main() -> None:
    from flctl.campaign.demonstration import build

    with tempfile.TemporaryDirectory() as folder:
        workspace = build(Path(folder) / "demo", python=sys.executable, seed=0)
        flctl = [sys.executable, "-m", "flctl.cli.main"]
        typer = [sys.executable, "-c", "import typer"]
        worst = 0.0
        for name, words in (("--help", ["--help"]), ("status", ["-C", str(workspace.root), "status"])):
            ours, theirs = pairs(flctl + words, typer)
            worst = max(worst, ours / theirs)
            figures = f"{ours * 1000:6.0f} ms   import typer {theirs * 1000:6.0f} ms   ratio {ours / theirs:.2f}"
            print(f"flctl {name:8} {figures}")
    print(f"limit {LIMIT}: {'kept' if worst <= LIMIT else 'BROKEN'}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
