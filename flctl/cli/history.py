"""`flctl history`: what each version of the model scored on each site's own data."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flctl.campaign.workspace import Workspace
from flctl.cli.moving import find
from flctl.cli.output import Grid, print_json

if TYPE_CHECKING:
    from flctl.campaign.matrix import History
    from flctl.policy.scores import Score

HOLE = "-"


def register(app: typer.Typer) -> None:
    app.command()(history)


def history(
    context: typer.Context,
    trained: Annotated[
        bool, typer.Option("--trained", help="Also each site's own model, as it was after training there.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show loss and perplexity of each model on each site's own data, and the best one. Reads records only."""
    from flctl.campaign.matrix import history_of

    workspace = find(context.obj)
    found = history_of(workspace)
    if json:
        print_json("history", status="ok", exit_code=0, data=_data(workspace, found))
        return
    _table(found).show()
    if trained and found.trained:
        print()
        _trained_table(found).show()
    _print_notes(workspace, found)


def _data(workspace: Workspace, found: "History") -> dict[str, Any]:
    from flctl.policy.scores import perplexity_of

    plan, models = workspace.plan(), []
    for model in found.models:
        mean = found.means.get(model.version)
        models.append(
            {
                "version": model.version,
                "sha256": model.sha256,
                "rolled_back_to": model.rolled_back_to,
                "mean_loss": mean,
                "mean_perplexity": None if mean is None else perplexity_of(mean),
                "sites": _rows(found.scores.get(model.version, {})),
                "trained": _rows(found.trained.get(model.version, {})),
            }
        )
    return {
        "best": found.best,
        "mean_over": found.sites,
        "ended": plan.ended if plan else "",
        "lacking": found.lacking,
        "models": models,
    }


def _rows(row: "dict[str, Score]") -> dict[str, dict[str, Any]]:
    return {
        site: {
            "loss": score.loss,
            "perplexity": score.perplexity,
            "tokens": score.tokens,
            "run": score.number,
            "inherited": score.inherited,
        }
        for site, score in sorted(row.items())
    }


def _table(found: "History") -> Grid:
    from flctl.policy.scores import perplexity_of

    grid = Grid(("model", *found.columns, "mean", ""), title="loss (perplexity) of each model on each site's own data")
    for model in found.models:
        row, mean = found.scores.get(model.version, {}), found.means.get(model.version)
        notes = ["best"] if model.version == found.best else []
        if model.rolled_back_to is not None:
            notes.append(f"the weights of {model.rolled_back_to:04d}")
        grid.add(
            f"{model.version:04d}",
            *(_cell(row.get(site)) for site in found.columns),
            HOLE if mean is None else _pair(mean, perplexity_of(mean)),
            ", ".join(notes),
        )
    return grid


def _trained_table(found: "History") -> Grid:
    title = "the same of each site's own model, after training there, on its own data"
    grid = Grid(("for model", *found.columns), title=title)
    for version, row in sorted(found.trained.items()):
        grid.add(f"{version:04d}", *(_cell(row.get(site)) for site in found.columns))
    return grid


def _cell(score: "Score | None") -> str:
    return HOLE if score is None else _pair(score.loss, score.perplexity)


def _pair(loss: float, perplexity: float) -> str:
    return f"{loss:.4f} ({perplexity:.2f})" if perplexity < 1e6 else f"{loss:.4f} ({perplexity:.2g})"


def _print_notes(workspace: Workspace, found: "History") -> None:
    plan, newest = workspace.plan(), found.models[-1].version
    if found.sites:
        print(f"mean: the plain mean of the losses at {', '.join(found.sites)}; the perplexity is its exponential")
    if plan is not None and plan.ended:
        print(f"the last plan ended at model {plan.target:04d}: {plan.ended}")
    if found.lacking and not any(run.open for run in workspace.runs()):
        print(f"model {newest:04d} is not evaluated at {', '.join(found.lacking)} yet; the next round does it")
        print(f"  -> now: flctl evaluate {' '.join(found.lacking)}")
