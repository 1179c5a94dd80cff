"""A sample of the row "black holes", and the road that fails on purpose."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import black_holes
from tests.chaos.proxy import Plan, Proxy, deaf
from tests.ssh_campaigns import SshCampaign
from tests.testbed.sshd import Sshd


def test_a_peer_that_falls_silent_is_given_up_and_nothing_is_left() -> None:
    result = black_holes.run(seed=1, trials=12)
    assert (result.trials, result.failures) == (12, 0), result.notes


PROGRAM = """
import sys
from flctl.campaign import contacts
from flctl.cli.main import main
from flctl.facility import patience
{}
sys.exit(main())
"""
IMPATIENT = """
patience.CONNECT, patience.ALIVE_INTERVAL, patience.ALIVE_COUNT = 3, 1, 3
contacts.BACKOFF_FIRST = contacts.BACKOFF_MOST = 1.0
"""


class Timed(SshCampaign):
    """A campaign whose programs have another patience than flctl's own."""

    def __init__(self, *arguments: Any, times: str, **login: Any) -> None:
        self.times = times
        super().__init__(*arguments, **login)

    def words(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", PROGRAM.format(self.times), *arguments]


def test_a_round_completes_whatever_stage_of_it_falls_silent(tmp_path: Path) -> None:
    """Every connection there is goes dead, twice in a round; the next ones, a moment later, are sound again."""
    with (
        Sshd(name="bh-round", address="127.0.93.8", port=24308, user="flctl-bh") as server,
        Proxy(server.address, server.port) as road,
    ):
        campaign = Timed(tmp_path, server, times="", host=road.address, port=road.port)
        try:
            assert campaign.flctl("round").returncode == 0
            first = road.up + road.down
            assert campaign.flctl("round").returncode == 0
            whole = road.up + road.down - first  # the first round brings more there
            campaign.times = IMPATIENT
            places = [road.up + road.down + int(part * whole) for part in (0.1, 0.8)]
            struck = threading.Thread(target=strike_at, args=(road, places), daemon=True)
            struck.start()
            ran = campaign.flctl("round", timeout=300)
            struck.join(timeout=60)
            assert ran.returncode == 0, ran.stdout + ran.stderr
            assert (campaign.place / "models" / "0003" / "flctl.json").exists()
            troubles = [entry for entry in campaign.journal() if entry["event"] == "trouble"]
            assert {entry["code"] for entry in troubles} == {"site_unreachable"}, troubles
            assert len(troubles) >= 2
            assert campaign.submissions(server.name) == 3
        finally:
            campaign.clear()


def test_a_site_that_has_fallen_silent_delays_no_other(tmp_path: Path) -> None:
    """While a login's answer is awaited, the other site's run goes from its order to its end."""
    with (
        Sshd(name="bh-sound", address="127.0.93.8", port=24308, user="flctl-bh") as sound,
        Sshd(name="bh-mute", address="127.0.93.8", port=24310, user="flctl-bhjump") as mute,
        Proxy(mute.address, mute.port, Plan(after=1600, then="freeze")) as road,
    ):
        campaign = Timed(tmp_path, sound, mute, times="patience.AUTH = 600.0")
        campaign.profile(mute.name, host=road.address, port=road.port)
        program = campaign.popen("round")
        try:
            campaign.wait(lambda: campaign.run(sound.name).get("stage") == "fetched", 120, "the sound site's run")
            assert road.failed_at is not None
            told = [entry["event"] for entry in campaign.journal() if entry.get("site") == mute.name]
            assert told == ["order"], told
        finally:
            os.killpg(program.pid, signal.SIGKILL)
            program.communicate()
            campaign.clear()


def strike_at(road: Proxy, places: list[int]) -> None:
    """Silence once so many bytes have passed, for the connections of that moment and the next half second."""
    for moved in places:
        while road.up + road.down < moved:
            time.sleep(0.002)
        road.strike("freeze")
        time.sleep(0.5)
        road.strike("pass")


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that says again what it hears."""

    def serve(link: socket.socket) -> None:
        with link, suppress(OSError):
            while data := link.recv(65536):
                link.sendall(data)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)


def heard(road: Proxy, sent: int, timeout: float = 0.5) -> tuple[int, str]:
    """How many bytes come back of so many, and how it ends."""
    with socket.create_connection((road.address, road.port)) as link:
        link.settimeout(timeout)
        count = 0
        try:
            link.sendall(b"x" * sent)
            while count < sent:
                data = link.recv(65536)
                if not data:
                    return count, "end"
                count += len(data)
        except OSError as error:
            return count, type(error).__name__
        return count, "whole"


@pytest.mark.parametrize(
    ("then", "ends"),
    [("reset", "ConnectionResetError"), ("close", "end"), ("freeze", "TimeoutError"), ("pass", "whole")],
)
def test_the_road_fails_at_the_byte_it_was_told(echo: int, then: str, ends: str) -> None:
    with Proxy("127.0.0.1", echo, Plan(after=1234, then=then)) as road:  # type: ignore[arg-type]
        count, how = heard(road, 5000)
    assert (count, how) == (5000 if then == "pass" else 1234, ends)
    assert road.down == count
    with Proxy("127.0.0.1", echo, Plan(after=1234, direction="up", then="close")) as road:
        assert heard(road, 5000)[1] == "end"
    assert road.up == 1234


def test_the_road_can_fail_at_any_moment_and_connections_have_plans_of_their_own(echo: int) -> None:
    with Proxy("127.0.0.1", echo, lambda number: Plan(then="reset" if number == 1 else "pass")) as road:
        assert [heard(road, 10)[1] for _ in range(3)] == ["whole", "ConnectionResetError", "whole"]
        with socket.create_connection((road.address, road.port)) as link:
            link.sendall(b"x")
            assert link.recv(1) == b"x"
            assert road.failed_at is not None
            road.arm(Plan(after=2, then="close"))
            link.sendall(b"abc")
            assert b"".join(iter(lambda: link.recv(10), b"")) == b"ab"
        road.strike("freeze")
        assert heard(road, 10) == (0, "TimeoutError")


def test_a_trickle_and_a_host_that_takes_no_connection(echo: int) -> None:
    with Proxy("127.0.0.1", echo, Plan(then="trickle", rate=2000)) as road:
        began = time.monotonic()
        assert heard(road, 1000, timeout=10) == (1000, "whole")
        assert time.monotonic() - began > 0.4
    with deaf() as port, pytest.raises(TimeoutError):
        socket.create_connection(("127.0.0.1", port), timeout=0.5)
