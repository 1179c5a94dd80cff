"""The program that merges at a site: an order and the folders it names in, the next model and its rule's state out."""

import json
import os
import signal
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flctl import __version__
from flctl.codec import from_data
from flctl.errors import FlctlError, Interrupted, defect
from flctl.model.job import Recipe, Source
from flctl.model.merge import merge
from flctl.model.shards import open_shards
from flctl.model.state import read_state
from flctl.records import SiteMerge

TOLD = 10  # per cent between two lines of the log


def merge_here() -> int:
    """Do what the job's environment says. What fails ends in one line that the job's record repeats."""
    try:
        obey(os.environ)
    except FlctlError as error:
        print(f"flctl: error: {error.message}", flush=True)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        print(f"flctl: error: {defect(error).message}", flush=True)
        return 1
    return 0


def obey(environment: Mapping[str, str]) -> None:
    """Merge as FLCTL_ORDER says, into FLCTL_OUT. A merge cut short is worth nothing, so it ends by itself only once
    FLCTL_DEADLINE has come; SIGUSR1, which comes earlier, stays ignored."""
    order = json.loads(Path(environment["FLCTL_ORDER"]).read_bytes())
    asked: SiteMerge = from_data(SiteMerge, order["merge"])
    names = [subject["name"] for subject in order["subjects"]]
    folders = dict(zip(names, map(Path, environment["FLCTL_SUBJECTS"].split("\n")), strict=True))
    base, out = Path(environment["FLCTL_MODEL"]), Path(environment["FLCTL_OUT"])
    draft = out.with_name(".merged")
    began, progress = time.monotonic(), _Progress(open_shards(base).size)
    watch = _Watch(float(environment["FLCTL_DEADLINE"]))
    try:
        made = merge(
            base,
            sources_of(asked, folders, base),
            draft,
            recipe=Recipe(rule=asked.rule, options=asked.options, master=asked.master),
            state=read_state(folders.get(f"{base.name}-state", base / "state")),
            progress=progress,
            stop=watch,
        )
    except Interrupted as error:
        raise Interrupted(f"{watch.reason()}; {progress.share} % was merged, which is worth nothing") from error
    draft.rename(out)
    coefficients = {part.name: made.coefficients[part.site, part.number] for part in asked.parts}
    seconds = round(time.monotonic() - began, 3)
    by = {"flctl": __version__, "torch": torch.__version__.split("+")[0]}
    metrics = {"coefficients": coefficients, "seconds": seconds, **by}
    (out / "metrics.json").write_text(json.dumps(metrics))


def sources_of(asked: SiteMerge, folders: Mapping[str, Path], base: Path) -> list[Source]:
    return [
        Source(
            site=part.site,
            number=part.number,
            folder=folders[part.name],
            weight=part.weight,
            steps=part.steps,
            base=None if f"{part.base:04d}" == base.name else folders[f"{part.base:04d}"],
        )
        for part in asked.parts
    ]


class _Watch:
    """Whether the merge is to stop."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.ended = False
        signal.signal(signal.SIGTERM, self._end)

    def __call__(self) -> bool:
        return self.ended or time.time() > self.deadline

    def reason(self) -> str:
        if self.ended:
            return "ended by SIGTERM"
        return "the walltime is nearly over: the site's profile must give its jobs more"

    def _end(self, number: int, frame: Any) -> None:
        self.ended = True


class _Progress:
    """Tells the log how far the merge is."""

    def __init__(self, total: int) -> None:
        self.total = max(1, total)
        self.share = 0
        self.told = 0

    def __call__(self, written: int) -> None:
        self.share = 100 * written // self.total
        if self.share >= self.told + TOLD:
            self.told = self.share - self.share % TOLD
            print(f"merged {self.told} %", flush=True)
