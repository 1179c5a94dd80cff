"""Owns how far a long row has come: one JSON line per finished step, so that one that was ended goes on from there."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.chaos import results


class Progress:
    """Steps by name and what came of each. `path` None: kept in memory. A file of another commit counts for nothing,
    nor does one of a checkout that differs from its commit."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.commit = path, results.commit()
        self._done: dict[str, Any] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else ():
            with suppress(ValueError):  # half a line: the run was ended there
                entry = json.loads(line)
                if self._counts(entry["commit"]):
                    self._done[entry["step"]] = entry["came"]

    def _counts(self, commit: str) -> bool:
        return commit == self.commit and not commit.endswith("+") and commit != "unknown"

    def once(self, step: str, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What came of a step: taken now, unless an earlier run of this commit took it."""
        if step not in self._done:
            self._done[step] = action()
            if self.path is not None:
                line = {"commit": self.commit, "step": step, "came": self._done[step]}
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("\n" + json.dumps(line))
        return self._done[step]

    def over(self) -> None:
        """All steps are taken and written down elsewhere: the next run begins anew."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def of(row: str, *, seed: int, trials: int) -> Progress:
    """Beside the results file, one for each part of a row."""
    name = f"results-{row.replace(' ', '-')}-{seed}-{trials}.jsonl"
    return Progress(results.results_file().with_name(name))
