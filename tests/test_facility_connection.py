"""Running commands at a site: over a real sshd, through a network that fails, and on this machine."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flctl.errors import HostKeyRefused, LoginNeeded, SiteUnreachable
from flctl.facility import connection as connections
from flctl.facility import patience
from flctl.facility.connection import connect, trust
from flctl.facility.profile import Transfer
from tests.ssh_sites import Network, agent, connected, keygen, local_site, road_to, site_of
from tests.testbed.sshd import Sshd

ADDRESS = "127.0.0.42"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture(scope="module")
def server() -> Iterator[Sshd]:
    with Sshd(name="conn", address=ADDRESS, port=2251, user="flctl-conn") as started:
        yield started


@pytest.fixture(params=["ssh", "local"])
def connection(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """One of each kind: what follows is true of both."""
    if request.param == "local":
        with connected(local_site(), road_to(tmp_path)) as made:
            yield made
    else:
        server = request.getfixturevalue("server")
        with connected(site_of(server), road_to(tmp_path, server)) as made:
            yield made


# What a command sees and says


def test_output_errors_and_status_come_back_apart(connection: Any) -> None:
    output = connection.run("echo out; echo err >&2; exit 7")
    assert (output.status, output.stdout, output.stderr) == (7, "out\n", "err\n")
    assert connection.run("").status == 0


def test_a_program_is_posix_shell_with_here_documents_and_functions(connection: Any) -> None:
    script = "greet() {\n  cat <<'END'\nit's \"$1\" `x` \\ %s }\nEND\n}\nset -e\ngreet\nfalse\necho never\n"
    output = connection.run(script)
    assert (output.status, output.stdout) == (1, 'it\'s "$1" `x` \\ %s }\n')


def test_commands_do_not_read_the_rest_of_the_program(connection: Any) -> None:
    output = connection.run('cat\nread -r line; echo "<$line>"\nhead -c 5\necho end')
    assert output.stdout == "<>\nend\n"


def test_a_program_with_an_error_in_it_does_not_begin(connection: Any, tmp_path: Path) -> None:
    output = connection.run("echo began\nif true; then\n")
    assert output.status != 0 and output.stdout == "" and output.stderr


def test_a_long_program_arrives_whole(connection: Any) -> None:
    script = "\n".join(f": {n:0100d}" for n in range(40_000)) + "\necho end"
    assert len(script) > 4_000_000
    assert connection.run(script).stdout == "end\n"


def test_bytes_that_are_no_text_are_replaced(connection: Any) -> None:
    assert connection.run(r"printf 'a\377b\0c\342\202\254'").stdout == "a\N{REPLACEMENT CHARACTER}b\0c€"


def test_output_is_kept_up_to_a_limit(connection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "OUTPUT_MOST", 100_000)
    monkeypatch.setattr("flctl.facility.local.OUTPUT_MOST", 100_000)
    output = connection.run("head -c 5000000 /dev/zero | tr '\\0' x; exit 3")
    assert output.status == 3 and 50_000 <= len(output.stdout) <= 100_000


def test_a_daemon_left_behind_does_not_keep_the_caller(connection: Any) -> None:
    began = time.monotonic()
    output = connection.run("sleep 30 & echo started $!")
    assert time.monotonic() - began < 10
    assert re.fullmatch(r"started \d+\n", output.stdout)
    connection.run(f"kill {output.stdout.split()[1]}")


def test_a_command_that_does_not_end_is_given_up_in_time(connection: Any) -> None:
    began = time.monotonic()
    with pytest.raises(SiteUnreachable, match="within 1 s"):
        connection.run("echo x; sleep 30", timeout=1.0)
    assert time.monotonic() - began < 5
    assert connection.run("echo again").stdout == "again\n"


# Over SSH


def test_many_commands_cost_one_login_even_one_session_at_a_time(tmp_path: Path) -> None:
    with (
        Sshd(name="conn-one", address=ADDRESS, port=2254, user="flctl-conn", options=("MaxSessions 1",)) as server,
        connected(site_of(server), road_to(tmp_path, server)) as connection,
    ):
        assert [connection.run(f"echo {n}").stdout for n in range(30)] == [f"{n}\n" for n in range(30)]
        assert connection.logins == server.attempts().connections == 1


def test_a_shell_that_dies_without_an_exit_status_is_no_answer(server: Sshd, tmp_path: Path) -> None:
    with connected(site_of(server), road_to(tmp_path, server)) as connection:
        with pytest.raises(SiteUnreachable):
            connection.run("echo x; kill -9 $$")
        assert connection.run("echo x").stdout == "x\n"


NOISE = "echo 'Welcome! \x1b]0;title\x07'\necho warning >&2\nalias echo='echo alias'\ncd /tmp\nset -u\n"


def test_a_noisy_login_is_around_the_answer_and_does_not_change_it(server: Sshd, tmp_path: Path) -> None:
    bashrc = server.account.file(server.account.home / ".bashrc", NOISE)
    try:
        with connected(site_of(server), road_to(tmp_path, server)) as connection:
            output = connection.run("echo answer; exit 4")
        assert output.status == 4 and output.stdout.endswith("\nanswer\n") and "Welcome" in output.stdout
    finally:
        bashrc.unlink()


STRANGE_SHELL = """#!/usr/bin/python3
# A login shell that is not POSIX: it knows plain commands with plain words and nothing else.
import os, re, sys
if len(sys.argv) != 3 or sys.argv[1] != "-c" or not re.fullmatch("[A-Za-z0-9 /_.=,-]+", sys.argv[2]):
    sys.exit("Missing }.")
