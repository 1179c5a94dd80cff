"""What PAM asks at a testbed's sshd, and the file of codes that its modules read."""

import base64
from dataclasses import dataclass
from pathlib import Path

from .procs import TestbedError

_AFTERWARDS = "account required pam_unix.so\npassword required pam_unix.so\nsession required pam_permit.so\n"
NOTHING = f"auth required pam_deny.so\n{_AFTERWARDS}"
"""For servers that let in by key alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Everything is asked before anything is refused. `password`: the account's password is asked for before the code;
    `combined`: with it, in one question; `plain`: the code is asked for as "Password: ". `rate_limit`: "3 30", at most
    3 tries within 30 s. `codes`: the modules' file."""

    codes: Path
    user: str
    period: int
    digits: int
    password: bool = False
    combined: bool = False
    plain: bool = False
    rate_limit: str = ""

    @property
    def oath(self) -> bool:
        """Whether pam_oath checks the codes; it knows two periods, no limit, and asks for the code alone."""
        return self.period in (30, 60) and not self.combined and not self.rate_limit

    @property
    def service(self) -> str:
        """The file of /etc/pam.d."""
        given = " use_first_pass" if self.plain else " forward_pass" if self.combined else ""
        if self.oath:
            code = f"auth required pam_oath.so usersfile={self.codes} window=1 digits={self.digits}{given}"
        else:
            # user=root: its file is the server's, not the account's.
            code = f"auth required pam_google_authenticator.so secret={self.codes} user=root{given}"
        before, after = "", ""
        if self.combined:
            after = "auth required pam_unix.so use_first_pass nodelay\n"
        elif self.password:
            before = "auth required pam_unix.so nodelay\n"
        elif self.plain:
            before = "auth optional pam_unix.so nodelay\n"  # it asks; that no password fits does not matter
        return f"{before}{code}\n{after}{_AFTERWARDS}"

    def secret(self, secret: bytes) -> str:
        """The content of the modules' file for a new secret."""
        if self.oath:
            return f"HOTP/T{self.period}/{self.digits} {self.user} - {secret.hex()}\n"
        if self.digits != 6:
            raise TestbedError("codes of 8 digits need a period of 30 or 60 s and a question of their own")
        limit = f'" RATE_LIMIT {self.rate_limit}\n' if self.rate_limit else ""
        return f'{base32(secret)}\n{limit}" WINDOW_SIZE 3\n" DISALLOW_REUSE\n" TOTP_AUTH\n" STEP_SIZE {self.period}\n'


def secret_in(content: str) -> str:
    """The secret in the modules' file, base32 as an enrolment shows it."""
    words = content.split()
    return base32(bytes.fromhex(words[3])) if content.startswith("HOTP/") else words[0]


def base32(secret: bytes) -> str:
    return base64.b32encode(secret).decode().rstrip("=")
