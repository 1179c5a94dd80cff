"""Waiting that could last for ever, or be taken for an answer: clocks that jump, silent servers, a held ledger."""

import contextlib
import fcntl
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import paramiko
import pytest

from flctl.campaign.journal import Journal
from flctl.errors import BudgetRefused, CodeSpent, ConfigurationError, FlctlError, Locked, LoginNeeded, SiteUnreachable
from flctl.facility import allowance, hostkeys, ledger, patience, scratch
from flctl.facility.connection import Road, connect
from flctl.facility.hostkeys import HostKey
from flctl.facility.openssh import login_place
from flctl.facility.over_ssh import OverSsh
from flctl.facility.profile import Environment, Login, Poll, Scheduler, Shape, Site, Storage, Totp, Transfer
from flctl.facility.transfer import push
from tests.ssh_sites import another_secret, early_in_a_step, keygen, road_to, secret_file

ADDRESS = "127.0.99.1"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return tmp_path / "state" / "flctl"


def a_site(folder: Path, host: str = ADDRESS, port: int = 22) -> Site:
    key = folder / "key"
    if not key.exists():
        keygen(key)
    return Site(
        schema=1,
        name="pisa",
        login=Login(host=host, port=port, user="me", kind="key", key=str(key)),
        transfer=Transfer(),
        scheduler=Scheduler(kind="local"),
        shapes={"prod": Shape()},
        storage=Storage(work="/tmp", data="/tmp"),
        environment=Environment(),
        poll=Poll(),
    )


class Slow(paramiko.ServerInterface):  # type: ignore[misc]
    """A server that is about to judge a key or a code when something happens to us; then it hangs up, or says nothing
    for longer than we wait."""

    def __init__(self, happens: Callable[[], object], then: str, method: str) -> None:
        self.happens, self.then, self.method = happens, then, method
        self.over = threading.Event()
        self.judged = 0

    def get_allowed_auths(self, username: str) -> str:
        return self.method

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return self._judge()

    def check_auth_interactive(self, username: str, submethods: str) -> paramiko.InteractiveQuery:
        return paramiko.InteractiveQuery("", "", ("Verification code: ", False))

    def check_auth_interactive_response(self, responses: list[str]) -> int:
        return self._judge()

    def _judge(self) -> int:
        self.judged += 1
        self.happens()
        if self.then == "says nothing":
            self.over.wait(60)
        raise EOFError


