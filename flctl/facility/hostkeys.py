"""Owns host keys: which key of which host is trusted, and the campaign's known_hosts, which both roads read.

A key is trusted if the campaign's file has it, or if the user's or the machine's own known_hosts has it, or the profile
names its published fingerprint; it is then copied into the campaign's file. It is also trusted while it comes with a
certificate of an authority that one of these files names for the host (@cert-authority); the authority's line is copied
then, and every connection judges the certificate anew. ssh-keygen reads the files: it knows hashed names, wildcards,
ports and markers.
"""

import base64
import binascii
import hashlib
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from flctl.durable import lock, write_whole
from flctl.errors import ConfigurationError, HostKeyRefused, Locked
from flctl.facility.hostcertificates import objection, signer
from flctl.facility.openssh import Place, environment
from flctl.facility.profile import Site

SYSTEM_FILE = Path("/etc/ssh/ssh_known_hosts")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostKey:
    """A host's public key: its type as known_hosts files name it, its bytes, and the certificate that came with it."""

    kind: str
    blob: bytes
    certificate: bytes = field(default=b"", compare=False, repr=False)

    @property
    def fingerprint(self) -> str:
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")

    def __str__(self) -> str:
        return f"{self.kind} {self.fingerprint}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A line of a known_hosts file that is about a host; `marker` is empty, "@cert-authority" or "@revoked"."""

    number: int
    marker: str
    hosts: str
    key: HostKey


def user_files() -> list[Path]:
    return [Path.home() / ".ssh" / "known_hosts", Path.home() / ".ssh" / "known_hosts2", SYSTEM_FILE]


def entries(path: Path, place: Place) -> tuple[Entry, ...]:
    """What a known_hosts file says of a host. Like ssh, a host on an unusual port that is not listed with it may be
    listed without."""
    if not path.exists():
        return ()
    return _find(path, place.name) or (_find(path, place.host) if place.port != 22 else ())


def verify(shown: HostKey, site: Site, place: Place, known_hosts: Path) -> str:
    """Where the trust in the key that the host shows comes from, in words; HostKeyRefused unless it is trusted. Called
    before any credential is sent."""
    ours = entries(known_hosts, place)
    theirs = [entry for path in user_files() for entry in entries(path, place)]
    _refuse_revoked(shown, site, place, [*ours, *theirs])
    plain = [entry.key for entry in ours if not entry.marker]
    if shown in plain:
        return "this campaign's known_hosts"
    own = [entry.key for entry in theirs if not entry.marker]
    authority, why = _authority(shown, place, [*ours, *theirs])
    if authority is not None:
        record(known_hosts, place, [authority], marker="@cert-authority")
        return f"a certificate of the authority {authority}"
    if shown in own:
        # All of them: a login alias may lead to several machines, each with its own key.
        record(known_hosts, place, own)
        return "your own known_hosts"
    if shown.fingerprint in _published(site):
        record(known_hosts, place, [shown])
        return "the fingerprint in the profile"
    raise _refused(shown, site, place, [*plain, *own], why)


def _refuse_revoked(shown: HostKey, site: Site, place: Place, known: Sequence[Entry]) -> None:
    shows = {shown.blob: "", signer(shown.certificate): "the authority of "}
    for whose in (shows[entry.key.blob] for entry in known if entry.marker == "@revoked" and entry.key.blob in shows):
        raise HostKeyRefused(
            f"{whose}the host key that {place} shows, {shown}, is marked as revoked in your known_hosts",
            hint="do not log in there; ask the facility",
            site=site.name,
        )


def _authority(shown: HostKey, place: Place, known: Sequence[Entry]) -> tuple[HostKey | None, str]:
    """The authority whose certificate came with the key and vouches for it; else None, and what is wrong with it."""
    named = [entry.key for entry in known if entry.marker == "@cert-authority"]
    if not shown.certificate or not named:
        return None, ""
    why = objection(shown.certificate, shown.blob, place, {key.blob for key in named})
    return (None if why else next(key for key in named if key.blob == signer(shown.certificate))), why


def kinds_on_file(place: Place, known_hosts: Path) -> tuple[str, ...]:
    """The key types known of a host: asked for first, so that its other keys do not look like a change."""
    found = [entry for path in (known_hosts, *user_files()) for entry in entries(path, place)]
    return tuple(dict.fromkeys(entry.key.kind for entry in found if not entry.marker))


