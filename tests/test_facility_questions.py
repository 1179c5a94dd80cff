"""What a server may ask at a login, and what it is given: real PAM conversations, each answer once, nothing else."""

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import paramiko
import pytest

from flctl.errors import CodeSpent, ConfigurationError, LoginNeeded
from flctl.facility import allowance
from flctl.facility.codes import Answers, parse_secret, wanted_by
from flctl.facility.connection import Road, connect
from flctl.facility.openssh import Place, environment, login_place, ssh
from flctl.facility.over_ssh import OverSsh
from flctl.facility.profile import Password, Site, Totp
from flctl.facility.transfer import push
from tests.ssh_sites import GONE, Watch, another_secret, connected, early_in_a_step, keygen, road_to, site_of
from tests.ssh_sites import secret_file as code_file
from tests.testbed.sshd import Attempts, Sshd

ADDRESS, USER = "127.0.0.75", "flctl-auth"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return tmp_path / "state"


@pytest.fixture(scope="module")
def both() -> Iterator[Sshd]:
    with Sshd(name="auth-both", address=ADDRESS, port=2720, user=USER, kind="password+totp") as server:
        yield server


@pytest.fixture(scope="module")
def code_only() -> Iterator[Sshd]:
    with Sshd(name="auth-code", address=ADDRESS, port=2721, user=f"{USER}-c", kind="totp") as server:
        yield server


def file_of(folder: Path, text: str) -> str:
    """The reference to a private file that holds a password."""
    (folder / "private").mkdir(exist_ok=True)
    return code_file(folder / "private", text)


def ready(server: Sshd, folder: Path, **fields: Any) -> Site:
    """A profile with fresh secrets of the server's, none of whose codes is used; early in a time step."""
    early_in_a_step()
    password = Password(secret=file_of(folder, server.reset_password())) if "password" in server.kind else Password()
    return site_of(server, secret=code_file(folder, server.reset_codes()), **{"password": password, **fields})


def let_in(site: Site, road: Road) -> None:
    with connected(site, road) as connection:
        assert connection.run("id -un").stdout == f"{site.login.user}\n"
        assert connection.logins == 1


def counted(server: Sshd, since: int) -> Attempts:
    server.wait_for(GONE, since=since)
    return server.attempts(since)


# What lets in


def test_password_and_code_let_in_with_one_attempt(both: Sshd, tmp_path: Path) -> None:
    since = both.mark()
    let_in(ready(both, tmp_path), road_to(tmp_path, both))
    seen = both.attempts(since)
    assert (seen.connections, seen.logins, seen.keys + seen.failed_keys, seen.failed_codes) == (1, 1, 0, 0)


def test_one_question_for_password_and_code_gets_both(tmp_path: Path) -> None:
    with Sshd(
        name="auth-combined", address=ADDRESS, port=2722, user=f"{USER}-b", kind="password+totp", combined=True
    ) as server:
        let_in(ready(server, tmp_path), road_to(tmp_path, server))
        assert server.attempts().failed_codes == 0


def test_a_code_alone_lets_in_and_no_key_is_offered(code_only: Sshd, tmp_path: Path) -> None:
    since = code_only.mark()
    let_in(ready(code_only, tmp_path), road_to(tmp_path, code_only))
    seen = code_only.attempts(since)
    assert (seen.connections, seen.logins, seen.keys + seen.failed_keys, seen.failed_codes) == (1, 1, 0, 0)


def test_a_code_is_given_where_it_is_asked_for_as_the_password(tmp_path: Path) -> None:
    with Sshd(
        name="auth-plain", address=ADDRESS, port=2724, user=f"{USER}-c", kind="totp", plain_prompt=True
    ) as server:
        let_in(ready(server, tmp_path), road_to(tmp_path, server))
        assert (server.attempts().connections, server.attempts().failed_codes) == (1, 0)


def test_a_server_without_questions_gets_the_code_by_the_method_password(by_method: Sshd, tmp_path: Path) -> None:
    since = by_method.mark()
    let_in(ready(by_method, tmp_path), road_to(tmp_path, by_method))
    assert (by_method.attempts(since).connections, by_method.attempts(since).failed_codes) == (1, 0)


