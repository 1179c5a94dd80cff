"""A sample of the row "black holes", and the road that fails on purpose."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.chaos import black_holes
from tests.chaos.proxy import Plan, Proxy, deaf


def test_a_peer_that_falls_silent_is_given_up_and_nothing_is_left() -> None:
    result = black_holes.run(seed=1, trials=12)
    assert (result.trials, result.failures) == (12, 0), result.notes


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
