"""Owns a login that a person makes: an ssh in the foreground asks on the terminal, then stays as a kept connection."""

import contextlib
import os
import re
import select
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from flctl.errors import CodeSpent, ConfigurationError, FlctlError, HostKeyRefused, LoginNeeded, SiteUnreachable
from flctl.facility import allowance, holding, ledger, patience
from flctl.facility.holding import Kept
from flctl.facility.openssh import Place, environment, jump_command, jump_place, quoted, ssh, unreachable
from flctl.facility.profile import Site
from flctl.words import printable


def keep(
    site: Site, place: Place, known_hosts: Path, seconds: float, on_login: Callable[[], None] = lambda: None
) -> Kept:
    """Let the person log in to one host, on the terminal, and keep the connection for `seconds`; `on_login` is called
    once we are in. LoginNeeded (which holds nothing), LoginTooSoon, HostKeyRefused, SiteUnreachable, ConfigurationError
    (the server lets nothing run over it); Locked while another login there waits for its answer."""
    from flctl.facility.login import check_jump, check_place

    check_jump(site, known_hosts)
    check_place(site, place, known_hosts)
    name, folder = holding.name_of(site, place, known_hosts), holding.folder(make=True)
    with holding.locked(site, place, name) as lock:
        holding.clear(name)
        allowance.take(site, place, person=True)
        try:
            _ask_person(site, place, known_hosts, folder / name)
            allowance.let_in(site, place)
            on_login()
            now = time.time()
            user_at = f"{place.user}@{place.name}"
            kept = Kept(name=name, site=site.name, place=user_at, since=now, until=now + seconds)
            holding.write(kept)
            _hold(kept, lock)
        except BaseException:
            holding.clear(name)
            raise
    _note_code(site)
    _check_sessions(site, place, kept)
    return kept


def has_terminal() -> bool:
    """Whether there is a terminal on which ssh can ask."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _ask_person(site: Site, place: Place, known_hosts: Path, address: Path) -> None:
    """An ssh in the foreground, which asks on the terminal, and goes into the background once it is let in."""
    argv = [*_asking(site, place, known_hosts), "-o", "ControlMaster=yes", "-o", f"ControlPath={quoted(address)}"]
    argv += ["-o", f"ControlPersist={holding.LINGER}", "-f", "-N", place.host]
    child = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()
    )
    heard: list[bytes] = []
    listener = threading.Thread(target=_repeat, args=(child, heard), daemon=True)
    listener.start()
    try:
        status = child.wait(timeout=patience.PERSON)
    except subprocess.TimeoutExpired:
        raise SiteUnreachable(
            f"{place} did not let us in within {patience.PERSON:.0f} s", hint=f"flctl login {site.name}", site=site.name
        ) from None
    finally:
        if child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=5)
            child.kill()
            child.wait()
        # An old ssh keeps its standard error when it goes into the background: no end comes then.
        listener.join(timeout=1.0)
    if status != 0:
        raise _failed(site, place, known_hosts, b"".join(heard).decode("utf-8", "replace"))


def _asking(site: Site, place: Place, known_hosts: Path) -> list[str]:
    """The argv of an ssh that asks what it is asked. Of two values of an option, ssh takes the first."""
    first = ["-o", "BatchMode=no", "-o", "LogLevel=INFO"]  # INFO: what the server says before it asks
    through: list[str] = []
    if jump_place(site) is not None:
        argv = jump_command(site, place, known_hosts)
        methods = "publickey,keyboard-interactive,password" if site.login.coded else "publickey"
        asks = [*first, "-o", f"PreferredAuthentications={methods}", "-o", "PasswordAuthentication=yes"]
        # It stays in the terminal's session, to ask there, and must outlive it.
        argv = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *argv[:3], *asks, *argv[3:]]
        through = ["-o", "ProxyCommand=" + shlex.join(argv).replace("%", "%%")]
    argv = ssh(site, place, known_hosts, code=site.login.coded)
    return [*argv[:3], *first, *through, *argv[3:]]


def _repeat(child: "subprocess.Popen[bytes]", heard: list[bytes]) -> None:
    """What ssh says besides its questions, shown as it comes; it has made it printable."""
    assert child.stderr is not None
    with child.stderr, contextlib.suppress(OSError, ValueError):
        while data := os.read(child.stderr.fileno(), 4096):
            heard.append(data)
            sys.stderr.write(data.decode("utf-8", "replace").replace("\r", ""))
            sys.stderr.flush()


def _failed(site: Site, place: Place, known_hosts: Path, words: str) -> FlctlError:
    if re.search(r"Host key verification failed|HOST IDENTIFICATION HAS CHANGED|host key is known", words):
        return HostKeyRefused(
            f"ssh does not trust the host key of {place}: {printable(words)}",
            hint=f"look at {known_hosts}",
            site=site.name,
        )
    lines = [line for line in words.splitlines() if line.strip()]
    last = printable(lines[-1]) if lines else "ssh ended without a word"
    if re.search(r"Permission denied|Too many authentication failures|authentication methods|Disconnected", words):
        error = LoginNeeded(
            f"{place} did not let you in: {last}",
            hint=f"nothing is kept, nothing is tried again by itself; with the next code: flctl login {site.name}",
            site=site.name,
        )
        error.attempted = False
        return error
    return unreachable(site, place, OSError(last))


def _note_code(site: Site) -> None:
    """Where flctl makes the same codes by itself, the one that the person has just typed is used."""
    from flctl.facility.codes import secret_of

    if site.login.coded and not site.login.attended:
        with contextlib.suppress(CodeSpent):
            secret = secret_of(site)
            ledger.spend(secret.key, secret.period)


def _check_sessions(site: Site, place: Place, kept: Kept) -> None:
    """ConfigurationError, and nothing kept, if the server lets nothing run over the connection."""
    argv = [*holding.through(kept), "-p", str(place.port), "-l", place.user, place.host, "exit"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            argv, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
        if holding.is_refused(done.returncode, done.stderr):
            holding.close(kept)
            raise ConfigurationError(
                f"{place} let you in, and allows no session over a connection that is kept",
                hint=f'the facility has switched that off: hold = "" in [login] of sites/{site.name}.toml',
                site=site.name,
            )


def _hold(kept: Kept, lock: int) -> None:
    """Start the holder, and wait until it has the connection."""
    ours, theirs = os.pipe()
    script = Path(__file__).with_name("holder.py")
    words = [str(kept.socket), str(holding.record_of(kept.name)), repr(kept.until), str(lock), str(theirs)]
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", str(script), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
            cwd="/",
            pass_fds=(lock, theirs),
            start_new_session=True,
        )
        os.close(theirs)
        theirs = -1
        if select.select([ours], [], [], holding.HOLDER_TIMEOUT)[0] and os.read(ours, 1) == b"+":
            threading.Thread(target=child.wait, name=f"reap {kept.name}", daemon=True).start()
            return
        child.kill()
        child.wait(timeout=holding.HOLDER_TIMEOUT)
    finally:
        for descriptor in (ours, theirs):
            if descriptor >= 0:
                os.close(descriptor)
    raise SiteUnreachable(
        f"the connection to {kept.place} ended at once", hint=f"flctl login {kept.site}", site=kept.site
    )
