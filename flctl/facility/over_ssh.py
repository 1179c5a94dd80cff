"""Owns the road for rsync over the system's ssh, with a login of its own: one shared connection where the facility
allows that, else one per rsync."""

import contextlib
import re
import select
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flctl.errors import (
    CodeSpent,
    ConfigurationError,
    FlctlError,
    HostKeyRefused,
    Interrupted,
    LoginNeeded,
    LoginPaused,
    LoginTooSoon,
    SiteUnreachable,
)
from flctl.facility import allowance, hostkeys, patience, scratch
from flctl.facility.codes import Answers
from flctl.facility.openssh import Place, environment, jump_place, quoted, ssh, transfer_place, unreachable
from flctl.facility.profile import Site
from flctl.facility.renewal import check
from flctl.facility.rsync import Shell, end
from flctl.facility.sockets import listening
from flctl.words import printable

if TYPE_CHECKING:
    from flctl.facility.connection import Road

LINGER = 10
"""Seconds for which a shared ssh connection outlives the flctl that opened it."""


MEETINGS = 3
"""How often a name is met, without a login, to find the host whose key ssh refused: it may lead to several."""


class AnotherHost(SiteUnreachable):
    """ssh met a host of this name whose key is trusted, but was not in the campaign's file; it is there now."""


NOBODY = re.compile(r"\bssh: (?:connect to host|Could not resolve)|\bHost key verification failed")
"""How ssh says that it met no host, or not the right one: no login was tried then."""


