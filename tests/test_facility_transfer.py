"""Moving files: over each road to a real sshd, and on this machine; whole, resumable, never more than asked for."""

import contextlib
import hashlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from flctl.errors import (
    BudgetRefused,
    ConfigurationError,
    FlctlError,
    HostKeyRefused,
    Interrupted,
    LoginNeeded,
    SiteUnreachable,
    TransferFailed,
)
from flctl.facility import over_connection, over_ssh, patience, rsync, transfer
from flctl.facility.connection import Connection
from flctl.facility.over_ssh import OverSsh
from flctl.facility.profile import Transfer
from flctl.records import FileEntry
from tests.ssh_sites import (
    GONE,
    Network,
    Watch,
    agent,
    connected,
    early_in_a_step,
    keygen,
    local_site,
    road_to,
    secret_file,
    site_of,
)
from tests.testbed.sshd import Sshd

ADDRESS = "127.0.0.44"
NAMES = [
    "plain",
    "-rf",
    "#comment",
    ";",
    "two\nlines",
    "a b",
    "$(id)",
    "`id`",
    "'\"\\",
    "*?[a]",
    "\x1b[31m",
    "ž" * 100,
    "d/e/f",
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture(scope="module")
def keyed() -> Iterator[Sshd]:
    with Sshd(name="move-key", address=ADDRESS, port=2261, user="flctl-move") as server:
        yield server


@pytest.fixture(scope="module")
def coded() -> Iterator[Sshd]:
    with Sshd(name="move-code", address=ADDRESS, port=2262, user="flctl-move", kind="key+totp") as server:
        yield server


@pytest.fixture(params=["shared ssh", "ssh", "own connection", "local"])
def any_road(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A connection and the folder at its site, by each road that files may take."""
    if request.param == "local":
        with connected(local_site(), road_to(tmp_path)) as connection:
            yield connection, tmp_path / "site"
        return
    server = request.getfixturevalue("coded" if request.param == "own connection" else "keyed")
    with to(server, tmp_path, multiplex=request.param == "shared ssh") as connection:
        yield connection, fresh(server)


@pytest.fixture(params=["shared ssh", "own connection"])
def server(request: pytest.FixtureRequest) -> Sshd:
    """A server to which files take the road over ssh, or that over the connection."""
    return request.getfixturevalue("coded" if request.param == "own connection" else "keyed")


def to(
    server: Sshd, folder: Path, *, network: Network | None = None, road: dict[str, Any] | None = None, **fields: Any
) -> Any:
    if server.kind == "key+totp" and "secret" not in fields:
        fields["secret"] = secret_file(folder, server.reset_codes(period=30))
    made = road_to(folder, server, **(road or {}))
    if network is not None:
        made.known_hosts.write_text(network.known_hosts_line)
    return connected(network.site(**fields) if network else site_of(server, **fields), made)


def fresh(server: Sshd) -> Path:
    """A new folder in the account's home."""
    path = server.account.home / f"t{time.time_ns()}"
    return server.account.folder(path)


def there(path: Path) -> PurePosixPath:
    return PurePosixPath(path)


def write(folder: Path, name: str, content: bytes) -> FileEntry:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return FileEntry(path=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def entry(name: str, size: int) -> FileEntry:
    return FileEntry(path=name, size=size, sha256="")


def open_up(folder: Path) -> None:
    """Let the site's account read what root laid there."""
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


# Whole files, whatever they are called


def test_files_of_any_name_go_and_come_byte_for_byte(any_road: Any, tmp_path: Path) -> None:
    connection, site = any_road
    source, target = tmp_path / "source", tmp_path / "target"
    entries = [write(source, name, os.urandom(n * 4099)) for n, name in enumerate(NAMES)]
    write(source, "not named", b"x")
    connection.push(source, NAMES, there(site / "new folder" / "here"))
    assert names_below(site / "new folder" / "here") == sorted(NAMES)
    connection.pull(there(site / "new folder" / "here"), entries, target)
    assert names_below(target) == sorted(NAMES)
    for name in NAMES:
        content = (source / name).read_bytes()
        assert (site / "new folder" / "here" / name).read_bytes() == content == (target / name).read_bytes(), name


def test_files_are_private_at_both_ends(any_road: Any, tmp_path: Path) -> None:
    connection, site = any_road
    sent = write(tmp_path / "source", "folder/a", b"x")
    (tmp_path / "source" / "folder" / "a").chmod(0o666)
    connection.push(tmp_path / "source", ["folder/a"], there(site / "made"))
    (site / "made" / "folder" / "a").chmod(0o666)
    connection.pull(there(site / "made"), [sent], tmp_path / "target")
    (site / "made" / "folder" / "a").chmod(0o600)
    for path in (site / "made", site / "made" / "folder", tmp_path / "target", tmp_path / "target" / "folder"):
        assert path.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "target" / "folder" / "a").stat().st_mode & 0o777 == 0o600


def test_equal_size_and_time_do_not_hide_a_different_content(any_road: Any, tmp_path: Path) -> None:
    connection, site = any_road
    site.mkdir(exist_ok=True)
    for content in (b"first", b"other"):
        sent = write(tmp_path / "source", "a", content)
        os.utime(tmp_path / "source" / "a", (1e9, 1e9))
        connection.push(tmp_path / "source", ["a"], there(site))
        assert (site / "a").read_bytes() == content
        os.utime(site / "a", (1e9, 1e9))
        connection.pull(there(site), [sent], tmp_path / "target")
        assert (tmp_path / "target" / "a").read_bytes() == content
        os.utime(tmp_path / "target" / "a", (1e9, 1e9))


def test_progress_ends_with_all_bytes_and_never_goes_back(any_road: Any, tmp_path: Path) -> None:
    connection, site = any_road
    names = ["a", "b", "c"]
    entries = [write(tmp_path / "source", name, os.urandom(3_000_000)) for name in names]
    for move in (
        lambda heard: connection.push(tmp_path / "source", names, there(site), progress=heard),
        lambda heard: connection.pull(there(site), entries, tmp_path / "target", progress=heard),
    ):
        heard: list[int] = []
        move(heard.append)
        assert heard[-1] == 9_000_000 and heard == sorted(heard)


def test_files_that_came_whole_stay_when_another_does_not(keyed: Sshd, tmp_path: Path) -> None:
    site = fresh(keyed)
    entries = [write(site, "a", b"a"), entry("missing", 3), write(site, "z", b"z")]
    open_up(site)
    with to(keyed, tmp_path) as connection, pytest.raises(TransferFailed, match="missing"):
        connection.pull(there(site), entries, tmp_path / "target")
    assert names_below(tmp_path / "target") == ["a", "z"]


def test_nothing_to_move_is_no_error(any_road: Any, tmp_path: Path) -> None:
    connection, site = any_road
    connection.push(tmp_path, [], there(site / "made"))
    connection.pull(there(site), [], tmp_path / "target")


# Never more than asked for


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "", ".", "a/../../x", "a//b", "nul\0"])
def test_a_name_that_leads_elsewhere_is_refused(any_road: Any, tmp_path: Path, name: str) -> None:
    connection, site = any_road
    (tmp_path / "source").mkdir(exist_ok=True)
    (tmp_path / "secret").write_text("x")
    with pytest.raises(TransferFailed):
        connection.push(tmp_path / "source", [name], there(site))
    with pytest.raises(TransferFailed):
        connection.pull(there(site), [entry(name, 1)], tmp_path / "target")


