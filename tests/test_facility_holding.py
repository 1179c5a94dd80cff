"""Connections that a person opens and later commands use: over real sshds with real codes, on a real terminal."""

import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from flctl.errors import CodeSpent, ConfigurationError, HostKeyRefused, Locked, LoginNeeded, SiteUnreachable
from flctl.facility import allowance, holder, holding
from flctl.facility.codes import parse_secret
from flctl.facility.connection import Road, connect
from flctl.facility.holding import Kept
from flctl.facility.profile import Site, Totp, Transfer
from flctl.records import FileEntry
from tests.ssh_sites import Watch, early_in_a_step, keygen, road_to, secret_file, site_of
from tests.terminals import Terminal
from tests.test_facility_connection import (  # noqa: F401  what is true of every connection
    test_a_command_that_does_not_end_is_given_up_in_time,
    test_a_daemon_left_behind_does_not_keep_the_caller,
    test_a_long_program_arrives_whole,
    test_a_program_is_posix_shell_with_here_documents_and_functions,
    test_a_program_with_an_error_in_it_does_not_begin,
    test_bytes_that_are_no_text_are_replaced,
    test_commands_do_not_read_the_rest_of_the_program,
    test_output_errors_and_status_come_back_apart,
    test_output_is_kept_up_to_a_limit,
)
from tests.testbed.sshd import Sshd

ADDRESS = "127.0.0.80"

KEEP = """
import pickle, sys
from flctl.errors import FlctlError
from flctl.facility import attended, holding
site, known_hosts, seconds, number = pickle.load(open(sys.argv[1], "rb"))
try:
    kept = attended.keep(site, holding.places(site)[number], known_hosts, seconds)
    print("kept", kept.place, flush=True)
except FlctlError as error:
    print(type(error).__name__, error.message, error.hint, flush=True)
    sys.exit(error.exit_code)
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home and a state folder (with a short name) of this test's own, and no agent; what it kept is closed."""
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="flctl-test-") as folder:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("XDG_STATE_HOME", folder)
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        yield Path(folder)
        close_all()


def close_all() -> None:
    for kept, _ in holding.everything():
        holding.close(kept)


@pytest.fixture(scope="module")
def server() -> Iterator[Sshd]:
    with Sshd(name="hold", address=ADDRESS, port=2800, user="flctl-hold", kind="key+totp") as started:
        yield started


def attended(server: Sshd, *, hold: int = 600, **fields: Any) -> Site:
    return site_of(server, totp={"automation": "forbidden", "permission": "", "secret": ""}, hold=hold, **fields)


def code_of(server: Sshd, *, room: float = 5.0) -> str:
    """The code of the moment of a secret that is new: none of its codes is used. To be typed within `room` seconds."""
    early_in_a_step(room=room)
    return parse_secret(server.reset_codes(period=30), Totp()).code(time.time())


def login(folder: Path, site: Site, road: Road, seconds: float, number: int = 0) -> Terminal:
    """`attended.keep` in a process of its own, on a terminal of its own."""
    (folder / "what").write_bytes(pickle.dumps((site, road.known_hosts, seconds, number)))
    return Terminal([sys.executable, "-c", KEEP, str(folder / "what")])


def keep(folder: Path, server: Sshd, site: Site, road: Road, seconds: float = 300) -> Kept:
    """A person logs in with the code of the moment."""
    with login(folder, site, road, seconds) as terminal:
        terminal.expect("One-time password")
        terminal.type(code_of(server))
        assert terminal.end() == 0, terminal.screen
    kept = holding.find(site, holding.places(site)[0], road.known_hosts)
    assert kept is not None
    return kept


def processes(kept: Kept) -> list[int]:
    """The ssh and the holder of a connection."""
    word, found = str(kept.socket).encode(), []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if word in line and b"-O\0exit" not in line:
            found.append(int(pid))
    return found


