"""The four DOE machines scaled down: 14 made-up chemistry tasks, split by group over two PBS sites and two others.

    python -m examples.doe.scaled [--rounds 8] [--steps 25] [--slurm] [--readme]

The PBS is the double of tests/pbs_double, which answers like OpenPBS 23.06 and really runs the jobs. `--slurm`: the two
others are the testbed's facilities (real sshd and Slurm; needs root), else they have no scheduler. `--readme`: the
table goes into README.md as well."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.doe.tasks import GROUPS, write_group
from examples.running import (
    Clock,
    LocalCampaign,
    TestbedCampaign,
    local_site,
    markdown,
    parameters,
    perplexities,
    report,
)

HERE = Path(__file__).parent
SITES = {"polaris": "names", "aurora": "properties", "frontier": "descriptions", "perlmutter": "reactions"}
PBS = ("polaris", "aurora")
STANDS_FOR = {"frontier": "leonardo", "perlmutter": "karolina"}  # of the testbed


def main(words: Sequence[str] | None = None) -> None:
    from tests.pbs_double import PbsServer

    asked = options(words)
    out = (asked.out or Path(tempfile.mkdtemp(prefix="flctl-doe-"))).resolve()
    with tempfile.TemporaryDirectory(prefix="flctl-pbs-") as folder, PbsServer(_open(folder), name="alcf") as pbs:
        if asked.slurm:
            from tests.testbed import Testbed

            bed = Testbed()
            bed.lock()
            try:
                bed.up()
                place = on_testbed(bed, pbs, out, asked)
            finally:
                bed.down()
        else:
            place = on_this_machine(pbs, out, asked)
    print(f"campaign: {place}")


def _open(folder: str) -> Path:
    Path(folder).chmod(0o755)
    return Path(folder)


def options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--records", type=int, default=400, help="of each task")
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--out", type=Path, help="a new folder; default: a temporary one")
    return parser.parse_args(words)


def on_this_machine(pbs: Any, out: Path, asked: argparse.Namespace) -> Path:
    profiles = []
    for name, group in SITES.items():
        profiles.append(local_site(out, name, f"chemistry: {group}", pbs=name in PBS))
        write_group(group, out / name / "data" / f"{group}.jsonl", seed=42, records=asked.records)
    campaign = LocalCampaign(out / "campaign", pbs.env())
    campaign.init(profiles, start(out), HERE / "scaled.toml")
    return run(campaign, asked, "two sites behind one PBS (the double), two without a scheduler")


def on_testbed(bed: Any, pbs: Any, out: Path, asked: argparse.Namespace) -> Path:
    from tests.testbed.python import PYTHON

    campaign = TestbedCampaign(bed, "doe", {"PATH": f"{pbs.bin}:/usr/bin:/bin"})
    profiles = {}
    for name, group in SITES.items():
        write_group(group, out / f"{group}.jsonl", seed=42, records=asked.records)
        text = (out / f"{group}.jsonl").read_text()
        if name in PBS:
            profile = local_site(campaign.folder, name, f"chemistry: {group}", pbs=True, python=PYTHON)
            (campaign.folder / name / "data" / f"{group}.jsonl").write_text(text)
            profiles[name] = profile.read_text()
        else:
            facility = bed.facilities[STANDS_FOR[name]]
            data = facility.account.file(facility.home / f"{group}.jsonl", text)
            profiles[name] = bed.profile_toml(STANDS_FOR[name], name=name, storage={"data": str(data)})
    campaign.init(profiles, start(out), HERE / "scaled.toml")
    return run(campaign, asked, "two sites behind one PBS (the double), two Slurm clusters behind sshd")


def start(out: Path) -> Path:
    from flctl.model.tiny import write_tiny_model

    write_tiny_model(out / "start", seed=42)
    return out / "start"


def run(campaign: LocalCampaign | TestbedCampaign, asked: argparse.Namespace, what: str) -> Path:
    clock = Clock()
    campaign.flctl("round", "--sites", ",".join(SITES), "--steps", str(asked.steps), "--rounds", str(asked.rounds))
    size = parameters(campaign.place / "models" / "0000")
    tasks = sum(len(GROUPS[group]) for group in SITES.values())
    caption = (
        f"{size:,} parameters, {tasks} tasks of {asked.records} records, {asked.rounds} rounds of {asked.steps} steps; "
        f"{what}; {clock} in all. Perplexity per byte on the text that each site keeps for validation:"
    )
    rows = perplexities(campaign.place, list(SITES), asked.rounds)
    columns = ["model", *(f"{group} ({site})" for site, group in SITES.items())]
    report(HERE / "README.md" if asked.readme else None, [caption, "", *markdown(columns, rows)])
    return campaign.place


if __name__ == "__main__":
    main()
