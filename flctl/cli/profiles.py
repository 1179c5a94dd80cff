"""`flctl site list | show | add`: which profiles there are, what one says, and one more for a campaign."""

import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flctl.cli.moving import find
from flctl.cli.output import Grid, print_json

if TYPE_CHECKING:
    from flctl.campaign.profiles import Known
    from flctl.campaign.workspace import Workspace
    from flctl.facility.profile import Queue, Site

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def register(app: typer.Typer) -> None:
    app.command("list")(list_)
    app.command()(show)
    app.command()(add)


def list_(
    context: typer.Context,
    everywhere: Annotated[
        bool, typer.Option("--available", help="The profiles that flctl ships; needs no campaign.")
    ] = False,
    json: Json = False,
) -> None:
    """List the campaign's sites: login, scheduler, when the facts were checked, what is still open or empty."""
    from flctl.campaign import profiles
    from flctl.facility.profile import load_site

    paths = profiles.available() if everywhere else find(context.obj).profiles
    rows = [
        profiles.in_short(profiles.Known(site=load_site(path), path=path, here=not everywhere))
        for path in paths.values()
    ]
    if json:
        print_json("site list", status="ok", exit_code=0, data={"sites": rows})
        return
    grid = Grid(("site", "login", "person", "scheduler", "checked", "questions"))
    for row in rows:
        grid.add(*(str(row[column]) for column in ("name", *grid.columns[1:])))
    grid.show()
    if everywhere:
        print("flctl site show NAME tells more; flctl site add NAME brings one into a campaign")
        return
    for row in rows:
        if row["fill_in"]:
            print(f"{row['path']}: fill in {', '.join(row['fill_in'])}")


def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A site of the campaign, or a shipped profile.")],
    json: Json = False,
) -> None:
    """Show what a profile says, what that rests on, which questions are open, and what is to be filled in."""
    from flctl.campaign import profiles

    known = profiles.find(_campaign(context.obj), name)
    if json:
        print_json("site show", status="ok", exit_code=0, data=profiles.in_full(known))
        return
    for label, text in _about(known):
        _tell(label, text)
    _shapes(known.site).show()
    if known.site.queues:
        _queues(known.site.queues).show()
    print(known.path)


def add(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="NAME|PATH...", help="Shipped profiles, or TOML files.")],
) -> None:
    """Copy profiles into the campaign's sites/. Never overwrites."""
    from flctl.campaign import profiles

    added = profiles.add(find(context.obj), words)
    for known in added.values():
        print(f"{known.path}: fill in {', '.join(profiles.to_fill_in(known.site)) or 'nothing'}")
        print(f"  {len(known.site.about.questions)} open questions: flctl site show {known.site.name}")
    print(f"then type: flctl site test {' '.join(added)}")


def _campaign(folder: Path | None) -> "Workspace | None":
    """The campaign that a command is in, if it is in one; one that is named must be there."""
    start = Path.cwd()
    inside = any((place / "flctl.toml").is_file() for place in (start, *start.parents))
    return find(folder) if folder or os.environ.get("FLCTL_CAMPAIGN") or inside else None


def _tell(label: str, text: str) -> None:
    line = f"{label:<11}{text}"
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False)
    print(line)


def _about(known: "Known") -> list[tuple[str, str]]:
    """Labels and texts, one line each."""
    from flctl.campaign.profiles import person, to_fill_in

    site = known.site
    about, storage, budget = site.about, site.storage, site.budget
    lines = [
        ("site", site.name + ("" if known.here else "  (shipped; not in this campaign)")),
        ("title", site.title),
        ("docs", about.docs),
        ("checked", about.checked),
        *(("evidence", text) for text in about.evidence),
        *(("question", text) for text in about.questions),
        ("fill in", ", ".join(to_fill_in(site))),
        ("login", _login(site)),
        ("person", person(site)),
        ("transfer", _transfer(site)),
        ("scheduler", " ".join(filter(None, (site.scheduler.kind, site.scheduler.account)))),
        ("work", storage.work),
        ("purge", f"after {storage.purge_days} days" if storage.purge_days else ""),
        ("data", storage.data),
        ("quota", storage.quota),
        ("balance", " ".join(filter(None, (budget.balance, budget.unit and f"in {budget.unit}")))),
        ("budget", f"{budget.max_node_hours:g} node-hours" if budget.max_node_hours else ""),
    ]
    return [(label, text) for label, text in lines if text]


def _login(site: "Site") -> str:
    from flctl.facility.script import clock

    login = site.login
    if site.connection == "local":
        return "none: this machine"
    parts = [
        f"{login.kind} at {login.host}{f':{login.port}' if login.port != 22 else ''}",
        f"through {login.proxy_jump}" if login.proxy_jump else "",
        f"renewed by {login.renew}" if login.renew else "",
        f"{login.interval} s between two at least" if login.interval else "",
        "" if login.multiplex else "one session per connection",
        f"kept for {clock(login.hold)} at most" if login.hold else "",
        f"{len(login.host_keys)} published host keys" if login.host_keys else "no published host key",
    ]
    return "; ".join(part for part in parts if part)


def _transfer(site: "Site") -> str:
    if site.connection == "local":
        return ""
    transfer = site.transfer
    port = f":{transfer.port}" if transfer.port != 22 else ""
    return f"{transfer.host}{port}{'' if transfer.shell else ', no shell'}" if transfer.host else "the login host"


def _shapes(site: "Site") -> Grid:
    from flctl.campaign.profiles import shapes_of
    from flctl.facility.script import clock

    grid = Grid(("shape", "nodes", "gpus", "cpus", "walltime", "queue", "options"))
    for name, shape in shapes_of(site).items():
        grid.add(
            name + (" *" if name == site.scheduler.shape else ""),
            str(shape.nodes) + (f" x {shape.ranks}" if shape.ranks > 1 else ""),  # nodes x ranks
            str(shape.gpus or ""),
            str(shape.cpus or ""),
            clock(shape.walltime),
            ", ".join(filter(None, (shape.partition or shape.queue, shape.qos))),
            " ".join(shape.extra),
        )
    return grid


def _queues(queues: "dict[str, Queue]") -> Grid:
    from flctl.facility.script import clock

    grid = Grid(("queue", "nodes", "walltime", "node-hours", "running", "charge"))
    for name, queue in queues.items():
        grid.add(
            name,
            f"{queue.min_nodes or 1}-{queue.max_nodes or ''}" if queue.min_nodes or queue.max_nodes else "",
            clock(queue.max_walltime) if queue.max_walltime else "",
            f"{queue.max_node_hours:g}" if queue.max_node_hours else "",
            str(queue.max_running or ""),
            f"{queue.charge:g}",
        )
    return grid
