"""A TCP road to a server that fails on purpose: it cuts, closes, falls silent or trickles at a chosen byte.

with Proxy(server.address, server.port, Plan(after=1500, direction="down", then="freeze")) as road:
    site = site_of(server, host=road.address, port=road.port)  # trust road.known_hosts_line(server.host_key_line)
    ...
    road.plan = PASS                      # connections made from now on pass
    road.strike("reset")                  # now, whatever the plan says; also "close", "freeze", "trickle"
    road.arm(Plan(after=200, then="reset"))   # the same, of the connections there are, counted from now
    road.up, road.down, road.made         # bytes to the server, bytes from it, connections so far
    road.failed_at                        # when the first of them failed, by time.monotonic()
    road.target = (another.address, another.port)   # an alias that names another login node now

`plan` may be a function of a connection's number (0, 1, ...). "freeze": neither side hears anything more, both
connections stay open, and new ones are accepted and stay mute (`strike`), or follow the plan. "reset": RST to both.
"close": an orderly end of both, what is on its way is delivered. "trickle": `rate` bytes a second from there on.
"""

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

Direction = Literal["up", "down", "both"]
Failure = Literal["pass", "reset", "close", "freeze", "trickle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What happens to one connection after `after` bytes in a direction: up is to the server, "both" is their sum.
    `rate`: bytes a second of a trickle."""

    after: int = 0
    direction: Direction = "down"
    then: Failure = "pass"
    rate: float = 2048.0


PASS = Plan()


class Proxy:
    """Listens on an ephemeral port of `address`; all its connections are served by one thread of its own."""

    def __init__(
        self, host: str, port: int, plan: Plan | Callable[[int], Plan] = PASS, *, address: str = "127.0.0.1"
    ) -> None:
        self.target, self.plan, self.address = (host, port), plan, address
        self.up = self.down = self.made = 0
        self.struck: Failure = "pass"
        self.failed_at: float | None = None
        self._listener = socket.create_server((address, 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._links: set[_Link] = set()
        self._thread = threading.Thread(target=self._serve, name=f"proxy {self.port}", daemon=True)

    def known_hosts_line(self, key: str) -> str:
        """`key`: type and key of the server, as ssh-keygen writes them."""
        return f"[{self.address}]:{self.port} {key}\n"

    def strike(self, failure: Failure) -> None:
        """Let it happen now, to every connection there is; new ones are mute after "freeze". "pass" heals a trickle and
        lets new connections through; what was frozen, cut or closed stays so."""
        self.struck = failure

        def happen() -> None:
            for link in list(self._links):
                link.fail(failure)

        self._call(happen)

    def arm(self, plan: Plan) -> None:
        """Let the plan be that of the connections there are, counted from now, and of new ones, from their start."""
        self.plan = plan
        self._call(lambda: [link.arm(plan) for link in list(self._links)])

    @property
    def open(self) -> int:
        """Connections whose client has not gone and that were not cut."""
        return len(self._links)

    def stop(self) -> None:
        self._call(lambda: [link.fail("reset") for link in list(self._links)])
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._listener.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _note_failure(self) -> None:
        self.failed_at = self.failed_at or time.monotonic()

    def _call(self, action: Callable[[], object]) -> None:
        done = threading.Event()

        def run() -> None:
            try:
                action()
            finally:
                done.set()

        self._loop.call_soon_threadsafe(run)
        done.wait(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(asyncio.start_server(self._accept, sock=self._listener))
        self._loop.run_forever()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        with contextlib.suppress(BaseException):
            self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        plan = self.plan(self.made) if callable(self.plan) else self.plan
        self.made += 1
        link = _Link(plan, writer, self._note_failure)
        self._links.add(link)
        try:
            if self.struck == "freeze":
                link.fail("freeze")
            await link.run(self, reader)
        finally:
            link.fail("reset" if link.failure == "reset" else "close")
            self._links.discard(link)


class _Link:
    """One connection through the proxy. It is frozen, cut and closed on the loop's thread only."""

    def __init__(self, plan: Plan, client: asyncio.StreamWriter, note: Callable[[], None]) -> None:
        self.failure: Failure = "pass"
        self._writers, self._note_failure = [client], note
        self.arm(plan)

    def arm(self, plan: Plan) -> None:
        self.plan, self.moved = plan, {"up": 0, "down": 0}
        if plan.then != "pass" and plan.after <= 0:
            self.fail(plan.then)

    def fail(self, failure: Failure) -> None:
        if self.failure in ("reset", "close") or (self.failure == "freeze" and failure in ("pass", "trickle")):
            return
        self.failure = failure
        if failure != "pass":
            self._note_failure()
        if failure == "freeze":
            for writer in self._writers:
                with contextlib.suppress(RuntimeError, AttributeError):
                    writer.transport.pause_reading()  # type: ignore[attr-defined]
        if failure in ("reset", "close"):
            for writer in self._writers:
                if failure == "reset" and (link := writer.get_extra_info("socket")) is not None:
                    with contextlib.suppress(OSError):
                        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort() if failure == "reset" else writer.close()

    async def run(self, proxy: Proxy, reader: asyncio.StreamReader) -> None:
        if self.failure in ("reset", "close"):
            return
        with contextlib.suppress(OSError):
            answers, server = await asyncio.open_connection(*proxy.target)
            self._writers.append(server)
            if self.failure != "pass":
                self.fail(self.failure)
            client = self._writers[0]
            ways = [
                asyncio.ensure_future(self._carry(proxy, "up", reader, server)),
                asyncio.ensure_future(self._carry(proxy, "down", answers, client)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                if self.failure == "close":
                    await asyncio.sleep(0.05)
            finally:
                for way in ways:
                    way.cancel()
                for writer in self._writers:
                    writer.close()

    async def _carry(
        self, proxy: Proxy, way: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                while data and self.failure not in ("reset", "close"):
                    if self.failure == "freeze":
                        await asyncio.Event().wait()
                    piece = data[: self._next(way, len(data))]
                    data = data[len(piece) :]
                    writer.write(piece)
                    await writer.drain()
                    self._note(proxy, way, len(piece))
                    if self.failure == "trickle":
                        await asyncio.sleep(len(piece) / self.plan.rate)

    def _next(self, way: Direction, size: int) -> int:
        """How many bytes may pass before something may have to happen."""
        if self.failure == "trickle":
            return max(1, min(size, int(self.plan.rate / 10)))
        if self.plan.then == "pass" or self.plan.direction not in (way, "both"):
            return size
        return max(1, min(size, self.plan.after - self._counted()))

    def _note(self, proxy: Proxy, way: Direction, size: int) -> None:
        self.moved[way] += size
        if way == "up":
            proxy.up += size
        else:
            proxy.down += size
        if self.failure == "pass" and self.plan.then != "pass" and self._counted() >= self.plan.after:
            self.fail(self.plan.then)

    def _counted(self) -> int:
        if self.plan.direction == "both":
            return sum(self.moved.values())
        return self.moved[self.plan.direction]


@contextlib.contextmanager
def deaf(address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """The port of a host that answers no attempt to connect: its queue is full, so that the kernel drops each one."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((address, port), backlog=0))
        port = int(listener.getsockname()[1])
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex((address, port))
        yield port