def symlink(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize("odd", [symlink, fifo, folder, nothing])
def test_only_regular_files_come_and_go(any_road: Any, tmp_path: Path, odd: Callable[[Path], None]) -> None:
    connection, site = any_road
    site.mkdir(exist_ok=True)
    (tmp_path / "source").mkdir()
    odd(tmp_path / "source" / "a")
    with pytest.raises(TransferFailed, match="a"):
        connection.push(tmp_path / "source", ["a"], there(site))
    odd(site / "a")
    with pytest.raises(TransferFailed, match="a"):
        connection.pull(there(site), [entry("a", 5)], tmp_path / "target")
    assert not os.path.lexists(tmp_path / "target" / "a")


def test_a_linked_folder_is_not_pushed_from(any_road: Any, tmp_path: Path) -> None:
    connection, site = any_road
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "etc").symlink_to("/etc")
    with pytest.raises(TransferFailed):
        connection.push(tmp_path / "source", ["etc/passwd"], there(site))


def test_a_file_larger_or_smaller_than_its_record_is_refused(any_road: Any, tmp_path: Path) -> None:
    connection, site = any_road
    site.mkdir(exist_ok=True)
    write(site, "a", b"x" * 1000)
    open_up(site)
    for size in (999, 1001):
        with pytest.raises(TransferFailed, match="a"):
            connection.pull(there(site), [entry("a", size)], tmp_path / "target")