def holder_of(kept: Kept) -> int:
    (pid,) = [pid for pid in processes(kept) if b"holder.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return pid


def wait(condition: Any, limit: float, what: str) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit, f"waited {limit} s for {what}"
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.fixture
def connection(server: Sshd, tmp_path: Path) -> Iterator[Any]:
    """For what is true of every connection."""
    site, road = attended(server), road_to(tmp_path, server)
    keep(tmp_path, server, site, road)
    made = connect(site, road)
    yield made
    made.close()


# One login for many commands


def test_one_code_serves_commands_and_files_of_many_processes(server: Sshd, tmp_path: Path) -> None:
    site, road, since = attended(server), road_to(tmp_path, server), server.mark()
    keep(tmp_path, server, site, road)
    (tmp_path / "big").write_bytes(os.urandom(3 << 20))
    digest = sha256((tmp_path / "big").read_bytes()).hexdigest()
    target = server.account.home / "pushed"
    for _ in range(3):
        one = connect(site, road)
        assert one.run("id -un").stdout == f"{server.user}\n"
        one.push(tmp_path, ["big"], target)
        entry = FileEntry(path="big", size=3 << 20, sha256=digest)
        one.pull(target, [entry], tmp_path / "back")
        assert sha256((tmp_path / "back" / "big").read_bytes()).hexdigest() == digest
        assert one.logins == 0
        one.close()
    seen = server.attempts(since)
    assert (seen.connections, seen.logins, seen.failed_codes) == (1, 1, 0)


def test_the_person_sees_what_the_server_says_before_it_asks(tmp_path: Path) -> None:
    banner = tmp_path / "banner"
    banner.write_text("Only for permitted use.\n")
    with Sshd(
        name="hold-banner",
        address=ADDRESS,
        port=2801,
        user="flctl-hold",
        kind="key+totp",
        options=(f"Banner {banner}",),
    ) as server:
        with login(tmp_path, attended(server), road_to(tmp_path, server), 60) as terminal:
            terminal.expect("Only for permitted use")
            terminal.expect("One-time password")
            terminal.type(code_of(server))
            assert terminal.end() == 0, terminal.screen
        close_all()


def test_a_password_and_a_code_are_two_questions_of_one_login(tmp_path: Path) -> None:
    with Sshd(name="hold-two", address=ADDRESS, port=2802, user="flctl-hold2", kind="password+totp") as server:
        site, road = attended(server, kind="attended", key="agent"), road_to(tmp_path, server)
        code = code_of(server, room=20.0)
        with Watch(server.password, code) as watch, login(tmp_path, site, road, 60) as terminal:
            terminal.expect("[Pp]assword:")
            terminal.type(server.password)
            terminal.expect("One-time password")
            terminal.type(code)
            assert terminal.end() == 0, terminal.screen
            assert connect(site, road).run("echo x").stdout == "x\n"
        assert watch.looks > 5 and watch.found == []
        assert server.password not in terminal.screen and code not in terminal.screen
        seen = server.attempts()
        assert (seen.connections, seen.logins, seen.failed_keys) == (1, 1, 0)
        close_all()


def test_one_session_at_a_time_is_enough(tmp_path: Path) -> None:
    with Sshd(
        name="hold-one", address=ADDRESS, port=2803, user="flctl-hold", kind="key+totp", options=("MaxSessions 1",)
    ) as server:
        site, road = attended(server, multiplex=False), road_to(tmp_path, server)
        keep(tmp_path, server, site, road)
        connection = connect(site, road)
        (tmp_path / "f").write_text("x")
        for n in range(15):
            assert connection.run(f"echo {n}").stdout == f"{n}\n"
            connection.push(tmp_path, ["f"], server.account.home / f"one-{n}")
        # Another process of the user has the one session for a while.
        other = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path / "what")], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None and other.stdout.readline() == "begun\n"
        began = time.monotonic()
        entry = FileEntry(path="f", size=1, sha256=sha256(b"x").hexdigest())
        connection.pull(server.account.home / "one-1", [entry], tmp_path / "back")
        assert time.monotonic() - began > 0.5 and (tmp_path / "back" / "f").read_text() == "x"
        assert other.wait(timeout=20) == 0
        other.stdout.close()
        seen = server.attempts()
        assert (seen.connections, seen.logins) == (1, 1)
        close_all()


