"""Owns rsync's end of the bridge: rsync runs this in place of ssh; it hands its streams to flctl and waits.

    python -I bridge.py SOCKET HOST COMMAND...

flctl carries the streams over the connection that it has already (over_connection.py), so no second login is needed.
"""

import array
import os
import socket
import sys


def main(address: str, command: list[str]) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.connect(address)
        streams = array.array("i", [0, 1, 2])
        link.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        link.sendall(" ".join(command).encode("utf-8", "surrogateescape"))
        link.shutdown(socket.SHUT_WR)
        # Ours must not hold open what rsync or flctl closes.
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        status = link.recv(1)
    return status[0] if status else 255


if __name__ == "__main__":
    # As ssh does with its arguments: the host (one connection, so one host), then the command.
    sys.exit(main(sys.argv[1], sys.argv[3:]))