class OverSsh:
    """rsync over the system's ssh. Questions of the server are brought to us and answered as at any login."""

    def __init__(self, site: Site, road: "Road", count: Callable[[Place], None]) -> None:
        self.site, self.road, self.lock_fds, self._count = site, road, road.lock_fds, count
        self._place = transfer_place(site)
        self._coded = site.login.coded
        self._end = contextlib.ExitStack()
        self._folder = self._end.enter_context(scratch.for_sockets(road.runtime))
        self._answers: Answers | None = None
        self._given_up = threading.Event()
        self._lifeline: socket.socket | None = None
        self._masters = 0

    @property
    def refusal(self) -> FlctlError | None:
        """Why a question of this login was not answered; the login must be ended then, or ssh answers nothing."""
        return self._answers.refusal if self._answers else None

    @contextlib.contextmanager
    def open(self) -> Iterator[Shell]:
        from flctl.facility.login import check_jump, check_place

        check_jump(self.site, self.road.known_hosts)
        check_place(self.site, self._place, self.road.known_hosts)
        if self.site.login.multiplex:
            if not self._master_lives():
                try:
                    self._open_master()
                except AnotherHost:
                    self._open_master()
            argv = [*self._ssh(code=False), *self._control(), "-o", "ControlMaster=no"]
            yield Shell(argv=argv, host=_bracketed(self._place.host), environment={})
            return
        self._await_turn()
        with allowance.outcome(self.site, self._place) as attempt, self._asking() as variables:
            attempt.met = True
            argv = [*self._ssh(code=self._coded), "-o", "ControlPath=none"]
            try:
                yield Shell(argv=argv, host=_bracketed(self._place.host), environment=variables)
            except (SiteUnreachable, LoginNeeded, HostKeyRefused) as error:
                attempt.met = not (isinstance(error, HostKeyRefused) or NOBODY.search(error.message))
                raise
            except FlctlError:
                self._note_login()
                raise
        self._note_login()

    def explain(self, status: int, words: str) -> FlctlError | None:
        if self.refusal is not None:
            return self.refusal
        if re.search(r"Host key verification failed|HOST IDENTIFICATION HAS CHANGED|host key is known", words):
            return self._host_key_refused(words)
        if re.search(r"Permission denied \(|Too many authentication failures", words):
            return self._refused(words)
        return None

    def _refused(self, words: str) -> LoginNeeded:
        if self._answers and not self._answers.dialogue and re.search(r"\([^()]*(?:keyboard|password)[^()]*\)", words):
            return allowance.unasked(self.site, self._place, printable(words))
        given = self._answers.given if self._answers else ""
        what = given or {"certificate": "certificate", "totp": "login"}.get(self.site.login.kind, "key")
        return LoginNeeded(
            f"{self._place} refused the {what}: {printable(words) or 'it hung up'}",
            hint="is it registered there, does the key have a passphrase (then ssh-add)? "
            f"After that: flctl release {self.site.name}",
            site=self.site.name,
        )

    def _note_login(self) -> None:
        jump = jump_place(self.site)
        for place in (jump, self._place) if jump else (self._place,):
            self._count(place)

    def close(self) -> None:
        if self._lifeline is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                argv = ["ssh", "-F", "none", *self._control(), "-O", "exit", self._place.host]
                subprocess.run(argv, env=environment(), capture_output=True, timeout=10, check=False)
            self._lifeline.close()
            self._lifeline = None
        self._end.close()

    # The shared connection

    def is_in(self) -> bool:
        """Whether the next rsync costs no login."""
        return self.site.login.multiplex and self._master_lives()

    def _ssh(self, *, code: bool) -> list[str]:
        return ssh(self.site, self._place, self.road.known_hosts, code=code)

    def _control(self) -> list[str]:
        return ["-o", f"ControlPath={quoted(self._folder / f'ssh{self._masters}')}"]

    def _open_master(self) -> None:
        """Log in, and leave the connection to an ssh in the background. It ends with `close`, or LINGER seconds after
        this process: it counts our lifeline as a user of it."""
        self._await_turn()
        self._masters += 1
        options = ["-o", "ControlMaster=yes", "-o", f"ControlPersist={LINGER}"]
        argv = [*self._ssh(code=self._coded), *self._control(), *options, "-f", "-N", self._place.host]
        began = time.time()
        with allowance.outcome(self.site, self._place) as attempt:
            attempt.met = True
            with self._asking() as variables, tempfile.TemporaryFile() as errors:
                child = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    env=environment(**variables),
                    start_new_session=True,
                )
                status = self._wait(child)
                errors.seek(0)
                words = errors.read(65536).decode("utf-8", "replace")
            if status != 0:
                attempt.met = not NOBODY.search(words)
                lost = unreachable(self.site, self._place, OSError(printable(words)))
                # Who hangs up on an answer has refused it, for all we know, unless this machine slept meanwhile.
                answered = self._answers is not None and self._answers.given and time.time() - began < patience.LOGIN
                raise self.explain(status, words) or (self._refused(words) if answered else lost)
        self._note_login()
        lifeline = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            lifeline.connect(str(self._folder / f"ssh{self._masters}"))
        except OSError as gone:  # ended before we came to it: this machine slept, or the connection was lost at once
            lifeline.close()
            raise unreachable(self.site, self._place, gone, "ended the connection at once") from gone
        self._lifeline = lifeline

    def _wait(self, child: "subprocess.Popen[bytes]") -> int:
        deadline = time.monotonic() + patience.LOGIN
        try:
            while time.monotonic() < deadline:
                if self.refusal is not None:
                    raise self.refusal
                if self.road.stop():
                    raise Interrupted("logging in was interrupted", site=self.site.name)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return child.wait(timeout=0.1)
            raise SiteUnreachable(
                f"{self._place} did not let us in within {patience.LOGIN:.0f} s",
                hint="rounds and ticks try again by themselves",
                site=self.site.name,
            )
        finally:
            end(child)

    def _master_lives(self) -> bool:
        if self._lifeline is None:
            return False
        with contextlib.suppress(OSError):
            while select.select([self._lifeline], [], [], 0)[0]:
                if not self._lifeline.recv(4096):
                    break
            else:
                return True
        self._lifeline.close()
        self._lifeline = None
        return False

    # Questions

    @contextlib.contextmanager
    def _asking(self) -> Iterator[dict[str, str]]:
        """The environment in which ssh brings its questions to us; empty where it has none to ask."""
        self._answers = None
        if not self._coded:
            yield {}
            return
        self._answers = self._fresh_answers()
        self._given_up.clear()
        address, program = self._folder / "ask", self._folder / "askpass"
        script = Path(__file__).with_name("askpass.py")
        command = shlex.join([sys.executable, "-I", str(script), str(address)])
        program.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        program.chmod(0o700)
        self._check_runs(program)
        with listening(address, self._reply):
            try:
                # DISPLAY: an ssh older than 8.4 asks a program only if it believes in a screen.
                yield {"SSH_ASKPASS": str(program), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":flctl"}
            finally:
                self._given_up.set()

    def _fresh_answers(self) -> Answers:
        """Answers for a second login within one contact. Its code cannot be the first one's, so it waits for the next
        time step: to leave would mean to begin each contact with a login and never come to the second."""
        while True:
            try:
                return Answers(self.site)
            except CodeSpent as spent:
                if spent.until - time.time() > 2 * self.site.login.totp.period:
                    raise
                self._wait_for(spent.until)

    def _await_turn(self) -> None:
        """Wait until the facility's interval between two logins is over; LoginNeeded if our certificate, or the agent
        that holds our key, has ended since the first of this contact: an ssh without a key would be refused."""
        from flctl.facility.keys import keys_of

        check(self.site)
        if self.site.login.keyed:
            keys_of(self.site)
        while True:
            try:
                return allowance.take(self.site, self._place)
            except LoginPaused:
                raise
            except LoginTooSoon as early:
                self._wait_for(early.until)

    def _wait_for(self, moment: float) -> None:
        """Until a moment of the wall clock, or as long as it was away: who waits looks again, and the clock may have
        been set back."""
        latest = time.monotonic() + moment - time.time()
        while (left := min(moment - time.time(), latest - time.monotonic())) > 0:
            if self.road.stop():
                raise Interrupted("waiting for the next login was interrupted", site=self.site.name)
            time.sleep(min(0.2, left))

    def _reply(self, link: socket.socket) -> None:
        question = b"".join(iter(lambda: link.recv(65536), b"")).decode("utf-8", "replace")
        # ssh puts (user@host) before the server's own words.
        question = question.removeprefix(f"({self._place.user}@{self._place.host}) ")
        if self._answers is None:
            return
        try:
            link.sendall(self._answers.answer(question).encode() + b"\n")
        except FlctlError:
            # Without an answer ssh would send an empty one, which counts as an attempt: it waits until it is ended.
            self._given_up.wait(patience.LOGIN)

    def _check_runs(self, program: Path) -> None:
        try:
            subprocess.run([program], env=environment(), stdin=subprocess.DEVNULL, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigurationError(
                f"no program can be run in {program.parent}: {error}",
                hint="let XDG_STATE_HOME name a folder that is not mounted noexec",
                site=self.site.name,
            ) from error

    def _host_key_refused(self, words: str) -> FlctlError:
        from flctl.facility.login import reach

        known_hosts, place = self.road.known_hosts, self._place
        known = hostkeys.entries(known_hosts, place)
        for _ in range(MEETINGS):
            try:
                reach(self.site, place, known_hosts).close()
            except FlctlError as error:
                return error
            if hostkeys.entries(known_hosts, place) != known:
                return AnotherHost(
                    f"{place} is the name of several hosts, and showed the key of another one: it is trusted, and on "
                    "file now",
                    hint="rounds and ticks try again by themselves",
                    site=self.site.name,
                )
        return HostKeyRefused(
            f"ssh does not trust the host key of {self._place}: {printable(words)}",
            hint=f"look at {self.road.known_hosts}",
            site=self.site.name,
        )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