RUN = """
import pickle, sys, threading
from pathlib import Path
from flctl.facility.connection import Road, connect
site, known_hosts, *_ = pickle.load(open(sys.argv[1], "rb"))
connection = connect(site, Road(known_hosts=known_hosts, runtime=Path("/tmp")))
thread = threading.Thread(target=connection.run, args=("touch ~/begun; sleep 2",))
thread.start()
print("begun", flush=True) if not thread.join(0.7) else None
thread.join()
"""


def test_a_server_that_allows_no_session_is_found_out_at_the_login(tmp_path: Path) -> None:
    with Sshd(
        name="hold-none", address=ADDRESS, port=2807, user="flctl-hold", kind="key+totp", options=("MaxSessions 0",)
    ) as server:
        with login(tmp_path, attended(server), road_to(tmp_path, server), 60) as terminal:
            terminal.expect("One-time password")
            terminal.type(code_of(server))
            assert terminal.end() == ConfigurationError.exit_code, terminal.screen
        assert "allows no session" in terminal.screen
        assert holding.everything() == []


def test_a_code_that_a_person_typed_is_not_made_again_by_flctl(server: Sshd, tmp_path: Path) -> None:
    code = code_of(server, room=20.0)
    site, road = site_of(server, secret=secret_file(tmp_path, server.totp_secret), hold=60), road_to(tmp_path, server)
    with login(tmp_path, site, road, 60) as terminal:
        terminal.expect("One-time password")
        terminal.type(code)
        assert terminal.end() == 0, terminal.screen
    assert connect(site, road).run("echo x").stdout == "x\n"
    close_all()
    with pytest.raises(CodeSpent):
        connect(site, road)


def test_a_transfer_host_has_a_connection_of_its_own(server: Sshd, tmp_path: Path) -> None:
    with Sshd(name="hold-files", address="127.0.0.81", port=2804, user="flctl-hold", kind="key+totp") as files:
        files.authorize(server.client_key.with_suffix(".pub").read_text())
        site = attended(server, transfer=Transfer(host=files.address, port=files.port))
        road = road_to(tmp_path, server, files)
        keep(tmp_path, server, site, road)
        with pytest.raises(LoginNeeded, match="person must log in"):
            connect(site, road)
        with login(tmp_path, site, road, 60, number=1) as terminal:
            terminal.expect("One-time password")
            terminal.type(code_of(files))
            assert terminal.end() == 0, terminal.screen
        connection, since = connect(site, road), server.mark()
        (tmp_path / "f").write_text("x")
        connection.push(tmp_path, ["f"], server.account.home / "over")
        assert (server.account.home / "over" / "f").read_text() == "x"
        assert (files.attempts().logins, server.attempts(since).logins) == (1, 0)
        close_all()


def test_a_key_and_a_jump_host_may_be_used_too(tmp_path: Path) -> None:
    with (
        Sshd(name="hold-key", address="127.0.0.82", port=2805, user="flctl-hold") as server,
        Sshd(name="hold-jump", address="127.0.0.82", port=2806, user="flctl-hold") as jump,
    ):
        jump.authorize(server.client_key.with_suffix(".pub").read_text())
        site = site_of(server, hold=60, proxy_jump=f"{jump.user}@{jump.address}:{jump.port}")
        road = road_to(tmp_path, server, jump)
        with login(tmp_path, site, road, 60) as terminal:
            assert terminal.end() == 0, terminal.screen
        connection = connect(site, road)
        assert connection.run("echo x").stdout == "x\n" and connection.logins == 0
        assert (server.attempts().logins, jump.attempts().logins) == (1, 1)
        # A key needs no person: when the kept connection is gone, flctl logs in again.
        holding.close(holding.everything()[0][0])
        again = connect(site, road)
        assert again.run("echo y").stdout == "y\n"
        again.close()
        assert server.attempts().logins == 2