words = sys.argv[2].split()
os.execvp(words[0], words)
"""


def test_any_login_shell_will_do(tmp_path: Path) -> None:
    shell = Path("/var/lib/flctl-testbed/strange-shell")
    shell.parent.mkdir(exist_ok=True)
    shell.write_text(STRANGE_SHELL)
    shell.chmod(0o755)
    with (
        Sshd(name="conn-csh", address=ADDRESS, port=2252, user="flctl-csh", shell=str(shell)) as server,
        connected(site_of(server), road_to(tmp_path, server)) as connection,
    ):
        assert connection.run("x='a b'; for n in 1 2; do echo \"$x $((n + 1))\"; done").stdout == "a b 2\na b 3\n"


def test_nothing_is_forwarded_and_there_is_no_terminal(server: Sshd, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("FLCTL_TEST_CANARY", "canary")
    with connected(site_of(server), road_to(tmp_path, server)) as connection:
        output = connection.run("tty; env")
    assert output.stdout.startswith("not a tty\n")
    assert not re.search("SSH_AUTH_SOCK|DISPLAY|canary", output.stdout)


def test_configuration_files_of_ssh_and_fabric_are_not_read(server: Sshd, tmp_path: Path) -> None:
    trap = tmp_path / "trapped"
    folder = Path.home() / ".ssh"
    folder.mkdir()
    (folder / "config").write_text(f"Host *\nProxyCommand touch {trap}\nUser nobody\nForwardAgent yes\n")
    (Path.home() / ".fabric.yaml").write_text(f"gateway: touch {trap}\nforward_agent: true\nrun:\n  echo: true\n")
    (tmp_path / "f").write_text("x")
    with connected(site_of(server), road_to(tmp_path, server)) as connection:
        assert connection.run("echo x").stdout == "x\n"
        connection.push(tmp_path, ["f"], server.account.home / "pushed")
    assert not trap.exists()


# When it fails


def test_a_host_that_is_not_there_is_unreachable(server: Sshd, tmp_path: Path) -> None:
    for host, port in ((server.address, 9), ("no-such-host.invalid", 22)):
        with pytest.raises(SiteUnreachable) as caught:
            connect(site_of(server, host=host, port=port), road_to(tmp_path, server))
        assert caught.value.site == server.name and host in caught.value.message


def test_after_a_cut_nobody_logs_in_again_unasked(server: Sshd, tmp_path: Path) -> None:
    with Network(server) as network:
        road = road_to(tmp_path)
        road.known_hosts.write_text(network.known_hosts_line)
        with connected(network.site(), road) as connection:
            assert connection.run("echo x").stdout == "x\n"
            since = server.mark()
            network.cut()
            for _ in range(2):
                with pytest.raises(SiteUnreachable):
                    connection.run("echo x")
            assert server.attempts(since).connections == 0


@pytest.mark.parametrize("after", [0, 10, 600, 1500, 2200])
def test_a_link_that_falls_silent_while_logging_in_is_given_up(
    server: Sshd, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent before the banner, in the key exchange, while authenticating."""
    monkeypatch.setattr(patience, "CONNECT", 1)
    monkeypatch.setattr(patience, "AUTH", 1.0)
    with Network(server, freeze_after=after) as network:
        if after == 0:
            network.freeze()
        road = road_to(tmp_path)
        road.known_hosts.write_text(network.known_hosts_line)
        began = time.monotonic()
        with pytest.raises(SiteUnreachable):
            connect(network.site(), road).run("true", timeout=1.0)
        assert time.monotonic() - began < 12


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_link_that_falls_silent_is_given_up_within_the_timeout(
    server: Sshd, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "CONNECT", 1)
    with Network(server) as network:
        road = road_to(tmp_path)
        road.known_hosts.write_text(network.known_hosts_line)
        with connected(network.site(), road) as connection:
            connection.run("true")
            if moment == "before":
                network.freeze()
            else:
                threading.Timer(0.5, network.freeze).start()
            began = time.monotonic()
            with pytest.raises(SiteUnreachable):
                connection.run("sleep 1; echo x", timeout=2.0)
            assert time.monotonic() - began < 6


