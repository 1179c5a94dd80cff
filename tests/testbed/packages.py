"""The Debian packages of the testbed: which are missing, and their installation without starting any daemon."""

import os
import subprocess
from pathlib import Path

from .procs import TestbedError

_POLICY = Path("/usr/sbin/policy-rc.d")


def wanted() -> list[str]:
    lines = Path(__file__).with_name("packages.txt").read_text(encoding="ascii").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def missing() -> list[str]:
    try:
        done = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *wanted()],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise TestbedError("the testbed needs Debian 12 (there is no dpkg-query here)") from None
    installed = {
        name for name, _, status in (line.partition(" ") for line in done.stdout.splitlines()) if status == "installed"
    }
    return [name for name in wanted() if name not in installed]


def install() -> list[str]:
    """Install what is missing; its names."""
    names = missing()
    if not names:
        return []
    if os.geteuid() != 0:
        raise TestbedError(f"only root can install {' '.join(names)}")
    ours = not _POLICY.exists()
    if ours:  # 101: "action forbidden by policy"; the packages' own sshd, munged and slurmctld stay down
        _POLICY.write_text("#!/bin/sh\nexit 101\n", encoding="ascii")
        _POLICY.chmod(0o755)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        for command in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *names]):
            done = subprocess.run(
                ["apt-get", *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise TestbedError(f"apt-get {' '.join(command)}: {(done.stderr or done.stdout)[-2000:]}")
    finally:
        if ours:
            _POLICY.unlink(missing_ok=True)
    return names
