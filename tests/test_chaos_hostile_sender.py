"""The row "hostile sender": no attack of a site's rsync succeeds, and the row sees one that does."""

import os
from pathlib import Path

import pytest

from tests.chaos import hostile_sender
from tests.chaos.hostile_sender import ATTACKS, CONTENT, Attack, judged


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
def test_what_an_attack_leaves_is_seen(tmp_path: Path, spoil, seen: str) -> None:  # type: ignore[no-untyped-def]
    os.umask(0o077)
    spoil(tmp_path)
    assert any(seen in told for told in judged(tmp_path, [], Attack()))


def test_the_right_file_alone_is_no_finding(tmp_path: Path) -> None:
    os.umask(0o077)
    (tmp_path / "asked").write_bytes(CONTENT)
    assert judged(tmp_path, ["asked"], Attack()) == []