@pytest.fixture(scope="module")
def by_method() -> Iterator[Sshd]:
    """Only the method "password", whose password is the code."""
    with Sshd(
        name="auth-method",
        address=ADDRESS,
        port=2723,
        user=f"{USER}-c",
        kind="totp",
        plain_prompt=True,
        method="password",
    ) as server:
        yield server


@pytest.mark.parametrize("which", ["both", "code_only", "by_method"])
def test_rsync_over_ssh_answers_the_same_questions(request: pytest.FixtureRequest, tmp_path: Path, which: str) -> None:
    server: Sshd = request.getfixturevalue(which)
    site, since, told = ready(server, tmp_path), server.mark(), list[Place]()
    carrier = OverSsh(site, road_to(tmp_path, server), told.append)
    (tmp_path / "note").write_text("hello")
    target = server.account.folder(server.account.home / "pushed")
    try:
        push(carrier, tmp_path, ["note"], target)
    finally:
        carrier.close()
    assert (target / "note").read_text() == "hello"
    assert (server.attempts(since).connections, server.attempts(since).failed_codes, len(told)) == (1, 0, 1)
    server.account.empty_home()


# What does not


def test_a_wrong_password_costs_one_attempt_and_is_not_tried_again(both: Sshd, tmp_path: Path) -> None:
    site, since = ready(both, tmp_path), both.mark()
    file_of(tmp_path, "canary-wrong")
    with pytest.raises(LoginNeeded, match="refused the password and one-time code") as caught:
        connect(site, road_to(tmp_path, both))
    assert "canary" not in str(caught.value) + caught.value.hint
    assert "login.password.secret" in caught.value.hint and "flctl release" in caught.value.hint
    assert caught.value.attempted and not isinstance(caught.value, CodeSpent)
    seen = counted(both, since)
    assert (seen.connections, seen.logins, seen.failed_codes) == (1, 0, 1)


def test_an_ssh_whose_flctl_was_killed_sends_no_empty_answer(code_only: Sshd, tmp_path: Path) -> None:
    """It goes on by itself, up to the question; an empty answer is a refused one, and some sites count those."""
    site, since, road = ready(code_only, tmp_path), code_only.mark(), road_to(tmp_path, code_only)
    program = tmp_path / "askpass"
    with contextlib.suppress(Killed), OverSsh(site, road, lambda place: None)._asking() as variables:
        program.write_text(Path(variables["SSH_ASKPASS"]).read_text())
        raise Killed
    program.chmod(0o700)
    words = [*ssh(site, login_place(site), road.known_hosts, code=True), code_only.address, "true"]
    done = subprocess.run(words, env=environment(**{**variables, "SSH_ASKPASS": str(program)}), timeout=60)
    assert done.returncode != 0
    seen = counted(code_only, since)
    assert (seen.connections, seen.logins, seen.failed_codes) == (1, 0, 0)


class Killed(BaseException):
    """As if flctl were: nothing is there any more that answers."""


def test_a_wrong_code_costs_one_attempt(code_only: Sshd, tmp_path: Path) -> None:
    site = ready(code_only, tmp_path)
    code_file(tmp_path, another_secret())
    since = code_only.mark()
    with pytest.raises(LoginNeeded, match="refused the one-time code"):
        connect(site, road_to(tmp_path, code_only))
    seen = counted(code_only, since)
    assert (seen.connections, seen.failed_codes) == (1, 1)


