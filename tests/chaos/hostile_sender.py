"""The row "hostile sender": a site whose rsync attacks the one that asks it for files, over a real sshd.

An attack is a program in rsync's place there (profile key transfer.rsync) and what lies in the folder. What counts is
the file system here afterwards: no file, link, pipe or folder outside of the target, nothing in the target but the
files that were asked for with the hashes they were asked for with, no set-id bit, no more bytes than asked for, and an
end in time.
"""

import hashlib
import os
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from flctl.campaign.session import _same
from flctl.errors import FlctlError
from flctl.facility import patience, rsync
from flctl.facility.profile import Transfer
from flctl.records import FileEntry
from tests.chaos.results import Result
from tests.ssh_sites import connected, road_to, site_of
from tests.testbed.sshd import Sshd

ROW = "hostile sender"
CONTENT = b"the right content of a file that was asked for\n" * 20
WRONG = CONTENT[::-1]
BOUND = 40.0
"""Seconds within which each attack must be over, with the patience for silence set to 5 and for slowness to 8."""

FAKE = """#!/usr/bin/python3
# Speaks for a site's rsync. What it is told on its command line is not looked at.
import os, sys, time
out = os.fdopen(1, "wb", buffering=0)
open(sys.argv[0] + ".ran", "w").close()
GREETING = (31).to_bytes(4, "little")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """`program`: shell words in rsync's place, `$@` what rsync is called with after --server; or Python after FAKE.
    `lay`: what lies in the site's folder besides the file `asked`. `wanted`: what is asked for."""

    program: str = 'exec /usr/bin/rsync --server "$@"'
    python: str = ""
    lay: Callable[[Path], object] = lambda folder: None
    wanted: tuple[str, ...] = ("asked",)
    may_come: bool = field(default=False)
    """Whether the file that was asked for may arrive, rightly: the attack is then in what comes with it."""


def _instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def lay(folder: Path) -> None:
        (folder / "asked").unlink()
        make(folder / "asked")

    return lay


def _beside(folder: Path) -> None:
    (folder / "more").write_bytes(CONTENT)
    (folder / ".bashrc").write_bytes(b"touch /tmp/owned\n")
    (folder / "below").mkdir()
    (folder / "below" / "deep").write_bytes(CONTENT)


def _link_then_file(folder: Path) -> None:
    (folder / "asked").unlink()
    (folder / "asked").symlink_to("/tmp")
    (folder / "down").mkdir()
    (folder / "down" / "through").write_bytes(CONTENT)


def _deep(folder: Path) -> None:
    place = folder / "asked"
    place.unlink()
    for _ in range(60):
        place /= "d" * 60
    place.mkdir(parents=True)
    (place / "f").write_bytes(CONTENT)


def _crowd(folder: Path) -> None:
    (folder / "asked").unlink()
    (folder / "asked").mkdir()
    for number in range(20_000):
        (folder / "asked" / f"{number}").touch()


def _grows(folder: Path) -> None:
    """A file that grows while it is sent."""

    def grow() -> None:
        end = time.monotonic() + 3
        while time.monotonic() < end and path.exists():
            with path.open("ab") as file:
                file.write(WRONG)
            time.sleep(0.001)

    path = folder / "asked"
    threading.Thread(target=grow, daemon=True).start()


def _patched(old: str, new: str) -> str:
    """A program that replaces bytes of what the real rsync sends by as many others: names, once they are agreed on."""
    assert len(old) == len(new)
    return (
        "import subprocess\n"
        "child = subprocess.Popen(['/usr/bin/rsync', *sys.argv[1:]], stdin=0, stdout=subprocess.PIPE)\n"
        "while data := os.read(child.stdout.fileno(), 65536):\n"
        f"    out.write(data.replace({old.encode()!r}, {new.encode()!r}))\n"
        "sys.exit(child.wait())\n"
    )


