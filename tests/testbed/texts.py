"""Real text that may not leave its site: Debian's Italian and Czech manual pages as plain text."""

import gzip
import re
import shutil
from pathlib import Path

from .accounts import Account
from .procs import STATE, TestbedError, call

_LIMIT = 300_000  # bytes of text per site
_ESCAPES = (
    (re.compile(r"\\f(?:\[[^]]*\]|\(..|.)"), ""),  # fonts
    (re.compile(r"\\s[-+]?\d"), ""),  # sizes
    (re.compile(r'\\".*$'), ""),  # comments
    (re.compile(r"\\\*?(?:\[[^]]*\]|\(..)"), ""),  # special characters and strings
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\e"), "\\\\"),
    (re.compile(r"\\[ ~0]"), " "),
    (re.compile(r"\\."), ""),  # \& \/ \, \c and the like
)


def pages(language: str) -> list[Path]:
    """The manual pages of manpages-<language>, wherever dpkg was allowed to put them."""
    package = f"manpages-{language}"
    listed = [Path(line) for line in call(["dpkg", "-L", package]).splitlines() if line.endswith(".gz")]
    found = [path for path in listed if f"/man/{language}/" in str(path) and path.is_file() and not path.is_symlink()]
    if found:
        return sorted(found)
    # Small images exclude manual pages (path-exclude in /etc/dpkg/dpkg.cfg.d): take them out of the package itself.
    folder = STATE / "texts" / package
    if not folder.exists():
        draft = folder.with_name(f".{package}")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        # apt would fetch as its own user; the folder is root's.
        call(
            [
                "sh",
                "-ec",
                f"cd {draft} && apt-get download -q -o APT::Sandbox::User=root {package} && dpkg -x {package}_*.deb .",
            ]
        )
        draft.rename(folder)
    found = [path for path in folder.rglob(f"man/{language}/**/*.gz") if not path.is_symlink()]
    if not found:
        raise TestbedError(f"there are no manual pages in {package}")
    return sorted(found)


def plain(page: str) -> str:
    """The text of a roff source: without requests and macros, escapes resolved or dropped."""
    lines = []
    for line in page.splitlines():
        if line.startswith((".", "'")):
            continue
        for pattern, replacement in _ESCAPES:
            line = pattern.sub(replacement, line)
        if line.strip():
            lines.append(line.rstrip())
    return "\n".join(lines) + "\n"


def put(language: str, owner: Account, folder: Path) -> None:
    """Fill the account's data folder, about 300 kB at most; done once."""
    if folder.exists() and any(folder.iterdir()):
        return
    owner.folder(folder)
    size = 0
    for path in pages(language):
        text = plain(gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace"))
        length = len(text.encode())
        if length < 500 or size + length > _LIMIT:
            continue  # a page that only refers to another; one that does not fit
        owner.file(folder / f"{path.stem}.txt", text)
        size += length
