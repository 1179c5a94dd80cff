"""Transfer hosts as they really are: without a shell, behind rrsync, with an old rsync, with hostile answers."""

import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from flctl.errors import BudgetRefused, FlctlError, LoginNeeded, SiteUnreachable, TransferFailed
from flctl.facility import rsync
from flctl.facility.profile import Password, Transfer
from flctl.records import FileEntry
from tests.ssh_sites import Network, connected, local_site, road_to, secret_file, site_of
from tests.testbed.procs import wait_until
from tests.testbed.sshd import Kind, Sshd

USER = "flctl-mover"
NAMES = ["plain", "-rf", "a b", "two\nlines", "*?[a]", "$(id)", "'\"\\", "d/e/f"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture(scope="module")
def login() -> Iterator[Sshd]:
    with Sshd(name="move-login", address="127.0.0.85", port=2850, user=USER) as server:
        server.account.empty_home()
        yield server


@pytest.fixture(scope="module")
def coded() -> Iterator[Sshd]:
    with Sshd(name="move-coded", address="127.0.0.85", port=2851, user=USER, kind="key+totp") as server:
        yield server


class Mover:
    """A host for files only: whatever is asked of it, rrsync answers. `asked`: what it was told to run;
    `shut`: into a folder."""

    def __init__(self, login: Sshd, restriction: str, port: int) -> None:
        home, self.shut = login.account.home, "-absolute" in restriction
        self.log = login.account.file(home / f"asked-{port}", "")
        words = f'printf "%s\\n" "$SSH_ORIGINAL_COMMAND" >>{self.log}; exec {restriction}'
        self.gate = login.account.file(home / f"gate-{port}", f"#!/bin/sh\n{words}\n", 0o700)
        self.server = Sshd(
            name=f"move-{port}",
            address="127.0.0.86",
            port=port,
            user=USER,
            options=(f"ForceCommand {self.gate}", "AllowTcpForwarding no"),
        )

    @property
    def asked(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture(scope="module", params=["/", "-absolute HOME"])
def mover(request: pytest.FixtureRequest, login: Sshd) -> Iterator[Mover]:
    """rrsync without a folder of its own, and shut into one."""
    folder = request.param.replace("HOME", str(login.account.home))
    made = Mover(login, f"/usr/bin/rrsync {folder}", 2852 if folder == "/" else 2853)
    with made.server:
        made.server.authorize(login.client_key.with_suffix(".pub").read_text())
        yield made


def through(login: Sshd, mover: Sshd, folder: Path, *, road: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A connection whose commands go to one host and whose files go through the other."""
    table = Transfer(host=mover.address, port=mover.port, shell=False)
    return connected(site_of(login, transfer=table, **fields), road_to(folder, login, mover, **(road or {})))


def fresh(server: Sshd) -> Path:
    return server.account.folder(server.account.home / f"t{os.urandom(6).hex()}")


def write(folder: Path, name: str, content: bytes) -> FileEntry:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return FileEntry(path=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


# Without a shell


@pytest.mark.parametrize("multiplex", [True, False])
def test_files_go_through_a_host_without_a_shell_and_commands_do_not(
    login: Sshd, mover: Mover, tmp_path: Path, multiplex: bool
) -> None:
    """Folders are made over the login host; the transfer host is asked for nothing but `rsync --server`."""
    target = fresh(login) / "not yet" / "there"
    entries = [write(tmp_path / "source", name, os.urandom(n * 4099)) for n, name in enumerate(NAMES)]
    before = len(mover.asked)
    with through(login, mover.server, tmp_path, multiplex=multiplex) as connection:
        assert connection.run("echo $0").stdout.strip() == "/bin/sh"
        connection.push(tmp_path / "source", NAMES, PurePosixPath(target))
        connection.pull(PurePosixPath(target), entries, tmp_path / "target")
        assert connection.logins == (2 if multiplex else 3)
    assert names_below(target) == sorted(NAMES) == names_below(tmp_path / "target")
    for name in NAMES:
        content = (tmp_path / "source" / name).read_bytes()
        assert (target / name).read_bytes() == content == (tmp_path / "target" / name).read_bytes(), name
    asked = mover.asked[before:]
    assert len(asked) == 2
    folder = str(target).replace(" ", "\\ ")
    for line in asked:
        assert re.fullmatch(r"rsync --server (--sender )?-IRe\S+ [a-z0-9=. -]* \. " + re.escape(folder) + "/", line)


def test_files_that_were_cut_come_whole_through_rrsync(login: Sshd, mover: Mover, tmp_path: Path) -> None:
    """They go on where they were cut, except for a push to an rrsync shut into a folder: that of rsync 3.5 keeps
    no beginnings."""
    size, target = 24_000_000, fresh(login)
    sent = write(tmp_path / "source", "a", os.urandom(size))
    with Network(mover.server) as network:
        table = Transfer(host="127.0.0.1", port=network.port, shell=False)
        road = road_to(tmp_path, login)
        with road.known_hosts.open("a") as stream:
            stream.write(network.known_hosts_line)
        for move, forgets in (
            (lambda c: c.push(tmp_path / "source", ["a"], PurePosixPath(target)), mover.shut),
            (lambda c: c.pull(PurePosixPath(target), [sent], tmp_path / "target"), False),
        ):
            network.cut_after = size * 2 // 3
            network.sent = network.received = 0
            with connected(site_of(login, transfer=table), road) as connection:
                with pytest.raises(SiteUnreachable):
                    move(connection)
                wait_until_idle()
                network.sent = network.received = 0
                move(connection)
                assert forgets or max(network.sent, network.received) < size * 2 // 3
    assert (target / "a").read_bytes() == (tmp_path / "source" / "a").read_bytes()
    assert (tmp_path / "target" / "a").read_bytes() == (tmp_path / "source" / "a").read_bytes()


def wait_until_idle() -> None:
    """rrsync lets in one rsync at a time, and the one that was cut has to notice it."""

    def idle() -> bool:
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        return not any(b"/usr/bin/rrsync" in line for line in lines)

    wait_until(idle, "rrsync ends", timeout=30)


def test_a_host_that_knows_a_folder_by_another_path_is_named_as_the_reason(login: Sshd, tmp_path: Path) -> None:
    """Both ways of rrsync to be shut into a folder take any other path for one below it."""
    inside = fresh(login)
    mover = Mover(login, f"/usr/bin/rrsync -absolute {inside}", 2854)
    write(tmp_path / "source", "a", b"x")
    with mover.server:
        mover.server.authorize(login.client_key.with_suffix(".pub").read_text())
        with through(login, mover.server, tmp_path) as connection:
            connection.push(tmp_path / "source", ["a"], PurePosixPath(inside / "in"))
            outside = PurePosixPath(fresh(login))
            for move in (
                lambda: connection.push(tmp_path / "source", ["a"], outside),
                lambda: connection.pull(outside, [FileEntry(path="a", size=1, sha256="")], tmp_path / "target"),
            ):
                with pytest.raises(TransferFailed) as caught:
                    move()
                wait_until_idle()
                assert caught.value.message.startswith("127.0.0.86 does not find a folder that 127.0.0.85 has: ")
                assert "transfer.host" in caught.value.hint
    assert names_below(inside) == ["in/a"]


def test_what_rrsync_forbids_is_told_in_its_own_words(
    login: Sshd, mover: Mover, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rsync, "OPTIONS", (*rsync.OPTIONS, "--protect-args"))
    write(tmp_path / "source", "a", b"x")
    with through(login, mover.server, tmp_path) as connection, pytest.raises(TransferFailed) as caught:
        connection.push(tmp_path / "source", ["a"], PurePosixPath(fresh(login)))
    assert caught.value.message.startswith("the host does not let rsync do that: /usr/bin/rrsync error: option -s ")


def test_a_host_that_gives_no_rsync_says_so(login: Sshd, tmp_path: Path) -> None:
    """Not "your ~/.bashrc talks": there is none."""
    mover = Mover(login, "echo This account is currently not available.", 2855)
    write(tmp_path / "source", "a", b"x")
    with mover.server:
        mover.server.authorize(login.client_key.with_suffix(".pub").read_text())
        with through(login, mover.server, tmp_path) as connection, pytest.raises(TransferFailed) as caught:
            connection.push(tmp_path / "source", ["a"], PurePosixPath(fresh(login)))
    assert "does not answer as rsync does" in caught.value.message
    assert "bashrc" not in caught.value.hint and "rsync 127.0.0.86:/" in caught.value.hint


# Each kind of login, once more for the files


ASKED = [("password+totp", "password and one-time code"), ("totp", "one-time code")]


@pytest.fixture(params=ASKED, ids=[kind for kind, _ in ASKED])
def asking(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Sshd, Sshd, dict[str, Any], str]]:
    """A login host and a transfer host that check the same answers, a profile's words on them, what they are given."""
    kind: Kind = request.param[0]
    with (
        Sshd(name="move-ask", address="127.0.0.87", port=2856, user="flctl-asked", kind=kind) as login,
        Sshd(name="move-ask-files", address="127.0.0.88", port=2857, user="flctl-asked", kind=kind) as files,
    ):
        secret = login.reset_codes(period=3)
        files.reset_codes(period=3)
        (files.folder / "codes").write_bytes((login.folder / "codes").read_bytes())
        fields: dict[str, Any] = {"transfer": Transfer(host=files.address, port=files.port), "totp": CODES}
        if kind == "password+totp":
            # One account, one password: the servers' last word counts.
            (tmp_path / "password").write_text(files.reset_password())
            (tmp_path / "password").chmod(0o600)
            fields["password"] = Password(secret=f"file:{tmp_path / 'password'}")
        yield login, files, {"secret": secret_file(tmp_path, secret), **fields}, request.param[1]


@pytest.mark.parametrize("multiplex", [True, False])
def test_a_host_of_its_own_asks_again_and_is_answered(asking: Any, tmp_path: Path, multiplex: bool) -> None:
    login, files, fields, _ = asking
    target, since = fresh(login), files.mark()
    sent = write(tmp_path / "source", "a", os.urandom(100_000))
    with connected(site_of(login, multiplex=multiplex, **fields), road_to(tmp_path, login, files)) as connection:
        connection.push(tmp_path / "source", ["a"], PurePosixPath(target))
        connection.pull(PurePosixPath(target), [sent], tmp_path / "target")
        assert connection.logins == (2 if multiplex else 3)
    assert (tmp_path / "target" / "a").read_bytes() == (tmp_path / "source" / "a").read_bytes()
    assert files.attempts(since).logins == (1 if multiplex else 2)


def test_a_host_of_its_own_that_refuses_the_answers_is_asked_once(asking: Any, tmp_path: Path) -> None:
    login, files, fields, given = asking
    files.reset_codes(period=3)
    since = files.mark()
    write(tmp_path / "source", "a", b"x")
    with connected(site_of(login, **fields), road_to(tmp_path, login, files)) as connection:
        with pytest.raises(LoginNeeded, match=f"127.0.0.88.* refused the {given}"):
            connection.push(tmp_path / "source", ["a"], PurePosixPath(fresh(login)))
        assert connection.logins == 1
    assert (files.attempts(since).connections, files.attempts(since).logins) == (1, 0)


CODES = {"automation": "permitted", "permission": "by the test", "period": 3}


# An rsync of another age, or in another place

OLD = """#!/bin/sh
# As an rsync of {release} in what matters: it speaks protocol {protocol}, and knows no option that came later.
for word; do
  case $word in
    --server|--sender|-[IRe]*|--timeout=*|--partial-dir|.flctl-partial|--safe-links|--files-from=-|--from0|.|/*) ;;
    *) echo "rsync: $word: unknown option" >&2; exit 1 ;;
  esac
done
exec /usr/bin/rsync --protocol={protocol} "$@"
"""


@pytest.fixture(params=["over ssh", "over the connection"])
def server(request: pytest.FixtureRequest) -> Sshd:
    """A site to which files take the road over ssh, or that over the connection."""
    return request.getfixturevalue("coded" if request.param == "over the connection" else "login")


def to(server: Sshd, folder: Path, transfer: Transfer, **road: Any) -> Any:
    fields = {"secret": secret_file(folder, server.reset_codes(period=30))} if server.kind == "key+totp" else {}
    return connected(site_of(server, transfer=transfer, **fields), road_to(folder, server, **road))


@pytest.mark.parametrize(("release", "protocol"), [("2.6", 29), ("3.0", 30), ("3.1 to 3.3", 31)])
def test_an_old_rsync_at_the_site_is_asked_for_nothing_that_it_does_not_know(
    server: Sshd, tmp_path: Path, release: str, protocol: int
) -> None:
    """A double of 2.6.9, 3.0.9 and 3.1.2; with the real ones the same was tried by hand (docs/transfer.md)."""
    site, heard = fresh(server), []
    old = server.account.file(site / "rsync", OLD.format(release=release, protocol=protocol), 0o700)
    entries = [write(tmp_path / "source", name, os.urandom(n * 4099)) for n, name in enumerate(NAMES)]
    target = PurePosixPath(site / "a folder")
    with to(server, tmp_path, Transfer(rsync=str(old)), on_rsync=heard.append) as connection:
        connection.push(tmp_path / "source", NAMES, target)
        connection.pull(target, entries, tmp_path / "target")
    told = rsync.rsync_program()[1] >= rsync.KEEPS_DEBUG
    assert heard == [f"{release} (protocol {protocol})"] * (2 if told else 0)
    for name in NAMES:
        assert (tmp_path / "target" / name).read_bytes() == (tmp_path / "source" / name).read_bytes(), name


def test_an_option_that_the_other_rsync_does_not_know_is_named(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No word of a lost connection, although that is how it ends for our rsync."""
    monkeypatch.setattr(rsync, "OPTIONS", (*rsync.OPTIONS, "--mkpath"))
    site = fresh(server)
    old = server.account.file(site / "rsync", OLD.format(release="3.0", protocol=30), 0o700)
    write(tmp_path / "source", "a", b"x")
    with to(server, tmp_path, Transfer(rsync=str(old))) as connection, pytest.raises(TransferFailed) as caught:
        connection.push(tmp_path / "source", ["a"], PurePosixPath(site))
    assert "--mkpath: unknown option" in caught.value.message


def test_an_rsync_of_ours_that_does_not_escape_sends_paths_apart(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 3.2.4 a blank in a folder's name would split it in two: then no path stands on the command line there."""
    program, _ = rsync.rsync_program()
    monkeypatch.setattr(rsync, "rsync_program", lambda: (program, (3, 2, 3)))
    site = fresh(server)
    log = server.account.file(site / "log", "")
    noting = f'#!/bin/sh\necho "$@" >>{log}\nexec /usr/bin/rsync "$@"\n'
    tool = server.account.file(site / "rsync", noting, 0o700)
    sent = write(tmp_path / "source", "a", b"x")
    with to(server, tmp_path, Transfer(rsync=str(tool))) as connection:
        connection.push(tmp_path / "source", ["a"], PurePosixPath(site / "a folder"))
        connection.pull(PurePosixPath(site / "a folder"), [sent], tmp_path / "target")
    assert names_below(site / "a folder") == ["a"] == names_below(tmp_path / "target")
    assert len(log.read_text().splitlines()) == 2 and "folder" not in log.read_text()


def test_an_rsync_outside_the_path_of_a_login_is_called_by_its_own(server: Sshd, tmp_path: Path) -> None:
    target = fresh(server)
    (target / "bin").mkdir()
    (target / "bin" / "mkdir").symlink_to("/usr/bin/mkdir")
    (target / "my tools").mkdir()
    (target / "my tools" / "rsync").symlink_to("/usr/bin/rsync")
    subprocess.run(["chmod", "-R", "a+rX", str(target)], check=True)
    sent = write(tmp_path / "source", "a", b"x")
    bashrc = server.account.file(server.account.home / ".bashrc", f"PATH={target}/bin\n")
    try:
        with (
            to(server, tmp_path, Transfer()) as connection,
            pytest.raises(TransferFailed, match="cannot be run") as caught,
        ):
            connection.push(tmp_path / "source", ["a"], PurePosixPath(target))
        with to(server, tmp_path, Transfer(rsync=str(target / "my tools" / "rsync"))) as connection:
            connection.push(tmp_path / "source", ["a"], PurePosixPath(target))
            connection.pull(PurePosixPath(target), [sent], tmp_path / "target")
    finally:
        bashrc.unlink()
    assert "transfer.rsync" in caught.value.hint
    assert names_below(tmp_path / "target") == ["a"]


def test_a_failed_write_whose_words_were_lost_is_taken_for_a_full_disk() -> None:
    """Seen with rsync 3.5.0 at both ends, once in some twenty full disks."""
    words = "rsync error: error in file IO (code 11) at receiver.c(380) [receiver=3.5.0]\n"
    error = rsync._meaning(local_site(), 11, words, ours=False)
    assert isinstance(error, BudgetRefused) and "No space left" in error.message


# Nothing there is expanded, nothing from there is believed


@pytest.mark.parametrize("folder", ["relative", "/x/a*b", "/x/[ab]", "/x/a?", "/x/back\\slash"])
def test_a_folder_that_rsync_might_expand_is_never_named_to_it(server: Sshd, tmp_path: Path, folder: str) -> None:
    write(tmp_path / "source", "a", b"x")
    since = server.mark()
    with to(server, tmp_path, Transfer()) as connection:
        for move in (
            lambda: connection.pull(PurePosixPath(folder), [write(tmp_path, "a", b"x")], tmp_path / "target"),
            lambda: connection.push(tmp_path / "source", ["a"], PurePosixPath(folder)),
        ):
            with pytest.raises(TransferFailed, match="cannot be named to rsync"):
                move()
    assert "rsync --server" not in server.log_text(since)


HOSTILE = {
    "links": "shift; exec /usr/bin/rsync --server -l --links --no-safe-links {rest}",
    "what lies below": "shift; exec /usr/bin/rsync --server -r {rest}",
    "what links lead to": "shift; exec /usr/bin/rsync --server -rL {rest}",
    "devices and pipes": "shift; exec /usr/bin/rsync --server -D {rest}",
}


@pytest.mark.parametrize("trick", HOSTILE)
@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "link to a folder"])
def test_a_site_that_sends_something_else_brings_nothing(server: Sshd, tmp_path: Path, trick: str, kind: str) -> None:
    """Whatever the rsync there does with a name that was asked for: no link, no pipe, no folder, no further file."""
    site = fresh(server)
    write(site / "secret", "inside", b"12345")
    path = site / "a"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        write(path, "more", b"12345")
    else:
        path.symlink_to("/etc/hostname" if kind == "link" else site / "secret")
    subprocess.run(["chmod", "-R", "a+rX", str(site)], check=True)
    tool = server.account.file(site / "rsync", "#!/bin/sh\n" + HOSTILE[trick].format(rest='"$@"') + "\n", 0o700)
    size = len(Path("/etc/hostname").read_bytes()) + 1
    entries = [FileEntry(path="a", size=size, sha256=""), FileEntry(path="a/more", size=6, sha256="")]
    with to(server, tmp_path, Transfer(rsync=str(tool))) as connection:
        for wanted in entries:
            with pytest.raises(FlctlError):
                connection.pull(PurePosixPath(site), [wanted], tmp_path / "target")
    assert not (tmp_path / "target").exists() or [p for p in (tmp_path / "target").rglob("*") if not p.is_dir()] == []
    assert not any(path.is_symlink() for path in (tmp_path / "target").rglob("*"))


HOSTILE_NAMES = ["../up", "/etc/passwd", "a/../../up", "..", "a/./b", "nul\0", ".flctl-incoming/a", ".flctl-partial/a"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("road", ["over ssh", "over the connection", "local"])
def test_a_name_that_a_site_made_up_is_never_a_path_here(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, road: str
) -> None:
    """A record from a site may name anything; neither end is touched for a name that leads out of its folder."""
    (tmp_path / "source").mkdir()
    (tmp_path / "up").write_text("x")
    wanted = FileEntry(path=name, size=1, sha256="")
    if road == "local":
        manager, site = connected(local_site(), road_to(tmp_path)), tmp_path / "site"
    else:
        server = request.getfixturevalue("coded" if road == "over the connection" else "login")
        manager, site = to(server, tmp_path, Transfer()), fresh(server)
    with manager as connection:
        with pytest.raises(TransferFailed, match="not the name of a file within a folder"):
            connection.pull(PurePosixPath(site), [wanted], tmp_path / "target")
        with pytest.raises(TransferFailed, match="not the name of a file within a folder"):
            connection.push(tmp_path / "source", [name], PurePosixPath(site))
    assert not (tmp_path / "target").exists()
