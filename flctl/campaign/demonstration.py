"""Owns the demo's campaign: two local sites with a private corpus each, and the matrix of what their models know."""

from pathlib import Path

from flctl.campaign.corpora import write_corpus
from flctl.campaign.creation import create
from flctl.campaign.workspace import Workspace
from flctl.errors import ConfigurationError
from flctl.policy.evaluating import contribution_name
from flctl.policy.view import View
from flctl.records import Run

LANGUAGES = {"italy": "italian", "czechia": "czech"}
TRAIN = {"steps": 40, "lr": 5e-3, "batch": 16, "sequence_length": 128, "threads": 1}

PROFILE = """\
schema = 1
name = "{name}"
title = "{language} text, on this machine"
connection = "local"

[scheduler]
kind = "local"
shape = "small"

[shapes.small]
walltime = "00:10:00"

[storage]
work = "{work}"
data = "{data}"

[environment]
python = "{python}"
seal_python = "{python}"

[poll]
every = 1
"""


def build(folder: Path, *, python: str, seed: int) -> Workspace:
    """A campaign in `folder`/campaign and two sites in `folder`/<site>, each with its corpus. `python` trains there."""
    from flctl.model.tiny import write_tiny_model

    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(
            f"{folder} exists and is no empty folder",
            hint=f"name another one; flctl -C {folder}/campaign round goes on with an interrupted demo",
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    profiles = {}
    for name, language in LANGUAGES.items():
        home = folder / name
        write_corpus(language, home / "data", seed=seed)
        profiles[name] = PROFILE.format(
            name=name, language=language.capitalize(), work=home / "work", data=home / "data", python=python
        )
    write_tiny_model(folder / "start", seed=seed)
    return create(folder / "campaign", profiles=profiles, model=folder / "start", seed=seed, train=TRAIN, cross=True)


def matrix(workspace: Workspace, version: int) -> dict[str, dict[str, float]]:
    """Perplexity by site (its language) and model, for the round that made `version`. Each number was measured by the
    site that holds the text."""
    return {site: _row(workspace, site, version) for site in LANGUAGES}


def _row(workspace: Workspace, site: str, version: int) -> dict[str, float]:
    trained, looked = _runs(workspace, site, version)
    own, seen = _scores(trained), _scores(looked)
    row = {f"global {version - 1:04d}": own["base"]}
    for other in LANGUAGES:
        theirs, _ = _runs(workspace, other, version)
        row[f"{other}'s own"] = own["trained"] if other == site else seen[contribution_name(theirs)]
    row[f"global {version:04d}"] = seen[f"{version:04d}"]
    return row


def _runs(workspace: Workspace, site: str, version: int) -> tuple[Run, Run]:
    plan = workspace.plan()
    if plan is None:
        raise ValueError("the demo has no plan")
    view = View(plan=plan, models=workspace.models(), runs=workspace.runs())
    trained, looked = view.train_run(site, version), view.evaluate_run(site, version)
    if trained is None or looked is None:
        raise ValueError(f"{site} has not evaluated model {version}")
    return trained, looked


def _scores(run: Run) -> dict[str, float]:
    given = run.contribution
    return {} if given is None else {name: row["perplexity"] for name, row in given.metrics["evaluation"].items()}


def verdict(workspace: Workspace) -> list[str]:
    """What the last round shows, in words; each claim is compared, not assumed."""
    version = workspace.newest_model().version
    rows, start = matrix(workspace, version), matrix(workspace, 1)
    lines = []
    for site in LANGUAGES:
        final = rows[site][f"global {version:04d}"]
        other = next(name for name in LANGUAGES if name != site)
        for what, rival in (
            (f"{other}'s own model", rows[site][f"{other}'s own"]),
            ("the starting model", start[site]["global 0000"]),
        ):
            relation = "beats" if final < rival else "DOES NOT beat"
            lines.append(
                f"On {LANGUAGES[site]} text the global model {relation} {what}: {final:.2f} against {rival:.2f}."
            )
    return lines
