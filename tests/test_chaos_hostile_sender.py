"""The row "hostile sender": no attack of a site's rsync succeeds, and the row sees one that does."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import hostile_sender
from tests.chaos.hostile_sender import ATTACKS, CONTENT, Attack, judged


@pytest.fixture
def narrow() -> Iterator[None]:
    """flctl's own umask, for this test alone."""
    before = os.umask(0o077)
    yield
    os.umask(before)


def test_no_attack_succeeds() -> None:
    assert len(ATTACKS) >= 15
    result = hostile_sender.run(seed=2, trials=11)
    assert result.failures == 0, "\n".join(result.notes)


@pytest.mark.parametrize(
    ("spoil", "seen"),
    [
        (lambda target: (target / "more").write_bytes(b"x"), "not asked for"),
        (lambda target: (target / "asked").symlink_to("/etc/passwd"), "a link"),
        (lambda target: os.mkfifo(target / "asked"), "a pipe"),
        (lambda target: ((target / "asked").write_bytes(b"x"), (target / "asked").chmod(0o4755)), "mode"),
        (lambda target: (target / "asked").write_bytes(CONTENT * 10), "bytes"),
    ],
)
def test_what_an_attack_leaves_is_seen(tmp_path: Path, spoil, seen: str, narrow: None) -> None:  # type: ignore[no-untyped-def]
    spoil(tmp_path)
    assert any(seen in told for told in judged(tmp_path, [], Attack()))


def test_the_right_file_alone_is_no_finding(tmp_path: Path, narrow: None) -> None:
    (tmp_path / "asked").write_bytes(CONTENT)
    assert judged(tmp_path, ["asked"], Attack()) == []
