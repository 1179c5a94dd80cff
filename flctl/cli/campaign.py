"""`flctl campaign start | tick | cron`: a campaign that moves without anybody watching."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from flctl.cli.moving import find, moving
from flctl.cli.output import print_failures, print_json, say, unheard

app = typer.Typer(
    help="Campaigns that run for weeks: a plan, and ticks from cron.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def start(
    context: typer.Context,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How many new models.")],
    sites: Annotated[list[str] | None, typer.Option("--sites", help="Sites: a b | a,b | all.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimizer steps of each run.")] = None,
) -> None:
    """Write the plan. Ticks move it; nothing is contacted now."""
    from flctl.campaign.config import load_configuration
    from flctl.campaign.outlook import brief
    from flctl.campaign.planning import open_plan

    workspace = find(context.obj)
    plan = open_plan(workspace, sites or [], rounds, steps)
    print(f"plan: models {plan.first:04d} to {plan.target:04d} by {', '.join(plan.sites)}")
    for line in brief(workspace, load_configuration(workspace), plan):
        print(f"  {line}")
    print("-> flctl campaign tick, or put it into cron: flctl campaign cron")


@app.command()
def tick(
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Move the campaign as far as it goes without waiting, and exit."""
    from flctl.campaign.report import progress
    from flctl.campaign.rounds import tick_outcome

    workspace = find(context.obj)
    with moving(workspace, (lambda line: None) if json else say, "campaign tick" if json else "") as engine:
        outcome = tick_outcome(engine, engine.tick())
    if json:
        data = progress(workspace, done=outcome.done)
        print_json(
            "campaign tick",
            status=outcome.status,
            exit_code=outcome.exit_code,
            data=data,
            errors=[*outcome.errors, *outcome.notes],
        )
    else:
        with unheard():
            print_failures([*outcome.errors, *outcome.notes])
            if outcome.done:
                print("nothing to do: no plan is open")
    raise typer.Exit(outcome.exit_code)


@app.command()
def cron(
    context: typer.Context,
    minutes: Annotated[int, typer.Option("--every", min=1, max=59, help="Minutes between ticks.")] = 5,
) -> None:
    """Print the crontab line and the systemd timer that move this campaign."""
    from flctl.campaign.schedule import crontab_line, systemd_units

    workspace = find(context.obj)
    called = Path(sys.argv[0]).resolve()
    program = [str(called)] if os.access(called, os.X_OK) else [sys.executable, "-m", "flctl.cli.main"]
    # Which codes and logins were used is kept there: a tick that looked elsewhere would know nothing of ours.
    if (state := os.environ.get("XDG_STATE_HOME", "")).startswith("/"):
        program = ["/usr/bin/env", f"XDG_STATE_HOME={state}", *program]
    print(f"# crontab -e\n{crontab_line(program, workspace.root, minutes)}")
    for name, text in systemd_units(program, workspace.root, workspace.label, minutes).items():
        print(f"\n# ~/.config/systemd/user/{name}\n{text}", end="")
    timer = f"flctl-{workspace.label}.timer"
    print(f"\n# then: systemctl --user daemon-reload; systemctl --user enable --now {timer}; loginctl enable-linger")
