"""No agent, display or port is forwarded and no terminal is asked for, over any road, at a server that would allow it:
the server's own log says what it was asked."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flctl.facility import attended, holding
from flctl.facility.connection import connect
from tests.ssh_sites import agent, keygen, road_to, site_of
from tests.testbed.sshd import Sshd

ALLOWED = {"exec", "eow@openssh.com", "exit-status"}
FORWARDS = r"rtype (?:streamlocal-|cancel-)?(?:tcpip-)?forward|ctype (?:direct|forwarded)-\S+"


@pytest.fixture(scope="module")
def server() -> Iterator[Sshd]:
    options = ("LogLevel DEBUG1", "AllowAgentForwarding yes", "X11Forwarding yes", "AllowTcpForwarding yes")
    with Sshd(name="forward", address="127.0.97.4", port=24770, user="flctl-fwd", options=options) as started:
        yield started


@pytest.fixture
def tempting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home whose configuration asks for everything, an agent, a display."""
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    text = "Host *\nForwardAgent yes\nForwardX11 yes\nRequestTTY force\nLocalForward 24779 127.0.0.1:22\n"
    (tmp_path / "home" / ".ssh" / "config").write_text(text)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DISPLAY", ":7")
    monkeypatch.setenv("FLCTL_TEST_CANARY", "canary")
    with tempfile.TemporaryDirectory(prefix="flctl-fwd-") as state, agent(keygen(tmp_path / "key")) as address:
        monkeypatch.setenv("XDG_STATE_HOME", state)
        monkeypatch.setenv("SSH_AUTH_SOCK", address)
        yield tmp_path


def asked(log: str) -> set[str]:
    """What sessions asked the server for, and every forwarding."""
    return {*re.findall(r"session_input_channel_req: session \d+ req (\S+)", log), *re.findall(FORWARDS, log)}


@pytest.mark.parametrize("road", ["own", "shared", "kept"])
def test_nothing_is_forwarded_over_any_road(server: Sshd, tempting: Path, road: str) -> None:
    since, target = server.mark(), server.account.home / f"pushed-{road}"
    site = site_of(server, multiplex=road != "own", hold=600 if road == "kept" else 0)
    way = road_to(tempting, server)
    (tempting / "f").write_text("x")
    kept = None
    if road == "kept":
        (place,) = holding.places(site)
        kept = attended.keep(site, place, way.known_hosts, 600)
    try:
        connection = connect(site, way)
        output = connection.run("tty; env").stdout
        connection.push(tempting, ["f"], target)
        connection.close()
    finally:
        if kept is not None:
            holding.close(kept)
    assert output.startswith("not a tty\n")
    assert not re.search("SSH_AUTH_SOCK|DISPLAY|canary", output)
    assert (target / "f").read_text() == "x"
    assert "exec" in asked(server.log_text(since)) <= ALLOWED


def test_the_servers_log_tells_of_what_is_forwarded(server: Sshd, tempting: Path) -> None:
    since, way = server.mark(), road_to(tempting, server)
    words = ["ssh", "-F", str(tempting / "home/.ssh/config"), "-i", str(server.client_key), "-p", str(server.port)]
    words += ["-o", f"UserKnownHostsFile={way.known_hosts}", "-R", "24778:127.0.0.1:22"]
    done = subprocess.run(
        [*words, f"{server.user}@{server.address}", "true"], capture_output=True, timeout=60, check=False
    )
    assert {"pty-req", "auth-agent-req@openssh.com"} < asked(server.log_text(since)), (done, server.log_text(since))
    assert "rtype tcpip-forward" in asked(server.log_text(since))