def test_where_no_person_is_needed_files_may_go_by_a_login_of_their_own(tmp_path: Path) -> None:
    with (
        Sshd(name="hold-key", address="127.0.0.82", port=2805, user="flctl-hold") as server,
        Sshd(name="hold-more", address="127.0.0.82", port=2808, user="flctl-hold") as files,
    ):
        files.authorize(server.client_key.with_suffix(".pub").read_text())
        site = site_of(server, hold=60, transfer=Transfer(host=files.address, port=files.port))
        told: list[tuple[str, str]] = []
        road = road_to(tmp_path, server, files, on_login=lambda place, why: told.append((place.name, why)))
        with login(tmp_path, site, road, 60) as terminal:
            assert terminal.end() == 0, terminal.screen
        connection = connect(site, road)
        (tmp_path / "f").write_text("x")
        connection.push(tmp_path, ["f"], server.account.home / "by-key")
        assert connection.logins == 1 and told == [(f"[{files.address}]:{files.port}", "files")]
        connection.close()


# Its end


def test_it_ends_at_the_stated_time_even_in_the_middle_of_a_command(server: Sshd, tmp_path: Path) -> None:
    site, road = attended(server), road_to(tmp_path, server)
    kept = keep(tmp_path, server, site, road, seconds=4)
    assert len(processes(kept)) == 2
    with pytest.raises(LoginNeeded, match="has ended") as caught:
        connect(site, road).run("sleep 60")
    assert kept.until - 0.1 < time.time() < kept.until + 3
    assert caught.value.hint == "flctl login hold" and not caught.value.attempted
    wait(lambda: not processes(kept), 3, "ssh and holder end")
    wait(lambda: not list(kept.socket.parent.glob("*.json")), 3, "the record goes")
    assert not kept.socket.exists() and holding.everything() == []


