"""Owns the small shell programs sent to a site: several commands in one, each answer between markers of its own."""

import re
import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from flctl.errors import SiteUnreachable

LIMIT = 1 << 20

COMPLAINTS_MOST, LINE_MOST = 1 << 16, 1000
"""Letters of a program's standard error, and of a line of it, that are read."""


class Plain(str):
    """A shell word in which everything means itself, `$` too."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one command of a program said."""

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A POSIX shell program that runs named commands one after the other, and the nonce that frames their answers.
    What a login shell prints around them is never taken for an answer."""

    script: str
    nonce: str

    @classmethod
    def of(cls, commands: Mapping[str, str]) -> "Program":
        nonce = secrets.token_hex(8)
        lines = ["umask 077", "exec 3>&1"]
        for name, command in commands.items():
            lines += [
                f"printf '\\n%s out %s\\n' {nonce} {name}",
                f"problem=$( {{ {command}\n}} 2>&1 >&3 3>&- </dev/null ); status=$?",
                f'printf \'\\n%s err %s %s\\n%s\' {nonce} {name} "$status" "$problem"',
                f"printf '\\n%s end %s\\n' {nonce} {name}",
            ]
        return cls(script="\n".join(lines) + "\n", nonce=nonce)

    def answers(self, stdout: str, names: Mapping[str, str], *, site: str) -> dict[str, Answer]:
        """The answer to each command; SiteUnreachable if one of them did not come back whole."""
        found = {name: self._answer(stdout, name) for name in names}
        lost = [name for name, answer in found.items() if answer is None]
        if lost:
            raise SiteUnreachable(
                f"the connection ended before the site had answered ({', '.join(lost)})",
                hint="nothing is lost: run the command again",
                site=site,
            )
        return {name: answer for name, answer in found.items() if answer is not None}

    def _answer(self, stdout: str, name: str) -> Answer | None:
        """Each mark is looked for once, behind the one before it: a site may print as many of them as it likes."""
        text, begun = "\n" + stdout, f"\n{self.nonce} out {name}\n"
        begin = text.find(begun)
        told = re.compile(rf"\n{self.nonce} err {name} ([0-9]{{1,3}})\n").search(text, begin + len(begun))
        if begin < 0 or told is None:
            return None
        end = text.find(f"\n{self.nonce} end {name}\n", told.end())
        if end < 0:
            return None
        complaints = in_short(text[told.end() : end])
        return Answer(status=int(told[1]), stdout=text[begin + len(begun) : told.start()], stderr=complaints)


def in_short(complaints: str) -> str:
    """As much of what a program complained of as is read: patterns are searched in it, which long lines make slow."""
    return "\n".join(line[:LINE_MOST] for line in complaints[:COMPLAINTS_MOST].split("\n"))


def quote(value: object) -> str:
    """A path or word as one shell word."""
    return shlex.quote(str(value))


def read_file(path: object, *, limit: int = LIMIT) -> str:
    """A command that prints a file; exit status 44 if there is none."""
    return f"test -e {quote(path)} || exit 44; head -c {limit} {quote(path)}"


MISSING = 44
