"""Finds what flctl ships beside its code: templates, site profiles, the payload."""

import ast
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


def trainer_options() -> tuple[str, ...]:
    """The options that train.py knows, read from its source: nobody imports the payload."""
    for node in ast.parse((payload_folder() / "train.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "OPTIONS":
            keys = node.value.keys if isinstance(node.value, ast.Dict) else []
            return tuple(key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))
    raise FlctlError("train.py names no options", hint="install flctl again")
