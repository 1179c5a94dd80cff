"""`python -m tests.testbed up|down|status|packages`, and `flctl ARGS...` as the orchestrator."""

import os
import sys

from . import Testbed, TestbedError, packages, python

USAGE = "usage: python -m tests.testbed up | down | status | packages | flctl ARGS..."


def main(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "packages" and not rest:
        if installed := packages.install():
            print(f"installed {' '.join(installed)}")
        return 0
    bed = Testbed()
    if command == "up" and not rest:
        bed.lock()
        bed.up()
        _describe(bed)
    elif command == "down" and not rest:
        bed.lock()
        bed.down()
    elif command == "status" and not rest:
        return 0 if _describe(bed) else 1
    elif command == "flctl":
        child = bed.popen(*rest, stdin=None, env={"TERM": os.environ.get("TERM", "dumb")})
        return child.wait()
    else:
        print(USAGE, file=sys.stderr)
        return 2
    return 0


def _describe(bed: Testbed) -> bool:
    for facility in bed.facilities.values():
        server, state = facility.sshd, "up" if facility.running else "down"
        print(
            f"{facility.name}: {state}, {facility.account_name}@{server.address}:{server.port}, login by {server.kind}"
        )
    print(f"orchestrator: account {bed.user.name}, home {bed.user.home}, flctl {python.FLCTL}")
    return bed.is_up


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TestbedError as error:
        sys.exit(f"testbed: {error}")
