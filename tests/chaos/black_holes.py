"""Owns the row "black holes": at every stage of every remote operation the peer falls silent, and nobody is told.

Each point runs in a process of its own: python -m tests.chaos.black_holes '"push own up 2000000"' prints what it saw.
Measured are the seconds from the silence to flctl's answer, and what is left of the operation a moment later: threads,
processes, sockets. With the bound set low (QUICK), and a few points with the real one.
"""

import concurrent.futures
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from flctl.errors import FlctlError, SiteUnreachable, TransferFailed
from flctl.facility import patience
from flctl.facility.profile import Site
from flctl.records import FileEntry
from tests.chaos.proxy import PASS, Plan, Proxy, deaf
from tests.chaos.results import ROOT, ROWS, Result
from tests.ssh_sites import road_to, site_of
from tests.testbed.sshd import Sshd, remove

BOUND = 90.0
QUICK = {"CONNECT": 2, "CONNECT_ALL": 4.0, "AUTH": 3.0, "LOGIN": 4.0, "ALIVE_INTERVAL": 1, "ALIVE_COUNT": 3}
"""Instead of the real patience; nothing takes longer than QUICK_BOUND then, on a busy machine."""
QUICK_BOUND = 4.0
SLACK = 3.0
SIZE = 6_000_000

SERVERS: tuple[dict[str, Any], ...] = (
    {"name": "bh-site", "address": "127.0.93.1", "port": 24301, "user": "flctl-bh"},
    {"name": "bh-jump", "address": "127.0.93.2", "port": 24302, "user": "flctl-bhjump"},
)

STAGES = (0, 21, 600, 1200, 1600)
"""Bytes from the server: before its greeting, in it, in the exchange of keys, at its end, while it lets us in."""

LOGINS = ("log in", "own login", "shared login", "keep", "jump login", "behind jump login")
POINTS = (
    *(f"{name} down {n}" for name in LOGINS for n in STAGES),
    *(f"{name} down {n}" for name in ("show key", "trust") for n in (0, 21, 600)),
    *("log in deaf", "show key deaf", "jump login deaf", "keep deaf", "log in up 1000", "own login down 2300"),
    *(f"run {way} {n}" for way in ("up", "down") for n in (1, 100)),
    *("run output down 50000", "run later", "jump command later"),
    *("kept run down 1", "kept run up 1", "kept run later", "kept push up 2000000", "kept pull down 2000000"),
    *("jump push up 3000000", "behind jump push up 3000000", "behind jump command later"),
    *(f"{road} push up {n}" for road in ("own", "shared", "connection") for n in (1, 3000, 3_000_000)),
    *(f"{road} pull down {n}" for road in ("own", "shared", "connection") for n in (1, 3000, 3_000_000)),
)
REAL = (
    *("log in down 1600", "own login down 1600", "keep down 1200", "run later", "kept run later"),
    *("shared push up 3000000", "connection pull down 3000000"),
)
"""What is also tried with the real patience."""


def run(*, seed: int, trials: int | None) -> Result:
    began = time.monotonic()
    points = [(name, "quick") for name in POINTS]
    if trials is None or trials >= ROWS["black holes"].trials:
        points = [*((name, "real") for name in REAL), *points]  # these take long: they run beside all others
    else:
        points = random.Random(seed).sample(points, trials)
    with _servers(), concurrent.futures.ThreadPoolExecutor(max_workers=10) as pool:
        seen = list(pool.map(lambda point: _in_process(*point), points))
    told = [(*point, *what) for point, what in zip(points, seen, strict=True)]
    notes = [f"{name} ({mode}): {wrong}" for name, mode, _, wrong in told if wrong]
    quick, real = ([took for _, mode, took, _ in told if mode == which] for which in ("quick", "real"))
    figures = {"worst": f"{max(real):.1f} s" if real else f"{max(quick):.1f} s of {QUICK_BOUND:.0f} s, bound set low"}
    figures["quick_worst"] = f"{max(quick):.2f} s"
    return Result(
        row="black holes",
        trials=len(points),
        failures=len(notes),
        seconds=time.monotonic() - began,
        figures=figures,
        notes=notes,
    )


@contextlib.contextmanager
def _servers() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        site, jump = (Sshd(**fields, options=("MaxStartups 500", "LoginGraceTime 600")) for fields in SERVERS)
        for server in (site, jump):
            stack.callback(remove, server.name)
            stack.enter_context(server)
        for server in (site, jump):
            server.authorize(site.client_key.with_suffix(".pub").read_text())
        folder = site.account.home / "pulled"
        site.account.folder(folder)
        (folder / "a").write_bytes(os.urandom(SIZE))
        site.account.give(folder / "a", 0o600)
        yield


