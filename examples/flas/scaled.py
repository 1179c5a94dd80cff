"""FLaS scaled down: a Llama of a few million parameters, Italian at one site and Czech at the other.

    python -m examples.flas.scaled [--rounds 5] [--steps 40] [--slurm] [--readme]

The texts are Debian's Italian and Czech manual pages where they can be had, else those that `flctl demo` makes up.
`--slurm`: the sites are the testbed's two facilities (real sshd, one-time codes and Slurm; needs root), else plain ones
of this machine. `--readme`: the table goes into README.md as well."""

import argparse
import gzip
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
SITES = {"leonardo": ("it", "italian"), "karolina": ("cs", "czech")}
LIMIT = 300_000  # bytes of text per site


def main(words: Sequence[str] | None = None) -> None:
    asked = options(words)
    out = (asked.out or Path(tempfile.mkdtemp(prefix="flctl-flas-"))).resolve()
    if asked.slurm:
        from tests.testbed import Testbed

        bed = Testbed()
        bed.lock()
        try:
            bed.up()
            place = on_testbed(bed, out, asked)
        finally:
            bed.down()
    else:
        place = on_this_machine(out, asked)
    print(f"campaign: {place}")


def options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--out", type=Path, help="a new folder; default: a temporary one")
    return parser.parse_args(words)


def on_testbed(bed: Any, out: Path, asked: argparse.Namespace) -> Path:
    campaign = TestbedCampaign(bed, "flas")
    campaign.init({name: bed.profile_toml(name) for name in SITES}, start(out, asked), HERE / "scaled.toml")
    return run(
        campaign, asked, "Debian's manual pages; two Slurm clusters behind sshd, one of them with one-time codes"
    )


def on_this_machine(out: Path, asked: argparse.Namespace) -> Path:
    profiles = [local_site(out, name, f"{language} text") for name, (_, language) in SITES.items()]
    texts = {put_text(*SITES[name], out / name / "data") for name in SITES}
    campaign = LocalCampaign(out / "campaign")
    campaign.init(profiles, start(out, asked), HERE / "scaled.toml")
    return run(campaign, asked, f"{', '.join(sorted(texts))}; two sites without a scheduler")


def start(out: Path, asked: argparse.Namespace) -> Path:
    from flctl.model.tiny import write_tiny_model

    write_tiny_model(out / "start", seed=42, width=asked.width, layers=asked.layers)
    return out / "start"


def put_text(short: str, language: str, folder: Path) -> str:
    """Debian's manual pages, or made-up text; says which."""
    from flctl.campaign.corpora import write_corpus
    from tests.testbed.procs import TestbedError
    from tests.testbed.texts import pages, plain

    try:
        sources = pages(short)
    except (TestbedError, OSError):
        write_corpus(language, folder, seed=42)
        return "made-up text (for Debian's: apt-get install manpages-it manpages-cs)"
    size = 0
    for path in sources:
        text = plain(gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")).encode()
        if 500 <= len(text) <= LIMIT - size:
            (folder / f"{path.stem}.txt").write_bytes(text)
            size += len(text)
    return "Debian's manual pages"


def run(campaign: LocalCampaign | TestbedCampaign, asked: argparse.Namespace, what: str) -> Path:
    clock = Clock()
    campaign.flctl("round", "--sites", "leonardo,karolina", "--steps", str(asked.steps), "--rounds", str(asked.rounds))
    size = parameters(campaign.place / "models" / "0000")
    caption = (
        f"{size:,} parameters, {asked.rounds} rounds of {asked.steps} steps; {what}; {clock} in all. "
        "Perplexity per byte on the text that each site keeps for validation:"
    )
    rows = perplexities(campaign.place, list(SITES), asked.rounds)
    lines = markdown(["model", "Italian (leonardo)", "Czech (karolina)"], rows)
    report(HERE / "README.md" if asked.readme else None, [caption, "", *lines])
    return campaign.place


if __name__ == "__main__":
    main()
