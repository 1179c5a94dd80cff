"""Owns the sockets by which our children talk back to us: private, short-lived, served by threads of this process."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def listening(address: Path, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """Serve every connection to a socket, each in a thread of its own, until the end of the block."""
    address.unlink(missing_ok=True)
    over, threads = threading.Event(), []

    def answer(link: socket.socket) -> None:
        with link:
            link.settimeout(None)
            serve(link)

    def accept(listener: socket.socket) -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                link, _ = listener.accept()
                threads.append(threading.Thread(target=answer, args=(link,), daemon=True))
                threads[-1].start()

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(address))
        listener.listen(4)
        listener.settimeout(0.1)
        acceptor = threading.Thread(target=accept, args=(listener,), daemon=True)
        acceptor.start()
        try:
            yield
        finally:
            over.set()
            acceptor.join()
            for thread in threads:
                thread.join(timeout=5)
            address.unlink(missing_ok=True)
