"""Finds what flctl ships beside its code: templates, site profiles, the payload, the zip that merges."""

import io
import zipfile
from functools import cache
from hashlib import sha256
from pathlib import Path

import flctl
from flctl.errors import FlctlError
from flctl.records import FileEntry, folder_sha256

PACKAGE = Path(flctl.__file__).parent
PAYLOAD_FILES = ("batch.py", "seal.py", "train.py")
MERGER = "merge.zip"
MERGER_FILES = (
    *("__init__.py", "codec.py", "durable.py", "errors.py", "faults.py", "records.py", "words.py"),
    "model/**/*.py",
)
UNUSED_THERE = ("model/__main__.py", "model/tiny.py", "model/lora.py", "model/merged.py")


def shipped(kind: str) -> Path:
    """The folder `templates` or `sites`: inside the package when installed from a wheel, else in the checkout."""
    for folder in (PACKAGE / "shipped" / kind, PACKAGE.parent / kind):
        if folder.is_dir():
            return folder
    raise FlctlError(f"this installation of flctl has no {kind} folder", hint="install flctl again")


def payload_folder() -> Path:
    return PACKAGE / "payload"


def payload_manifest() -> tuple[FileEntry, ...]:
    """The files that every site gets, with their hashes."""
    contents = {name: (payload_folder() / name).read_bytes() for name in PAYLOAD_FILES}
    return tuple(
        FileEntry(path=name, size=len(content), sha256=sha256(content).hexdigest())
        for name, content in contents.items()
    )


def payload_sha256() -> str:
    return folder_sha256(payload_manifest())


@cache
def merger() -> bytes:
    """The zip that a site's Python runs to merge: flctl's arithmetic and what that imports. The same sources give the
    same bytes everywhere, so that its hash is its name."""
    found = sorted({path.relative_to(PACKAGE).as_posix() for glob in MERGER_FILES for path in PACKAGE.glob(glob)})
    contents = {f"flctl/{name}": PACKAGE / name for name in found if name not in UNUSED_THERE}
    contents["__main__.py"] = PACKAGE / "model" / "__main__.py"
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:  # zlib's bytes differ from version to version
        for name, path in contents.items():
            about = zipfile.ZipInfo(name)
            about.create_system = 3
            archive.writestr(about, path.read_bytes())
    return made.getvalue()


def merger_manifest() -> tuple[FileEntry, ...]:
    content = merger()
    return (FileEntry(path=MERGER, size=len(content), sha256=sha256(content).hexdigest()),)


def merger_sha256() -> str:
    return folder_sha256(merger_manifest())
