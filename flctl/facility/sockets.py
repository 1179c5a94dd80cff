"""Owns the sockets by which our children talk back to us: private, short-lived, served by threads of this process."""

import contextlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

LONGEST_FOLDER = 80
"""Bytes of a folder's path: that of a socket may have 104 on macOS, and ssh adds 17 while it makes its own."""


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


def socket_folder(runtime: Path) -> Path:
    """A private folder whose path is short enough for sockets."""
    if len(os.fsencode(runtime)) <= LONGEST_FOLDER:
        return runtime
    return Path(tempfile.mkdtemp(prefix="flctl-sockets-", dir="/tmp"))


def remove(folder: Path, runtime: Path) -> None:
    if folder != runtime:
        shutil.rmtree(folder, ignore_errors=True)
