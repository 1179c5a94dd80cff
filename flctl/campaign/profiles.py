"""Owns the profiles of sites: which there are, here and shipped, what each says, and how a campaign gets one."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flctl.campaign.shipped import shipped
from flctl.campaign.workspace import Workspace, write_atomic
from flctl.codec import to_data
from flctl.errors import ConfigurationError
from flctl.facility.profile import Shape, Site, load_site, missing
from flctl.facility.table import nearest

EXAMPLE = "example"
PLACEHOLDER = "example.org"


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A profile and where it stands; `here`: in the campaign, not only among the shipped ones."""

    site: Site
    path: Path
    here: bool


def available() -> dict[str, Path]:
    """The profiles that flctl ships, by name."""
    return {path.stem: path for path in sorted(shipped("sites").glob("*.toml")) if path.stem != EXAMPLE}


def find(workspace: Workspace | None, name: str) -> Known:
    """The campaign's profile of that name, else the shipped one."""
    own = workspace.profiles if workspace else {}
    path = own.get(name) or available().get(name)
    if path is None:
        raise _unknown(name, {**available(), **own}, "flctl site list --available")
    return Known(site=load_site(path), path=path, here=name in own)


def sources_of(words: Sequence[str]) -> dict[str, Path]:
    """The files that a list of sites names: paths of TOML files, and shipped profiles. Each is a whole profile."""
    found: dict[str, Path] = {}
    for word in words:
        path = Path(word)
        if path.suffix != ".toml":
            if word not in available():
                raise _unknown(word, available(), "give the path of one of your own: path/to/NAME.toml")
            path = available()[word]
        load_site(path)
        if found.setdefault(path.stem, path) != path:
            raise ConfigurationError(
                f"{found[path.stem]} and {path} are two profiles of one site", hint="name one of them"
            )
    return found


def texts_of(words: Sequence[str]) -> dict[str, str]:
    """The same profiles as text."""
    return {name: path.read_text(encoding="utf-8") for name, path in sources_of(words).items()}


def add(workspace: Workspace, words: Sequence[str]) -> dict[str, Known]:
    """Copy profiles into the campaign, all or none, and the job template of their scheduler if it lacks that.
    ConfigurationError if it has one of that name already."""
    sources = sources_of(words)
    for name in sources:
        if name in workspace.profiles:
            raise ConfigurationError(
                f"this campaign has a site {name!r} already: {workspace.profiles[name]}",
                hint=f"edit that file; flctl site show {name}",
                site=name,
            )
    added = {}
    for name, source in sources.items():
        site, target = load_site(source), workspace.root / "sites" / f"{name}.toml"
        template = f"{site.scheduler.kind}.sh"
        if not (workspace.root / "templates" / template).exists():
            write_atomic(workspace.root / "templates" / template, (shipped("templates") / template).read_bytes())
        write_atomic(target, source.read_bytes())
        workspace.journal.append("site added", site=name)
        added[name] = Known(site=site, path=target, here=True)
    return added


def to_fill_in(site: Site) -> list[str]:
    """The keys that the user must still fill in; among them those that hold an example's address, and the leave to
    keep a connection where each login needs a person."""
    login = site.login
    more = {
        "login.renew": PLACEHOLDER in login.renew,
        "login.hold": site.connection == "ssh" and login.attended and not login.hold,
    }
    return missing(site) + [key for key, is_open in more.items() if is_open]


def person(site: Site) -> str:
    """When a login there needs a person: `never`, at `each login`, or at each `renewal` of the certificate."""
    if site.connection == "local":
        return "never"
    if site.login.attended:
        return "each login"
    if site.login.kind == "certificate" and not site.login.renew_unattended:
        return "renewal"
    return "never"


def shapes_of(site: Site) -> dict[str, Shape]:
    """Each shape with what it leaves open filled in from the scheduler's table."""
    return {
        name: dataclasses.replace(site, scheduler=dataclasses.replace(site.scheduler, shape=name)).shape
        for name in site.shapes
    }


def in_short(known: Known) -> dict[str, Any]:
    """What `flctl site list` says of a profile, as data."""
    site = known.site
    return {
        "name": site.name,
        "title": site.title,
        "login": site.login.kind if site.connection == "ssh" else "local",
        "person": person(site),
        "scheduler": site.scheduler.kind,
        "transfer": site.transfer.host or site.login.host,
        "checked": site.about.checked,
        "questions": len(site.about.questions),
        "fill_in": to_fill_in(site),
        "path": str(known.path),
    }


def in_full(known: Known) -> dict[str, Any]:
    """What `flctl site show` says of it, as data; times in seconds. `shipped`: it is not in this campaign."""
    return {**in_short(known), "shipped": not known.here, "profile": to_data(known.site)}


def _unknown(name: str, known: Mapping[str, Path], otherwise: str) -> ConfigurationError:
    close = nearest(name, known)
    return ConfigurationError(
        f"there is no profile of a site {name!r}; there is: {', '.join(sorted(known))}",
        hint=f"did you mean {close}? Otherwise: {otherwise}" if close else otherwise,
    )
