"""What others wrote, on a terminal or in a record: words, never orders to the terminal."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flctl.words import LONGEST, plain, printable

HOSTILE = {
    "colour": "\x1b[31mred\x1b[0m",
    "clear the screen": "\x1b[2J\x1b[Hhome",
    "set the title": "\x1b]0;owned\x07after",
    "write the clipboard": "\x1b]52;c;cm0gLXJmIC8K\x1b\\after",
    "answerback": "\x1b[6n\x05\x1bZ\x1b[c",
    "device control": '\x1bP$q"p\x1b\\after',
    "application command": "\x1b_Gi=1;AAAA\x1b\\after",
    "C1 control sequence": "\x9b31mred",
    "C1 title": "\x9d0;owned\x9cafter",
    "C1 strings": "\x90x\x9c\x98x\x9c\x9ex\x9c\x9fx\x9c",
    "never ended": "\x1b]0;" + "x" * 50,
    "cut in the middle": "x\x1b[",
    "one escape": "\x1b",
    "escape to another set": "\x1b(0lqk\x1b)B",
    "nested": "\x1b\x1b[31m[31mred",
    "broken by a control letter": "\x1b[\x0031mred",
    "carriage return": "all is well\rnothing is",
    "backspaces": "rm\b\b  ",
    "bell, null, delete": "\x07\x00\x7f",
    "bidirectional override": "\u202etxt.exe\u202c",
    "isolates": "\u2066a\u2069",
    "line separators": "a\u2028b\u2029c\x85d\x0bd\x0ce",
    "half a character": "\ud800x",
    "zero width": "a\u200bb\ufeffc",
    "tags": "a\U000e0041b",
}
"""By what each would do to a terminal or to a reader."""


@pytest.mark.parametrize("name", HOSTILE)
def test_no_order_to_the_terminal_is_left(name: str) -> None:
    for text in (HOSTILE[name], f"before {HOSTILE[name]} after\n{HOSTILE[name]}"):
        assert all(letter.isprintable() for letter in plain(text).replace("\n", ""))
        assert printable(text).isprintable()
    assert "31m" not in plain(HOSTILE["colour"]) and "owned" not in plain(HOSTILE["set the title"])


@given(st.text())
def test_whatever_was_written_is_printable_and_stays_so(text: str) -> None:
    once = plain(text)
    assert once.replace("\n", "").isprintable() and plain(once) == once
    assert printable(text).isprintable() and printable(printable(text)) == printable(text)


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S"])))
def test_words_in_any_language_stay_as_they_are(text: str) -> None:
    assert plain(text) == text


def test_lines_stay_lines_or_become_one() -> None:
    assert plain("a\r\n\tb  c\n") == "a \n b  c\n"
    assert printable(" a\r\n\tb  c\n") == "a b c"


def test_words_are_cut() -> None:
    assert printable("x" * 1000) == "x" * 300 + "..."
    assert printable("x" * 1000, 10) == "x" * 10 + "..."
    assert len(plain("\x1b" + "x" * (2 * LONGEST))) <= LONGEST


@pytest.mark.parametrize(
    "text", ["\x1b[" * 500_000, "\x1b]" * 500_000, "\x9d" + "\x9b" * 1_000_000, "\x1b[" + "0" * 10**6]
)
def test_no_text_takes_long(text: str) -> None:
    began = time.process_time()
    plain(text)
    printable(text)
    assert time.process_time() - began < 5
