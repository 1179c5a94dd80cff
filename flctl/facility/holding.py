"""Owns connections that a person opened and that are kept for later commands: their files, finding and closing them.

A kept connection is a master of the system's ssh, opened on the person's terminal (attended.py). holder.py lives beside
it and ends it at the stated time. Its files lie in a folder of the user's that all campaigns share: ssh's control
socket NAME, the record NAME.json, and NAME.lock, which the holder has locked as long as it lives.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from flctl.errors import ConfigurationError, FlctlError, Locked, LoginNeeded
from flctl.facility import hostkeys, ledger, scratch
from flctl.facility.openssh import (
    Place,
    environment,
    jump_place,
    login_place,
    quoted,
    transfer_place,
)
from flctl.facility.profile import Site

LINGER = 10
"""Seconds for which the ssh outlives its holder and its last user."""

HOLDER_TIMEOUT = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A kept connection. `site` as the profile calls it that opened it; `place` is user@host; times in Unix seconds;
    `name` of its files; `machine` that it is on, for the folder may be seen by others."""

    name: str
    site: str
    place: str
    since: float
    until: float
    machine: str = field(default_factory=lambda: os.uname().nodename)

    @property
    def socket(self) -> Path:
        return folder() / self.name

    @property
    def alive(self) -> bool:
        """Whether its holder and its ssh live, and its time is not over."""
        return time.time() < self.until and _is_locked(self.name) and _answers(self.socket)


def folder(*, make: bool = False) -> Path:
    """Where they lie: private to the user, and short enough for sockets. ConfigurationError if others can enter it."""
    return scratch.private(ledger.state_folder() / "kept", room=12, make=make)


def places(site: Site) -> list[Place]:
    """The hosts of a site that files and commands go to, each once."""
    return list(dict.fromkeys((login_place(site), transfer_place(site))))


def find(site: Site, place: Place, known_hosts: Path) -> Kept | None:
    """The living connection to a host that was opened with the trust that this campaign has in it, as long as the
    profile allows it now; another campaign's may have allowed more."""
    kept = _read(name_of(site, place, known_hosts))
    if kept is None:
        return None
    allowed = replace(kept, until=min(kept.until, kept.since + site.login.hold))
    return allowed if allowed.alive else None


def found(site: Site, known_hosts: Path) -> dict[Place, Kept]:
    """The living connections to a site, by host."""
    kept = {place: find(site, place, known_hosts) for place in places(site)}
    return {place: one for place, one in kept.items() if one is not None}


def end_older(site: Site, place: Place, known_hosts: Path) -> None:
    """Close a connection to a host that has lasted longer than the profile allows now."""
    kept = _read(name_of(site, place, known_hosts))
    if kept is not None and kept.alive and find(site, place, known_hosts) is None:
        close(kept)


def everything() -> list[tuple[Kept, bool]]:
    """Every connection of this machine on record and whether it lives; what is left of others is removed."""
    listed = []
    for path in sorted(folder().glob("*.json")):
        kept = _read(path.stem)
        alive = kept is not None and kept.alive
        if kept is not None and not alive and kept.machine != os.uname().nodename:
            continue  # in a home that machines share; a laptop's name may change, then it still answers
        if kept is not None:
            listed.append((kept, alive))
        _sweep(path.stem)
    return listed


def needed(site: Site, why: str = "no kept connection is open") -> FlctlError:
    """That a person must log in; nothing was sent to the site."""
    name = site.name
    store = "" if site.login.kind == "attended" else f"; where it permits codes of a program: flctl auth store {name}"
    if not site.login.hold:
        return ConfigurationError(
            "a person must answer each login there, and the profile does not allow keeping a connection",
            hint=f"where the facility permits that, set login.hold in sites/{name}.toml{store}",
            site=name,
        )
    error = LoginNeeded(f"a person must log in: {why}", hint=f"flctl login {name}", site=name)
    error.attempted = False
    return error


