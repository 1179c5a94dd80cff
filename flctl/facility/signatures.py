"""Owns signatures of completion records: what ssh-keygen says of them against pinned public keys.

The format is OpenSSH's own (PROTOCOL.sshsig); ssh-keygen -Y came with OpenSSH 8.1.
"""

import shutil
import subprocess
from collections.abc import Sequence

from flctl.errors import ConfigurationError
from flctl.facility import scratch
from flctl.facility.openssh import environment
from flctl.words import printable

NAMESPACE = "flctl-manifest"
"""A signature made for something else (a git commit, a file) never counts."""
LONGEST = 16 * 1024
PATIENCE = 30.0


def signer_of(content: bytes, signature: str, site: str, signers: Sequence[str]) -> str | None:
    """Which of the pinned public keys signed exactly these bytes as a record of the site; None: none of them."""
    return next((signer for signer in signers if not fault(content, signature, site, signer)), None)


def fault(content: bytes, signature: str, site: str, signer: str) -> str:
    """Why a signature does not count; empty if it does. ConfigurationError where this machine cannot tell."""
    if not signature.strip():
        return "there is no signature"
    if len(signature) > LONGEST:
        return "what should be a signature is too long to be one"
    with scratch.folder() as folder:
        pinned, given = folder / "signers", folder / "signature"
        pinned.write_text(f'{site} namespaces="{NAMESPACE}" {signer}\n')
        given.write_text(signature)
        words = [_program(), "-Y", "verify", "-n", NAMESPACE, "-f", str(pinned), "-I", site, "-s", str(given)]
        try:
            done = subprocess.run(
                words, input=content, capture_output=True, timeout=PATIENCE, env=environment(), check=False
            )
        except subprocess.TimeoutExpired:
            return "ssh-keygen did not end in time"
    said = (done.stderr + done.stdout).decode(errors="replace")
    if "unknown option" in said or "usage:" in said:
        raise ConfigurationError("signatures need OpenSSH 8.1 or newer here", hint="see ssh -V; install a newer one")
    return "" if done.returncode == 0 else printable(said, 200) or f"ssh-keygen ended with {done.returncode}"


def _program() -> str:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise ConfigurationError("signatures need ssh-keygen, and there is none here", hint="install OpenSSH's client")
    return program
