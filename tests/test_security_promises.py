"""SECURITY.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`tests/(\w+\.py)::(\w+)`")


def test_every_promise_has_a_test_that_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| S\d\d", line)]
    assert len(rows) > 25
    for row in rows:
        named = NAMED.findall(row)
        assert named, row
        for file, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE), test


def test_the_readme_leads_there() -> None:
    assert "SECURITY.md" in (ROOT / "README.md").read_text(encoding="utf-8")