def test_an_expired_password_is_not_changed(both: Sshd, tmp_path: Path) -> None:
    """Even where the profile's pattern would match: PAM asks for the old password and then twice for a new one."""
    site = ready(both, tmp_path)
    site = replace(site, login=replace(site.login, password=replace(site.login.password, prompt="(?i)password")))
    subprocess.run(["chage", "-d", "0", both.user], check=True)
    try:
        with pytest.raises(LoginNeeded, match=r"asks for a change of the password.*nothing was answered") as caught:
            connect(site, road_to(tmp_path, both))
        assert "log in by hand and change it" in caught.value.hint
    finally:
        subprocess.run(["chage", "-d", "2026-01-01", both.user], check=True)
    shadow = subprocess.run(["getent", "shadow", both.user], check=True, capture_output=True, text=True).stdout
    with pytest.raises(LoginNeeded, match="none is tried until a person has looked at it"):
        allowance.check(site)  # which every contact asks first
    assert allowance.release(site)
    let_in(site, road_to(tmp_path, both))
    assert shadow == subprocess.run(["getent", "shadow", both.user], check=True, capture_output=True, text=True).stdout


def test_an_unknown_question_is_not_answered(both: Sshd, code_only: Sshd, tmp_path: Path) -> None:
    site = ready(both, tmp_path)
    site = replace(site, login=replace(site.login, password=replace(site.login.password, prompt="PIN")))
    since = both.mark()
    with pytest.raises(LoginNeeded, match=r"asked 'Password:'.*nothing was answered") as caught:
        connect(site, road_to(tmp_path, both))
    assert "login.password.prompt" in caught.value.hint
    both.wait_for(GONE, since=since)
    assert both.attempts(since).failed_codes == 0
    # A code-only site that asks for a password is given no code where the profile has a pattern of its own.
    plain = replace(site_of(code_only), name="x")
    own = replace(plain, login=replace(plain.login, kind="totp", totp=replace(plain.login.totp, prompt="Token")))
    assert wanted_by("Password:", own) == () and wanted_by("Token:", own) == ("code",)


def test_a_server_that_wants_a_key_after_all_is_named(tmp_path: Path) -> None:
    with Sshd(name="auth-key", address=ADDRESS, port=2725, user=f"{USER}-c") as server:
        totp = {"secret": code_file(tmp_path, another_secret()), "automation": "permitted", "permission": "the test"}
        early_in_a_step()
        with pytest.raises(LoginNeeded, match="lets nobody in by a question: it wants publickey") as caught:
            connect(site_of(server, kind="totp", totp=totp), road_to(tmp_path, server))
        assert "login.kind" in caught.value.hint
        seen = counted(server, 0)
        assert (seen.connections, seen.failed_keys + seen.failed_codes) == (1, 0)


@pytest.mark.parametrize("secret", ["", "file:/does/not/exist"])
def test_a_password_that_cannot_be_had_is_found_before_the_site_is_bothered(
    both: Sshd, tmp_path: Path, secret: str
) -> None:
    site, since = ready(both, tmp_path, password=Password(secret=secret)), both.mark()
    with pytest.raises(ConfigurationError, match=r"login\.password\.secret: ") as caught:
        connect(site, road_to(tmp_path, both))
    assert caught.value.site == both.name
    assert both.attempts(since).connections == 0


@pytest.mark.parametrize(
    ("login", "error", "hint"),
    [
        ({"kind": "attended", "hold": 600}, LoginNeeded, "flctl login auth-both"),
        ({"kind": "attended"}, ConfigurationError, "login.hold"),
        ({"totp": {"automation": "forbidden"}, "hold": 600}, LoginNeeded, "flctl login auth-both"),
        ({"totp": {"automation": "forbidden"}}, ConfigurationError, "flctl auth store auth-both"),
    ],
)
def test_where_a_person_must_answer_nothing_is_sent(
    both: Sshd, tmp_path: Path, login: dict[str, Any], error: type[LoginNeeded | ConfigurationError], hint: str
) -> None:
    since = both.mark()
    with pytest.raises(error) as caught:
        Answers(site_of(both, **login))
    assert hint in caught.value.hint and not getattr(caught.value, "attempted", False)
    with pytest.raises(error):
        connect(site_of(both, **login), road_to(tmp_path, both))
    assert both.attempts(since).connections == 0


