"""APPFL's LLaMA 2 case scaled down: a LoRA adapter of a tiny Llama, four clients unlike each other, federated against
pooled against local.

    python -m examples.appfl.scaled [--rounds 5] [--steps 12] [--slurm] [--readme]

Six campaigns of the same tool: one of four sites; one of a single site that has all the data and makes as many steps as
the four together; and each client alone. `--slurm`: two of the four are the testbed's Slurm facilities (needs root),
else all are plain sites of this machine. `--readme`: the table goes into README.md as well."""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.appfl.base import score, write_base
from examples.appfl.task import alpaca, records, write_lines
from examples.running import Clock, LocalCampaign, TestbedCampaign, local_site, markdown, parameters, report

HERE = Path(__file__).parent
CLIENTS = ("delta", "perlmutter", "gpu1", "gpu2")
STANDS_FOR = {"delta": "leonardo", "perlmutter": "karolina"}  # of the testbed
LORA = ("--lora", "r=8,alpha=32,targets=q_proj+v_proj")
PARTITION = ("--by", "label", "--alpha-size", "8", "--alpha-class", "2", "--seed", "42")
SEED = 42
TEST = 60  # records that no client has


def main(words: Sequence[str] | None = None) -> None:
    asked = options(words)
    out = (asked.out or Path(tempfile.mkdtemp(prefix="flctl-appfl-"))).resolve()
    if not asked.slurm:
        compare(out, asked, federated_here(out, asked))
        return
    from tests.testbed import Testbed

    bed = Testbed()
    bed.lock()
    try:
        bed.up()
        compare(out, asked, federated_on_testbed(bed, out, asked))
    finally:
        bed.down()


def options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--base-steps", type=int, default=150, help="of the base model's own training")
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--out", type=Path, help="a new folder; default: a temporary one")
    return parser.parse_args(words)


def prepare(out: Path, asked: argparse.Namespace) -> Mapping[str, Path]:
    """Make the base model, the dataset and its partition; the clients' files by name, and all of it as `pooled`."""
    train = records(asked.records, SEED)
    write_lines(out / "cb" / "train.jsonl", train)
    pooled = write_lines(out / "alpaca.jsonl", [alpaca(record) for record in train])
    write_base(out / "base", seed=SEED, steps=asked.base_steps)
    LocalCampaign(out).flctl("partition", str(pooled), "--clients", *CLIENTS, *PARTITION, "--out", str(out / "parts"))
    return {"pooled": pooled, **{name: out / "parts" / f"{name}.jsonl" for name in CLIENTS}}


def site(folder: Path, name: str, data: Path, **options: Any) -> Path:
    profile = local_site(folder, name, f"{name}'s part", **options)
    (folder / name / "data" / data.name).write_bytes(data.read_bytes())
    return profile


def train(campaign: LocalCampaign | TestbedCampaign, asked: argparse.Namespace, steps: int) -> Path:
    campaign.flctl("round", "--steps", str(steps), "--rounds", str(asked.rounds))
    return campaign.place / "models"


def federated_here(out: Path, asked: argparse.Namespace) -> Path:
    parts = prepare(out, asked)
    campaign = LocalCampaign(out / "federated")
    profiles = [site(out / "sites", name, parts[name]) for name in CLIENTS]
    campaign.init(profiles, out / "base", HERE / "scaled.toml", *LORA)
    return train(campaign, asked, asked.steps)


def federated_on_testbed(bed: Any, out: Path, asked: argparse.Namespace) -> Path:
    from tests.testbed.python import PYTHON

    parts = prepare(out, asked)
    campaign = TestbedCampaign(bed, "appfl")
    profiles = {}
    for name in CLIENTS:
        if name in STANDS_FOR:
            facility = bed.facilities[STANDS_FOR[name]]
            data = facility.account.file(facility.home / f"{name}.jsonl", parts[name].read_text())
            profiles[name] = bed.profile_toml(STANDS_FOR[name], name=name, storage={"data": str(data)})
        else:
            profiles[name] = site(campaign.folder, name, parts[name], python=PYTHON).read_text()
    campaign.init(profiles, out / "base", HERE / "scaled.toml", *LORA)
    return train(campaign, asked, asked.steps)


def alone(out: Path, name: str, data: Path, asked: argparse.Namespace, steps: int) -> Path:
    """The models of a campaign of one site."""
    campaign = LocalCampaign(out / f"alone-{name}")
    campaign.init([site(out / "alone", name, data)], out / "base", HERE / "scaled.toml", *LORA)
    return train(campaign, asked, steps)


def compare(out: Path, asked: argparse.Namespace, federated: Path) -> None:
    """Score every final adapter on the records that no client has."""
    clock = Clock()
    parts = {"pooled": out / "alpaca.jsonl", **{name: out / "parts" / f"{name}.jsonl" for name in CLIENTS}}
    test = [alpaca(record) for record in records(TEST, SEED + 1)]
    models: dict[str, Path | None] = {"base, no adapter": None}
    for version in range(1, asked.rounds + 1):
        models[f"federated, round {version}"] = federated / f"{version:04d}"
    last = f"{asked.rounds:04d}"
    models["pooled"] = alone(out, "pooled", parts["pooled"], asked, asked.steps * len(CLIENTS)) / last
    for name in CLIENTS:
        models[f"local: {name} alone"] = alone(out, name, parts[name], asked, asked.steps) / last
    rows: list[list[object]] = []
    for name, adapter in models.items():
        right, loss = score(out / "base", adapter, test)
        rows.append([name, f"{right:.3f}", f"{loss:.3f}"])
    sizes = ", ".join(f"{name} {len(parts[name].read_text().splitlines())}" for name in CLIENTS)
    caption = (
        f"{parameters(out / 'base'):,} parameters and a LoRA adapter of {parameters(federated / '0000'):,}; "
        f"{asked.records} records ({sizes}); {asked.rounds} rounds of {asked.steps} steps of 4 records "
        f"(pooled: {asked.steps * len(CLIENTS)}); pooled and local took {clock}. On {TEST} records that no client has:"
    )
    columns = ["adapter", "right answers", "loss per token of the answer"]
    report(HERE / "README.md" if asked.readme else None, [caption, "", *markdown(columns, rows)])


if __name__ == "__main__":
    main()