def _in_process(name: str, mode: str) -> tuple[float, str]:
    """The seconds that a point took, and what was wrong with it."""
    argv = [sys.executable, "-m", "tests.chaos.black_holes", name, mode]
    try:
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    except subprocess.TimeoutExpired:
        return 240.0, "it hangs"
    if done.returncode != 0:
        return 0.0, done.stderr[-1500:]
    seen = json.loads(done.stdout.splitlines()[-1])
    bound = QUICK_BOUND + SLACK if mode == "quick" else BOUND
    wrong = [seen["wrong"]] if seen["wrong"] else []
    if seen["took"] > bound:
        wrong.append(f"it took {seen['took']:.1f} s")
    if seen["left"]:
        wrong.append(f"left behind: {seen['left']}")
    return seen["took"], "; ".join(wrong)


# One point


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What an operation works with. `fail` lets the road fall silent as the point says; until then it is sound."""

    site: Site
    road: Any
    folder: Path
    home: Path
    fail: Callable[[], None]


def main(name: str, mode: str) -> None:
    if mode == "quick":
        for key, value in QUICK.items():
            setattr(patience, key, value)
    server, jump = (Sshd(**fields) for fields in SERVERS)
    with tempfile.TemporaryDirectory(prefix="bh-", dir="/tmp") as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        os.environ |= {"XDG_STATE_HOME": str(folder), "HOME": str(folder)}
        operation, plan = _plan(name)
        target = jump if operation.startswith("jump") else server
        proxy = stack.enter_context(Proxy(target.address, target.port))
        port = stack.enter_context(deaf()) if name.endswith("deaf") else proxy.port
        fields: dict[str, Any] = {"host": "127.0.0.1", "port": port}
        if "jump" in operation:
            middle = (jump.address, jump.port) if operation.startswith("behind") else ("127.0.0.1", port)
            fields["proxy_jump"] = f"{jump.user}@{middle[0]}:{middle[1]}"
        if operation.startswith("jump"):
            fields |= {"host": server.address, "port": server.port}
        fields |= {"hold": 600} if operation.startswith("ke") else {}
        fields |= {"multiplex": False} if operation.startswith("own") else {}
        road = road_to(folder, server, jump, sparing=operation.startswith("connection"))
        with road.known_hosts.open("a") as file:
            file.write(f"[127.0.0.1]:{port} {target.host_key_line}\n")
        (folder / "a").write_bytes(os.urandom(SIZE))

        def fail() -> None:
            if name.endswith("deaf"):
                proxy.failed_at = time.monotonic()
            elif name.endswith("later"):
                threading.Timer(0.5, proxy.strike, args=("freeze",)).start()
            elif operation in LOGINS or operation.startswith("own"):
                proxy.plan = plan  # of the connection that is made next
            else:
                proxy.arm(plan)

        site = site_of(server, **fields)
        scene = Scene(site=site, road=road, folder=folder, home=server.account.home, fail=fail)
        print(json.dumps(_measure(scene, proxy, operation, port)))


def _plan(name: str) -> tuple[str, Plan]:
    """The operation of a point, and where it fails."""
    words = name.split()
    if words[-1] in ("deaf", "later"):
        return " ".join(words[:-1]), PASS
    direction: Any = words[-2]
    return " ".join(words[:-2]), Plan(after=int(words[-1]), direction=direction, then="freeze")


def _measure(scene: Scene, proxy: Proxy, operation: str, port: int) -> dict[str, Any]:
    wrong, closing, before = "", contextlib.ExitStack(), _left(proxy, port)
    try:
        OPERATIONS[operation](scene, closing)
        wrong = "it ended as if nothing had happened"
    except (SiteUnreachable, TransferFailed) as error:
        message = error.message
    except FlctlError as error:
        wrong = f"{type(error).__name__}: {error.message}"
    ended = time.monotonic()
    if proxy.failed_at is None:
        wrong = wrong or f"the point was not reached: {message}"
    with contextlib.suppress(FlctlError):
        closing.close()
    closed = time.monotonic()
    limit = patience.ALIVE_INTERVAL * (patience.ALIVE_COUNT + 2) + 12
    while (left := [item for item in _left(proxy, port) if item not in before]) and time.monotonic() < closed + limit:
        time.sleep(0.1)
    return {
        "took": max(ended - (proxy.failed_at or ended), closed - ended),
        "wrong": wrong,
        "left": left,
        "swept": round(time.monotonic() - closed, 1),
    }


def _left(proxy: Proxy, port: int) -> list[str]:
    """What of the operation is still there: threads, processes that name the port, connections to it."""
    own = ("MainThread", f"proxy {proxy.port}")
    left = [thread.name for thread in threading.enumerate() if thread.name not in own]
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if int(pid) != os.getpid() and any(str(port) in word for word in words):
                left.append(f"{pid} {words[0]}")
    sockets = Path("/proc/self/net/tcp").read_text().splitlines()
    mine = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            mine.add(os.readlink(path))
    rows = [fields for fields in map(str.split, sockets[1:]) if fields[2].endswith(f":{port:04X}")]
    return left + [f"a socket in state {fields[3]}" for fields in rows if f"socket:[{fields[9]}]" in mine]


# The operations


def _log_in(scene: Scene, closing: contextlib.ExitStack) -> None:
    from flctl.facility.connection import connect

    scene.fail()
    connection = connect(scene.site, scene.road)
    closing.callback(connection.close)
    connection.run("true", timeout=60)


def _show_key(scene: Scene, closing: contextlib.ExitStack) -> None:
    from flctl.facility.connection import host_key

    scene.fail()
    host_key(scene.site, scene.road.known_hosts)


def _trust(scene: Scene, closing: contextlib.ExitStack) -> None:
    from flctl.facility.connection import trust

    scene.fail()
    trust(scene.site, "SHA256:none", scene.road.known_hosts)


def _connected(scene: Scene, closing: contextlib.ExitStack) -> Any:
    from flctl.facility.connection import connect

    connection = connect(scene.site, scene.road)
    closing.callback(connection.close)
    connection.run("true")
    return connection


def _run(scene: Scene, closing: contextlib.ExitStack, script: str = "sleep 100; echo x") -> None:
    connection = _connected(scene, closing)
    scene.fail()
    connection.run(script, timeout=150)


def _output(scene: Scene, closing: contextlib.ExitStack) -> None:
    _run(scene, closing, "head -c 1000000 /dev/zero | tr '\\0' x")


def _push(scene: Scene, closing: contextlib.ExitStack) -> None:
    connection = _connected(scene, closing)
    target = PurePosixPath(scene.home / f"pushed-{scene.folder.name}")
    closing.callback(shutil.rmtree, target, ignore_errors=True)
    _move(scene, connection, lambda: connection.push(scene.folder, ["a"], target))


def _pull(scene: Scene, closing: contextlib.ExitStack) -> None:
    connection = _connected(scene, closing)
    entry = FileEntry(path="a", size=SIZE, sha256="")
    _move(
        scene, connection, lambda: connection.pull(PurePosixPath(scene.home / "pulled"), [entry], scene.folder / "in")
    )


def _move(scene: Scene, connection: Any, move: Callable[[], None]) -> None:
    """Move files, on a road that fails only once the commands before have passed."""
    carrier = connection._road()
    opened = carrier.open

    @contextlib.contextmanager
    def failing() -> Iterator[Any]:
        if type(carrier).__name__ == "OverSsh" and carrier.site.login.multiplex:
            carrier._open_master() if not carrier._master_lives() else None
        scene.fail()
        with opened() as shell:
            yield shell

    carrier.open = failing
    move()


def _push_login(scene: Scene, closing: contextlib.ExitStack) -> None:
    """The login of rsync's own ssh falls silent; nothing of it has begun before."""
    connection = _connected(scene, closing)
    carrier, opened = connection._road(), connection._road().open

    @contextlib.contextmanager
    def failing() -> Iterator[Any]:
        scene.fail()
        with opened() as shell:
            yield shell

    carrier.open = failing
    connection.push(scene.folder, ["a"], PurePosixPath(scene.home / f"pushed-{scene.folder.name}"))