def test_neither_password_nor_code_is_seen_by_anybody(
    both: Sshd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    site, road = ready(both, tmp_path), road_to(tmp_path, both)
    secret = both.totp_secret
    code = parse_secret(secret, Totp()).code(time.time())
    with Watch(both.password, secret, code) as watch, connected(site, road) as connection:
        connection.run("sleep 0.2")
    assert watch.looks > 10 and watch.found == []
    assert both.password not in caplog.text and secret not in caplog.text
    answers = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "secret"]
    assert answers and not any(both.password.encode() in path.read_bytes() for path in answers)


# Several questions at once: OpenSSH's PAM asks one at a time, others do not


class OneExchange(paramiko.ServerInterface):  # type: ignore[misc]
    """A server that asks for everything in one exchange."""

    transport: paramiko.Transport

    def __init__(self, *questions: str) -> None:
        self.questions, self.answers = questions, list[list[str]]()

    def get_allowed_auths(self, username: str) -> str:
        return "keyboard-interactive"

    def check_auth_interactive(self, username: str, submethods: str) -> paramiko.InteractiveQuery:
        return paramiko.InteractiveQuery("Welcome", "to the site", *((question, False) for question in self.questions))

    def check_auth_interactive_response(self, responses: list[str]) -> int:
        self.answers.append(responses)
        return int(paramiko.AUTH_SUCCESSFUL)


class HangsUp(OneExchange):
    """Ends the connection without a word when it is answered."""

    def check_auth_interactive_response(self, responses: list[str]) -> int:
        super().check_auth_interactive_response(responses)
        raise EOFError


class Expired(OneExchange):
    """Has no keyboard-interactive, and wants a new password when it is given the old one (RFC 4252, section 8)."""

    def get_allowed_auths(self, username: str) -> str:
        return "password"

    def check_auth_password(self, username: str, password: str) -> int:
        self.answers.append([password])
        message = paramiko.Message()
        message.add_byte(bytes([60]))
        message.add_string("Your password has expired")
        message.add_string("")
        self.transport._send_message(message)
        return int(paramiko.AUTH_FAILED)


def asked_at_once(folder: Path, site: Site, *questions: str) -> list[list[str]]:
    """The answers to questions that come together; the login's error is raised."""
    return answered_by(OneExchange(*questions), folder, site)


def log_in(site: Site, road: Road) -> None:
    connect(site, road).close()


def open_for_files(site: Site, road: Road) -> None:
    carrier = OverSsh(site, road, lambda place: None)
    try:
        with carrier.open():
            pass
    finally:
        carrier.close()


def answered_by(
    server: OneExchange, folder: Path, site: Site, attempt: Callable[[Site, Road], None] = log_in
) -> list[list[str]]:
    key = keygen(folder / "host_key")
    with socket.create_server(("127.0.0.76", 0)) as listener:

        def serve() -> None:
            link, _ = listener.accept()
            transport = paramiko.Transport(link)
            transport.add_server_key(paramiko.PKey.from_path(key))
            server.transport = transport
            transport.start_server(server=server)

        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        road = road_to(folder)
        words = (folder / "host_key.pub").read_text().split()
        road.known_hosts.write_text(f"[127.0.0.76]:{port} {words[0]} {words[1]}\n")
        try:
            attempt(replace(site, login=replace(site.login, host="127.0.0.76", port=port)), road)
        finally:
            thread.join()
    return server.answers


def test_several_questions_of_one_exchange_get_each_its_answer(both: Sshd, tmp_path: Path) -> None:
    site = ready(both, tmp_path)
    code = parse_secret(both.totp_secret, Totp()).code(time.time())
    assert asked_at_once(tmp_path, site, "Verification code: ", "Password: ") == [[code, both.password]]


def test_of_several_questions_none_is_answered_if_one_is_unknown(both: Sshd, tmp_path: Path) -> None:
    site = ready(both, tmp_path)
    with pytest.raises(LoginNeeded, match="'Welcome to the site Favourite colour\\?'"):
        asked_at_once(tmp_path, site, "Password: ", "Favourite colour?")


