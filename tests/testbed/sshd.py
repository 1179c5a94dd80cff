"""A real OpenSSH server on a loopback address: own host key, own account, and one of the ways to log in.

with Sshd(name="leonardo", address="127.0.0.11", port=2211, user="flctl-leo", kind="key+totp") as server:
    server.client_key, server.totp_secret, server.password, server.known_hosts_line, server.attempts()
"""

import contextlib
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from .accounts import Account, account
from .attempts import Attempts, count, under_way
from .pam import NOTHING, Conversation, base32, secret_in
from .procs import STATE, Daemon, TestbedError, call, wait_until

Kind = Literal["key", "certificate", "key+totp", "password+totp", "totp"]
PROGRAM = "/usr/sbin/sshd"
__all__ = ["Attempts", "Kind", "Sshd", "remove"]


class Sshd:
    """One sshd and what it needs in /var/lib/flctl-testbed/sshd/<name>; it serves one account only.

    `user` is made if it does not exist. `client_key` is a private key that the server accepts (kind "certificate": with
    its certificate beside it); `authorize` adds others. Codes: a `period` of 30 or 60 s is checked by pam_oath, which
    knows no other; any other, and all with a `rate_limit`, by pam_google_authenticator. Both refuse a code used before.

    Kind "password+totp": keyboard-interactive asks for the account's password, then a code; "totp": for a code only.
    `plain_prompt`: the code of kind "totp" is asked for as "Password: ". `combined`: password and code are asked for
    with one question. `method`: "password" offers that method of SSH instead of keyboard-interactive.
    `host_certificate`: the host key is shown with a certificate of the server's own authority (`certify_host`).
    """

    def __init__(
        self,
        *,
        name: str,
        address: str,
        port: int,
        user: str,
        kind: Kind = "key",
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        period: int = 30,
        shell: str = "/bin/bash",
        plain_prompt: bool = False,
        combined: bool = False,
        method: Literal["keyboard-interactive", "password"] = "keyboard-interactive",
        host_certificate: bool = False,
        rate_limit: str = "",
    ) -> None:
        self.name, self.address, self.port, self.kind = name, address, port, kind
        self.user, self.period, self.digits, self.shell = user, period, 6, shell
        self.environment, self.options = dict(environment or {}), tuple(options)
        self.plain_prompt, self.combined, self.method = plain_prompt, combined, method
        self.host_certificate, self.rate_limit = host_certificate, rate_limit
        self.folder = STATE / "sshd" / name
        self.service = f"flctl-sshd-{name}"
        self.log = self.folder / "log"
        self.client_key = self.folder / "client_key"

    @property
    def account(self) -> Account:
        return account(self.user, shell=self.shell)

    def start(self, *, fresh: bool = False) -> Self:
        """Start it if it does not run. `fresh`: an empty log, new secrets, no key but client_key."""
        if self.running:
            return self
        if fresh:
            for path in (self.log, self._authorized_keys, self._codes, self._password, self._host_certificate):
                path.unlink(missing_ok=True)
        self._lay_out()
        known = self.mark()
        self._daemon.start()
        # Its log says when it listens: a connection made to find out would be counted.
        wait_until(lambda: "Server listening on" in self.log_text(known) or not self.running, f"{self.service} listens")
        if not self.running:
            raise TestbedError(f"{self._daemon.failed()} {self.log_text()[-2000:]}")
        return self

    def stop(self) -> None:
        """End the server and every connection it serves."""
        self._daemon.stop(with_children=True)

    def restart(self, *, new_host_key: bool = False) -> None:
        self.stop()
        if new_host_key:
            self._host_key.unlink()
            self._host_key.with_name("host_key-cert.pub").unlink(missing_ok=True)
        self.start()

    @property
    def running(self) -> bool:
        return self._daemon.pid is not None

    def __enter__(self) -> Self:
        return self.start(fresh=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def host_key_line(self) -> str:
        """Type and key, as ssh-keygen writes them."""
        return " ".join(self._host_key.with_suffix(".pub").read_text().split()[:2])

    @property
    def host_key_fingerprint(self) -> str:
        """SHA256:..."""
        return call(["ssh-keygen", "-l", "-E", "sha256", "-f", str(self._host_key)]).split()[1]

    @property
    def known_hosts_line(self) -> str:
        return f"[{self.address}]:{self.port} {self.host_key_line}\n"

    @property
    def totp_secret(self) -> str:
        """The account's secret for one-time codes, base32 as an enrolment shows it."""
        return secret_in(self._codes.read_text())

    @property
    def password(self) -> str:
        """The account's password; only kind "password+totp" sets one."""
        return self._password.read_text()

    @property
    def host_authority_line(self) -> str:
        """A line of a known_hosts file that trusts the host keys which this server's authority certified."""
        key = " ".join(self._host_authority.with_suffix(".pub").read_text().split()[:2])
        return f"@cert-authority [{self.address}]:{self.port} {key}\n"

    def certify_host(self, *, principals: str = "", validity: str = "-1m:+1h") -> None:
        """Sign the host key, for the server's address unless said otherwise; `restart` shows the new certificate."""
        words = ["ssh-keygen", "-q", "-s", str(self._host_authority), "-I", self.name, "-h"]
        words += ["-n", principals or self.address, "-V", validity]
        call([*words, str(self._host_key.with_suffix(".pub"))])

    def authorize(self, public_key: str) -> None:
        """Let this public key in as well (not for kind "certificate")."""
        if public_key.strip() in self._authorized_keys.read_text().splitlines():
            return
        with self._authorized_keys.open("a", encoding="ascii") as stream:
            stream.write(public_key.strip() + "\n")

    def certify(self, public_key: Path, *, validity: str = "-1m:+1h") -> Path:
        """Sign a public key for the account; the certificate's path (X.pub gives X-cert.pub)."""
        call(
            [
                "ssh-keygen",
                "-q",
                "-s",
                str(self._authority),
                "-I",
                self.user,
                "-n",
                self.user,
                "-V",
                validity,
                str(public_key),
            ]
        )
        return public_key.with_name(f"{public_key.stem}-cert.pub")

    def reset_codes(self, *, period: int | None = None, digits: Literal[6, 8] = 6, secret_bytes: int = 20) -> str:
        """Give the account a new secret (base32), so that no test waits for a step that an earlier one has not used."""
        self.period, self.digits = period or self.period, digits
        secret = secrets.token_bytes(secret_bytes)
        conversation = Conversation(
            codes=self._codes,
            user=self.user,
            period=self.period,
            digits=digits,
            password=self.kind == "password+totp",
            combined=self.combined,
            plain=self.plain_prompt,
            rate_limit=self.rate_limit,
        )
        _write(self._codes, conversation.secret(secret), 0o600)
        # PAM reads its file at each login: a running server need not be told.
        _write(self._pam, conversation.service, 0o644)
        return base32(secret)

    def reset_password(self) -> str:
        """Give the account a new password; it is that of every server of this account."""
        _write(self._password, secrets.token_urlsafe(12), 0o600)
        words = f"{self.user}:{self.password}\n"
        subprocess.run(["chpasswd"], input=words, text=True, check=True, capture_output=True)
        return self.password

    def mark(self) -> int:
        """A place in the log, for `since`."""
        return self.log.stat().st_size if self.log.exists() else 0

    def log_text(self, since: int = 0) -> str:
        return self.log.read_bytes()[since:].decode(errors="replace").replace("\r\n", "\n") if self.log.exists() else ""

    def attempts(self, since: int = 0, *, settle: float = 5.0) -> Attempts:
        """Count. sshd may write how a login ended after the client has gone, so logins under way are waited for,
        at most `settle` seconds: one that waits for a code is counted as it stands."""
        with contextlib.suppress(TestbedError):
            wait_until(lambda: not under_way(self.log_text(since)), "logins end", timeout=settle)
        return count(self.log_text(since))

    def wait_for(self, pattern: str, *, since: int = 0, timeout: float = 15.0) -> str:
        """Wait until the log holds a line that matches; sshd writes some only after the client has gone."""
        wait_until(
            lambda: re.search(pattern, self.log_text(since), re.MULTILINE), f"{pattern} in {self.log}", timeout=timeout
        )
        found = re.search(pattern, self.log_text(since), re.MULTILINE)
        return found[0] if found else ""

    @property
    def _host_key(self) -> Path:
        return self.folder / "host_key"

    @property
    def _host_certificate(self) -> Path:
        return self.folder / "host_key-cert.pub"

    @property
    def _authority(self) -> Path:
        return self.folder / "user_ca"

    @property
    def _host_authority(self) -> Path:
        return self.folder / "host_ca"

    @property
    def _password(self) -> Path:
        return self.folder / "password"

    @property
    def _authorized_keys(self) -> Path:
        return self.folder / "authorized_keys"

    @property
    def _codes(self) -> Path:
        return self.folder / "codes"

    @property
    def _pam(self) -> Path:
        return Path("/etc/pam.d") / self.service

    @property
    def _daemon(self) -> Daemon:
        # PAM's service name is the program's name, and sshd must be called by an absolute path: hence the link.
        program = self.folder / self.service
        return Daemon(
            name=self.service, argv=(str(program), "-D", "-f", str(self.folder / "config"), "-E", str(self.log))
        )

    def _lay_out(self) -> None:
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        account(self.user, shell=self.shell)
        for key in (self._host_key, self._authority, self._host_authority, self.client_key):
            if not key.exists():
                key.with_suffix(".pub").unlink(missing_ok=True)
                call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"{self.name} {key.name}", "-f", str(key)])
        public = self.client_key.with_suffix(".pub")
        if self.kind == "certificate":
            self.certify(public)
        if self.host_certificate and not self._host_certificate.exists():
            self.certify_host()
        if self.kind == "password+totp" and not self._password.exists():
            self.reset_password()
        if not self._authorized_keys.exists():
            _write(self._authorized_keys, public.read_text(), 0o644)
        if "totp" not in self.kind:
            _write(self._pam, NOTHING, 0o644)
        elif not self._codes.exists():
            self.reset_codes()
        program = self.folder / self.service
        program.unlink(missing_ok=True)
        program.symlink_to(PROGRAM)
        _write(self.folder / "config", self._config(), 0o644)

    def _config(self) -> str:
        certificate = self.kind == "certificate"
        asked = "keyboard-interactive:pam" if self.method == "keyboard-interactive" else "password"
        methods = {"key+totp": f"publickey,{asked}", "password+totp": asked, "totp": asked}.get(self.kind, "publickey")
        variables = " ".join(f"{name}={value}" for name, value in self.environment.items())
        return "\n".join(
            (
                *self.options,  # first: sshd takes the first value of a keyword
                f"ListenAddress {self.address}:{self.port}",
                f"HostKey {self._host_key}",
                *([f"HostCertificate {self._host_key}-cert.pub"] if self.host_certificate else []),
                "PidFile none",
                "LogLevel VERBOSE",
                f"AllowUsers {self.user}",
                "UsePAM yes",
                f"AuthenticationMethods {methods}",
                f"KbdInteractiveAuthentication {'yes' if 'keyboard' in methods else 'no'}",
                f"PasswordAuthentication {'yes' if 'password' in methods.split(',') else 'no'}",
                f"AuthorizedKeysFile {'none' if certificate else self._authorized_keys}",
                f"TrustedUserCAKeys {self._authority.with_suffix('.pub') if certificate else 'none'}",
                "PrintMotd no",
                "PrintLastLog no",
                "AllowAgentForwarding no",
                "X11Forwarding no",
                "Subsystem sftp /usr/lib/openssh/sftp-server",
                *([f"SetEnv {variables}"] if variables else []),
                "",
            )
        )


def _write(path: Path, text: str, mode: int) -> None:
    """Whole or not at all: sshd and PAM may read at any time."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)
    draft.chmod(mode)
    draft.rename(path)


def remove(name: str) -> None:
    """Take away what a server of that name left on the machine (it must not run)."""
    shutil.rmtree(STATE / "sshd" / name, ignore_errors=True)
    (Path("/etc/pam.d") / f"flctl-sshd-{name}").unlink(missing_ok=True)