def _keep(scene: Scene, closing: contextlib.ExitStack) -> None:
    from flctl.facility import attended, holding

    scene.fail()
    (place,) = holding.places(scene.site)
    attended.keep(scene.site, place, scene.road.known_hosts, 600)


def _kept(operation: Callable[[Scene, contextlib.ExitStack], None]) -> Callable[[Scene, contextlib.ExitStack], None]:
    def over_kept(scene: Scene, closing: contextlib.ExitStack) -> None:
        from flctl.facility import attended, holding

        (place,) = holding.places(scene.site)
        kept = attended.keep(scene.site, place, scene.road.known_hosts, 600)
        closing.callback(holding.close, kept)
        operation(scene, closing)

    return over_kept


OPERATIONS: dict[str, Callable[[Scene, contextlib.ExitStack], None]] = {
    "log in": _log_in,
    "show key": _show_key,
    "trust": _trust,
    "keep": _keep,
    "run": _run,
    "run output": _output,
    "jump login": _log_in,
    "behind jump login": _log_in,
    **dict.fromkeys(("jump command", "behind jump command"), _run),
    **dict.fromkeys(("jump push", "behind jump push"), _push),
    **dict.fromkeys(("own login", "shared login"), _push_login),
    "kept run": _kept(_run),
    "kept push": _kept(_push),
    "kept pull": _kept(_pull),
    **dict.fromkeys(("own push", "shared push", "connection push"), _push),
    **dict.fromkeys(("own pull", "shared pull", "connection pull"), _pull),
}


if __name__ == "__main__":
    main(*sys.argv[1:])
