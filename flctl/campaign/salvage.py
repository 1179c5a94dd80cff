"""Owns `flctl adopt`: a campaign's folder, or its damaged records, made anew from what the sites know; take-overs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flctl.campaign import adoption, driver, mending
from flctl.campaign.config import load_profile
from flctl.campaign.creation import LABEL, frame
from flctl.campaign.frozen import NAME, frozen_told
from flctl.campaign.session import Session
from flctl.campaign.workspace import Workspace, write_atomic, write_json
from flctl.codec import to_data
from flctl.errors import ConfigurationError, FlctlError, Interrupted, LoginTooSoon, UsageError
from flctl.records import Model, Run

if TYPE_CHECKING:
    from flctl.campaign.engine import Engine

T = TypeVar("T")

LOST = (
    "the journal's lines from before now",
    "how the models before this one were made, and the contributions to them: flctl verify begins here",
    "what a rule of aggregation remembers (momentum, variance), unless a site merges",
    "the plan, and what was set in flctl.toml: look through it before flctl round",
)
"""What the sites cannot tell."""


@dataclass(slots=True, kw_only=True)
class Adopted:
    """What was taken back. `model`: the one that was brought, and the site that it came from; `runs`: what is known now
    and was not; `aside`: damaged records, by their new names; `driver`: the epoch that began; `unasked`: sites that
    could not be asked, and why."""

    model: tuple[Model, str] | None = None
    runs: list[Run] = field(default_factory=list)
    aside: list[Path] = field(default_factory=list)
    epoch: int = 0
    unasked: list[tuple[str, FlctlError]] = field(default_factory=list)


def new_folder(folder: Path, label: str, profiles: dict[str, str], seed: int) -> Workspace:
    """A campaign's folder without a model, of the name and id that its folders at the sites have."""
    match = LABEL.fullmatch(label)
    if match is None:
        raise UsageError(
            f"--id {label} is no NAME-ID of a campaign",
            hint="it is the name of the campaign's folder in storage.work at each site, as demo-1f2e3d4c",
        )
    return frame(folder, name=match[1], id_=match[2], profiles=profiles, seed=seed)


def adopt(engine: "Engine", *, takeover: bool, is_new: bool = False) -> Adopted:
    """Take back what the sites know and this folder does not. `takeover`: this host becomes the campaign's driver;
    `is_new`: the folder was made for this, nobody has written its flctl.toml."""
    workspace, found = engine.workspace, Adopted()
    names = list(workspace.profiles)
    with workspace.lock_campaign():
        found.aside = mending.set_driver_aside(workspace)
        if not takeover:
            driver.ours(workspace)
        found.aside += mending.set_aside(workspace)
        seen = _each(engine, names, driver.look, found, equip=False)
        if takeover:
            found.epoch = driver.take_over(workspace, list(seen.values())).epoch
        if not workspace.models():
            _bring_model(engine, seen, found, is_new=is_new)
        elif any(_each(engine, seen, mending.cannot_follow, found, equip=False).values()):
            _bring_newer_model(engine, seen, found)
        _restore_frozen(engine, seen, found)
        found.aside += mending.set_overtaken_aside(workspace)
        before = workspace.runs()
        _each(engine, seen, lambda session: None, found, equip=True)
        found.runs = [run for run in workspace.runs() if run not in before]
    return found


def _each(
    engine: "Engine", names: Iterable[str], do: Callable[[Session], T], found: Adopted, *, equip: bool
) -> dict[str, T]:
    """Do something at each site; those where it fails are told in `found`."""
    done: dict[str, T] = {}
    for name in names:
        try:
            profile = load_profile(engine.workspace, name)
            with engine.workspace.lock_site(name) as lock:
                done[name] = do(engine.access.session(profile, lock, equip=equip))
        except (Interrupted, LoginTooSoon):
            raise
        except FlctlError as error:
            found.unasked.append((name, error))
    return done


def _bring_model(engine: "Engine", seen: dict[str, driver.Seen], found: Adopted, *, is_new: bool) -> None:
    """The newest version that a site holds whole, and flctl.toml of a new folder as far as the orders tell it.
    ConfigurationError if there is none."""
    workspace = engine.workspace
    orders = _orders(engine, seen, found)
    _bring_newest(engine, seen, found, adoption.bases(orders))
    if not found.model:
        raise ConfigurationError(
            f"no site has a whole model of {workspace.label}, so there is nothing to go on from",
            hint=f"put a copy of the campaign's models/NNNN into {workspace.root / 'models'}, then flctl adopt again"
            + "".join(f"; {name}: {error.message}" for name, error in found.unasked),
        )
    if is_new:
        _fill_in(workspace, orders)