def certified(place: Place, known_hosts: Path) -> bool:
    """Whether an authority is named for a host, or a key revoked, which may be one: only then is it asked for a
    certificate."""
    return any(entry.marker for path in (known_hosts, *user_files()) for entry in entries(path, place))


def settled(place: Place, known_hosts: Path) -> bool:
    """Whether ssh, which reads the campaign's file alone, can judge a host's key by it as `verify` would."""
    theirs = [entry for path in user_files() for entry in entries(path, place)]
    known = any(entry.marker != "@revoked" for entry in entries(known_hosts, place))
    return known and not any(entry.marker == "@revoked" for entry in theirs)


def record(known_hosts: Path, place: Place, keys: Iterable[HostKey], *, marker: str = "") -> None:
    """Add a host's keys to the campaign's file, each once."""
    with _locked(known_hosts) as stream:
        text = stream.read()
        present = text.splitlines()
        lines = [f"{marker} {place.name} {key.kind} {base64.b64encode(key.blob).decode()}".lstrip() for key in keys]
        fresh = [line for line in dict.fromkeys(lines) if line not in present]
        broken = "\n" if text and not text.endswith("\n") else ""
        stream.write(broken + "".join(line + "\n" for line in fresh))
        stream.flush()
        os.fsync(stream.fileno())


def replace(known_hosts: Path, place: Place, key: HostKey) -> None:
    """Let this be the only key of the host by its own name in the campaign's file; lines with markers stay."""
    old = {entry.number: entry.hosts for entry in entries(known_hosts, place) if not entry.marker}
    if old:
        kept = []
        for number, line in enumerate(known_hosts.read_text(encoding="utf-8").splitlines(), 1):
            hosts = old.get(number, "")
            others = ",".join(host for host in hosts.split(",") if host != place.name and not host.startswith("|"))
            if not hosts or others:
                kept.append(line.replace(hosts, others, 1))
        write_whole(known_hosts, "".join(line + "\n" for line in kept).encode())
    record(known_hosts, place, [key])


def _refused(shown: HostKey, site: Site, place: Place, known: Sequence[HostKey], why: str) -> HostKeyRefused:
    what = f"the host key of {place} is unknown: it shows {shown}"
    if known:
        what = (
            f"the host key of {place} has changed: it shows {shown}; on file is {', '.join(map(str, known))}. "
            "Somebody may be listening in"
        )
    if why:
        what += f". It came with a certificate that does not count: {why}"
    return HostKeyRefused(
        f"{what}. Nothing was sent to it",
        hint="compare it with what the facility publishes; if it is right: "
        f"flctl site trust {site.name} {shown.fingerprint}",
        site=site.name,
    )


def _published(site: Site) -> set[str]:
    return {fingerprint.rstrip("=") for fingerprint in (*site.login.host_keys, *site.transfer.host_keys)}


def _find(path: Path, name: str) -> tuple[Entry, ...]:
    try:
        done = subprocess.run(
            ["ssh-keygen", "-F", name, "-f", str(path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            env=environment(),
            check=False,
        )
    except FileNotFoundError:
        raise ConfigurationError(
            "ssh-keygen is not installed", hint="install OpenSSH's client (Debian: apt-get install openssh-client)"
        ) from None
    except subprocess.TimeoutExpired:
        raise ConfigurationError(
            f"ssh-keygen does not come to an end with {path}", hint=f"ssh-keygen -F {name} -f {path}"
        ) from None
    found, number = [], 0
    for line in done.stdout.splitlines():
        if line.startswith("#"):
            match = re.search(r"found: line (\d+)", line)
            number = int(match[1]) if match else 0
        elif entry := _parsed(number, line):
            found.append(entry)
    return tuple(found)


def _parsed(number: int, line: str) -> Entry | None:
    words = line.split()
    marker = words.pop(0) if words and words[0].startswith("@") else ""
    try:
        hosts, kind, text = words[:3]
        return Entry(number=number, marker=marker, hosts=hosts, key=HostKey(kind=kind, blob=base64.b64decode(text)))
    except (ValueError, binascii.Error):
        return None


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    """A file open for reading and appending, for this process and thread alone."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            reason = "it is a symbolic link" if path.is_symlink() else error.strerror
            raise ConfigurationError(
                f"{path} cannot be written: {reason}", hint="it is the campaign's own file; who made it?"
            ) from None
        with os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace") as stream:
            try:
                lock(descriptor)
            except OSError as error:
                raise Locked(f"{path} cannot be locked: {error.strerror}", hint=f"find it: fuser -v {path}") from error
            # Another process may have renamed a new file over it meanwhile.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                yield stream
                return
