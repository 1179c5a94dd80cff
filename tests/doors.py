"""Further ways into a testbed facility: another sshd for the same account, with another kind of login."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.testbed import Testbed
from tests.testbed.accounts import account
from tests.testbed.orchestrator import popen
from tests.testbed.procs import wait_until
from tests.testbed.sshd import Sshd, remove

PERMISSION = "granted for the testbed by its own operators"


@contextlib.contextmanager
def door(bed: Testbed, site: str, name: str, port: int, **options: Any) -> Iterator[Sshd]:
    """Another sshd of the facility, on its address. The orchestrator's key is let in where keys are."""
    facility = bed.facilities[site]
    server = Sshd(
        name=name,
        address=facility.sshd.address,
        port=port,
        user=facility.account_name,
        **{"environment": facility.sshd.environment, **options},
    )
    try:
        with server:
            server.authorize(bed.key.with_suffix(".pub").read_text())
            yield server
    finally:
        remove(name)


@contextlib.contextmanager
def gate(bed: Testbed, name: str, address: str, port: int) -> Iterator[Sshd]:
    """A host of its own that connections go through; nobody works there."""
    with Sshd(name=name, address=address, port=port, user="flctl-gate", shell="/usr/sbin/nologin") as server:
        server.authorize(bed.key.with_suffix(".pub").read_text())
        yield server


def login_at(server: Sshd, **fields: Any) -> dict[str, Any]:
    """A profile's [login] for a door; the key stays the orchestrator's."""
    return {
        "host": server.address,
        "port": server.port,
        "kind": server.kind,
        "host_keys": [server.host_key_fingerprint],
        **fields,
    }


@contextlib.contextmanager
def agent_of(bed: Testbed, *keys: Path) -> Iterator[str]:
    """An ssh-agent of the orchestrator's that holds copies of these keys, with the certificates beside them."""
    folder = bed.user.folder(bed.user.home / "agent")
    address = folder / "socket"
    child = popen(bed.user, ["ssh-agent", "-D", "-a", str(address)])
    try:
        wait_until(address.exists, "the agent's socket")
        for key in keys:
            for path in (key, key.with_name(f"{key.name}-cert.pub")):
                bed.user.give(Path(shutil.copyfile(path, folder / path.name)), 0o600)
            added = bed.run("ssh-add", "-q", str(folder / key.name), env={"SSH_AUTH_SOCK": str(address)})
            assert added.returncode == 0, added.stderr
        yield str(address)
    finally:
        child.terminate()
        child.wait(timeout=10)
        shutil.rmtree(folder)


def empty_gate() -> None:
    account("flctl-gate", shell="/usr/sbin/nologin").end_processes()
