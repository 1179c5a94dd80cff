"""The secret of one-time codes, and every code made of it, in a whole campaign on the testbed: nowhere to be found."""

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from flctl.facility.codes import parse_secret
from flctl.facility.profile import Totp
from tests.federation import Federation
from tests.ssh_sites import Watch
from tests.testbed import Testbed


@pytest.fixture
def bed(testbed: Testbed) -> Iterator[Testbed]:
    testbed.reset()
    yield testbed
    testbed.user.end_processes()


def leaks(
    roots: Sequence[Path], secrets: Sequence[str], codes: Sequence[str], *, kept: Sequence[Path] = ()
) -> list[str]:
    """Files below these folders that hold a secret, or a code as a word of its own (not within weights, where any six
    digits turn up by chance)."""
    words = re.compile(rb"(?<![0-9A-Za-z.])(?:" + b"|".join(code.encode() for code in codes) + rb")(?![0-9A-Za-z])")
    found = []
    for path in (path for root in roots for path in root.rglob("*") if path.is_file() and path not in kept):
        content = path.read_bytes()
        if any(secret.encode() in content for secret in secrets):
            found.append(f"{path}: a secret")
        elif path.suffix != ".safetensors" and path.name != "tokenizer.json" and words.search(content):
            found.append(f"{path}: a code")
    return found


def test_no_secret_and_no_code_is_anywhere(bed: Testbed) -> None:
    federation = Federation(bed, "canaries")
    secret = bed.totp_file.read_text().strip()
    key = bed.key.read_text().splitlines()[1]
    began = time.time()
    said = ""
    with Watch(secret, key) as watch:
        for words in (
            ("round",),
            ("auth", "test", "leonardo"),
            ("status",),
            ("log", "karolina"),
            ("site", "test", "leonardo"),
        ):
            done = bed.flctl(*words, cwd=federation.place, env={"FLCTL_DEBUG": "1"})
            said += done.stdout + done.stderr
        # A traceback, with all that FLCTL_DEBUG shows: the journal is a folder.
        broken = federation.place / "plan.json"
        text = broken.read_bytes()
        broken.write_bytes(b"[]")
        done = bed.flctl("status", cwd=federation.place, env={"FLCTL_DEBUG": "1"})
        said += done.stdout + done.stderr
        broken.write_bytes(text)
    codes = [parse_secret(secret, Totp()).code(began + step) for step in range(-30, int(time.time() - began) + 60, 30)]
    assert federation.run("leonardo")["stage"] == "fetched"
    assert watch.looks > 20 and watch.found == []
    assert secret not in said and key not in said
    assert not re.search("|".join(rf"(?<![\w.]){code}(?!\w)" for code in codes), said)
    roots = [bed.user.home, *(facility.account.home for facility in bed.facilities.values())]
    assert leaks(roots, [secret, key], codes, kept=[bed.totp_file, bed.key]) == []


def test_the_scan_sees_a_leak(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"code": "123456"}')
    (tmp_path / "log").write_text("1.123456 and 9123456")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "x.safetensors").write_bytes(b"\0JBSWY3DPEHPK3PXP\0 123456")
    found = leaks([tmp_path], ["JBSWY3DPEHPK3PXP"], ["123456"])
    assert sorted(Path(line.split(":")[0]).name for line in found) == ["journal.jsonl", "x.safetensors"]
    with Watch("JBSWY3DPEHPK3PXP") as watch:
        import subprocess

        subprocess.run(["sleep", "0.5"], env={"LEAK": "JBSWY3DPEHPK3PXP"}, check=True)
    assert watch.found
