"""`flctl evaluate`: one version of the model on the sites' own data, and nothing else."""

from typing import TYPE_CHECKING, Annotated

import typer

from flctl.campaign.workspace import Workspace
from flctl.cli.moving import find
from flctl.cli.output import Grid, number, print_failures, print_json
from flctl.cli.round import duration, run_round
from flctl.cli.verify import version_of
from flctl.records import Plan

if TYPE_CHECKING:
    from flctl.campaign.rounds import Outcome


def register(app: typer.Typer) -> None:
    app.command()(evaluate)


def evaluate(
    context: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[SITES]...", help="Sites: a b | a,b | all.", show_default=False)
    ] = None,
    sites: Annotated[list[str] | None, typer.Option("--sites", help="The same.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="VERSION", help="7, 0007 or newest. Default: the newest.")
    ] = None,
    wait: Annotated[str | None, typer.Option("--wait", help="Give up waiting after: 90, 45s, 30m, 12h, 2d.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan and job scripts; touch nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Evaluate one version of the model at the sites, each on its own data. Nothing is trained or made."""
    from flctl.campaign.evaluation import open_evaluation

    workspace, limit = find(context.obj), duration(wait)
    wanted = [name for word in [*(names or []), *(sites or [])] for name in word.split(",") if name]
    if dry_run:
        _print_dry_run(workspace, wanted, version_of(model), json)
        return
    plan = open_evaluation(workspace, wanted, version_of(model))
    raise typer.Exit(run_round(workspace, plan, limit, json=json, command="evaluate"))


def scored(workspace: Workspace, plan: Plan) -> dict[str, dict[str, float | int | None]]:
    """What the plan's sites measured of its version, as far as they have."""
    from flctl.policy.scores import scores_of

    runs = [run for run in workspace.runs() if run.order.plan == plan.number]
    found = scores_of(runs, workspace.models()).get(plan.evaluates or 0, {})
    return {
        site: {"loss": score.loss, "perplexity": score.perplexity, "tokens": score.tokens}
        for site, score in sorted(found.items())
    }


def print_end(workspace: Workspace, plan: Plan, outcome: "Outcome") -> None:
    grid = Grid(("model", "site", "loss", "perplexity", "tokens"))
    for site, row in scored(workspace, plan).items():
        tokens = "" if row["tokens"] is None else f"{row['tokens']:,}"
        grid.add(f"{plan.evaluates:04d}", site, number(row["loss"], 4), number(row["perplexity"], 2), tokens)
    if grid.rows:
        grid.show()
    print_failures(outcome.errors)
    waits = sorted({run.site for run in workspace.runs() if run.open})
    if waits:
        print(
            f"model {plan.evaluates:04d} is not evaluated at {', '.join(waits)} yet\n-> flctl round goes on from here"
        )
    elif outcome.done:
        print("-> flctl history shows it beside the others")


def _print_dry_run(workspace: Workspace, names: list[str], version: int | None, json: bool) -> None:
    from flctl.campaign.evaluation import proposed_evaluation
    from flctl.campaign.rehearsal import script_of

    plan = proposed_evaluation(workspace, names, version)
    scripts = {name: script_of(workspace, name) for name in plan.sites}
    if json:
        data = {"sites": plan.sites, "evaluates": plan.evaluates, "scripts": scripts}
        print_json("evaluate", status="ok", exit_code=0, data=data)
        return
    print(f"plan: model {plan.evaluates:04d} is evaluated by {', '.join(plan.sites)}")
    for site, script in scripts.items():
        print(f"\n# ---- {site}: job.sh\n{script}", end="")
    print("\nnothing was written, sent or submitted; /_WORK_ and the like are resolved at the first login")
