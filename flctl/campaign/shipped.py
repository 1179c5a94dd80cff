"""Finds what flctl ships beside its code: templates, site profiles, the payload."""

from hashlib import sha256
from pathlib import Path

import flctl
from flctl.errors import FlctlError
from flctl.records import FileEntry, folder_sha256

PACKAGE = Path(flctl.__file__).parent
PAYLOAD_FILES = ("batch.py", "seal.py", "train.py")


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
