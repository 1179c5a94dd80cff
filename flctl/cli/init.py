"""`flctl init`: make a campaign."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(init)


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the campaign.")],
    sites: Annotated[list[str], typer.Option("--sites", help="Shipped profiles by name, or paths: a b | a,b.")],
    model: Annotated[Path, typer.Option("--model", help="A Hugging Face folder with safetensors weights.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="The campaign's seed.")] = 0,
    settings: Annotated[
        Path | None, typer.Option("--settings", metavar="FILE", help="A flctl.toml to begin with; its id is made new.")
    ] = None,
) -> None:
    """Make a campaign: flctl.toml, site profiles, job templates, model 0000. Never overwrites."""
    from flctl.campaign.creation import create, unfilled
    from flctl.campaign.profiles import texts_of
    from flctl.campaign.settings import Settings

    wanted = None if settings is None else Settings(settings)
    seed = seed or (wanted.seed if wanted else 0)
    workspace = create(folder, profiles=texts_of(sites), model=model, seed=seed)
    if wanted is not None:
        wanted.apply(workspace)
    print(f"campaign {workspace.label} is in {workspace.root}")
    gaps = unfilled(workspace)
    if gaps:
        print("fill in:")
    for site, keys in gaps.items():
        print(f"  {workspace.root / 'sites' / (site + '.toml')}: {', '.join(keys)}")
    print(f"then type:\n  cd {workspace.root}\n  flctl site test\n  flctl plan\n  flctl round")
