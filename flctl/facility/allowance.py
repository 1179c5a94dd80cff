"""Owns how often the user's flctl may log in to a host: the distance between two logins, how many a day, how they are
spread over it, and when none may be tried because of how the last ones ended; for all flctl processes of a user."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flctl import faults
from flctl.errors import ConfigurationError, HostKeyRefused, LoginNeeded, LoginPaused, LoginTooSoon, SiteUnreachable
from flctl.facility import ledger
from flctl.facility.openssh import Place, jump_place, login_place, transfer_place
from flctl.facility.profile import Site

DAY, HOUR = 86400.0, 3600.0
WINDOW = DAY + 300.0
"""Seconds for which a try is one of the day's: a facility counts it when it lets us in, which may be minutes later for
one login than for another."""
KEPT = 3 * DAY
"""Seconds for which a login is remembered: a clock that jumps by a day and back must not make us forget a day."""
COOLDOWN_MOST = 4 * HOUR
"""Seconds of the longest cool-down after logins that were refused before anything was asked."""
NO_MOMENT = 1e11
"""Unix seconds of no clock; what is as large, or no number, was not written by us."""
SKEW_NOTED = 10.0
"""Seconds between two clocks that are worth a warning."""


@dataclass(slots=True, kw_only=True)
class Host:
    """What is remembered of the logins of one user at one host. `tries`: when (Unix seconds), each written before it
    was made; how many in a row were `refused`, or ended `unasked`, the last at `failed_at`; `released`: a person has
    looked at the last refusal; no login from `since` `until`, because of `why`; `skew`: seconds by which our clock was
    ahead of the host's when we were last in."""

    tries: list[float] = field(default_factory=list)
    refused: int = 0
    unasked: int = 0
    failed_at: float = 0.0
    released: bool = True
    since: float = 0.0
    until: float = 0.0
    why: str = ""
    skew: float = 0.0

    def settle(self, now: float) -> None:
        """A moment of the future was one before the clock was set back: when is not known, so it counts as now."""
        self.tries = sorted(min(at, now) for at in self.tries if now - KEPT < at)
        if self.since > now:
            self.since, self.until = now, now + self.until - self.since
        self.failed_at = min(self.failed_at, now)

    def pause(self, why: str, seconds: float, now: float) -> float:
        self.since, self.until, self.why = now, now + seconds, why
        return self.until

    def let_in(self) -> None:
        self.refused = self.unasked = 0
        self.failed_at = self.since = self.until = 0.0
        self.released, self.why = True, ""

    def idle(self) -> bool:
        """Whether there is nothing to remember."""
        return not (self.tries or self.refused or self.unasked or self.skew or self.until)


@dataclass(slots=True, kw_only=True)
class Try:
    """One login under way. `met`: the host itself has answered, so that what follows counts as a login there."""

    met: bool = False


def take(site: Site, place: Place, *, person: bool = False, now: float | None = None) -> None:
    """Take the right to log in to this host (and to the jump host before it) at this moment; it is written to disk
    before this returns. Nothing is taken if there is none: LoginTooSoon if a login of this user was less than
    login.interval ago, by any flctl; LoginPaused while none may be tried, or once login.per_day of them were tried
    within 24 hours; LoginNeeded (not attempted) if the last one was refused and nobody has released the site. A
    `person` who answers the questions at a terminal is only held to the interval."""
    names = _names(site, place)
    with _hosts(now) as (hosts, moment):
        found = [hosts.setdefault(name, Host()) for name in names]
        _keep_interval(site, found, moment)
        if not person:
            for name, host in zip(names, found, strict=True):
                _refuse_if_failed(site, name, host, moment)
                _refuse_if_many(site, name, host, moment)
        for host in found:
            host.tries.append(moment)
    faults.point("login-taken", site.name)


def check(site: Site) -> None:
    """LoginNeeded (not attempted) or LoginPaused if no login to the login host may be tried now because of how the last
    ones ended. Nothing is taken."""
    names = _names(site, login_place(site))
    with _hosts(write=False) as (hosts, now):
        for name in names:
            _refuse_if_failed(site, name, hosts.get(name, Host()), now)


def unasked(site: Site, place: Place, words: str = "") -> LoginPaused:
    """The host refused us before it asked anything, as pam_google_authenticator does once its rate limit is reached:
    nothing is known of our codes, and the next try has to wait."""
    why = f": {words}" if words else "; it does that after too many logins in a short time"
    until = time.time() + site.login.cooldown
    return LoginPaused(f"{place} refused the login without asking for a code{why}", until=until, site=site.name)