def test_what_is_asked_for_again_is_not_given_again(both: Sshd, tmp_path: Path) -> None:
    with pytest.raises(LoginNeeded, match="the password was not enough: the site asked again"):
        asked_at_once(tmp_path, ready(both, tmp_path), "Password: ", "Password: ")
    (tmp_path / "again").mkdir()
    with pytest.raises(LoginNeeded, match="the one-time code was not enough: the site asked again"):
        asked_at_once(tmp_path / "again", ready(both, tmp_path), "Verification code: ", "Verification code: ")


@pytest.mark.parametrize("server", [HangsUp("Password: "), Expired()])
def test_a_site_that_hangs_up_on_an_answer_has_refused_it(both: Sshd, tmp_path: Path, server: OneExchange) -> None:
    with pytest.raises(LoginNeeded, match="hung up on the password; it is not tried again") as caught:
        answered_by(server, tmp_path, ready(both, tmp_path))
    assert caught.value.attempted
    assert server.answers == [[both.password]]


def test_a_transfer_host_that_hangs_up_on_an_answer_has_refused_it(both: Sshd, tmp_path: Path) -> None:
    server = HangsUp("Password: ")
    with pytest.raises(LoginNeeded, match=r"refused the password: (it hung up|.*Connection)") as caught:
        answered_by(server, tmp_path, ready(both, tmp_path), open_for_files)
    assert caught.value.attempted
    assert server.answers == [[both.password]]


def test_a_question_behind_many_words_is_shown(both: Sshd, tmp_path: Path) -> None:
    site = ready(both, tmp_path)
    with pytest.raises(LoginNeeded, match=r"A notice\. A notice.* Favourite colour\?'"):
        Answers(site).answer("Favourite colour?", "A notice. " * 100)


def test_a_question_without_an_end_is_not_answered_and_takes_no_time(both: Sshd, tmp_path: Path) -> None:
    site, began = ready(both, tmp_path), time.monotonic()
    with pytest.raises(LoginNeeded, match="nothing was answered"):
        Answers(site).answer("new " * 60000 + "Password:")
    assert time.monotonic() - began < 10


# Which question asks for what


NEVER = (
    "Duo two-factor login for me\n\nEnter a passcode or select one of the following options:\n"
    "\n 1. Duo Push to XXX-1234\n\nPasscode or option (1-1): ",
    "Do you accept the terms of use? (yes/no) ",
    "Accept terms?",
    "Enter your new PIN:",
    "Are you sure you want to continue connecting (yes/no/[fingerprint])? ",
    "Enter PASSCODE from your token, or press Enter for a push:",
    "Captcha: 7 + 4 = ",
    "",
)
"""What no kind of login answers."""


@pytest.mark.parametrize(
    ("kind", "question", "wanted"),
    [
        ("key+totp", "Verification code:", ("code",)),
        ("key+totp", "One-time password (OATH) for `me':", ("code",)),
        ("key+totp", "Password:", ()),
        ("key+totp", "Password & verification code:", ()),
        ("key+totp", "Enter passphrase for key '/home/me/.ssh/id':", ()),
        ("key+totp", "New verification code:", ()),
        *((kind, question, ()) for kind in ("key+totp", "password+totp", "totp") for question in NEVER),
        ("password+totp", "Password:", ("password",)),
        ("password+totp", "(me@login) Password:", ("password",)),
        ("password+totp", "One-time password:", ("code",)),
        ("password+totp", "Password + OTP:", ("password", "code")),
        ("password+totp", "Password & verification code: ", ("password", "code")),
        ("password+totp", "Current password:", ()),
        ("password+totp", "New password:", ()),
        ("totp", "Password:", ("code",)),
        ("totp", "Enter PASSCODE:", ("code",)),
        ("totp", "me@login.example's password:", ("code",)),
        ("totp", "Verification code:", ("code",)),
        ("totp", "LDAP Password for me:", ()),
        ("totp", "New password:", ()),
        ("totp", "Current password:", ()),
    ],
)
def test_a_question_gets_what_it_asks_for(both: Sshd, kind: str, question: str, wanted: tuple[str, ...]) -> None:
    assert wanted_by(question.strip(), site_of(both, kind=kind)) == wanted