def _restore_frozen(engine: "Engine", seen: dict[str, driver.Seen], found: Adopted) -> None:
    """Where models are adapters: what their frozen base is, as the orders at the sites tell it, if this folder lost
    that. Where it lies here a person has to say, once a site lacks it (campaign.frozen)."""
    from flctl.model.adapter_config import facts_of, is_adapter, read_config

    workspace = engine.workspace
    folder = workspace.model_folder(workspace.newest_model().version)
    if workspace.frozen() is None and is_adapter(folder):
        facts = facts_of(read_config(folder).values)
        if told := frozen_told(_orders(engine, seen, found), facts):
            write_json(workspace.root / NAME, to_data(told))
            workspace.journal.append("adopted", frozen=told.sha256)


def _bring_newer_model(engine: "Engine", seen: dict[str, driver.Seen], found: Adopted) -> None:
    """The newest version that a site holds whole and this folder has not reached, if there is one."""
    newest = engine.workspace.newest_model().version
    known = adoption.bases(_orders(engine, seen, found))
    _bring_newest(engine, seen, found, {version: what for version, what in known.items() if version > newest})


def _orders(engine: "Engine", seen: dict[str, driver.Seen], found: Adopted) -> list[tuple[str, dict[str, Any]]]:
    """(site, order) of every run at the sites."""
    orders: list[tuple[str, dict[str, Any]]] = []

    def read(session: Session) -> None:
        name = session.site.name
        orders.extend((name, there.order) for there in adoption.whats_there(session, seen[name].attempts))

    _each(engine, seen, read, found, equip=False)
    return orders


def _bring_newest(
    engine: "Engine", seen: dict[str, driver.Seen], found: Adopted, known: dict[int, tuple[str, int]]
) -> None:
    """The first of these versions (with sha256 and steps) that a site holds whole."""
    workspace = engine.workspace
    for version, (digest, steps) in known.items():

        def bring(session: Session, wanted: tuple[int, str, int] = (version, digest, steps)) -> None:
            if not workspace.has_model(wanted[0]) and adoption.bring_model(session, *wanted):
                found.model = (workspace.newest_model(), session.site.name)

        _each(engine, seen, bring, found, equip=False)
        if found.model:
            return


def _fill_in(workspace: Workspace, orders: list[tuple[str, dict[str, Any]]]) -> None:
    """[train] as the newest orders have it, but for what a site's own profile says, and cross-evaluation."""
    from flctl.campaign.creation import TRAIN, toml_lines

    train: dict[str, Any] = {}
    names = {"train": set[str](), "evaluate": set[str]()}
    for name, order in orders:
        # One that only names versions is of `flctl evaluate`, or of a return to the best one.
        if order.get("work") == "train" or (order.get("work") == "evaluate" and _of_others(order)):
            names[order["work"]].add(name)
    for name, order in sorted(orders, key=lambda item: _whole(item[1].get("round"))):
        if order.get("work") == "train" and isinstance(order.get("train"), dict):
            own = load_profile(workspace, name).train
            told = order["train"].items()
            # What runs at every site is not for one of them to say.
            train |= {key: value for key, value in told if key not in (*own, "command") and _fit([key, value])}
            train["steps"] = _whole(order.get("steps")) or train.get("steps", TRAIN["steps"])
    path = workspace.root / "flctl.toml"
    text = path.read_text(encoding="utf-8")
    head, tail = text.split("[train]", 1)
    rest = tail[tail.index("\n[evaluation]") :]
    # Each site evaluates then. One alone could have written such orders, to be sent what the others contributed.
    if names["evaluate"] and names["evaluate"] >= names["train"]:
        rest = rest.replace("cross = false", "cross = true")
    note = tail.split("\n", 1)[0]
    write_atomic(path, f"{head}[train]{note}\n{toml_lines(train)}\n{rest}".encode())


def _of_others(order: dict[str, Any]) -> bool:
    """Whether an evaluation is about what other sites contributed."""
    subjects = order.get("subjects")
    names = [item.get("name") for item in subjects if isinstance(item, dict)] if isinstance(subjects, list) else []
    return any(not str(name).isdigit() for name in names)


def _whole(value: object) -> int:
    """A whole number that a site wrote; 0 if it is none."""
    return value if type(value) is int and value > 0 else 0


def _fit(value: object) -> bool:
    """Whether flctl.toml may hold what a site wrote: numbers and printable text, alone or in tables and lists."""
    if isinstance(value, dict):
        return all(_fit([key, item]) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_fit, value))
    return value.isprintable() if isinstance(value, str) else isinstance(value, bool | int | float)
