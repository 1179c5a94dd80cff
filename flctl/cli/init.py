"""`flctl init`: make a campaign."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flctl.cli.bar import shown
from flctl.errors import UsageError

if TYPE_CHECKING:
    from flctl.model.lora import Lora


def register(app: typer.Typer) -> None:
    app.command()(init)


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the campaign.")],
    sites: Annotated[list[str], typer.Option("--sites", help="Shipped profiles by name, or paths: a b | a,b.")],
    model: Annotated[Path, typer.Option("--model", help="A Hugging Face folder with safetensors weights.")],
    lora: Annotated[
        str | None,
        typer.Option(
            "--lora",
            metavar="KEY=VALUE,...",
            help="Train a fresh LoRA adapter; the model stays frozen: r=8,alpha=32,targets=q_proj+v_proj,dropout=0.0",
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="Go on with a LoRA adapter of the model.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The campaign's seed.")] = 0,
    trainer: Annotated[
        Path | None, typer.Option("--trainer", help="A program of yours, NAME.py, that trains in place of train.py.")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option("--settings", metavar="FILE", help="A flctl.toml to begin with; its id is made new.")
    ] = None,
) -> None:
    """Make a campaign: flctl.toml, site profiles, job templates, model 0000. Never overwrites."""
    from flctl.campaign.creation import create, unfilled
    from flctl.campaign.profiles import texts_of
    from flctl.campaign.settings import Settings

    if lora is not None and adapter is not None:
        raise UsageError("--lora makes a new adapter, --adapter goes on with one", hint="give one of the two")
    begin: Lora | Path | None = adapter
    if lora is not None:
        from flctl.model.lora import parsed

        begin = parsed(lora)
    wanted = None if settings is None else Settings(settings)
    seed = seed or (wanted.seed if wanted else 0)
    profiles = texts_of(sites)
    with shown() as tell:
        workspace = create(folder, profiles=profiles, model=model, seed=seed, trainer=trainer, adapter=begin, told=tell)
    if wanted is not None:
        wanted.apply(workspace)
    print(f"campaign {workspace.label} is in {workspace.root}")
    gaps = unfilled(workspace)
    if gaps:
        print("fill in:")
    for site, keys in gaps.items():
        print(f"  {workspace.root / 'sites' / (site + '.toml')}: {', '.join(keys)}")
    print(f"then type:\n  cd {workspace.root}\n  flctl site test\n  flctl plan\n  flctl round")