def test_a_dead_peer_is_noticed_without_any_command(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "ALIVE_INTERVAL", 0.2)
    with Network(server) as network:
        road = road_to(tmp_path)
        road.known_hosts.write_text(network.known_hosts_line)
        with connected(network.site(), road) as connection:
            assert connection.run("sleep 1; echo x").stdout == "x\n"
            network.freeze()
            began = time.monotonic()
            with pytest.raises(SiteUnreachable):
                connection.run("sleep 30", timeout=60.0)
            assert time.monotonic() - began < 10


def test_a_cut_in_the_middle_of_a_program_runs_none_of_it(server: Sshd, tmp_path: Path) -> None:
    marker = server.account.home / "ran"
    marker.unlink(missing_ok=True)
    script = f"echo x > {marker}\n" + "\n".join(f": {n:0100d}" for n in range(20_000))
    with Network(server) as network:
        road = road_to(tmp_path)
        road.known_hosts.write_text(network.known_hosts_line)
        with connected(network.site(), road) as connection:
            connection.run("true")
            network.sent, network.received, network.cut_after = 0, 0, 500_000
            with pytest.raises(SiteUnreachable):
                connection.run(script, timeout=20)
    with connected(site_of(server), road_to(tmp_path, server)) as connection:
        assert connection.run(f"sleep 0.5; test -e {marker} || echo no").stdout == "no\n"


# Through a jump host


@pytest.fixture(scope="module")
def jump() -> Iterator[Sshd]:
    with Sshd(name="conn-jump", address="127.0.0.43", port=2253, user="flctl-jump") as started:
        yield started


def through(server: Sshd, jump: Sshd, **fields: Any) -> Any:
    jump.authorize(server.client_key.with_suffix(".pub").read_text())
    return site_of(server, proxy_jump=f"{jump.user}@{jump.address}:{jump.port}", **fields)