@contextlib.contextmanager
def serving(server: Slow, folder: Path) -> Iterator[Site]:
    key = keygen(folder / "host_key")
    with socket.create_server((ADDRESS, 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            link, _ = listener.accept()
            transport = paramiko.Transport(link)
            transport.add_server_key(paramiko.PKey.from_path(key))
            transport.start_server(server=server)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield a_site(folder, port=port)
        finally:
            server.over.set()
            thread.join()


@pytest.mark.parametrize("then", ["says nothing", "hangs up"])
@pytest.mark.parametrize("kind", ["key", "totp"])
def test_a_machine_that_slept_while_it_logged_in_was_not_refused(
    kind: str, then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock goes on meanwhile, the monotonic one does not; the server has given us up since."""
    asleep = [0.0]
    clock = SimpleNamespace(time=lambda: time.time() + sum(asleep), monotonic=time.monotonic)
    monkeypatch.setattr("paramiko.auth_handler.time", clock)
    monkeypatch.setattr("flctl.facility.authentication.time", clock)
    early_in_a_step()
    server = Slow(lambda: asleep.append(9 * 3600), then, {"key": "publickey", "totp": "keyboard-interactive"}[kind])
    with serving(server, tmp_path) as site:
        coded = Totp(automation="permitted", permission="by the test", secret=secret_file(tmp_path, another_secret()))
        site = replace(site, login=replace(site.login, kind=kind, totp=coded))
        with pytest.raises(SiteUnreachable):
            connect(site, trusting(tmp_path, site))
    assert server.judged == 1


def test_a_clock_that_is_set_back_does_not_prolong_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """paramiko's own limits are moments of the wall clock, which stands still here."""
    for module in ("auth_handler", "transport", "packet"):
        monkeypatch.setattr(f"paramiko.{module}.time", SimpleNamespace(time=lambda: 1e9, sleep=time.sleep))
    monkeypatch.setattr(patience, "AUTH", 0.5)
    monkeypatch.setattr("flctl.facility.authentication.SPARE", 0.5)
    server = Slow(lambda: None, "says nothing", "publickey")
    with serving(server, tmp_path) as site:
        began = time.monotonic()
        with pytest.raises(SiteUnreachable):
            connect(site, trusting(tmp_path, site))
        assert time.monotonic() - began < 20
    assert server.judged == 1


def trusting(folder: Path, site: Site) -> Road:
    road = road_to(folder)
    kind, blob = (folder / "host_key.pub").read_text().split()[:2]
    road.known_hosts.write_text(f"[{site.login.host}]:{site.login.port} {kind} {blob}\n")
    return road


# The user's ledger


def test_who_only_looks_at_the_ledger_waits_for_nobody_and_who_writes_not_for_ever(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One flctl that is stopped while it holds the ledger stops no other's status, and nobody's site for long."""
    site = a_site(tmp_path)
    allowance.take(site, login_place(site))
    ledger.spend(b"x" * 10, 30, now=1e9)
    monkeypatch.setattr("flctl.durable.LOCK_PATIENCE", 0.2)
    with contextlib.ExitStack() as held:
        for name in ("logins", "codes"):
            fcntl.flock(held.enter_context((state / f"{name}.lock").open("w")), fcntl.LOCK_EX)
        assert allowance.used(site) == 1
        allowance.check(site)
        assert (allowance.scarce(site), allowance.skew(site)) == (False, 0.0)
        with pytest.raises(Locked, match="does not go on"):
            allowance.take(site, login_place(site))
        with pytest.raises(Locked, match="does not go on"):
            ledger.spend(b"x" * 10, 30, now=1e9 + 60)
    allowance.take(site, login_place(site))
    assert allowance.used(site) == 2


def test_without_room_for_the_ledger_nothing_is_sent_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, site = tmp_path / "disk", a_site(tmp_path)
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", str(disk)], check=True)
    try:
        monkeypatch.setenv("XDG_STATE_HOME", str(disk))
        allowance.take(site, login_place(site))
        ledger.spend(b"x" * 10, 30, now=1e9)
        with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
        for attempt in (
            lambda: allowance.take(site, login_place(site)),
            lambda: ledger.spend(b"x" * 10, 30, now=1e9 + 60),
        ):
            with pytest.raises(BudgetRefused, match="No space left") as caught:
                attempt()
            assert "make room" in caught.value.hint
        assert allowance.used(site) == 1
        (disk / "ballast").unlink()
        with pytest.raises(CodeSpent):
            ledger.spend(b"x" * 10, 30, now=1e9)
        allowance.take(site, login_place(site))
        assert allowance.used(site) == 2
        assert sorted(path.suffix for path in (disk / "flctl").iterdir()) == [".json", ".json", ".lock", ".lock"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN", "1e300"])
def test_a_moment_that_is_none_is_damage_and_said(state: Path, tmp_path: Path, value: str) -> None:
    """Else a pause without an end, or a traceback."""
    site = a_site(tmp_path)
    allowance.take(site, login_place(site))
    path = state / "logins.json"
    path.write_text(path.read_text().replace('"until": 0.0', f'"until": {value}'))
    with pytest.raises(ConfigurationError, match="cannot be understood"):
        allowance.check(site)


@pytest.mark.parametrize("name", ["logins.json", "codes.json"])
def test_a_ledger_that_cannot_be_read_is_said(state: Path, tmp_path: Path, name: str) -> None:
    site = a_site(tmp_path)
    allowance.take(site, login_place(site))
    (state / "logins.json").unlink()
    (state / name).mkdir()
    with pytest.raises(ConfigurationError, match="cannot be used: Is a directory"):
        if name == "logins.json":
            allowance.check(site)
        else:
            ledger.spend(b"x" * 10, 30)


# Names


SEEK = """
import sys, time
from pathlib import Path
from dataclasses import replace
from flctl.facility import patience
from flctl.facility.connection import connect
from flctl.facility.doorstep import look
from tests.ssh_sites import road_to
from tests.test_facility_waiting import a_site
patience.RESOLVE = 1.0
folder = Path(sys.argv[1])
site, began = a_site(folder, "login.pisa.example.org"), time.monotonic()
print([check.detail for check in look(site, folder / "none")[0]])
try:
    connect(site, road_to(folder))
except Exception as error:
    print(type(error).__name__, error)
print("in time" if time.monotonic() - began < 20 else "too late")
"""


def test_a_silent_name_server_is_not_waited_for(tmp_path: Path) -> None:
    """The system's own resolver, which would ask for 150 s: its limits are the machine's, not ours."""
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("nameserver 127.0.99.2\noptions timeout:30 attempts:5\n")
    command = 'mount --bind "$1" /etc/resolv.conf && exec "$2" -c "$3" "$4"'
    words = ["unshare", "-m", "sh", "-c", command, "sh", str(resolv), sys.executable, SEEK, str(tmp_path)]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.99.2", 53))
        done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT)
    told = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "no name server answered within 1 s" in told[0]
    assert "SiteUnreachable" in told[1] and "no name server answered" in told[1]
    assert told[2] == "in time"


def test_an_agent_that_says_nothing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = a_site(tmp_path)
    site = replace(site, login=replace(site.login, key="agent"))
    monkeypatch.setattr(patience, "AGENT", 0.2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(tmp_path / "agent"))
        silent.listen()
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
        with pytest.raises(LoginNeeded, match="the ssh-agent does not answer: it says nothing") as caught:
            connect(site, road_to(tmp_path))
    assert not caught.value.attempted
    assert allowance.used(site) == 0


def test_a_journal_or_list_of_hosts_that_is_held_stops_nobody_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flctl.durable.LOCK_PATIENCE", 0.2)
    journal, site = Journal(tmp_path / "journal.jsonl"), a_site(tmp_path)
    root = scratch.private(ledger.state_folder() / "run", room=scratch.NAME + scratch.SOCKET, make=True)
    key = HostKey(kind="ssh-ed25519", blob=b"x", certificate=b"")
    for path, attempt in (
        (journal.path, lambda: journal.append("x")),
        (tmp_path / "known_hosts", lambda: hostkeys.replace(tmp_path / "known_hosts", login_place(site), key)),
        (root / "lock", lambda: contextlib.ExitStack().enter_context(scratch.folder())),
    ):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with path.open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(FlctlError, match="another flctl holds it"):
                attempt()


@pytest.mark.parametrize("multiplex", [True, False])
def test_a_transfer_host_that_is_away_costs_no_logins(multiplex: bool, tmp_path: Path) -> None:
    """Else the day's are gone when it is back."""
    site = a_site(tmp_path)
    away = Transfer(host="127.0.99.3", port=24901)
    site = replace(site, login=replace(site.login, multiplex=multiplex), transfer=away)
    road = road_to(tmp_path)
    keygen(tmp_path / "its")
    road.known_hosts.write_text(f"[{away.host}]:{away.port} {(tmp_path / 'its.pub').read_text()}")
    (tmp_path / "file").write_text("x")
    carrier = OverSsh(site, road, lambda place: None)
    try:
        with pytest.raises(SiteUnreachable, match="Connection refused"):
            push(carrier, tmp_path, ["file"], PurePosixPath("/nowhere"))
    finally:
        carrier.close()
    assert allowance.used(site) == 0
