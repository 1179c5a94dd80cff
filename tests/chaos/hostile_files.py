"""The row "hostile files": what a site may leave where flctl looks for a contribution, taken through the real look at a
site's records, the real fetch and the real gates. None is accepted; each costs at most 2 s of this process's time and
256 MB of its memory.

A case changes a folder `out` that holds a right contribution, or the record of it. The cases run one after the other in
a process of their own: `python -m tests.chaos.hostile_files FOLDER [CASE ...]` prints a line of JSON for each.
"""

import ctypes
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flctl.errors import FlctlError
from tests.campaigns import Campaign
from tests.chaos.hostile_checkpoints import CHECKPOINTS, TRAP
from tests.chaos.results import Result

ROW = "hostile files"
SECONDS, MEGABYTES = 2.0, 256.0
Record = dict[str, Any]
Case = Callable[[Path, Record], object]
"""Spoils a folder, or the record of it. What it returns, if it is text, is the record as it is written."""


def _weights(out: Path) -> Path:
    return out / "model.safetensors"


def _other(make: Callable[[Path], object]) -> Case:
    """Something else than a file in the file's place; the record still tells of the file."""

    def case(out: Path, record: Record) -> None:
        _weights(out).unlink()
        make(_weights(out))

    return case


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)
        made.bind(path.name)
        os.chdir(here)


def _named(name: str) -> Case:
    """The right content under another name in the record, and there, where that can be."""

    def case(out: Path, record: Record) -> None:
        (entry,) = record["files"]
        entry["path"] = name
        if "\0" not in name and not name.startswith("/") and len(name) < 200:
            place = out / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                _weights(out).rename(place)

    return case


def _told(**values: Any) -> Case:
    return lambda out, record: record.update(values)


def _entry(**values: Any) -> Case:
    return lambda out, record: record["files"][0].update(values)


def _text(change: Callable[[str], str]) -> Case:
    return lambda out, record: change(json.dumps(record))


def _beside(name: str, content: bytes) -> Case:
    """A further file, which the record names rightly."""

    def case(out: Path, record: Record) -> None:
        (out / name).write_bytes(content)
        record["files"].append(entry_of(out, name))

    return case


def _index(files: dict[str, str]) -> Case:
    return _beside("model.safetensors.index.json", json.dumps({"weight_map": files}).encode())


def _sparse(size: int, *, lie: bool) -> Case:
    def case(out: Path, record: Record) -> None:
        os.truncate(_weights(out), size)
        if not lie:
            record["files"][0]["size"] = size

    return case


def _changed_later(out: Path, record: Record) -> None:
    with _weights(out).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\x00\x3f")


def _linked_folder(out: Path, record: Record) -> None:
    """The file is right, but the record names it through a link to a folder."""
    (out / "here").symlink_to(".")
    record["files"][0]["path"] = "here/model.safetensors"


def _checkpoint(spoil: Callable[[Path], None]) -> Case:
    """Another file in the file's place, and a record that tells of it rightly."""

    def case(out: Path, record: Record) -> None:
        spoil(_weights(out))
        record["files"] = [entry_of(out, path.name) for path in sorted(out.iterdir())]

    return case


def entry_of(out: Path, name: str) -> Record:
    with (out / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": name, "size": (out / name).stat().st_size, "sha256": digest}


FILES: dict[str, Case] = {
    "a link to a file of ours": _other(lambda path: path.symlink_to("/etc/passwd")),
    "a link to nothing": _other(lambda path: path.symlink_to("/nowhere")),
    "a link to itself": _other(lambda path: path.symlink_to(path.name)),
    "a link to the right file": lambda out, record: (
        _weights(out).rename(out / "real"),
        _weights(out).symlink_to("real"),
    ),
    "a name through a linked folder": _linked_folder,
    "a hard link to a file of ours": _other(lambda path: os.link("/etc/passwd", path)),
    "a pipe": _other(os.mkfifo),
    "a socket": _other(_socket),
    "a device that never ends": _other(lambda path: os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))),
    "a folder": _other(lambda path: path.mkdir()),
    "nothing": _other(lambda path: None),
    "a sparse file of 1 TB": _sparse(1 << 40, lie=False),
    "a sparse file of 1 TB that is said to be small": _sparse(1 << 40, lie=True),
    "a file that changed after its record": _changed_later,
    "a file longer than its record": lambda out, record: _weights(out).open("ab").write(b"x"),
    "a file shorter than its record": lambda out, record: os.truncate(_weights(out), 100),
    "another hash": _entry(sha256="0" * 64),
    "no hash": _entry(sha256=""),
    "a hash with a line end": _entry(sha256="0" * 63 + "\n"),
    "a size below zero": _entry(size=-1),
    "a size that is no number": _entry(size="many"),
    "a size beyond all measure": _entry(size=1e400),
    "a file twice": lambda out, record: record["files"].append({**record["files"][0], "size": 1}),
    "a million files": lambda out, record: record["files"].extend([{**record["files"][0]}] * 10_000),
    "a name that leads up": _named("../model.safetensors"),
    "a name that leads up from below": _named("a/../../../model.safetensors"),
    "an absolute name": _named("/tmp/model.safetensors"),
    "a name in a folder": _named("a/model.safetensors"),
    "the name of our own folder": _named(".flctl-incoming/model.safetensors"),
    "a name with a line end": _named("a\nmodel.safetensors"),
    "a name with a null": _named("a\0.safetensors"),
    "a name that looks like an option": _named("-model.safetensors"),
    "a name with commands": _named("$(id)`id`;id.safetensors"),
    "a name with an escape sequence": _named("\x1b]0;x\x07.safetensors"),
    "a name of 5000 letters": _named("x" * 5000 + ".safetensors"),
    "a name that is no text": _entry(path=["model.safetensors"]),
    "a pickle under a further name": _beside("extra.safetensors", b"\x80\x04cos\nsystem\n(S'id'\ntR."),
    "an index that leads up": _index({"a": "../../../models/0000/model.safetensors"}),
    "an index to an absolute name": _index({"a": "/etc/passwd"}),
    "an index to a pickle": _index({"a": "pytorch_model.bin"}),
    "an index beside a single file": _index({"a": "model.safetensors"}),
    "an index without end": _beside("model.safetensors.index.json", b'{"weight_map":' + b'{"a":' * 100_000),
    "an index too long": _beside("model.safetensors.index.json", b'{"weight_map":{' + b" " * (17 << 20) + b"}}"),
}

