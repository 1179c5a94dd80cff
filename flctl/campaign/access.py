"""Owns this process's connections to the sites: one per site, made when it is needed, refused where a site is held."""

import re
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from flctl import faults
from flctl.campaign import adoption, contacts, driver
from flctl.campaign.session import Session, open_session
from flctl.campaign.workspace import Workspace
from flctl.errors import ConfigurationError, LoginNeeded, LoginPaused, LoginTooSoon
from flctl.facility import allowance, holding, renewal
from flctl.facility.certificates import clock
from flctl.facility.connection import Connection, Road, connect, shares
from flctl.facility.openssh import Place, login_place, transfer_place
from flctl.facility.over_kept import KeptConnection
from flctl.facility.profile import Site, load_site
from flctl.facility.references import read_reference
from flctl.facility.witness import Witness


class Note(Protocol):
    """Hears what is done at a site, and how far it is."""

    def __call__(self, site: str, what: str, moved: int = 0, total: int = 0) -> None: ...


Terminal = Callable[[], AbstractContextManager[None]]
"""Lends our terminal, for as long as the context lasts, to a program that asks a person something."""

RENEWAL_PAUSE = 300.0
"""Seconds after a renewal that failed before a process which stays tries the next."""

T = TypeVar("T")

RSYNCS = 4
"""What brings a first run to a site and back: the payload, the base, the job, the result."""