def close(kept: Kept) -> None:
    """End a connection and everything that uses it; its holder cleans up. Locked if it does not let go."""
    _exit(kept.socket)
    deadline = time.monotonic() + HOLDER_TIMEOUT
    while _is_locked(kept.name):
        if time.monotonic() > deadline:
            raise Locked(
                f"the connection to {kept.place} does not end",
                hint=f"pgrep -f {kept.socket} shows its ssh: end that",
                site=kept.site,
            )
        time.sleep(0.02)
    _sweep(kept.name)


def through(kept: Kept) -> list[str]:
    """The argv of an ssh that uses the connection and can never make one of its own, without the host."""
    options = {
        "ControlMaster": "no",
        "ControlPath": quoted(kept.socket),
        "ProxyCommand": "false",
        "BatchMode": "yes",
        "ClearAllForwardings": "yes",
        "RequestTTY": "no",
        "LogLevel": "ERROR",
    }
    return ["ssh", "-F", "none", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]


def is_refused(status: int | None, words: str) -> bool:
    """Whether an ssh ended because the server allows no further session over the connection."""
    return status == 255 and bool(re.search(r"[Ss]ession open refused by peer|session request failed", words))


# Files


def name_of(site: Site, place: Place, known_hosts: Path) -> str:
    """Of the files of a connection: its machine, host and user, the way there, and which keys of the hosts are trusted.
    A campaign that trusts other keys has nothing to do with it."""
    jump = jump_place(site)
    hosts = [place, *([jump] if jump else [])]
    trusted = [sorted({(e.marker, str(e.key)) for e in hostkeys.entries(known_hosts, host)}) for host in hosts]
    text = json.dumps([os.uname().nodename, [f"{host.user}@{host.name}" for host in hosts], trusted])
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def record_of(name: str) -> Path:
    return folder() / f"{name}.json"


def _read(name: str) -> Kept | None:
    try:
        data = json.loads(record_of(name).read_text(encoding="utf-8"))
        kept = Kept(**data)
        return kept if kept.name == name and kept.since <= kept.until else None
    except (OSError, ValueError, TypeError):
        return None


def write(kept: Kept) -> None:
    draft = folder() / f".{kept.name}.{os.getpid()}"
    draft.write_text(json.dumps(asdict(kept)), encoding="utf-8")
    draft.rename(record_of(kept.name))


def clear(name: str) -> None:
    """Remove what is left of a connection that has no holder, and end its ssh if there is one."""
    address = folder() / name
    if address.exists():
        _exit(address)
        address.unlink(missing_ok=True)
    record_of(name).unlink(missing_ok=True)


def _sweep(name: str) -> None:
    """Remove what is left of a connection, unless it has a holder or somebody opens it anew."""
    descriptor = _open_lock(name)
    try:
        if _try(lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)):
            clear(name)
    finally:
        os.close(descriptor)


def _exit(address: Path) -> None:
    argv = ["ssh", "-F", "none", "-S", str(address).replace("%", "%%"), "-O", "exit", "kept"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(argv, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)


@contextlib.contextmanager
def locked(site: Site, place: Place, name: str) -> Iterator[int]:
    """For whoever opens the connection, then for its holder, which inherits it."""
    descriptor = _open_lock(name)
    try:
        deadline = time.monotonic() + 1.0
        while not _try(lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)):
            if time.monotonic() > deadline:
                raise Locked(
                    f"another flctl login to {place} waits for its answer, or has just opened a connection",
                    hint="flctl login --status",
                    site=site.name,
                )
            time.sleep(0.02)
        yield descriptor
    finally:
        os.close(descriptor)


def _is_locked(name: str) -> bool:
    descriptor = _open_lock(name)
    try:
        return not _try(lambda: fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB))
    finally:
        os.close(descriptor)


def _open_lock(name: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(folder() / f"{name}.lock", flags, 0o600)


def _try(action: Callable[[], object]) -> bool:
    try:
        action()
    except BlockingIOError:
        return False
    return True


def _answers(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link, contextlib.suppress(OSError):
        link.settimeout(2.0)
        link.connect(str(address))
        return True
    return False
