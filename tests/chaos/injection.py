"""The row "injection": hostile strings in every field of a profile and every value of a job template that a site gives.

Each is loaded by load_site and rendered by job_script, with the shipped template of each scheduler. What is refused is
refused; what is accepted must leave every other line of the script as it is, must stay one directive where it is one,
must be bash (`bash -n`), and is then really run by bash: each string brings commands that would make a file of their
own. An escape is such a file, another line, another directive, a script that is no bash, or an exception that is no
clear refusal.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import tempfile
import time
import tomllib
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from flctl.campaign.config import CampaignTable, Configuration
from flctl.campaign.session import _expand
from flctl.campaign.trainers import trainer_of
from flctl.errors import ConfigurationError
from flctl.facility.openssh import login_place, ssh, transfer_place
from flctl.facility.profile import Site, load_site
from flctl.facility.rsync import rsync_program
from flctl.facility.script import DIRECTIVE, job_script
from tests.chaos.hostile_text import MARK, hostile
from tests.chaos.results import Result

ROW = "injection"
FULL = 100_000
BATCH = 2000
TEMPLATES = Path(__file__).parents[2] / "templates"

BASE = """
schema = 1
name = "here"
[login]
host = "login.example.org"
user = "me"
[transfer]
host = "files.example.org"
[scheduler]
kind = "{kind}"
account = "acc"
{more}
[shapes.prod]
gpus = 1
cpus = 2
extra = ["{option}"]
[queues.batch]
[storage]
work = "$WORK/fl"
data = "/data"
[environment]
modules_use = ["/soft/modules"]
modules = ["cuda"]
unset = ["PYTHONPATH"]
exports = {{ NAME = "value" }}
proxy = "http://proxy:3128"
python = "python3"
seal_python = "python3"
launch = "srun --cpu-bind=cores"
[environment.container]
program = "apptainer"
image = "/images/train.sif"
gpu = "--nv"
binds = ["/scratch"]
options = ["--cleanenv"]
[budget]
balance = "saldo -b"
"""
KINDS = {
    "slurm": BASE.format(kind="slurm", more='partition = "gpu"\nqos = "q"', option="--mem=0"),
    "pbs": BASE.format(kind="pbs", more='queue = "work"\nplace = "scatter"\nfilesystems = "home"', option="-l x=1"),
    "local": BASE.format(kind="local", more="", option="--x=1"),
}
BENIGN = {
    "extra": "--mem=0",
    "gpu": "--nv",
    "options": "--cleanenv",
    "host_keys": "SHA256:" + "A" * 43,
    "launch": "srun",
    "docs": "https://example.org",
    "proxy": "http://proxy:3128",
    "walltime": "01:00:00",
    "select": "2:ncpus=64",
    "dependency": "afterok:1",
    "signers": "ssh-ed25519 " + "A" * 68,
}
NO_CAMPAIGN = Configuration(campaign=CampaignTable(name="c", id="0"))
OPEN = frozenset(
    {"env:WORK", "exports.VALUE", "storage.work", "storage.data", "environment.container.image", "environment.python"}
    | {"environment.container.binds", "environment.modules_use", "environment.launch", "environment.trainer"}
    | {"train.command"}
)
"""What takes more than plain names, and so gets half of the strings."""

PATHS = frozenset({"work", "data", "image", "binds", "modules_use", "trainer", "key"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A place for a string: `put` writes it into the table of a profile."""

    name: str
    put: Callable[[dict[str, Any], str], None]
    benign: str


def slots() -> list[Slot]:
    """Every key of a profile, its items and names as well, but `activate`, which is the user's own shell."""
    found = [Slot(name="env:WORK", put=lambda table, text: None, benign="/work")]
    for path, kind in _keys(Site, ()):
        if path[-1] == "activate":
            continue
        benign = BENIGN.get(path[-1], "/some/place" if path[-1] in PATHS else "word")
        many = typing.get_origin(kind) is tuple
        found.append(Slot(name=".".join(path), put=_putter(path, [] if many else None), benign=benign))
        if path[-1] in ("exports", "train"):
            found.append(Slot(name=f"{path[-1]}.VALUE", put=_putter((*path, "NAME"), None), benign="value"))
        if path[-1] == "train":
            found.append(
                Slot(name="train.command", put=_putter((*path, "command"), None), benign="/some/mine.py --fast")
            )
        if path[-1] in ("exports", "train", "shapes", "queues"):
            found.append(Slot(name=f"{path[-1]}.NAME", put=_namer(path), benign="OTHER"))
    return found


