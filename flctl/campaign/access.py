"""Owns this process's connections to the sites: one per site, made when it is needed, refused where a site is held."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from flctl.campaign import contacts
from flctl.campaign.session import Session, open_session
from flctl.campaign.workspace import Workspace
from flctl.errors import CodeSpent, LoginNeeded
from flctl.facility.connection import Connection, Road, connect
from flctl.facility.profile import Site


class Note(Protocol):
    """Hears what is done at a site, and how far it is."""

    def __call__(self, site: str, what: str, moved: int = 0, total: int = 0) -> None: ...


@dataclass(slots=True, kw_only=True)
class Access:
    """The way to the sites. `runtime`: a private folder for sockets; `stopped` is asked while files move."""

    workspace: Workspace
    runtime: Path
    stopped: Callable[[], bool]
    note: Note
    _connections: dict[str, Connection] = field(default_factory=dict)
    _equipped: set[str] = field(default_factory=set)

    def session(self, profile: Site, lock: int) -> Session:
        """The site's session, with this flctl's payload in place there. `lock`: the descriptor of the site's lock,
        which must be held: rsync and ssh children inherit it. LoginNeeded for a held site, without a login."""
        name = profile.name
        held = self.workspace.contact(name).held
        if held is not None and contacts.is_held(held):
            raise LoginNeeded(
                f"the site is held, no login is tried: {held.reason}",
                hint=f"put it right, then flctl release {name}",
                site=name,
            )
        self.note(name, "connecting")
        connection = self._connections.get(name)
        if connection is None:
            connection = self._connect(profile)
            self._connections[name] = connection
        connection.lock_fds = (lock,)
        session = open_session(self.workspace, profile, connection, partial(self.note, name))
        if name not in self._equipped:
            session.place_payload()
            self._equipped.add(name)
        return session

    def drop(self, site: str) -> None:
        """Close the connection to a site, if there is one."""
        self._equipped.discard(site)
        connection = self._connections.pop(site, None)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        for site in list(self._connections):
            self.drop(site)

    def _connect(self, profile: Site) -> Connection:
        """Log in. A refused login holds the site, whoever asked for it: nothing hammers."""
        try:
            return connect(profile, self._road(profile.name))
        except CodeSpent:
            raise
        except LoginNeeded as error:
            self.hold(profile.name, error)
            raise

    def hold(self, site: str, error: LoginNeeded) -> None:
        """Hold a site whose login was refused; one that is held keeps its first reason."""
        contact = self.workspace.contact(site)
        if contact.held is None and error.attempted:
            self.workspace.save_contact(site, contacts.failed(contact, error, time.time()))

    def _road(self, site: str) -> Road:
        folder = self.runtime / site
        folder.mkdir(mode=0o700, exist_ok=True)
        return Road(
            known_hosts=self.workspace.root / "known_hosts",
            runtime=folder,
            stop=self.stopped,
            on_login=lambda: self._count_login(site),
        )

    def _count_login(self, site: str) -> None:
        contact = self.workspace.contact(site)
        self.workspace.save_contact(site, replace(contact, logins=contact.logins + 1))
        self.workspace.journal.append("login", site=site, count=contact.logins + 1)
