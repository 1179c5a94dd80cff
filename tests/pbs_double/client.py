#!/usr/bin/python3
"""qsub, qstat, qdel, qselect, pbsnodes, pbs_rstat of the double, by the name this file is called by: asks the server.

Standard library only, and a file by itself: it is copied beside the server's state, where every account may run it."""

import getopt
import hashlib
import json
import os
import socket
import sys
import time

VERSION = "23.06.06"
OPTIONS = {
    "qsub": "a:A:c:C:e:fhIj:J:k:l:m:M:N:o:p:P:q:r:R:S:u:v:VW:Xz",
    "qstat": "ainpqrstwxu:fGHJMQEBW:T1F:D:",
    "qdel": "W:x",
    "qselect": "a:A:c:h:HJl:N:p:q:r:s:t:Tu:xP:",
    "pbsnodes": "avF:",
    "pbs_rstat": "",
}


def main():
    program, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if arguments == ["--version"]:
        print(f"pbs_version = {VERSION}")
        return 0
    try:
        options, operands = getopt.getopt(arguments, OPTIONS[program])
    except getopt.GetoptError as error:
        sys.stderr.write(f"{program}: {error}\nusage: {program} ...\n")
        return 2
    request = {
        "program": program,
        "arguments": arguments,
        "options": options,
        "operands": operands,
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
    }
    if program == "qsub":
        try:
            with open(operands[0], encoding="utf-8", errors="surrogateescape") as script:
                request["script"] = script.read()
        except OSError as error:
            sys.stderr.write(f"qsub: script file:: {error.strerror}\n")
            return 1
    try:
        if os.path.exists(os.path.join(folder, "down")):
            raise ConnectionRefusedError
        answer = ask(address(folder), request)
    except OSError:
        return refused(program, dict(options), open(os.path.join(folder, "name")).read())
    sys.stdout.write(answer["stdout"])
    sys.stderr.write(answer["stderr"])
    return answer["status"]


def address(folder):
    """An abstract socket: no permissions, no length to mind, and nobody there once the server is gone."""
    return b"\0pbs-double-" + hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest().encode()


def ask(place, request):
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(place)
        link.sendall(json.dumps(request).encode())
        link.shutdown(socket.SHUT_WR)
        text = b""
        while piece := link.recv(1 << 16):
            text += piece
    if not text:
        raise ConnectionResetError
    return json.loads(text)


def refused(program, options, name):
    """15010 is the errno; an exit status holds the lower eight bits of it."""
    if options.get("-F") == "json":
        head = {"timestamp": int(time.time()), "pbs_version": VERSION, "pbs_server": name}
        print(json.dumps(head, indent="\t", separators=(",", ":\t")))
    where = f"Couldn't connect to cluster: {name}" if program == "qdel" else ""
    words = where or f"{program}: cannot connect to server {name} (errno=15010)"
    sys.stderr.write(f"Connection refused\n{words}\n")
    return 255 if program == "qstat" else 15010 % 256


if __name__ == "__main__":
    sys.exit(main())
