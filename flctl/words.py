"""Owns words that others wrote (a server, a scheduler, a job, a file): made harmless before they are shown or kept."""

import re

LONGEST = 64 * 1024
"""Letters that are looked at; what comes after is dropped, so that no answer makes this slow."""

# ECMA-48: control sequences; strings (OSC, DCS, SOS, PM, APC) up to BEL, ST or their line's end; other escapes. Each
# introducer has a form of one C1 letter as well, which terminals obey.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)


def plain(text: str) -> str:
    """The text without escape sequences; every other letter that is not printable (C0, C1, bidirectional overrides,
    line separators, half characters), but for line ends, is a blank."""
    if text.isprintable():
        return text
    text = _SEQUENCE.sub("", text[:LONGEST])
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)


def printable(text: str, limit: int = 300) -> str:
    """The same as one line of single blanks, cut at `limit`."""
    text = " ".join(plain(text[:LONGEST]).split())
    return text if len(text) <= limit else text[:limit] + "..."