SERVE = 'shift; exec /usr/bin/rsync --server {more} "$@"'
ATTACKS: dict[str, Attack] = {
    "further files": Attack(program=SERVE.format(more="-r"), lay=_beside, may_come=True),
    "the whole folder, times and owners too": Attack(program=SERVE.format(more="-rtgoD --no-relative"), lay=_beside),
    "a folder in the file's place": Attack(program=SERVE.format(more="-r"), lay=_instead(lambda p: _filled(p))),
    "a link in the file's place": Attack(
        program=SERVE.format(more="-l --links"), lay=_instead(lambda p: p.symlink_to("/etc/passwd"))
    ),
    "what a link leads to": Attack(
        program=SERVE.format(more="-L"), lay=_instead(lambda p: p.symlink_to("/etc/hostname"))
    ),
    "a link, then a file through it": Attack(
        program=SERVE.format(more="-rl"), lay=_link_then_file, wanted=("asked", "down/through")
    ),
    "a link to where others write, then a file below it": Attack(
        program=SERVE.format(more="-rlK"), lay=_link_then_file, wanted=("asked/through",)
    ),
    "a pipe": Attack(program=SERVE.format(more="-D --specials"), lay=_instead(os.mkfifo)),
    "a device": Attack(
        program=SERVE.format(more="-D --devices"), lay=_instead(lambda p: os.mknod(p, 0o020666, os.makedev(1, 5)))
    ),
    "hard links": Attack(
        program=SERVE.format(more="-H"), lay=lambda f: os.link(f / "asked", f / "again"), wanted=("asked", "again")
    ),
    "set-id bits and rights for all": Attack(
        program=SERVE.format(more="-p --perms"), lay=lambda f: (f / "asked").chmod(0o6777), may_come=True
    ),
    "a wrong content of the right size": Attack(lay=lambda f: (f / "asked").write_bytes(WRONG)),
    "a wrong content of the right size and time": Attack(
        lay=lambda f: ((f / "asked").write_bytes(WRONG), os.utime(f / "asked", (1, 1)))
    ),
    "nothing, and success": Attack(program="exit 0"),
    "nothing, and success, after the greeting": Attack(python="out.write(GREETING); sys.exit(0)"),
    "a huge file": Attack(lay=lambda f: os.truncate(f / "asked", 1 << 40)),
    "a large file that its record calls small": Attack(lay=lambda f: os.truncate(f / "asked", 1 << 32)),
    "a file that grows": Attack(lay=_grows),
    "a folder of 20,000 files": Attack(program=SERVE.format(more="-r"), lay=_crowd),
    "a folder 60 deep": Attack(program=SERVE.format(more="-r"), lay=_deep),
    "a name that leads up": Attack(python=_patched("asked", "../up")),
    "an absolute name": Attack(python=_patched("asked", "/tmp/")),
    "a name of our own": Attack(python=_patched("asked", ".ssh/")),
    "a name with a line end": Attack(python=_patched("asked", "a\nb\nc")),
    "another name": Attack(python=_patched("asked", "other")),
    "a name that leads up, in a folder": Attack(
        python=_patched("sub/asked", "../../../u"[:9]),
        lay=lambda f: ((f / "sub").mkdir(), (f / "sub" / "asked").write_bytes(CONTENT)),
        wanted=("sub/asked",),
    ),
    "garbage": Attack(python="out.write(os.urandom(1 << 16)); time.sleep(1)"),
    "garbage after the greeting": Attack(python="out.write(GREETING + os.urandom(1 << 20)); time.sleep(1)"),
    "garbage without end": Attack(python="out.write(GREETING)\nwhile True: out.write(os.urandom(1 << 16))"),
    "a greeting of another age": Attack(python="out.write((255).to_bytes(4, 'little') + bytes(4096)); time.sleep(1)"),
    "complaints without end": Attack(python="while True: os.write(2, b'rsync: \\x1b]0;owned\\x07' * 1000)"),
    "silence": Attack(python="time.sleep(600)"),
    "silence after the greeting": Attack(python="out.write(GREETING); time.sleep(600)"),
    "silence in the middle of a file": Attack(
        python="import subprocess\n"
        "child = subprocess.Popen(['/usr/bin/rsync', *sys.argv[1:]], stdin=0, stdout=subprocess.PIPE)\n"
        "out.write(os.read(child.stdout.fileno(), 200)); time.sleep(600)"
    ),
}