def test_a_sender_cannot_exceed_the_largest_size_that_was_asked_for(
    keyed: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel stops our rsync even if it believed the site: here --max-size is not given at all."""
    site = fresh(keyed)
    write(site, "a", os.urandom(1_000_000))
    open_up(site)
    told = lambda words: [word for word in words if not word.startswith("--max-size")]  # noqa: E731
    popen = subprocess.Popen
    monkeypatch.setattr(rsync.subprocess, "Popen", lambda argv, **options: popen(told(argv), **options))
    with to(keyed, tmp_path) as connection, pytest.raises(FlctlError):
        connection.pull(there(site), [entry("a", 1000)], tmp_path / "target")
    assert not (tmp_path / "target" / "a").exists()
    assert all(path.stat().st_size <= 2048 for path in (tmp_path / "target").rglob("*") if path.is_file())


RECURSING = """#!/bin/sh
# A site's rsync that sends what lies below a folder although only the folder's name was asked for.
shift
exec /usr/bin/rsync --server -r "$@"
"""


@pytest.mark.parametrize("rsync_refuses", [True, False])
def test_files_that_were_not_asked_for_do_not_come(
    tmp_path: Path, rsync_refuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if our rsync is one that takes them: then they never leave the folder where things arrive."""
    if not rsync_refuses:
        monkeypatch.setattr(rsync, "OPTIONS", [o for o in rsync.OPTIONS if o != "--no-dirs"])
    with Sshd(name="move-evil", address=ADDRESS, port=2265, user="flctl-evil") as server:
        site, tools = fresh(server), server.account.folder(server.account.home / "tools")
        for name in ("a/more", "a/.bashrc"):
            write(site, name, b"not asked for")
        open_up(site)
        server.account.file(tools / "rsync", RECURSING, 0o700)
        bashrc = server.account.file(server.account.home / ".bashrc", f"PATH={tools}:$PATH\n")
        try:
            with to(server, tmp_path) as connection, pytest.raises(FlctlError):
                connection.pull(there(site), [entry("a", 100)], tmp_path / "target")
        finally:
            bashrc.unlink()
    assert names_below(tmp_path / "target") == []


def test_rsync_is_never_told_to_follow_or_recurse(keyed: Sshd, tmp_path: Path) -> None:
    site, seen = fresh(keyed), []
    write(tmp_path / "source", "a", os.urandom(2_000_000))

    def look() -> bool:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            except OSError:
                continue
            if any(word.endswith("/rsync") for word in words[:6]) and str(tmp_path) in " ".join(words):
                seen.append(words)
        return False

    with to(keyed, tmp_path, road={"stop": look}) as connection:
        connection.push(tmp_path / "source", ["a"], there(site))
    assert seen
    short = re.compile(r"-[a-zA-Z]*[arLKk]")
    for words in seen:
        options = words[: words.index("--")]
        assert not [word for word in options if short.fullmatch(word)]
        assert not {"--inplace", "--append", "--archive", "--recursive", "--copy-links", "--trust-sender"} & set(
            options
        )


# When it is interrupted


def test_what_was_moved_before_a_cut_is_not_moved_again(server: Sshd, tmp_path: Path) -> None:
    size = 24_000_000
    site = fresh(server)
    sent = write(tmp_path / "source", "a", os.urandom(size))
    with Network(server) as network:
        for move, target in (
            (lambda c: c.push(tmp_path / "source", ["a"], there(site)), site),
            (lambda c: c.pull(there(site), [sent], tmp_path / "target"), tmp_path / "target"),
        ):
            with to(server, tmp_path, network=network) as connection:
                connection.run("true")
                network.sent = network.received = 0
                network.cut_after = size * 2 // 3
                with pytest.raises(SiteUnreachable):
                    move(connection)
            wait_for(lambda target=target: list(target.glob(f"**/{rsync.PARTIAL}/a")))
            assert not (target / "a").exists()
            with to(server, tmp_path, network=network) as connection:
                connection.run("true")
                network.sent = network.received = 0
                move(connection)
                assert max(network.sent, network.received) < size * 2 // 3
            assert (target / "a").read_bytes() == (tmp_path / "source" / "a").read_bytes()
            assert [path.name for path in target.iterdir()] == ["a"]


def wait_for(condition: Callable[[], object], timeout: float = 20.0) -> None:
    limit = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_link_that_falls_silent_ends_the_transfer(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "ALIVE_INTERVAL", 1)
    monkeypatch.setattr(patience, "ALIVE_COUNT", 2)
    write(tmp_path / "source", "a", os.urandom(24_000_000))
    with Network(server) as network, to(server, tmp_path, network=network) as connection:
        connection.run("true")
        network.sent, network.freeze_after = 0, 8_000_000
        began = time.monotonic()
        with pytest.raises(SiteUnreachable):
            connection.push(tmp_path / "source", ["a"], there(fresh(server)))
        assert time.monotonic() - began < 20


def rsyncs(word: str) -> list[int]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(part.endswith(b"rsync") for part in words[:1]) and word.encode() in b" ".join(words):
            found.append(int(pid))
    return found


def test_stopping_ends_our_rsync_and_keeps_what_it_has(server: Sshd, tmp_path: Path) -> None:
    """The lock is inherited by rsync, so that an orphan has no rival."""
    site, target = fresh(server), tmp_path / "target"
    sent = write(site, "a", os.urandom(30_000_000))
    open_up(site)
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    held: list[str] = []

    with Network(server) as network:

        def stop() -> bool:
            if not network.frozen.is_set():
                return False
            for pid in rsyncs(str(target)):
                held.extend(os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir())
            return True

        closed = 987
        with to(server, tmp_path, network=network, road={"stop": stop, "lock_fds": (lock, closed)}) as connection:
            network.received, network.freeze_after = 0, 15_000_000
            with pytest.raises(Interrupted):
                connection.pull(there(site), [sent], target)
    assert str(tmp_path / "lock") in held
    assert rsyncs(str(target)) == []
    assert not (target / "a").exists()
    assert (target / transfer.INCOMING / rsync.PARTIAL / "a").stat().st_size > 5_000_000
    os.close(lock)


def test_what_came_before_our_rsync_was_killed_does_not_come_again(keyed: Sshd, tmp_path: Path) -> None:
    """As a power cut does: it had no time to keep what it had under the name of a partial file."""
    size, site, target = 24_000_000, fresh(keyed), tmp_path / "target"
    sent = write(site, "a", os.urandom(size))
    open_up(site)
    with Network(keyed) as network:

        def kill() -> bool:
            for pid in rsyncs(str(target)) if network.frozen.is_set() else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return False

        with to(keyed, tmp_path, network=network, road={"stop": kill}) as connection:
            connection.run("true")
            network.received, network.freeze_after = 0, size * 2 // 3
            with pytest.raises(SiteUnreachable):
                connection.pull(there(site), [sent], target)
    wait_for(lambda: not rsyncs(str(target)))
    with Network(keyed) as network, to(keyed, tmp_path, network=network) as connection:
        connection.pull(there(site), [sent], target)
        assert network.received < size * 2 // 3
    assert (target / "a").read_bytes() == (site / "a").read_bytes()
    assert names_below(target) == ["a"]


def test_what_was_sent_before_the_link_fell_silent_is_not_sent_again(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rsync there still waits for the rest, and has not yet kept what it has under the name of a partial file."""
    monkeypatch.setattr(patience, "ALIVE_INTERVAL", 1)
    monkeypatch.setattr(patience, "ALIVE_COUNT", 2)
    size, site = 24_000_000, PurePosixPath(f"{fresh(server)}/.0007.part")
    write(tmp_path / "source", "in/a", os.urandom(size))
    with Network(server) as silent, to(server, tmp_path, network=silent) as connection:
        connection.run("true")
        silent.sent, silent.freeze_after = 0, size * 2 // 3
        with pytest.raises(SiteUnreachable):
            connection.push(tmp_path / "source", ["in/a"], site)
        with Network(server) as network, to(server, tmp_path, network=network) as another:
            another.run("true")
            network.sent = 0
            another.push(tmp_path / "source", ["in/a"], site)
            assert network.sent < size * 2 // 3
    assert (Path(site) / "in" / "a").read_bytes() == (tmp_path / "source" / "in" / "a").read_bytes()
    assert [name for name in names_below(Path(site)) if not name.startswith("in/.")] == ["in/a"]


def test_stopping_ends_a_local_copy(tmp_path: Path) -> None:
    write(tmp_path / "source", "a", b"x" * 20_000_000)
    stop = threading.Event()
    with connected(local_site(), road_to(tmp_path, stop=stop.is_set)) as connection:
        with pytest.raises(Interrupted):
            connection.push(tmp_path / "source", ["a"], there(tmp_path / "t"), progress=lambda moved: stop.set())
        assert names_below(tmp_path / "t") == []


def test_leavings_of_a_killed_rsync_are_swept(keyed: Sshd, tmp_path: Path) -> None:
    site = fresh(keyed)
    sent = write(site, "a", b"content")
    open_up(site)
    for name in (".a.Ab12Cd", f"{transfer.INCOMING}/.a.Ab12Cd"):
        write(tmp_path / "target", name, b"x")
    with to(keyed, tmp_path) as connection:
        connection.pull(there(site), [sent], tmp_path / "target")
    assert names_below(tmp_path / "target") == [".a.Ab12Cd", "a"]


# Why it failed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=777", "none", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_is_a_budget_refused_at_either_end(any_road: Any, tmp_path: Path, small_disk: Path) -> None:
    connection, site = any_road
    for folder in (tmp_path, *tmp_path.parents):  # the account at the site has to reach it
        if folder.stat().st_mode & 0o7777 == 0o700:
            folder.chmod(0o711)
    sent = write(tmp_path / "source", "a", os.urandom(3_000_000))
    with pytest.raises(BudgetRefused, match="No space left"):
        connection.push(tmp_path / "source", ["a"], there(small_disk))
    connection.push(tmp_path / "source", ["a"], there(site))
    with pytest.raises(BudgetRefused, match="No space left"):
        connection.pull(there(site), [sent], small_disk / "target")


def test_files_pass_a_shell_that_talks(server: Sshd, tmp_path: Path) -> None:
    sent = write(tmp_path / "source", "a", os.urandom(300_000))
    bashrc = server.account.file(server.account.home / ".bashrc", "echo 'Welcome to the machine'\n")
    target = fresh(server)
    try:
        with to(server, tmp_path) as connection:
            connection.push(tmp_path / "source", ["a"], there(target))
            connection.pull(there(target), [sent], tmp_path / "back")
        assert (tmp_path / "back" / "a").read_bytes() == (tmp_path / "source" / "a").read_bytes()
    finally:
        bashrc.unlink()


def test_a_shell_that_talks_at_a_transfer_host_is_named_as_the_reason(keyed: Sshd, tmp_path: Path) -> None:
    """The same server by another address: a host of its own, whose shell nobody has heard."""
    write(tmp_path / "source", "a", b"x")
    with Network(keyed) as network:
        road = road_to(tmp_path, keyed)
        road.known_hosts.write_text(keyed.known_hosts_line + network.known_hosts_line)
        site = site_of(keyed, transfer=Transfer(host="127.0.0.1", port=network.port))
        bashrc = keyed.account.file(keyed.account.home / ".bashrc", "echo 'Welcome to the machine'\n")
        try:
            with connected(site, road) as connection, pytest.raises(TransferFailed) as caught:
                connection.push(tmp_path / "source", ["a"], there(fresh(keyed)))
            assert ".bashrc" in caught.value.hint
        finally:
            bashrc.unlink()


def test_a_site_without_rsync_is_told_apart(server: Sshd, tmp_path: Path) -> None:
    write(tmp_path / "source", "a", b"x")
    bashrc = server.account.file(server.account.home / ".bashrc", "PATH=/nowhere\n")
    try:
        with to(server, tmp_path) as connection, pytest.raises(TransferFailed, match="cannot be run") as caught:
            connection.pull(there(fresh(server)), [entry("a", 1)], tmp_path / "target")
        assert "PATH" in caught.value.hint
    finally:
        bashrc.unlink()


def test_a_folder_that_may_not_be_written_is_a_failed_transfer(any_road: Any, tmp_path: Path) -> None:
    connection, _ = any_road
    write(tmp_path / "source", "a", b"x")
    with pytest.raises(TransferFailed):
        connection.push(tmp_path / "source", ["a"], PurePosixPath("/proc/flctl"))


def program(path: Path, says: str) -> None:
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)


@pytest.mark.parametrize("says", ["openrsync: protocol version 29", "rsync  version 3.0.9  protocol version 30"])
def test_an_rsync_that_is_too_old_is_refused_with_the_way_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    program(tmp_path / "rsync", says)
    monkeypatch.setenv("PATH", str(tmp_path))
    rsync.rsync_program.cache_clear()
    try:
        with pytest.raises(ConfigurationError, match=r"rsync 3\.1") as caught:
            rsync.rsync_program()
        assert "brew install rsync" in caught.value.hint
    finally:
        rsync.rsync_program.cache_clear()


# Logins


def test_one_code_serves_commands_and_files(coded: Sshd, tmp_path: Path) -> None:
    early_in_a_step()
    since = coded.mark()
    write(tmp_path / "source", "a", b"x")
    with to(coded, tmp_path) as connection:
        for n in range(3):
            connection.push(tmp_path / "source", ["a"], there(fresh(coded)))
            connection.run(f"echo {n}")
        assert connection.logins == 1
    counted = coded.attempts(since)
    assert (counted.connections, counted.codes, counted.failed_codes) == (1, 1, 0)


@pytest.mark.parametrize(("multiplex", "logins"), [(True, 2), (False, 4)])
def test_every_login_of_ssh_is_counted(keyed: Sshd, tmp_path: Path, multiplex: bool, logins: int) -> None:
    since, told = keyed.mark(), []
    write(tmp_path / "source", "a", b"x")
    with to(keyed, tmp_path, multiplex=multiplex, road={"on_login": lambda *_: told.append(1)}) as connection:
        for _ in range(3):
            connection.push(tmp_path / "source", ["a"], there(fresh(keyed)))
        assert (connection.logins, len(told)) == (logins, logins)
    assert keyed.attempts(since).logins == logins


def test_a_shared_connection_ends_with_ours_and_is_made_anew_when_it_is_lost(
    keyed: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(over_ssh, "LINGER", 3)
    write(tmp_path / "source", "a", b"x")
    runtime = str(tmp_path / "run")

    def masters() -> list[int]:
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_master(pid, runtime)]

    with to(keyed, tmp_path) as connection:
        connection.push(tmp_path / "source", ["a"], there(fresh(keyed)))
        first = masters()
        time.sleep(4.5)  # longer than it may linger: only our lifeline keeps it
        assert masters() == first and len(first) == 1
        os.kill(first[0], 9)
        wait_for(lambda: masters() == [])
        connection.push(tmp_path / "source", ["a"], there(fresh(keyed)))
        assert connection.logins == 3
        assert len(masters()) == 1
    wait_for(lambda: masters() == [])


def test_a_shared_connection_that_ended_before_it_was_used_is_trouble_of_the_site(
    keyed: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when this machine sleeps between ssh's login and our first use of it."""
    wait = OverSsh._wait

    def sleeping(self: OverSsh, child: "subprocess.Popen[bytes]") -> int:
        status = wait(self, child)
        time.sleep(3)
        return status

    monkeypatch.setattr(over_ssh, "LINGER", 1)
    monkeypatch.setattr(OverSsh, "_wait", sleeping)
    write(tmp_path / "source", "a", b"x")
    with to(keyed, tmp_path) as connection:
        with pytest.raises(SiteUnreachable, match="ended the connection at once"):
            connection.push(tmp_path / "source", ["a"], there(fresh(keyed)))
        monkeypatch.setattr(over_ssh, "LINGER", 10)
        connection.push(tmp_path / "source", ["a"], there(fresh(keyed)))


def is_master(pid: int, runtime: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
    return "ControlMaster=yes" in words and runtime in words


def test_a_shared_connection_does_not_outlive_a_killed_flctl(keyed: Sshd, tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path, PurePosixPath\n"
        "from flctl.facility import over_ssh\nfrom flctl.facility.connection import connect\n"
        "from tests.ssh_sites import road_to, site_of\nfrom tests.testbed.sshd import Sshd\n"
        "over_ssh.LINGER = 1\nfolder = Path(sys.argv[1])\n"
        f"server = Sshd(name='move-key', address='{ADDRESS}', port=2261, user='flctl-move')\n"
        "connect(site_of(server), road_to(folder, server)).push(folder, ['a'], PurePosixPath(sys.argv[2]))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    write(tmp_path, "a", b"x")
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(fresh(keyed))], check=False, timeout=60)
    runtime = str(tmp_path / "run")
    wait_for(lambda: not any(is_master(pid, runtime) for pid in map(int, filter(str.isdigit, os.listdir("/proc")))))


# A transfer host of its own


@pytest.fixture(scope="module")
def files_host() -> Iterator[Sshd]:
    with Sshd(name="move-files", address="127.0.0.45", port=2264, user="flctl-move", kind="key+totp") as server:
        yield server


def split(coded: Sshd, files_host: Sshd, folder: Path, **fields: Any) -> Any:
    """A site whose commands and files have a host each, both wanting key and code."""
    files_host.authorize(coded.client_key.with_suffix(".pub").read_text())
    # A facility checks the codes of its hosts in one place, with one secret.
    secret = coded.reset_codes(period=3)
    files_host.reset_codes(period=3)
    (files_host.folder / "codes").write_bytes((coded.folder / "codes").read_bytes())
    transfer_table = Transfer(host=files_host.address, port=files_host.port)
    return site_of(coded, secret=secret_file(folder, secret), transfer=transfer_table, **fields)


@pytest.mark.parametrize("multiplex", [True, False])
def test_a_transfer_host_that_wants_a_code_gets_one_of_its_own(
    coded: Sshd, files_host: Sshd, tmp_path: Path, multiplex: bool
) -> None:
    site, road = split(coded, files_host, tmp_path, multiplex=multiplex), road_to(tmp_path, coded, files_host)
    since, target = files_host.mark(), fresh(coded)
    sent = write(tmp_path / "source", "a", os.urandom(100_000))
    with connected(site, road) as connection:
        connection.push(tmp_path / "source", ["a"], there(target))
        connection.pull(there(target), [sent], tmp_path / "target")
        assert connection.logins == (2 if multiplex else 3)
    assert (tmp_path / "target" / "a").read_bytes() == (tmp_path / "source" / "a").read_bytes()
    counted = files_host.attempts(since)
    assert (counted.codes, counted.failed_codes) == (1 if multiplex else 2, 0)


@pytest.mark.parametrize("multiplex", [True, False])
def test_a_refused_code_at_the_transfer_host_is_one_attempt(
    coded: Sshd, files_host: Sshd, tmp_path: Path, multiplex: bool
) -> None:
    site, road = split(coded, files_host, tmp_path, multiplex=multiplex), road_to(tmp_path, coded, files_host)
    files_host.reset_codes(period=3)
    since = files_host.mark()
    write(tmp_path / "source", "a", b"x")
    with connected(site, road) as connection, pytest.raises(LoginNeeded, match="refused the one-time code"):
        connection.push(tmp_path / "source", ["a"], there(fresh(coded)))
    files_host.wait_for(GONE, since=since)
    counted = files_host.attempts(since)
    assert (counted.connections, counted.codes, counted.failed_codes) == (1, 0, 1)


@pytest.mark.parametrize("multiplex", [True, False])
def test_another_question_at_the_transfer_host_is_not_answered(
    coded: Sshd, files_host: Sshd, tmp_path: Path, multiplex: bool
) -> None:
    site, road = split(coded, files_host, tmp_path, multiplex=multiplex), road_to(tmp_path, coded, files_host)
    module = "auth required pam_unix.so\naccount required pam_unix.so\nsession required pam_permit.so\n"
    (Path("/etc/pam.d") / f"flctl-sshd-{files_host.name}").write_text(module)
    since = files_host.mark()
    write(tmp_path / "source", "a", b"x")
    with connected(site, road) as connection, pytest.raises(LoginNeeded, match=r"'Password:'.*nothing was answered"):
        connection.push(tmp_path / "source", ["a"], there(fresh(coded)))
    files_host.wait_for(GONE, since=since)
    assert files_host.attempts(since).failed_codes == 0
    assert "authentication failure" not in files_host.log_text(since)


def test_the_transfer_hosts_key_must_be_trusted(coded: Sshd, files_host: Sshd, tmp_path: Path) -> None:
    site, road = split(coded, files_host, tmp_path), road_to(tmp_path, coded)
    since = files_host.mark()
    write(tmp_path / "source", "a", b"x")
    with connected(site, road) as connection:
        with pytest.raises(HostKeyRefused, match="unknown") as caught:
            connection.push(tmp_path / "source", ["a"], there(fresh(coded)))
        assert files_host.host_key_fingerprint in caught.value.message
        with road.known_hosts.open("a") as stream:
            stream.write(f"[{files_host.address}]:{files_host.port} {coded.host_key_line}\n")
        with pytest.raises(HostKeyRefused, match="changed"):
            connection.push(tmp_path / "source", ["a"], there(fresh(coded)))
    counted = files_host.attempts(since)
    assert counted.keys + counted.failed_keys + counted.codes + counted.failed_codes == 0


def test_neither_secret_nor_codes_are_left_behind_by_the_road_that_is_asked(
    coded: Sshd, files_host: Sshd, tmp_path: Path
) -> None:
    site, road = split(coded, files_host, tmp_path), road_to(tmp_path, coded, files_host)
    write(tmp_path / "source", "a", b"x")
    with Watch(coded.totp_secret) as watch, connected(site, road) as connection:
        connection.push(tmp_path / "source", ["a"], there(fresh(coded)))
    assert watch.found == [] and watch.looks > 10
    assert names_below(road.runtime) == ["askpass"]
    assert coded.totp_secret not in (road.runtime / "askpass").read_text()


def test_a_refused_key_at_the_transfer_host_says_so(keyed: Sshd, files_host: Sshd, tmp_path: Path) -> None:
    key = keygen(tmp_path / "key")
    keyed.authorize((tmp_path / "key.pub").read_text())
    site = site_of(keyed, key=str(key), transfer=Transfer(host=files_host.address, port=files_host.port))
    write(tmp_path / "source", "a", b"x")
    connection: Connection
    with connected(site, road_to(tmp_path, keyed, files_host)) as connection:
        with pytest.raises(LoginNeeded, match="refused the key"):
            connection.push(tmp_path / "source", ["a"], there(fresh(keyed)))
        assert connection.logins == 1


def test_a_long_runtime_folder_does_not_hinder_the_sockets(server: Sshd, tmp_path: Path) -> None:
    runtime = tmp_path / ("x" * 90) / "run"
    runtime.mkdir(mode=0o700, parents=True)
    write(tmp_path / "source", "a", b"x")
    with to(server, tmp_path, road={"runtime": runtime}) as connection:
        connection.push(tmp_path / "source", ["a"], there(fresh(server)))
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize("kind", ["certificate", "agent", "agent's certificate", "passphrase"])
def test_whatever_logs_in_also_moves_files(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """paramiko and the system's ssh agree on what key they show."""
    certified = "certificate" in kind
    words = "some words" if kind == "passphrase" else ""
    key = keygen(tmp_path / "key", passphrase=words)
    write(tmp_path / "source", "a", b"x")
    with Sshd(
        name="move-any", address=ADDRESS, port=2266, user="flctl-move", kind="certificate" if certified else "key"
    ) as server:
        if certified:
            server.certify(tmp_path / "key.pub")
        else:
            server.authorize((tmp_path / "key.pub").read_text())
        with agent(key, passphrase=words, certificates=certified) as address:
            if kind != "certificate":
                monkeypatch.setenv("SSH_AUTH_SOCK", address)
            with to(server, tmp_path, key="agent" if "agent" in kind else str(key)) as connection:
                connection.push(tmp_path / "source", ["a"], there(fresh(server)))
                assert connection.logins == 2
            assert server.attempts().logins == 2


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_what_a_shell_prints_before_the_mark_never_reaches_rsync(size: int) -> None:
    mark, content = b"0123456789abcdef", bytes(range(256)) * 3
    stream = io.BytesIO(b"welcome 0123\n" * 1000 + b"\n" + mark + b"\n" + content)
    receive = over_connection._after(mark, lambda most: stream.read(min(most, size)))
    assert b"".join(iter(lambda: receive(1 << 17), b"")) == content
    stream = io.BytesIO(b"no such command\n")
    assert over_connection._after(mark, stream.read)(100) == b""


def test_a_connection_that_cannot_be_written_to_any_more_hides_no_reason(keyed: Sshd, tmp_path: Path) -> None:
    """paramiko throws an EOFError when a channel of it is closed."""
    from flctl.facility.login import open_session

    with Network(keyed) as network, to(keyed, tmp_path, network=network, road={"sparing": True}) as connection:
        carrier = connection._road()
        with pytest.raises(SiteUnreachable, match="the true reason"), carrier.open():
            carrier._channel = open_session(connection._wire)
            network.freeze()
            connection._wire.sock.shutdown(socket.SHUT_WR)
            raise SiteUnreachable("the true reason", site=keyed.name)


# New keys in the middle


@pytest.mark.parametrize("sparing", [True, False], ids=["our connection", "ssh"])
def test_a_server_that_asks_for_new_keys_all_the_time_slows_nothing_down_to_a_halt(
    tmp_path: Path, sparing: bool
) -> None:
    """Every megabyte, while data flows in either direction; the server is the one that asks."""
    content = os.urandom(24_000_000)
    entry = write(tmp_path / "source", "a", content)
    options = ("RekeyLimit 1M", "LogLevel DEBUG1")
    with Sshd(name="move-rekey", address="127.0.93.7", port=24307, user="flctl-move", options=options) as server:
        site, target = fresh(server), tmp_path / "back"
        with connected(site_of(server), road_to(tmp_path, server, sparing=sparing)) as connection:
            for move in (
                lambda: connection.push(tmp_path / "source", ["a"], there(site)),
                lambda: connection.pull(there(site), [entry], target),
            ):
                since = server.mark()
                move()
                assert server.log_text(since).count("SSH2_MSG_NEWKEYS received") >= 10
            assert (target / "a").read_bytes() == content
            output = connection.run("head -c 5000000 /dev/zero | tr '\\0' x", timeout=60.0)
            assert output.stdout == "x" * 5_000_000


def test_a_transfer_that_moves_too_little_for_too_long_is_given_up(
    keyed: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that trickles is alive, and of no use."""
    from tests.chaos.proxy import Plan, Proxy

    write(tmp_path / "source", "a", os.urandom(4_000_000))
    monkeypatch.setattr(patience, "SLOW_WINDOW", 4.0)
    with Proxy(keyed.address, keyed.port) as network:
        road = road_to(tmp_path, sparing=True)
        road.known_hosts.write_text(network.known_hosts_line(keyed.host_key_line))
        with connected(site_of(keyed, host=network.address, port=network.port), road) as connection:
            connection.run("true")
            network.arm(Plan(after=100_000, direction="up", then="trickle", rate=20_000))
            began = time.monotonic()
            with pytest.raises(SiteUnreachable, match="the files do not get through"):
                connection.push(tmp_path / "source", ["a"], there(fresh(keyed)))
            assert time.monotonic() - began < 30
    assert rsyncs(str(tmp_path)) == []