def test_time_that_passes_in_sleep_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monotonic clock stands still while a laptop sleeps, and nobody may set the other one back to gain time."""
    wall = time.time
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(holder, "LOOK_EVERY", 0.05)
        began = time.monotonic()
        monkeypatch.setattr(time, "time", lambda: wall() + (3600 if time.monotonic() > began + 0.2 else 0))
        holder.stay(ours, wall() + 1800)
        assert 0.2 < time.monotonic() - began < 2
        began = time.monotonic()
        monkeypatch.setattr(time, "time", lambda: wall() - (3600 if time.monotonic() > began + 0.2 else 0))
        holder.stay(ours, wall() + 0.5)
        assert 0.4 < time.monotonic() - began < 2


def test_without_its_holder_it_is_not_used_and_ends_soon(server: Sshd, tmp_path: Path) -> None:
    site, road = attended(server), road_to(tmp_path, server)
    kept = keep(tmp_path, server, site, road)
    os.kill(holder_of(kept), signal.SIGKILL)
    wait(lambda: not kept.alive, 2, "the holder's death")
    with pytest.raises(LoginNeeded):
        connect(site, road)
    assert wait(lambda: not processes(kept), holding.LINGER + 5, "ssh ends") > 1
    assert [alive for _, alive in holding.everything()] == [False]
    assert holding.everything() == []


def test_without_its_holder_a_process_that_uses_it_sends_nothing_more(server: Sshd, tmp_path: Path) -> None:
    """Its polls would keep the ssh alive for ever, whatever time was stated."""
    site, road = attended(server), road_to(tmp_path, server)
    kept = keep(tmp_path, server, site, road)
    connection = connect(site, road)
    assert connection.run("echo x").stdout == "x\n"
    os.kill(holder_of(kept), signal.SIGKILL)
    wait(lambda: not kept.alive, 2, "the holder's death")
    (tmp_path / "f").write_text("x")
    for use in (lambda: connection.run("echo x"), lambda: connection.push(tmp_path, ["f"], server.account.home / "n")):
        with pytest.raises(LoginNeeded, match="has ended"):
            use()


def test_a_frozen_ssh_is_named_when_it_does_not_end(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "HOLDER_TIMEOUT", 1.0)
    kept = keep(tmp_path, server, attended(server), road_to(tmp_path, server))
    (ssh,) = set(processes(kept)) - {holder_of(kept)}
    os.kill(ssh, signal.SIGSTOP)
    with pytest.raises(Locked, match="does not end") as caught:
        holding.close(kept)
    assert str(kept.socket) in caught.value.hint
    os.kill(ssh, signal.SIGKILL)
    wait(lambda: not processes(kept), 3, "the holder ends")
    assert holding.everything() == []


def test_a_state_folder_that_cannot_be_made_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/1/nothing")
    with pytest.raises(ConfigurationError, match="cannot be made") as caught:
        holding.everything()
    monkeypatch.undo()
    assert "XDG_STATE_HOME" in caught.value.hint


def test_a_holder_that_is_asked_to_end_takes_the_connection_along(server: Sshd, tmp_path: Path) -> None:
    kept = keep(tmp_path, server, attended(server), road_to(tmp_path, server))
    os.kill(holder_of(kept), signal.SIGTERM)
    wait(lambda: not processes(kept), 3, "ssh and holder end")
    assert holding.everything() == []


def test_a_server_that_goes_away_is_noticed(server: Sshd, tmp_path: Path) -> None:
    site, road = attended(server), road_to(tmp_path, server)
    kept = keep(tmp_path, server, site, road)
    connection = connect(site, road)
    try:
        server.stop()
        with pytest.raises(LoginNeeded, match="has ended"):
            connection.run("echo x")
    finally:
        server.start()
    with pytest.raises(LoginNeeded, match="person must log in"):
        connect(site, road)
    wait(lambda: not processes(kept), 3, "ssh and holder end")


def test_closing_ends_it_for_everybody(server: Sshd, tmp_path: Path) -> None:
    site, road = attended(server), road_to(tmp_path, server)
    kept = keep(tmp_path, server, site, road)
    connection = connect(site, road)
    holding.close(kept)
    assert processes(kept) == [] and holding.everything() == []
    with pytest.raises(LoginNeeded, match="has ended"):
        connection.run("echo x")


def test_a_shorter_time_in_the_profile_counts_at_once(server: Sshd, tmp_path: Path) -> None:
    site, road = attended(server), road_to(tmp_path, server)
    kept = keep(tmp_path, server, site, road)
    (place,) = holding.places(site)
    shorter = replace(site, login=replace(site.login, hold=100))
    found = holding.find(shorter, place, road.known_hosts)
    assert found is not None and found.until == kept.since + 100
    holding.end_older(shorter, place, road.known_hosts)
    assert kept.alive, "its time is not over by either profile"
    wait(lambda: time.time() > kept.since + 1, 2, "a second to be over")
    for hold in (0, 1):
        over = replace(site, login=replace(site.login, hold=hold))
        assert holding.find(over, place, road.known_hosts) is None
        with pytest.raises((LoginNeeded, ConfigurationError)):
            connect(over, road)
    assert connect(site, road).run("echo x").stdout == "x\n", "another campaign's profile may allow more"
    holding.end_older(over, place, road.known_hosts)
    assert processes(kept) == [] and holding.everything() == []


def test_what_a_reboot_leaves_behind_is_not_used_and_is_replaced(server: Sshd, tmp_path: Path) -> None:
    site, road = attended(server), road_to(tmp_path, server)
    kept = keep(tmp_path, server, site, road)
    for pid in processes(kept):
        os.kill(pid, signal.SIGKILL)
    wait(lambda: not processes(kept), 2, "their death")
    assert kept.socket.exists() and holding.record_of(kept.name).exists()
    with pytest.raises(LoginNeeded, match="person must log in"):
        connect(site, road)
    again = keep(tmp_path, server, site, road)
    assert again.name == kept.name and connect(site, road).run("echo x").stdout == "x\n"


def test_another_machines_connection_in_the_same_home_is_left_alone(server: Sshd, tmp_path: Path) -> None:
    site, road = attended(server), road_to(tmp_path, server)
    kept = keep(tmp_path, server, site, road)
    there = replace(kept, name="0123456789", machine="elsewhere")
    holding.write(there)
    assert [one.name for one, _ in holding.everything()] == [kept.name]
    assert holding.record_of(there.name).exists()
    renamed = replace(kept, machine="as-this-laptop-was-called")  # it answers here, whatever the name
    holding.write(renamed)
    assert holding.everything() == [(renamed, True)]
    holding.record_of(there.name).unlink()


def test_a_login_that_begins_as_one_is_closed_is_not_swept_away(server: Sshd, tmp_path: Path) -> None:
    site, road = attended(server), road_to(tmp_path, server)
    (place,) = holding.places(site)
    kept = keep(tmp_path, server, site, road)
    holding.close(kept)
    with holding.locked(site, place, kept.name):
        holding.write(kept)
        holding.everything()
        assert holding.record_of(kept.name).exists()
        holding.clear(kept.name)


def test_a_link_that_falls_silent_is_unreachable_not_gone(server: Sshd, tmp_path: Path) -> None:
    from tests.ssh_sites import Network

    with Network(server) as network:
        site = network.site(totp={"automation": "forbidden", "permission": "", "secret": ""}, hold=60)
        road = road_to(tmp_path, server)
        road.known_hosts.write_text(network.known_hosts_line)
        keep(tmp_path, server, site, road)
        connection = connect(site, road)
        network.freeze()
        with pytest.raises(SiteUnreachable, match="no answer within 1 s"):
            connection.run("echo x", timeout=1.0)
        close_all()


# What must not happen


def test_a_wrong_code_is_one_failed_try_and_leaves_nothing(server: Sshd, tmp_path: Path) -> None:
    site, road, since = attended(server), road_to(tmp_path, server), server.mark()
    right = code_of(server)
    with login(tmp_path, site, road, 60) as terminal:
        terminal.expect("One-time password")
        terminal.type(f"{(int(right) + 1) % 1_000_000:06d}")
        assert terminal.end() == LoginNeeded.exit_code, terminal.screen
    assert "LoginNeeded" in terminal.screen and "flctl login hold" in terminal.screen
    seen = server.attempts(since)
    assert (seen.connections, seen.logins, seen.failed_codes) == (1, 0, 1)
    assert [path.suffix for path in holding.folder().iterdir()] == [".lock"]


def test_who_leaves_at_the_question_leaves_nothing(server: Sshd, tmp_path: Path) -> None:
    site, road = attended(server), road_to(tmp_path, server)
    with login(tmp_path, site, road, 60) as terminal:
        terminal.expect("One-time password")
        os.killpg(terminal.child.pid, signal.SIGINT)
        assert terminal.end() != 0
    assert [path.suffix for path in holding.folder().iterdir()] == [".lock"]
    assert keep(tmp_path, server, site, road).alive


def test_no_code_and_no_secret_is_seen_by_other_processes(server: Sshd, tmp_path: Path) -> None:
    site, road, code = attended(server), road_to(tmp_path, server), code_of(server, room=20.0)
    with Watch(code, server.totp_secret) as watch, login(tmp_path, site, road, 60) as terminal:
        terminal.expect("One-time password")
        terminal.type(code)
        assert terminal.end() == 0, terminal.screen
        connect(site, road).run("echo x")
    assert watch.looks > 5 and watch.found == []
    assert code not in terminal.screen
    assert not any(code.encode() in path.read_bytes() for path in holding.folder().iterdir() if path.is_file())


def test_of_two_logins_at_once_one_is_refused_without_a_question(server: Sshd, tmp_path: Path) -> None:
    site, road, since = attended(server), road_to(tmp_path, server), server.mark()
    with login(tmp_path, site, road, 60) as first:
        first.expect("One-time password")
        with login(tmp_path, site, road, 60) as second:
            assert second.end() == 10
        assert "Locked" in second.screen and "One-time" not in second.screen
        first.type(code_of(server))
        assert first.end() == 0, first.screen
    assert server.attempts(since).connections == 1


@pytest.mark.parametrize("what", ["open to all", "a link", "another's"])
def test_a_folder_that_others_may_enter_is_not_used(what: str, state: Path, server: Sshd, tmp_path: Path) -> None:
    folder = holding.folder(make=True)
    assert folder == state / "flctl" / "kept"
    if what == "open to all":
        folder.chmod(0o755)
    elif what == "another's":
        os.chown(folder, server.account.uid, server.account.gid)
    else:
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    try:
        with pytest.raises(ConfigurationError, match="nobody else can enter"):
            connect(attended(server), road_to(tmp_path, server))
    finally:
        if what == "a link":
            folder.unlink()
        else:
            folder.chmod(0o700)
            os.chown(folder, os.geteuid(), os.getegid())


def test_a_long_home_still_has_short_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ("long" * 20)))
    folder = holding.folder(make=True)
    try:
        assert folder.parent == Path("/tmp") and len(str(folder)) + 11 + 17 <= 103
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder == holding.folder()
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ("else" * 20)))
        assert holding.folder() != folder and not holding.folder().exists()
    finally:
        folder.rmdir()


def test_a_campaign_that_trusts_other_keys_does_not_use_it(server: Sshd, tmp_path: Path) -> None:
    site, road = attended(server), road_to(tmp_path, server)
    keep(tmp_path, server, site, road)
    (tmp_path / "other").mkdir()
    stranger = keygen(tmp_path / "other" / "key").with_suffix(".pub").read_text().split()
    other = road_to(tmp_path / "other", server)
    other.known_hosts.write_text(f"[{server.address}]:{server.port} {stranger[0]} {stranger[1]}\n")
    with pytest.raises(LoginNeeded):
        connect(site, other)
    # The same trust in another campaign: the same connection.
    same = road_to(tmp_path / "other", server)
    assert connect(site, same).run("echo x").stdout == "x\n"


def test_an_unknown_host_is_asked_nothing(server: Sshd, tmp_path: Path) -> None:
    road, since = road_to(tmp_path), server.mark()
    with login(tmp_path, attended(server), road, 60) as terminal:
        assert terminal.end() == HostKeyRefused.exit_code, terminal.screen
    assert "flctl site trust" in terminal.screen
    assert server.attempts(since).keys == 0


def test_where_a_person_is_needed_the_site_hears_nothing(server: Sshd, tmp_path: Path) -> None:
    road, since = road_to(tmp_path, server), server.mark()
    with pytest.raises(LoginNeeded, match="person must log in") as caught:
        connect(attended(server), road)
    assert caught.value.hint == "flctl login hold" and not caught.value.attempted
    with pytest.raises(ConfigurationError, match="does not allow keeping") as refused:
        connect(attended(server, hold=0, kind="attended"), road)
    assert "login.hold" in refused.value.hint
    assert server.attempts(since).connections == 0


def test_the_interval_between_logins_counts_for_people_too(server: Sshd, tmp_path: Path) -> None:
    site, road = attended(server, interval=600), road_to(tmp_path, server)
    allowance.take(site, holding.places(site)[0])
    since = server.mark()
    with login(tmp_path, site, road, 60) as terminal:
        assert terminal.end() == LoginNeeded.exit_code, terminal.screen
    assert "LoginTooSoon" in terminal.screen
    assert server.attempts(since).connections == 0


def test_a_road_with_its_own_stop_ends_a_transfer(server: Sshd, tmp_path: Path) -> None:
    from flctl.errors import Interrupted

    site, road = attended(server), road_to(tmp_path, server)
    keep(tmp_path, server, site, road)
    (tmp_path / "big").write_bytes(os.urandom(64 << 20))
    stopped = replace(road, stop=lambda: True)
    with pytest.raises(Interrupted):
        connect(site, stopped).push(tmp_path, ["big"], server.account.home / "stopped")
    assert connect(site, road).run("echo x").stdout == "x\n"