def _filled(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_bytes(CONTENT)


class Stand:
    """A site, a home for us, and what must not change around the target."""

    def __init__(self, root: Path, server: Sshd) -> None:
        self.root, self.server = root, server
        self.road = road_to(root, server)

    def attack(self, name: str) -> list[str]:
        """What the attack achieved."""
        attack, spot = ATTACKS[name], Path(tempfile.mkdtemp(dir=self.root))
        site = self.server.account.folder(self.server.account.home / f"s{time.time_ns()}")
        target = spot / "target"
        (spot / "beside").write_text("untouched")
        (site / "asked").write_bytes(CONTENT)
        attack.lay(site)
        subprocess.run(["chmod", "-R", "a+rX", str(site)], check=True)
        if name.startswith("set-id"):
            (site / "asked").chmod(0o6777)
        text = FAKE + attack.python if attack.python else f'#!/bin/sh\n: >"$0.ran"\n{attack.program}\n'
        tool = self.server.account.file(site / "tool", text, 0o755)
        began = time.monotonic()
        arrived = self._pull(site, target, attack, tool)
        told = judged(target, arrived, attack)
        if not tool.with_name("tool.ran").exists():
            told.append("the attack was never made")
        if attack.may_come and arrived != ["asked"]:
            told.append("the file that was asked for did not come")
        if time.monotonic() - began > BOUND:
            told.append(f"it took {time.monotonic() - began:.0f} s")
        if sorted(path.name for path in spot.iterdir()) not in (["beside"], ["beside", "target"]):
            told.append(f"beside the target: {sorted(path.name for path in spot.iterdir())}")
        return told

    def _pull(self, site: Path, target: Path, attack: Attack, tool: Path) -> list[str]:
        """The names that flctl says have come, with their right content: as Session.bring looks at them."""
        digest = hashlib.sha256(CONTENT).hexdigest()
        wanted = [FileEntry(path=name, size=len(CONTENT), sha256=digest) for name in attack.wanted]
        profile = site_of(self.server, transfer=Transfer(rsync=str(tool)), per_day=10_000)
        try:
            with connected(profile, self.road) as connection:
                connection.pull(PurePosixPath(site), wanted, target)
        except FlctlError as error:
            if not error.message.replace("\n", "").isprintable():
                return ["(an error that is not printable)"]
        kept = [entry.path for entry in wanted if _same(target / entry.path, entry)]
        for entry in wanted:
            if entry.path not in kept and (target / entry.path).is_file() and not (target / entry.path).is_symlink():
                (target / entry.path).unlink()  # as bring does with a file whose hash differs
        return kept


def judged(target: Path, arrived: list[str], attack: Attack) -> list[str]:
    """What is in the target that should not be."""
    told = [name for name in arrived if name.startswith("(")]
    total = 0
    for path in target.rglob("*") if target.exists() else ():
        name, found = str(path.relative_to(target)), path.lstat()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            told.append(f"{name} is a link, a pipe or a device")
        elif path.is_file():
            total += found.st_size
            ours = name in attack.wanted or name.startswith((".flctl-incoming/.flctl-partial/", ".flctl-incoming/."))
            if not ours:
                told.append(f"{name} was not asked for")
        if not path.is_symlink() and found.st_mode & 0o7077:
            told.append(f"{name} has the mode {oct(found.st_mode)}")
    if total > 2 * len(CONTENT) * len(attack.wanted) + 1024:
        told.append(f"{total} bytes")
    return told


def run(*, seed: int, trials: int | None) -> Result:
    """All attacks, or `trials` of them."""
    names = list(ATTACKS)
    random.Random(seed).shuffle(names)
    names, began, told = names[:trials], time.monotonic(), []
    slowest = ("", 0.0)
    server = Sshd(name="chaos-sender", address="127.0.97.1", port=24710, user="flctl-sender")
    before, window = rsync.OPTIONS, patience.SLOW_WINDOW
    old = {name: os.environ.get(name) for name in ("HOME", "XDG_STATE_HOME", "SSH_AUTH_SOCK")}
    with tempfile.TemporaryDirectory(prefix="flctl-sender-") as folder, server:
        os.environ |= {"HOME": f"{folder}/home", "XDG_STATE_HOME": f"{folder}/state"}
        os.environ.pop("SSH_AUTH_SOCK", None)
        Path(folder, "home").mkdir()
        rsync.OPTIONS = tuple("--timeout=5" if o.startswith("--timeout") else o for o in before)
        patience.SLOW_WINDOW = 8.0
        try:
            stand = Stand(Path(folder), server)
            for name in names:
                since = time.monotonic()
                told += [f"{name}: {what}" for what in stand.attack(name)]
                slowest = max(slowest, (name, time.monotonic() - since), key=lambda row: row[1])
        finally:
            rsync.OPTIONS, patience.SLOW_WINDOW = before, window
            for key, value in old.items():
                os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
    return Result(
        row=ROW,
        trials=len(names),
        failures=len(told),
        seconds=time.monotonic() - began,
        figures={"worst": f"{slowest[1]:.1f} s ({slowest[0]})"},
        notes=told,
    )