RECORDS: dict[str, Case] = {
    "no JSON": _text(lambda text: text[:-2]),
    "an array": _text(lambda text: f"[{text}]"),
    "a record twice": _text(lambda text: text + text),
    "a key twice": _text(lambda text: text.replace('"outcome": "done"', '"outcome": "failed", "outcome": "done"')),
    "nested without end": _text(lambda text: text[:-1] + ', "x": ' + "[" * 200_000 + "]" * 200_000 + "}"),
    "deeper than a record": _text(lambda text: text[:-1] + ', "x": ' + "[" * 50 + "]" * 50 + "}"),
    "10 MB": _text(lambda text: text[:-1] + ', "x": "' + "x" * (10 << 20) + '"}'),
    "10 MB of blanks before it": _text(lambda text: " " * (10 << 20) + text),
    "a number of a million digits": _text(lambda text: text.replace('"samples": 8', '"samples": ' + "9" * 900_000)),
    "samples beyond all measure": _told(samples=10**300),
    "samples below zero": _told(samples=-8),
    "samples that are no number": _told(samples="8"),
    "samples that are true": _told(samples=True),
    "samples that are no whole number": _told(samples=8.5),
    "samples that are NaN": _told(samples=float("nan")),
    "no steps": _told(steps=0),
    "another schema": _told(schema=2),
    "a schema in words": _told(schema="1"),
    "another token": _told(token="f00000000000000"),
    "another attempt": _told(attempt=2),
    "another run": _told(number=9),
    "another site": _told(site="pisa"),
    "another kind of work": _told(work="merge"),
    "another base": _told(base={"version": 0, "sha256": "0" * 64}),
    "no base": _told(base=None),
    "a base in a list": _told(base=[0, "0"]),
    "files that are a table": _told(files={"model.safetensors": 1}),
    "files that are words": _told(files=["model.safetensors"]),
    "no files": _told(files=[]),
    "files that are nothing": _told(files=None),
    "metrics that are text": _told(metrics="Nel mezzo del cammin"),
    "times in words": _told(started_at="yesterday"),
    "times beyond all measure": _told(ended_at=1e308),
    "an outcome of another kind": _told(outcome=["done"]),
    "an outcome in capitals": _told(outcome="DONE"),
}

CASES: dict[str, Case] = {
    **{f"checkpoint: {name}": _checkpoint(spoil) for name, spoil in CHECKPOINTS.items()},
    **{f"file: {name}": case for name, case in FILES.items()},
    **{f"record: {name}": case for name, case in RECORDS.items()},
}