@contextmanager
def outcome(site: Site, place: Place) -> Iterator[Try]:
    """Around one login to which the right was taken: how it ends is remembered. One that met nobody costs nothing,
    unless it looks like a ban: then none is tried for an hour."""
    under_way = Try()
    try:
        yield under_way
    except LoginPaused as error:
        raise _note_unasked(site, place, error) from None
    except LoginNeeded as error:
        if error.attempted:
            _note_refused(site, place, met=under_way.met)
        raise
    except SiteUnreachable as error:
        if not under_way.met and _give_back(site, place):
            error.message += "; after a login that was refused this looks like a ban: none is tried for an hour"
        raise
    except HostKeyRefused:
        if not under_way.met:
            _give_back(site, place)
        raise
    let_in(site, place)


def let_in(site: Site, place: Place) -> None:
    """The host let us in: what went wrong before is over."""
    with _hosts() as (hosts, _):
        for name in _names(site, place):
            hosts.setdefault(name, Host()).let_in()


def release(site: Site) -> bool:
    """A person says that the cause of a refusal is put right, or that the clock is: the site's hosts may be tried
    again. After two refusals in a row the hour's pause (and more after more) stays. False if nothing was in the way."""
    if site.connection == "local":
        return False
    lifted = False
    with _hosts() as (hosts, _):
        for name in _all_names(site):
            host = hosts.get(name)
            if host is not None and (not host.released or host.skew):
                host.released, host.skew, lifted = True, 0.0, True
    return lifted


def used(site: Site, now: float | None = None) -> int:
    """Logins within the last 24 hours at the one of the site's hosts that has most."""
    with _hosts(now, write=False) as (hosts, moment):
        return max((len(_of_day(hosts[name].tries, moment)) for name in _all_names(site) if name in hosts), default=0)


def scarce(site: Site, now: float | None = None) -> bool:
    """Whether half of the day's logins are used: the rest is spread, and files go without one of their own."""
    return 0 < site.login.per_day <= 2 * used(site, now)


def spread_until(site: Site, now: float | None = None) -> float:
    """From when on a login that no person asked for may be tried: half of the day's may come as they are needed, the
    others are spread evenly until the first of them is 24 hours old."""
    with _hosts(now, write=False) as (hosts, moment):
        names = _names(site, login_place(site))
        return max(spread([*hosts.get(name, Host()).tries], site.login.per_day, moment) for name in names)


def spread(tries: Sequence[float], per_day: int, now: float) -> float:
    """The moment from which the next login fits, given those of before (Unix seconds): `now` or earlier if at once."""
    of_day = _of_day(tries, now)
    left = per_day - len(of_day)
    if not per_day or not of_day or 2 * left > per_day:
        return now
    first, last = min(of_day), max(of_day)
    return last + (first + WINDOW - last) / (max(0, left) + 1)


def note_skew(site: Site, seconds: float) -> None:
    """Remember by how much our clock is ahead of the login host's, if that is worth a word."""
    with _hosts() as (hosts, _):
        skew = round(seconds, 1) if abs(seconds) > SKEW_NOTED else 0.0
        hosts.setdefault(_name(login_place(site)), Host()).skew = skew


def skew(site: Site) -> float:
    with _hosts(write=False) as (hosts, _):
        return hosts.get(_name(login_place(site)), Host()).skew


def _keep_interval(site: Site, found: Sequence[Host], now: float) -> None:
    interval = site.login.interval
    last = max((max(host.tries, default=now - interval) for host in found), default=now - interval)
    if interval and now < last + interval:
        raise LoginTooSoon(
            f"the last login was {now - last:.0f} s ago, and {interval} s must lie between two",
            until=last + interval,
            hint=f"wait {last + interval - now:.0f} s",
            site=site.name,
        )


def _refuse_if_failed(site: Site, name: str, host: Host, now: float) -> None:
    if not host.released:
        error = LoginNeeded(
            f"the last login as {name} was refused; none is tried until a person has looked at it",
            hint=f"log in by hand once; then flctl release {site.name}",
            site=site.name,
        )
        error.attempted = False
        raise error
    if now < host.until:
        raise _paused(site, host.why, host.until)


def _refuse_if_many(site: Site, name: str, host: Host, now: float) -> None:
    of_day, most = _of_day(host.tries, now), site.login.per_day
    if most and len(of_day) >= most:
        until = of_day[len(of_day) - most] + WINDOW
        raise _paused(site, f"the day's {most} logins as {name} are used up (login.per_day)", until)


