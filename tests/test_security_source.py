"""What flctl's own source may not hold: trust without a check, words for a shell, pickles, code made of text."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "flctl").rglob("*.py"))
TEXTS = [*SOURCES, *sorted((ROOT / "templates").iterdir()), *sorted((ROOT / "sites").iterdir())]

TRUSTING = re.compile(
    r"AutoAddPolicy|WarningPolicy|StrictHostKeyChecking\W{1,4}(?:no|off|accept-new|ask)\b|trust-sender|old-args", re.I
)
FORBIDDEN_CALLS = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "tempfile.mktemp",
        "marshal.load",
        "marshal.loads",
    ),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "joblib.load", "yaml.load", "yaml.unsafe_load"),
    *(
        "shelve.open",
        "dill.load",
        "dill.loads",
        "numpy.load",
        "np.load",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
    ),
}
FORBIDDEN_IMPORTS = {
    "pickle",
    "_pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "joblib",
    "yaml",
    "telnetlib",
    "ftplib",
}


def findings(source: str) -> Iterator[str]:
    """What in Python source is forbidden."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.split(".")[0] in FORBIDDEN_IMPORTS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_IMPORTS:
            yield f"from {node.module}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name.endswith((".extractall", ".Unpickler")):
                yield f"{name}()"
            for keyword in node.keywords:
                given = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if (keyword.arg, given) in {("shell", True), ("allow_pickle", True), ("weights_only", False)}:
                    yield f"{keyword.arg}={given}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_host_is_trusted_without_a_check(path: Path) -> None:
    assert TRUSTING.findall(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_no_shell_no_code_made_of_text(path: Path) -> None:
    assert list(findings(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        *(
            "eval('1')",
            "exec(x)",
            "import pickle",
            "from pickle import loads",
            "torch.load(f)",
            "torch.load(f, weights_only=False)",
        ),
        *(
            "subprocess.run('x', shell=True)",
            "numpy.load(f, allow_pickle=True)",
            "yaml.load(f)",
            "z.extractall('/')",
            "os.system('x')",
        ),
        *("pickle.loads(b)", "joblib.load(f)", "tempfile.mktemp()", "pickle.Unpickler(f)"),
    ],
)
def test_the_gate_sees_what_it_is_there_for(source: str) -> None:
    assert list(findings(source))


@pytest.mark.parametrize(
    "text", ["AutoAddPolicy()", "StrictHostKeyChecking=no", '"StrictHostKeyChecking": "accept-new"', "--trust-sender"]
)
def test_the_gate_sees_trust_without_a_check(text: str) -> None:
    assert TRUSTING.search(text)


# Versions of what we stand on (S06, S47)

FLOORS = {"paramiko": "5.0", "torch": "2.10", "cryptography": "42", "safetensors": "0.5", "transformers": "5.0"}
"""Below these are holes that reach us: paramiko CVE-2026-44405 (SHA-1 signatures) and CVE-2023-48795 (Terrapin), torch
CVE-2025-32434 and CVE-2026-24747 (weights_only), cryptography CVE-2024-26130."""


def test_what_is_required_has_no_known_hole() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, floor in FLOORS.items():
        assert f"{name}>={floor}" in required, name


def test_what_is_installed_is_above_the_floors() -> None:
    from importlib.metadata import version

    for name, floor in FLOORS.items():
        numbers = [int(part) for part in re.findall(r"\d+", version(name))[:2]]
        assert numbers >= [int(part) for part in floor.split(".")], name