def _keys(kind: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner, here = hints[field.name], (*path, field.name)
        arguments = typing.get_args(inner)
        if dataclasses.is_dataclass(inner):
            yield from _keys(inner, here)
        elif typing.get_origin(inner) is dict and dataclasses.is_dataclass(arguments[1]):
            yield here, inner
            yield from _keys(arguments[1], (*here, "prod" if field.name == "shapes" else "batch"))
        else:
            yield here, inner


def _putter(path: tuple[str, ...], many: list[str] | None) -> Callable[[dict[str, Any], str], None]:
    def put(table: dict[str, Any], text: str) -> None:
        for part in path[:-1]:
            table = table.setdefault(part, {})
        table[path[-1]] = text if many is None else [text]

    return put


def _namer(path: tuple[str, ...]) -> Callable[[dict[str, Any], str], None]:
    def put(table: dict[str, Any], text: str) -> None:
        for part in path:
            table = table.setdefault(part, {})
        table[text] = "x" if path[-1] in ("exports", "train") else {}

    return put


def toml(table: Mapping[str, Any]) -> str:
    """A profile as TOML, strings byte for byte as they are meant (also such as TOML forbids)."""

    def word(text: str) -> str:
        kept = {'"': '\\"', "\\": "\\\\"}
        return '"' + "".join(kept.get(c) or (c if c.isprintable() else _unicode(c)) for c in text) + '"'

    def value(item: Any) -> str:
        if isinstance(item, str):
            return word(item)
        if isinstance(item, list):
            return f"[{', '.join(map(value, item))}]"
        if isinstance(item, dict):
            return "{" + ", ".join(f"{word(name)} = {value(inner)}" for name, inner in item.items()) + "}"
        return json.dumps(item)

    return "".join(f"{word(name)} = {value(item)}\n" for name, item in table.items())


def _unicode(letter: str) -> str:
    return f"\\U{ord(letter):08X}"


@dataclass(slots=True)
class Tally:
    """What became of the strings."""

    counts: Counter[str]
    escapes: list[str]


class Trial:
    """One folder, a golden script for each slot and scheduler, and the scripts that wait to be run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.canaries, self.scripts = folder / "c", folder / "s"
        self.slots = slots()
        self.open = [slot for slot in self.slots if slot.name in OPEN]
        self.tally = Tally(counts=Counter(), escapes=[])
        self._told: dict[str, str] = {}
        self._golden: dict[tuple[str, str], str | None] = {}
        for part in (self.canaries, self.scripts, folder / "bin", folder / "home"):
            part.mkdir()
        for name in ("od", "tr", "sleep", "module", "srun", "apptainer", "python3", "word"):
            (folder / "bin" / name).symlink_to("/bin/true")
        (folder / "bin" / "cat").symlink_to("/bin/cat")
        (folder / "bin" / "touch").symlink_to("/bin/touch")
        self._running: subprocess.Popen[bytes] | None = None

    def one(self, number: int, seed: int) -> None:
        """Load and render one hostile string, and keep the script to be run if it differs from the usual one."""
        chance = random.Random(f"{seed}/{number}")
        slot, kind = self.slots[number % len(self.slots)], chance.choice(list(KINDS))
        if number % 2:
            slot = chance.choice(self.open)
        mark = f"{number:x}"
        text = hostile(chance, slot.benign).replace(MARK, str(self.canaries / mark))
        told = f"{kind}, {slot.name} = {text!r}"
        golden = self.golden(slot, kind)
        try:
            made = self.render(slot, kind, text)
        except ConfigurationError as error:
            self.tally.counts["refused"] += 1
            if not error.message.isprintable() and not error.message.replace("\n", "").isprintable():
                self.tally.escapes.append(f"{told}: the refusal is not printable")
            return
        except Exception as error:
            self.tally.escapes.append(f"{told}: {type(error).__name__}: {error}")
            return
        if golden is None or made == golden:
            self.tally.counts["accepted, not in the script"] += 1
            return
        self.tally.counts["accepted and run"] += 1
        if wrong := differs(golden, made, slot.benign):
            self.tally.escapes.append(f"{told}: {wrong}")
        self._told[mark] = told
        (self.scripts / mark).write_text(made, encoding="utf-8")
        if len(self._told) >= BATCH:
            self.flush()

    def golden(self, slot: Slot, kind: str) -> str | None:
        """The script with a harmless value in the slot; the usual one where the slot takes no word."""
        if (slot.name, kind) not in self._golden:
            try:
                self._golden[slot.name, kind] = self.render(slot, kind, slot.benign)
            except ConfigurationError:
                self._golden[slot.name, kind] = self.render(self.slots[0], kind, "/work")
        return self._golden[slot.name, kind]

    def render(self, slot: Slot, kind: str, text: str) -> str:
        """The script with this string in the slot; ConfigurationError if it is refused."""
        table = tomllib.loads(KINDS[kind])
        slot.put(table, text)
        path = self.folder / "here.toml"
        path.write_bytes(toml(table).encode("utf-8", "surrogatepass"))
        site = load_site(path)
        check_commands(site)
        home = self.folder / "home"
        told = {"HOME": str(home), "WORK": f"{home}{text}" if slot.name == "env:WORK" else f"{home}/w"}
        for name in ("x", "USER", "PATH"):
            told.setdefault(name, f"{home}/{name}")
        work, data = (PurePosixPath(_expand(place, told, site)) for place in (site.storage.work, site.storage.data))
        with contextlib.suppress(OSError):
            os.makedirs(work / "runs/0001-1", exist_ok=True)  # or the script ends there
        return job_script(
            site,
            (TEMPLATES / f"{kind}.sh").read_text(encoding="utf-8"),
            token="f0123456789abcd",
            campaign="c",
            run=work / "runs/0001-1",
            workdir=work,
            payload=work / "payload",
            data=str(data),
            now=0.0,
            command=trainer_of(self.folder, NO_CAMPAIGN, site).command(work),
        )

    def flush(self) -> None:
        """Run what waits, in a bash each, while the next strings are made; see what the last ones did."""
        self.settle()
        if not self._told:
            return
        folder = self.folder / "running"
        self.scripts.rename(folder)
        self.scripts.mkdir()
        self._sent, self._told = self._told, {}
        self._running = subprocess.Popen(
            ["/bin/bash", "-c", RUN, "bash", str(folder)],
            env={"PATH": str(self.folder / "bin"), "HOME": str(self.folder / "home"), "BASH": "/bin/bash"},
            cwd=self.folder / "home",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def settle(self) -> None:
        """Wait for the scripts that run; a file that one of their strings made is an escape."""
        if self._running is None:
            return
        assert self._running.wait(timeout=600) == 0
        self._running = None
        for mark in (self.folder / "running").glob("*.syntax"):
            self.tally.escapes.append(f"{self._sent[mark.stem]}: the script is no bash")
        for mark in self.canaries.iterdir():
            self.tally.escapes.append(f"{self._sent.get(mark.name, mark.name)}: it was run")
            mark.unlink()
        ran = sum(1 for _ in (self.folder / "running").glob("*.ran"))
        if ran != len(self._sent):
            self.tally.escapes.append(f"only {ran} of {len(self._sent)} scripts were run")
        shutil.rmtree(self.folder / "running")


IN_DIRECTIVE = re.compile(r"(-[A-Za-z] )?[^\s'\"`$\\;|<>#]*")
"""What may stand in a directive: nothing that parts words for a shell or a scheduler, but behind an option of PBS."""

RUN = """
for script in "$1"/*; do
  /bin/bash -n "$script" || : >"$script.syntax"
  /bin/bash "$script"
  : >"$script.ran"
done
exit 0
"""


def differs(golden: str, made: str, benign: str) -> str:
    """What a script has more, or other, than a slot with another content; empty if nothing."""
    usual, lines = golden.split("\n"), made.split("\n")
    if len(usual) != len(lines):
        return f"{len(lines) - len(usual):+d} lines"
    for old, new in zip(usual, lines, strict=True):
        if bool(DIRECTIVE.match(old)) != bool(DIRECTIVE.match(new)):
            return f"a directive came or went: {new!r}"
        if old != new and DIRECTIVE.match(old):
            before, found, behind = old.partition(benign)
            slot = new[len(before) : len(new) - len(behind)]
            if found and not (new == before + slot + behind and IN_DIRECTIVE.fullmatch(slot)):
                return f"another directive: {new!r}"
    return ""


def check_commands(site: Site) -> None:
    """No value of a profile that is accepted adds a word to the argv of ssh, or becomes an option of it."""
    for place in {login_place(site), transfer_place(site)}:
        argv = [*ssh(site, place, Path("/known_hosts")), place.host]
        options = [word for word in argv[1:] if word.startswith("-")]
        if not set(options) <= {"-F", "-o", "-p", "-l"} or place.host.startswith("-") or not place.host.isprintable():
            raise AssertionError(f"an option of ssh: {options}")
        values = [argv[place + 1] for place, word in enumerate(argv) if word == "-o"]
        if not all(value.split("=", 1)[0].isalnum() and value.isprintable() for value in values):
            raise AssertionError(f"a value of ssh's -o: {values}")
        if site.login.proxy_jump and len(shlex.split(next(v for v in values if v.startswith("ProxyCommand=")))) < 10:
            raise AssertionError("the jump command fell apart")


def run(*, seed: int, trials: int | None) -> Result:
    """`trials` strings (None: 100,000)."""
    began, number = time.monotonic(), FULL if trials is None else trials
    rsync_program.cache_clear()
    with tempfile.TemporaryDirectory(prefix="flctl-injection-") as folder:
        trial = Trial(Path(folder))
        for index in range(number):
            trial.one(index, seed)
        trial.flush()
        trial.settle()
        counts, escapes = trial.tally.counts, trial.tally.escapes
    figures = {"worst": f"{len(escapes)} escapes", "slots": len(trial.slots), **counts}
    return Result(
        row=ROW,
        trials=number,
        failures=len(escapes),
        seconds=time.monotonic() - began,
        figures=figures,
        notes=escapes[:50],
    )


if __name__ == "__main__":
    os.umask(0o077)
    print(run(seed=1, trials=1000))
