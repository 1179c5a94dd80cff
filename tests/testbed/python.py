"""A Python environment that every account can run: the libraries of the one running here, and flctl as a wheel."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .procs import STATE, TestbedError, call

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDER = STATE / f"python{os.environ.get('FLCTL_TESTBED', '')}"
PYTHON = FOLDER / "bin" / "python"
FLCTL = FOLDER / "bin" / "flctl"
_COPIED = FOLDER / "copied-from"
_SITE_PACKAGES = FOLDER / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def prepare() -> None:
    """Bring the environment up to date with this checkout; the checkout itself may lie where only root can look."""
    with _alone():
        _libraries()
        _install_flctl()


def ready() -> None:
    """For those who need the libraries and some flctl: bring up to date what is not, but leave an flctl that is there,
    because another process may be running it."""
    with _alone():
        if _libraries() or not FLCTL.exists():
            _install_flctl()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    STATE.mkdir(mode=0o755, parents=True, exist_ok=True)
    with FOLDER.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _libraries() -> bool:
    """Copy them if they have changed; whether they had."""
    source = Path(sysconfig.get_path("purelib"))
    kinds = sorted(entry.name for entry in source.glob("*.dist-info") if not entry.name.startswith("flctl-"))
    state = hashlib.sha256("\n".join([sys.version, str(_interpreter()), *kinds]).encode()).hexdigest()
    if _COPIED.exists() and _COPIED.read_text() == state:
        return False
    _copy(source)
    _COPIED.write_text(state)
    return True


def _interpreter() -> Path:
    """The system's Python if it is of the version running here: other accounts must be able to run it."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for candidate in (
        f"/usr/bin/python{version}",
        f"/usr/local/bin/python{version}",
        f"{sys.base_prefix}/bin/python{version}",
    ):
        path = Path(candidate).resolve()
        if path.exists() and all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents)):
            return path
    raise TestbedError(
        f"no Python {version} that other accounts may run; make .venv with /usr/bin/python3 (make PYTHON=...)"
    )


def _copy(source: Path) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    call([str(_interpreter()), "-m", "venv", "--without-pip", str(FOLDER)])
    _SITE_PACKAGES.rmdir()
    linked = ["cp", "-al", str(source), str(_SITE_PACKAGES)]
    if subprocess.run(linked, capture_output=True, check=False).returncode != 0:  # another file system
        shutil.rmtree(_SITE_PACKAGES, ignore_errors=True)
        call(["cp", "-a", str(source), str(_SITE_PACKAGES)], timeout=900)
    for entry in list(_SITE_PACKAGES.glob("*flctl*")):  # the editable install, which points into the checkout
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    call(["chmod", "-R", "a+rX", str(FOLDER)])


def _install_flctl() -> None:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        wheel = ["wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, str(CHECKOUT)]
        call([sys.executable, "-m", "pip", *wheel], environment=environment)
        built = [str(path) for path in Path(folder).glob("flctl-*.whl")]
        install = ["install", "-q", "--no-deps", "--no-index", "--force-reinstall", *built]
        # A build of the same version must replace the files; umask: other accounts read them.
        call([str(PYTHON), "-m", "pip", *install], environment=environment)
    call(["chmod", "-R", "a+rX", str(_SITE_PACKAGES / "flctl"), str(FLCTL)])