@dataclass(slots=True, kw_only=True)
class Access:
    """The way to the sites. `runtime`: a private folder for sockets; `stopped` is asked while files move; `terminal`:
    None where nobody is there; `tell` hears what a person should know; `stays`: whether this process goes on for longer
    than one tick; `sparing`: whether files go without a login of their own wherever they can."""

    workspace: Workspace
    runtime: Path
    stopped: Callable[[], bool]
    note: Note
    terminal: Terminal | None = None
    tell: Callable[[str], None] = lambda line: None
    stays: bool = False
    sparing: bool = False
    _renewals: dict[str, float] = field(default_factory=dict)
    _connections: dict[str, Connection] = field(default_factory=dict)
    _equipped: set[str] = field(default_factory=set)
    _asked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        take_secrets(self.workspace)

    def session(self, profile: Site, lock: int, *, equip: bool = True, automatic: bool = False) -> Session:
        """The site's session, with this flctl's payload in place there (unless `equip` is false: nothing is sent then).
        `automatic`: no person asked for it, so that a login is one of those that are spread over the day; the first one
        of a command that somebody typed at a terminal is not.
        `lock`: the descriptor of the site's lock, which must be held: rsync and ssh children inherit it. LoginNeeded
        for a held site, without a login."""
        name = profile.name
        self._check_held(name)
        self.note(name, "connecting")
        connection = self._connections.get(name)
        if connection is None:
            typed = self.terminal is not None and name not in self._asked
            self._asked.add(name)
            connection = self._connect(self._allowed(profile, automatic=automatic and not typed), connect)
            self._connections[name] = connection
            self._note_skew(profile, connection)
        self._note_until(profile, connection)
        connection.lock_fds = (lock,)
        session = open_session(self.workspace, profile, connection, partial(self.note, name))
        if equip and name not in self._equipped:
            for run in adoption.reconcile(session, driver.begin(session)):
                self.tell(f"{name}: run {run.number:04d}, which is there and was not known here, is adopted")
            session.place_payload()
            faults.point("equipped", name)
            self._equipped.add(name)
        return session

    def _check_held(self, name: str) -> None:
        held = self.workspace.contact(name).held
        if held is not None and contacts.is_held(held):
            raise LoginNeeded(
                f"the site is held, no login is tried: {held.reason}",
                hint=f"put it right, then flctl release {name}",
                site=name,
            )

    def drop(self, site: str) -> None:
        """Close the connection to a site, if there is one."""
        self._equipped.discard(site)
        connection = self._connections.pop(site, None)
        if connection is not None:
            connection.close()

    def is_kept(self, site: str) -> bool:
        """Whether the site is reached over a connection that a person opened: contacts cost no login then."""
        return isinstance(self._connections.get(site), KeptConnection)

    def close(self) -> None:
        for site in list(self._connections):
            self.drop(site)

    def rehearse(self, profile: Site, witness: Witness) -> None:
        """Log in once, as any command would, and leave; `witness` sees how it goes."""
        from flctl.facility.login import rehearse

        self._check_held(profile.name)
        on_login = partial(self._count_login, profile, why="test")
        profile = self._allowed(profile, automatic=False)
        self._connect(profile, lambda site, road: rehearse(site, road.known_hosts, on_login, witness))

    def _allowed(self, profile: Site, *, automatic: bool) -> Site:
        """The profile if a login may be tried now; LoginPaused if it is one of those that are spread over the day, and
        not its turn. A person who typed the command may go beyond the day's number, and is told so."""
        login, known_hosts = profile.login, self.workspace.root / "known_hosts"
        if profile.connection == "local" or login.attended or (login.hold and holding.found(profile, known_hosts)):
            return profile
        allowance.check(profile)
        used = allowance.used(profile)
        until = allowance.spread_until(profile) if automatic else 0.0
        if until > time.time():
            raise LoginPaused(
                f"{used} of the day's {login.per_day} logins are used (login.per_day), the rest is spread: the next is "
                f"at {clock(until)}",
                until=until,
                hint="rounds and ticks go on by themselves then",
                site=profile.name,
            )
        if self.terminal is None or automatic or used < login.per_day:
            return profile
        self.tell(f"{profile.name}: the day's {login.per_day} logins are used up (login.per_day); this is one more")
        return replace(profile, login=replace(login, per_day=0))

    def _note_skew(self, profile: Site, connection: Connection) -> None:
        """Compare our clock with the site's after a login; a warning if they differ, before a code is ever wrong."""
        if profile.connection == "local":
            return
        before = time.time()
        told = re.search(r"(\d{9,12})\s*$", connection.run("date +%s").stdout)
        after, contact = time.time(), self.workspace.contact(profile.name)
        if told is None or after - before > allowance.SKEW_NOTED:
            return
        ahead = round((before + after) / 2 - int(told[1]) - 0.5, 1)
        allowance.note_skew(profile, ahead)
        contact = replace(contact, skew=ahead)
        self.workspace.save_contact(profile.name, contact)
        if warning := contacts.clock_differs(profile.name, contact):
            self.tell(warning)

    def _connect(self, profile: Site, way: Callable[[Site, Road], T]) -> T:
        """Log in. A refused login holds the site, whoever asked for it: nothing hammers."""
        try:
            self._renew(profile)
            faults.point("login", profile.name)
            made = way(profile, self._road(profile))
            faults.point("logged-in", profile.name)
            return made
        except LoginTooSoon:
            raise
        except LoginNeeded as error:
            self.hold(profile.name, error)
            raise

    def _renew(self, profile: Site) -> None:
        """Get a new certificate if it is time for one and the profile's program may be run: without asking, or by a
        person who is there; after a failure not again by this tick. A failure is one where no valid one is left."""
        name, unattended = profile.name, profile.login.renew_unattended
        if not profile.login.renew or not (unattended or self.terminal) or not renewal.is_time(profile):
            return
        failed_at = self._renewals.get(name)
        again = self.stays and unattended
        if failed_at is not None and not (again and time.monotonic() > failed_at + RENEWAL_PAUSE):
            return
        self._renewals[name] = time.monotonic()
        self.note(name, "getting a new certificate")
        try:
            if unattended or self.terminal is None:
                renewal.renew(profile, interactive=False, stop=self.stopped)
            else:
                with self.terminal():
                    renewal.renew(profile, interactive=True, stop=self.stopped)
        except LoginNeeded as error:
            self.workspace.journal.append("renewal failed", site=name, message=error.message)
            if renewal.certificate_until(profile) is None:
                raise
        else:
            self.workspace.journal.append("renewal", site=name, until=renewal.certificate_until(profile))
            del self._renewals[name]

    def _note_until(self, profile: Site, connection: Connection) -> None:
        """Remember until when the site's certificate, or the connection kept to it, is good; `flctl login` may have
        renewed it meanwhile."""
        contact, login = self.workspace.contact(profile.name), profile.login
        until = connection.until if isinstance(connection, KeptConnection) else None
        if login.kind == "certificate":
            until = renewal.certificate_until(profile) or until
        elif not login.attended:
            until = None  # when a connection that spares logins ends, flctl makes another
        if until != contact.login_until:
            self.workspace.save_contact(profile.name, replace(contact, login_until=until))

    def hold(self, site: str, error: LoginNeeded) -> None:
        """Hold a site whose login was refused; one that is held keeps its first reason."""
        contact = self.workspace.contact(site)
        if contact.held is None and error.attempted:
            self.workspace.save_contact(site, contacts.failed(contact, error, time.time()))

    def _road(self, profile: Site) -> Road:
        folder = self.runtime / profile.name
        folder.mkdir(mode=0o700, exist_ok=True)
        return Road(
            known_hosts=self.workspace.root / "known_hosts",
            runtime=folder,
            stop=self.stopped,
            on_login=lambda place, why: self._count_login(profile, place, why),
            on_rsync=lambda version: self._note_rsync(profile.name, version),
            sparing=self.sparing or not profile.login.per_day,
        )

    def _note_rsync(self, site: str, version: str) -> None:
        contact = self.workspace.contact(site)
        if contact.rsync != version:
            self.workspace.save_contact(site, replace(contact, rsync=version))

    def _count_login(self, profile: Site, place: Place, why: str) -> None:
        site = profile.name
        contact = self.workspace.contact(site)
        counted = replace(contact, logins=contact.logins + 1, login_at=time.time())
        if contacts.hold_of(contact) is not None and contact.held is None:
            counted = replace(counted, trouble=None)
        faults.point("login-count", site)
        self.workspace.save_contact(site, counted)
        faults.point("login-counted", site)
        self.workspace.journal.append(
            "login", site=site, count=counted.logins, host=str(place), kind=profile.login.kind, why=why
        )


def take_secrets(workspace: Workspace) -> None:
    """No program started from now on inherits a secret that a profile keeps in an environment variable."""
    for path in workspace.profiles.values():
        with suppress(ConfigurationError):
            login = load_site(path).login
            for reference in (login.password.secret, login.totp.secret):
                with suppress(ConfigurationError):
                    if reference.startswith("env:"):
                        read_reference(reference)


def expected_logins(site: Site, kept: Collection[Place] = ()) -> int:
    """How many logins it takes to bring files to a site and commands there, hosts on the way included: those that one
    process makes (a `round`, or a tick), or the person for it by `flctl login`. `kept`: hosts that connections are kept
    to already. Where each rsync must log in by itself (multiplex = false), as many as a run needs."""
    if site.connection == "local":
        return 0
    if site.login.attended:
        roads = sum(place not in kept for place in holding.places(site))
    else:
        held = login_place(site) in kept
        roads = 0 if held else 1
        if not shares(site) and not (held and transfer_place(site) in kept):
            roads += 1 if site.login.multiplex else RSYNCS
    return roads * (2 if site.login.proxy_jump else 1)