class Stand:
    """A campaign with a local site, whose runs are written by hand and looked at by flctl."""

    def __init__(self, root: Path) -> None:
        from dataclasses import replace

        from flctl.campaign.config import load_configuration, load_profile
        from flctl.campaign.session import open_session
        from flctl.campaign.workspace import Workspace
        from flctl.facility.connection import Road, connect

        self.campaign = Campaign(root, ("brno",))
        self.workspace = Workspace(self.campaign.place)
        self.site = load_profile(self.workspace, "brno")
        known = load_configuration(self.workspace)
        # Room for the largest hostile header: of a model as small as this one, [fetch] size_factor would refuse it.
        self.configuration = replace(known, fetch=replace(known.fetch, size_factor=250))
        road = Road(known_hosts=self.workspace.root / "known_hosts", runtime=root)
        connection = connect(self.site, road)
        self.session = open_session(self.workspace, self.site, connection, lambda what, done, total: None)
        self.session.place_payload()
        self.number = 0

    def outcome(self, case: Case | None) -> tuple[str, float, float]:
        """What becomes of a run whose site left this ("fetched", or why not); seconds of this process, megabytes."""
        from flctl.campaign.steps.attempt import remote_folder
        from flctl.records import Job, Order, Run, Stage, Work, token_of

        self.number += 1
        order = Order(site="brno", work=Work.TRAIN, base=0, round=1, steps=4)
        token = token_of("c", "brno", self.number, 1)
        run = Run(
            number=self.number,
            order=order,
            stage=Stage.RUNNING,
            job=Job(token=token, id=f"1.{self.number}"),
            created_at=time.time(),
            changed_at=time.time(),
        )
        self.workspace.attempt_folder(run).mkdir(parents=True, mode=0o700)
        # In a process of its own, so that nothing it took is there to be used again by what is measured.
        if (child := os.fork()) == 0:
            self._leave(Path(str(remote_folder(self.session, run))), run, case)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, case
        used, before = time.process_time(), _memory_begins()
        words = self._fetched(run)
        return words, time.process_time() - used, (_memory("VmHWM") - before) / 1e6

    def _leave(self, folder: Path, run: Any, case: Case | None) -> None:
        """What the site's job leaves."""
        base = self.workspace.model_record(0)
        out = folder / "out"
        out.mkdir(parents=True)
        _weights(out).write_bytes(_weights(self.workspace.model_folder(0)).read_bytes())
        (folder / "owner").write_text(
            json.dumps({"by": "job", "job_id": run.job.id, "nonce": "n", "time": time.time()})
        )
        record: Record = {
            "schema": 1,
            "token": run.job.token,
            "campaign": "c",
            "site": "brno",
            "number": run.number,
            "attempt": 1,
            "work": "train",
            "outcome": "done",
            "reason": "",
            "exit_status": 0,
            "base": {"version": 0, "sha256": base["sha256"]},
            "steps": 4,
            "samples": 8,
            "tokens": 100,
            "claimed_at": time.time(),
            "started_at": time.time(),
            "ended_at": time.time(),
            "job_id": run.job.id,
            "host": "node",
            "files": [entry_of(out, "model.safetensors")],
            "metrics": {"loss": 1.0},
        }
        told = case(out, record) if case else None
        (folder / "done.json").write_text(told if isinstance(told, str) else json.dumps(record))

    def _fetched(self, run: Any) -> str:
        from flctl.campaign.steps.check import check
        from flctl.campaign.steps.fetch import fetch
        from flctl.records import Stage

        try:
            (judged,) = check(self.session, [run])
            if judged.stage != Stage.ENDED:
                return f"{judged.stage}: {judged.failure.message if judged.failure else 'no record'}"
            return str(fetch(self.session, judged, self.configuration).stage)
        except FlctlError as error:
            return f"{type(error).__name__}: {error.message}"
        except Exception as error:
            return f"DEFECT {type(error).__name__}: {error}"


def _memory(name: str) -> float:
    """Bytes of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024.0


def _memory_begins() -> float:
    """Give back what is free, and forget the peak so far; what is in use now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def main(folder: Path, names: list[str]) -> None:
    os.umask(0o077)
    stand = Stand(folder)
    for name in ["", *(names or CASES)]:
        words, seconds, megabytes = stand.outcome(CASES[name] if name else None)
        print(json.dumps([name, words, round(seconds, 3), round(megabytes, 1)]), flush=True)


def measured(names: list[str]) -> list[tuple[str, str, float, float]]:
    """(case, what became of it, seconds, megabytes) of each, from a process of their own; first of a right one."""
    with tempfile.TemporaryDirectory(prefix="flctl-hostile-") as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.chaos.hostile_files", folder, *names],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]  # type: ignore[misc]


def faults(found: list[tuple[str, str, float, float]], *, seconds: float = SECONDS) -> list[str]:
    """What was accepted, broke flctl, or cost too much."""
    (_, right, _, _), *others = found
    told = [] if right == "fetched" else [f"a right contribution was not accepted: {right}"]
    for name, words, used, megabytes in others:
        if words == "fetched" or words.startswith("DEFECT") or used > seconds or megabytes > MEGABYTES:
            told.append(f"{name}: {words[:300]}; {used} s, {megabytes} MB")
    return [*told, "a pickle was read"] if TRAP.exists() else told


def run(*, seed: int, trials: int | None) -> Result:
    """All of them, or `trials` of them."""
    import random

    names = list(CASES)
    random.Random(seed).shuffle(names)
    began = time.monotonic()
    found = measured(names[:trials])
    told = faults(found)
    slowest, largest = max(row[2] for row in found[1:]), max(row[3] for row in found[1:])
    return Result(
        row=ROW,
        trials=len(found) - 1,
        failures=len(told),
        seconds=time.monotonic() - began,
        figures={"worst": f"{slowest:.2f} s, {largest:.0f} MB", "seconds": slowest, "megabytes": largest},
        notes=told,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
