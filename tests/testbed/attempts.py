"""What an sshd's log (LogLevel VERBOSE) tells of the attempts to log in."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """What reached the server, counted in its log."""

    connections: int  # TCP connections
    logins: int  # sessions that were let in
    keys: int  # keys and certificates accepted, be it as the first of two steps
    failed_keys: int
    codes: int  # one-time codes, with or without a password, accepted
    failed_codes: int


_LINES = {
    "connections": r"^Connection from ",
    "logins": r"^Accepted (?:publickey|keyboard-interactive/pam|password) for ",
    "keys": r"^(?:Accepted|Partial) publickey for ",
    "failed_keys": r"^Failed publickey for ",
    "codes": r"^(?:Accepted|Partial) (?:keyboard-interactive/pam|password) for ",
    "failed_codes": r"^Failed (?:keyboard-interactive/pam|password) for ",
}
# Keys found acceptable are "Accepted key ..." and no outcome.
_OUTCOME = (
    r"^(?:Accepted \S+ for |Connection (?:closed|reset) |Disconnect|Received disconnect |Timeout |Unable |fatal: )"
)


def count(log: str) -> Attempts:
    return Attempts(**{name: len(re.findall(line, log, re.MULTILINE)) for name, line in _LINES.items()})


def under_way(log: str) -> list[str]:
    """Client ports of the connections of which the log tells neither that they were let in nor that they ended."""
    return [
        port[1]
        for port in re.finditer(r"^Connection from \S+ port (\d+) on ", log, re.MULTILINE)
        if not re.search(_OUTCOME + rf".* port {port[1]}\b", log[port.end() :], re.MULTILINE)
    ]