def test_both_roads_lead_through_the_jump_host(server: Sshd, jump: Sshd, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    seen, passed = server.mark(), jump.mark()
    with connected(through(server, jump), road_to(tmp_path, server, jump)) as connection:
        assert connection.run("echo x").stdout == "x\n"
        assert (connection.logins, server.attempts(seen).logins, jump.attempts(passed).logins) == (2, 1, 1)
        connection.push(tmp_path, ["f"], server.account.home / "pushed")
        assert (server.account.home / "pushed" / "f").read_text() == "x"
        assert connection.logins == 4
    assert (server.attempts(seen).logins, jump.attempts(passed).logins) == (2, 2)


def test_a_jump_host_must_be_trusted_as_well(server: Sshd, jump: Sshd, tmp_path: Path) -> None:
    site, road, since = through(server, jump), road_to(tmp_path, server), jump.mark()
    with pytest.raises(HostKeyRefused, match="unknown") as caught:
        connect(site, road)
    assert jump.host_key_fingerprint in caught.value.message
    counted = jump.attempts(since)
    assert counted.keys + counted.failed_keys == 0
    trust(site, jump.host_key_fingerprint, road.known_hosts)
    with connected(site, road) as connection:
        assert connection.run("echo x").stdout == "x\n"


def test_a_jump_host_that_refuses_the_key_is_asked_once_and_named(server: Sshd, jump: Sshd, tmp_path: Path) -> None:
    key, since = keygen(tmp_path / "key"), jump.mark()
    server.authorize((tmp_path / "key.pub").read_text())
    with pytest.raises(LoginNeeded, match=f"jump host .*{jump.address}.* wants publickey") as caught:
        connect(through(server, jump, key=str(key)), road_to(tmp_path, server, jump))
    assert "flctl release" in caught.value.hint
    assert jump.attempts(since).failed_keys == 1


def test_a_jump_host_that_asks_for_a_code_is_out_of_reach(server: Sshd, tmp_path: Path) -> None:
    with Sshd(name="auth-gate", address="127.0.0.75", port=2735, user="flctl-jump", kind="key+totp") as gate:
        gate.authorize(server.client_key.with_suffix(".pub").read_text())
        with pytest.raises(LoginNeeded, match="wants keyboard-interactive") as caught:
            connect(through(server, gate), road_to(tmp_path, server, gate))
        assert "out of flctl's reach" in caught.value.hint
        assert gate.attempts().failed_codes == 0


def test_trusting_finds_the_transfer_host_too(server: Sshd, jump: Sshd, tmp_path: Path) -> None:
    site = site_of(server, transfer=Transfer(host=jump.address, port=jump.port))
    road = road_to(tmp_path)
    for trusted in (server, jump):
        trust(site, trusted.host_key_fingerprint, road.known_hosts)
    assert road.known_hosts.read_text() == server.known_hosts_line + jump.known_hosts_line


# Here


def test_a_local_program_runs_in_a_session_of_its_own(tmp_path: Path) -> None:
    with connected(local_site(), road_to(tmp_path)) as connection:
        assert connection.logins == 0
        session = connection.run("ps -o sid= -p $$").stdout
    assert int(session) != os.getsid(0)


def test_importing_the_connection_does_not_load_paramiko() -> None:
    heavy = ("paramiko", "fabric", "invoke", "cryptography")
    program = f"import sys, flctl.facility.connection; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_refused_login_says_what_to_do(server: Sshd, tmp_path: Path) -> None:
    with pytest.raises(LoginNeeded) as caught:
        connect(site_of(server, user="nobody"), road_to(tmp_path, server))
    assert "nobody" in caught.value.message and "login.user" in caught.value.hint


# What a server is asked for


def test_a_server_is_asked_for_commands_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No terminal, no forwarding of agent, screen or ports, no variables, whatever the user's own ssh_config says."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    (home / ".ssh" / "config").write_text(
        "Host *\n ForwardAgent yes\n ForwardX11 yes\n RequestTTY force\n SendEnv CANARY\n"
        f" LocalForward 24399 127.0.0.1:1\n RemoteForward 24398 127.0.0.1:1\n ProxyCommand touch {home}/called\n"
    )
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("CANARY", "x")
    (tmp_path / "f").write_text("x")
    options = ("LogLevel DEBUG3", "AcceptEnv *")
    with (
        Sshd(name="conn-talk", address="127.0.93.5", port=24305, user="flctl-conn", options=options) as server,
        agent(server.client_key) as address,
    ):
        monkeypatch.setenv("SSH_AUTH_SOCK", address)
        for sparing in (False, True):
            with connected(site_of(server), road_to(tmp_path, server, sparing=sparing)) as connection:
                connection.run("true")
                connection.push(tmp_path, ["f"], server.account.home / f"talk-{sparing}")
                if not sparing:  # the connection that rsync's ssh has made
                    assert server.log_text().count("Accepted publickey") == 2
        log = server.log_text()
    assert set(re.findall(r"server_input_channel_req: channel \d+ request (\S+)", log)) == {"exec"}
    assert set(re.findall(r"server_input_global_request: rtype (\S+)", log)) <= {
        "keepalive@openssh.com",
        "no-more-sessions@openssh.com",
        "hostkeys-prove-00@openssh.com",
    }
    assert set(re.findall(r"ctype (\S+) rchan", log)) == {"session"}
    assert re.findall(r"kex: \S+ cipher: (\S+)", log) and "gssapi-with-mic" not in log
    assert set(re.findall(r"kex: \S+ cipher: (\S+)", log)) == {"aes128-gcm@openssh.com"}
    assert not (home / "called").exists()