def _paused(site: Site, why: str, until: float) -> LoginPaused:
    from flctl.facility.certificates import clock

    return LoginPaused(
        f"{why}; none is tried before {clock(until)}",
        until=until,
        hint="rounds and ticks go on by themselves then",
        site=site.name,
    )


def _note_unasked(site: Site, place: Place, error: LoginPaused) -> LoginPaused:
    """The cool-down after a login that was refused before anything was asked: the profile's, twice as long each time
    in a row."""
    with _hosts() as (hosts, now):
        host = hosts.setdefault(_name(place), Host())
        host.unasked += 1
        host.failed_at = now
        seconds = site.login.cooldown * 2.0 ** min(host.unasked - 1, 10)
        until = host.pause(error.message, min(seconds, max(COOLDOWN_MOST, site.login.cooldown)), now)
    return _paused(site, error.message, until)


def _note_refused(site: Site, place: Place, *, met: bool) -> None:
    """The host refused us: the place itself if we came as far, else the jump host before it. After two in a row an
    hour without any, doubled with each further one, up to a day."""
    with _hosts() as (hosts, now):
        names = _names(site, place)
        host = hosts.setdefault(names[-1] if met else names[0], Host())
        host.refused += 1
        host.failed_at, host.released = now, False
        if host.refused > 1:
            why = f"{host.refused} logins in a row were refused"
            host.pause(why, min(DAY, HOUR * 2.0 ** min(host.refused - 2, 10)), now)


def _give_back(site: Site, place: Place) -> bool:
    """The host was not met: the try does not count there (it does at a jump host, which may have let us in). True if
    the login before it had failed: then the host may have banned us, and is left alone for an hour."""
    with _hosts() as (hosts, now):
        host = hosts.setdefault(_name(place), Host())
        if host.tries:
            host.tries.pop()
        banned = bool(host.refused or host.unasked) and now - host.failed_at < DAY
        if banned:
            host.pause("the host was out of reach after a login that was refused, which looks like a ban", HOUR, now)
        return banned


def _of_day(tries: Sequence[float], now: float) -> list[float]:
    return sorted(at for at in tries if now - WINDOW < at)


def _names(site: Site, place: Place) -> list[str]:
    """The hosts that a login to `place` logs in to, on the way first."""
    jump = jump_place(site)
    return [_name(host) for host in ([jump] if jump else []) + [place]]


def _all_names(site: Site) -> list[str]:
    return list(dict.fromkeys([*_names(site, login_place(site)), _name(transfer_place(site))]))


def _name(place: Place) -> str:
    return f"{place.user}@{place}"


@contextmanager
def _hosts(now: float | None = None, *, write: bool = True) -> Iterator[tuple[dict[str, Host], float]]:
    """What is remembered, for this process and thread alone, and the present moment; written back at the end, even if
    that is an error: what a clock that was set back made of it stays. Who only looks waits for nobody."""
    with ledger.locked("logins") if write else nullcontext(ledger.state_folder() / "logins.json") as path:
        # Asked only now: whoever had the lock before us logged in before this moment.
        moment = time.time() if now is None else now
        hosts = _read(path)
        for host in hosts.values():
            host.settle(moment)
        try:
            yield hosts, moment
        finally:
            if write:
                ledger.write(path, {name: asdict(host) for name, host in hosts.items() if not host.idle()})


def _read(path: Path) -> dict[str, Host]:
    text = ledger.text_of(path)
    try:
        return {str(name): _host(entry) for name, entry in json.loads(text).items()} if text is not None else {}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ConfigurationError(
            f"{path}, which keeps when the last logins were, cannot be understood",
            hint=f"rm {path}",
        ) from None


def _host(entry: float | Mapping[str, object]) -> Host:
    """An entry; until 0.4 it was the moment of the last login."""
    if isinstance(entry, (int, float)):
        return Host(tries=[float(entry)])
    host, empty = Host(**entry), Host()  # type: ignore[arg-type]
    for name in Host.__slots__:
        kind = type(getattr(empty, name))
        if not isinstance(getattr(host, name), (int, float) if kind is float else kind):
            raise TypeError(name)
    host.tries = [float(at) for at in host.tries]
    if not all(abs(moment) < NO_MOMENT for moment in (*host.tries, host.failed_at, host.since, host.until, host.skew)):
        raise ValueError("no moment")
    return host
