"""Owns what ssh runs to ask a question (SSH_ASKPASS): it passes the question on to flctl and prints the answer.

python -I askpass.py SOCKET QUESTION
"""

import socket
import sys


def main(address: str, question: str) -> int:
    if not question:  # flctl asks whether this can be run at all
        return 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.connect(address)
        link.sendall(question.encode("utf-8", "surrogateescape"))
        link.shutdown(socket.SHUT_WR)
        answer = link.recv(4096)
    sys.stdout.buffer.write(answer)
    return 0 if answer else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], " ".join(sys.argv[2:])))