@pytest.mark.parametrize("cipher", ["aes256-gcm@openssh.com", "aes256-ctr"])
def test_a_server_that_lacks_the_fastest_cipher_is_reached_with_another(tmp_path: Path, cipher: str) -> None:
    (tmp_path / "f").write_text("x")
    with Sshd(
        name="conn-cipher", address="127.0.93.6", port=24306, user="flctl-conn", options=(f"Ciphers {cipher}",)
    ) as server:
        with connected(site_of(server), road_to(tmp_path, server)) as connection:
            connection.push(tmp_path, ["f"], server.account.home / "cipher")
        assert (server.account.home / "cipher" / "f").read_text() == "x"


def test_one_host_of_several_addresses_is_enough_and_silent_ones_have_one_time_in_all(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An alias of many login nodes, most of them down."""
    from tests.chaos.proxy import deaf

    found = socket.getaddrinfo

    def several(host: str, port: int, *arguments: Any, **options: Any) -> Any:
        names = addresses if host == "alias.example" else [host]
        return [entry for name in names for entry in found(name, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", several)
    monkeypatch.setattr(patience, "CONNECT", 0.5)
    monkeypatch.setattr(patience, "CONNECT_ALL", 1.2)
    with deaf() as port, deaf("127.0.0.2", port), Network(server) as network:
        road = road_to(tmp_path)
        addresses = ["127.0.0.1", "127.0.0.2"] * 4
        began = time.monotonic()
        with pytest.raises(SiteUnreachable, match=r"alias\.example"):
            connect(site_of(server, host="alias.example", port=port), road)
        assert time.monotonic() - began < 5
        addresses = ["127.0.0.9", "127.0.0.1"]
        road.known_hosts.write_text(f"[alias.example]:{network.port} {server.host_key_line}\n")
        monkeypatch.setattr(patience, "CONNECT", 20)
        with connected(site_of(server, host="alias.example", port=network.port), road) as connection:
            assert connection.run("echo x").stdout == "x\n"


def test_a_server_that_takes_no_further_login_now_is_tried_again_later(tmp_path: Path) -> None:
    """MaxStartups: it hangs up before it says who it is; nobody has refused us."""
    with (
        Sshd(
            name="conn-busy", address="127.0.93.9", port=24309, user="flctl-conn", options=("MaxStartups 1:100:1",)
        ) as server,
        socket.create_connection((server.address, server.port)) as waiting,
    ):
        assert waiting.recv(4) == b"SSH-"
        with pytest.raises(SiteUnreachable) as caught:
            connect(site_of(server), road_to(tmp_path, server))
        assert "by themselves" in caught.value.hint
        waiting.close()
        server.wait_for("Connection (closed|reset)|Did not receive identification|exited MaxStartups")
        with connected(site_of(server), road_to(tmp_path, server)) as connection:
            assert connection.run("echo x").stdout == "x\n"


def test_a_command_that_talks_without_an_end_is_given_up_in_time(server: Sshd, tmp_path: Path) -> None:
    """What comes drop by drop is no reason to wait longer."""
    with connected(site_of(server), road_to(tmp_path, server)) as connection:
        began = time.monotonic()
        with pytest.raises(SiteUnreachable):
            connection.run("while echo drop; do sleep 0.05; done", timeout=1.0)
        assert time.monotonic() - began < 10
        assert connection.run("echo x").stdout == "x\n"
