"""A road to a server that loses packets: two tunnels joined by a relay that drops some, one of them in a network
namespace of its own. The kernel's TCP does the rest, as on a bad line."""

import contextlib
import ctypes
import fcntl
import os
import random
import select
import socket
import struct
import subprocess
import threading
from types import TracebackType

from tests.ssh_sites import Network
from tests.testbed.sshd import Sshd

NEAR, FAR = "10.255.95.1", "10.255.95.2"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CLONE_NEWNET = 0x40000000


def tunnel(name: str, address: str, peer: str) -> int:
    """A new network interface of the caller's namespace, whose packets are read and written here."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    subprocess.run(["ip", "address", "add", address, "peer", peer, "dev", name], check=True)
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    return descriptor


class Lossy(Network):
    """Loses each packet, of either direction, with this probability."""

    def __init__(self, server: Sshd, *, loss: float, seed: int = 1) -> None:
        super().__init__(server)
        self._listener.close()
        self._loss, self._dice, self.lost, self.passed = loss, random.Random(seed), 0, 0
        self._tunnels = [tunnel("flctl-near", NEAR, FAR)]
        far = threading.Thread(target=self._begin_far)
        far.start()
        far.join()
        self._ended = threading.Event()
        self._relay = threading.Thread(target=self._carry_packets, daemon=True)
        self._relay.start()
        self.host, self.port = FAR, int(self._listener.getsockname()[1])

    @property
    def known_hosts_line(self) -> str:
        return f"[{FAR}]:{self.port} {self.server.host_key_line}\n"

    def _begin_far(self) -> None:
        """In a thread of its own: the namespace is that of the thread, its sockets stay in it."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        self._tunnels.append(tunnel("flctl-far", FAR, NEAR))
        self._listener = socket.create_server((FAR, 0))

    def _carry_packets(self) -> None:
        near, far = self._tunnels
        with contextlib.suppress(OSError):
            while not self._ended.is_set():
                for descriptor in select.select([near, far], [], [], 0.1)[0]:
                    packet = os.read(descriptor, 65536)
                    if self._dice.random() < self._loss:
                        self.lost += 1
                        continue
                    self.passed += 1
                    os.write(far if descriptor == near else near, packet)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._ended.set()
        self._relay.join()
        for descriptor in self._tunnels:
            os.close(descriptor)
