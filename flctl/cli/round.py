"""`flctl round`: make the next models, and show what each site is doing while they are made."""

import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from flctl.campaign.workspace import Workspace
from flctl.cli.moving import a_person, find, leave, moving
from flctl.cli.output import Grid, console, number, print_failures, print_json, say, unheard
from flctl.errors import UsageError
from flctl.policy.evaluating import CANCELLED
from flctl.records import Plan
from flctl.words import plain

if TYPE_CHECKING:
    from rich.table import Table

    from flctl.campaign.engine import Engine
    from flctl.campaign.rounds import Outcome


def register(app: typer.Typer) -> None:
    app.command(name="round")(round_)


def round_(
    context: typer.Context,
    sites: Annotated[list[str] | None, typer.Option("--sites", help="Sites: a b | a,b | all.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="How many new models. Default: 1.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimizer steps of each run.")] = None,
    wait: Annotated[str | None, typer.Option("--wait", help="Give up waiting after: 90, 45s, 30m, 12h, 2d.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan and job scripts; touch nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Train at the sites, fetch, merge: make the next model of the campaign. An interrupted round goes on."""
    from flctl.campaign.planning import open_plan

    workspace = find(context.obj)
    limit = duration(wait)
    if dry_run:
        _print_dry_run(workspace, sites or [], rounds, steps, json)
        return
    plan = open_plan(workspace, sites or [], rounds, steps)
    raise typer.Exit(run_round(workspace, plan, limit, json=json))


def run_round(
    workspace: Workspace, plan: Plan, wait: float | None, *, json: bool = False, command: str = "round"
) -> int:
    """Drive the open plan to its end with a view of it. Returns the exit code."""
    from flctl.campaign.config import load_configuration
    from flctl.campaign.outlook import brief
    from flctl.campaign.report import progress
    from flctl.campaign.rounds import drive
    from flctl.cli import evaluate

    live = sys.stdout.isatty() and not json
    stream = sys.stderr if json else sys.stdout
    first = workspace.newest_model().version
    lines = View(workspace, stream if not live else None)
    lend = lines.lend if a_person() else None
    with moving(workspace, lines.tell, command if json else "", terminal=lend) as engine:
        lines.engine = engine
        with lines:
            for line in brief(workspace, load_configuration(workspace), plan) if plan.evaluates is None else ():
                lines.tell(line)
            outcome = drive(engine, plan, wait=wait, pause=engine.stop.wait)
    if json:
        data = progress(workspace, done=outcome.done)
        if plan.evaluates is not None:
            data["evaluation"] = {"model": plan.evaluates, "sites": evaluate.scored(workspace, plan)}
        print_json(command, status=outcome.status, exit_code=outcome.exit_code, data=data, errors=outcome.errors)
    else:
        with unheard():
            if plan.evaluates is None:
                _print_end(workspace, outcome, first)
            else:
                evaluate.print_end(workspace, plan, outcome)
    if engine.abandoned:
        leave(outcome.exit_code)
    return outcome.exit_code


class View:
    """What `round` shows while it works: a live table on a terminal, a line per change elsewhere."""

    def __init__(self, workspace: Workspace, stream: TextIO | None) -> None:
        self.workspace = workspace
        self.stream = stream or sys.stdout
        self.engine: Engine | None = None
        self._live = None
        if stream is None:
            from rich.live import Live

            self._live = Live(get_renderable=self._table, console=console(), refresh_per_second=4, transient=True)

    def __enter__(self) -> "View":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, line: str) -> None:
        stamped = plain(f"{time.strftime('%H:%M:%S')}  {line}")
        if self._live is not None:
            self._live.console.print(stamped, markup=False)
        else:
            say(stamped, self.stream)

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Leave the terminal to a program that asks something."""
        if self._live is None:
            yield
            return
        self._live.stop()
        try:
            yield
        finally:
            self._live.start()

    def _table(self) -> "Table":
        from flctl.campaign.report import ago, state_of

        grid = Grid(("site", "run", "state", "since", "now"), title=self._title())
        doing = dict(self.engine.doing) if self.engine else {}
        open_runs = {run.site: run for run in self.workspace.runs() if run.open}
        for site in sorted(open_runs):
            run, now = open_runs[site], doing.get(site)
            state = state_of(run, self.workspace.contact(site))
            name = f"{run.number}.{run.attempt}" + ("" if run.order.work == "train" else f" {run.order.work}")
            grid.add(site, name, state, ago(run.changed_at), _moving(now))
        if "" in doing:
            grid.add("", "", doing[""].what, ago(doing[""].since), "")
        return grid.rich()

    def _title(self) -> str:
        plan, newest = self.workspace.plan(), self.workspace.newest_model().version
        if plan is not None and newest >= plan.target:
            return f"model {newest if plan.evaluates is None else plan.evaluates:04d} is being evaluated"
        return f"model {newest + 1:04d} is being made"


def _moving(now: object) -> str:
    """`pushing 0003  120 of 480 MB, 95.2 MB/s`, or what else the site's thread does."""
    what, since = getattr(now, "what", ""), getattr(now, "since", 0.0)
    moved, total = getattr(now, "moved", 0), getattr(now, "total", 0)
    if not total:
        return what
    rate = moved / max(0.001, time.time() - since) / 1e6
    return f"{what}  {moved / 1e6:.0f} of {total / 1e6:.0f} MB, {rate:.1f} MB/s"


def _score(metrics: Mapping[str, Any], name: str) -> float | None:
    """A perplexity in the metrics of a trainer, which may be of any shape; None where there is none."""
    table = metrics.get("evaluation")
    row = table.get(name) if isinstance(table, dict) else None
    value = row.get("perplexity") if isinstance(row, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _print_end(workspace: Workspace, outcome: "Outcome", first: int) -> None:
    """The models made and each site's perplexities; then what went wrong."""
    from flctl.campaign.gates import warnings_of
    from flctl.campaign.privacy import line, shown
    from flctl.campaign.report import alternative

    model = workspace.newest_model()
    grid = Grid(("for model", "site", "steps", "samples", "perplexity of the base", "after training there"))
    for run in workspace.runs():
        if run.contribution is not None and run.order.round > first and run.order.work == "train":
            base, trained = (_score(run.contribution.metrics, key) for key in ("base", "trained"))
            given = run.contribution
            grid.add(
                f"{run.order.round:04d}", run.site, str(given.steps), str(given.samples), number(base), number(trained)
            )
    if grid.rows:
        grid.show()
    for version in range(first + 1, model.version + 1):
        for warning in warnings_of(workspace.model_record(version)):
            print(f"model {version:04d} is merged with a warning: {warning}")
    plan = workspace.plan()
    if plan is not None and plan.ended not in ("", CANCELLED):
        print(f"the plan ended at model {plan.target:04d}: {plan.ended}")
    if model.rolled_back_to is not None and model.version > first:
        print(f"model {model.version:04d} has the weights of model {model.rolled_back_to:04d}, the best so far")
    if told := shown(workspace.model_record(model.version)):
        print(f"privacy: {line(told)}")
    print_failures(outcome.errors)
    if not outcome.done:
        open_runs = [run for run in workspace.runs() if run.open]
        waits = ", ".join(sorted({run.site for run in open_runs}))
        print(f"model {model.version + 1:04d} is not made" + (f"; {waits} not finished" if waits else ""))
        spared = any(alternative(workspace, run).startswith("flctl skip") for run in open_runs)
        driven = all(failure.code != "locked" for _, failure in outcome.errors)
        skip = "; flctl skip SITE makes it without one" if spared and driven else ""
        after = "then " if outcome.errors else ""
        print(f"-> {after}flctl round goes on from here{skip}")
    if outcome.done:
        print(f"model {model.version:04d}  sha256 {model.sha256[:16]}  {workspace.model_folder(model.version)}")


def _print_dry_run(workspace: Workspace, sites: list[str], rounds: int | None, steps: int | None, json: bool) -> None:
    from flctl.campaign.privacy import line
    from flctl.campaign.rehearsal import private_after, rehearse

    plan, scripts = rehearse(workspace, sites, rounds, steps)
    private = private_after(workspace, plan)
    if json:
        data = {
            "sites": plan.sites,
            "first": plan.first,
            "target": plan.target,
            "steps": plan.steps,
            "privacy": private,
            "scripts": scripts,
        }
        print_json("round", status="ok", exit_code=0, data=data)
        return
    print(f"plan: models {plan.first:04d} to {plan.target:04d}, {plan.steps} steps a run, by {', '.join(plan.sites)}")
    if private:
        print(f"privacy after model {plan.target:04d}: {line(private)}")
    for site, script in scripts.items():
        print(f"\n# ---- {site}: job.sh\n{script}", end="")
    print("\nnothing was written, sent or submitted; /_WORK_ and the like are resolved at the first login")


def duration(text: str | None) -> float | None:
    """Seconds of `90`, `45s`, `30m`, `12h`, `2d`."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None:
        raise UsageError(f"--wait {text} is no duration", hint="write 90, 45s, 30m, 12h or 2d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
