"""Privacy in a campaign: what is spent is stated as dp-accounting counts it, limits hold, seeds stay at home."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, get_epsilon_gaussian
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from safetensors.numpy import load_file

from flctl.campaign.config import PrivacyTable, load_configuration
from flctl.campaign.journal import Journal
from flctl.campaign.merging import model_record
from flctl.campaign.privacy import allowed, check_plan, epsilon, line, multipliers, outlook, privacy_settings
from flctl.campaign.workspace import Workspace, write_json
from flctl.errors import BudgetRefused, ConfigurationError
from tests.campaigns import Campaign
from tests.test_campaign_merging import contributions, record, weights

ON = "[privacy]\nclip = 0.5\nnoise_multiplier = 1.0\n"


def campaign_folder(root: Path, text: str, spent: tuple[float | None, ...] = ()) -> Workspace:
    """A campaign's records alone, with a model for each of these noise multipliers (None: made without privacy)."""
    root.mkdir(exist_ok=True)
    (root / "flctl.toml").write_text(f'[campaign]\nname = "c"\nid = "00000000"\n{text}')
    for version, multiplier in enumerate((0.0, *spent)):
        facts: dict[str, Any] = {"parents": [{"version": version - 1}] if version else []}
        facts["contributions"] = [{"site": "brno", "number": version}] if version else []
        facts["privacy"] = None if multiplier is None or not version else {"noise_multiplier": multiplier}
        write_json(root / "models" / f"{version:04d}" / "flctl.json", model_record(version=version, files=(), **facts))
    return Workspace(root)


# What is spent


def test_one_merge_spends_what_the_analytic_gaussian_mechanism_says() -> None:
    """Balle and Wang 2018: the epsilon for which Phi(1/2s - es) - e^e Phi(-1/2s - es) is delta, with s = z."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    for multiplier, known in ((1.0, 4.377178), (2.0, 1.993091), (10.0, 0.340669)):
        found = epsilon([multiplier], 1e-5)
        assert found == pytest.approx(known, abs=1e-6)
        assert found == get_epsilon_gaussian(multiplier, 1e-5)
        half = 1 / (2 * multiplier)
        delta = phi(half - found * multiplier) - math.exp(found) * phi(-half - found * multiplier)
        assert delta == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize("spent", [(1.0,) * 8, (0.8, 1.5, 3.0, 1.5), (4.0, 0.6)])
def test_merges_together_spend_what_dp_accounting_composes(spent: tuple[float, ...]) -> None:
    tight, moments = PLDAccountant(), RdpAccountant()
    for multiplier in spent:
        tight.compose(GaussianDpEvent(multiplier))
        moments.compose(GaussianDpEvent(multiplier))
    found = epsilon(spent, 1e-5)
    assert found == pytest.approx(tight.get_epsilon(1e-5), rel=1e-6)
    assert found <= moments.get_epsilon(1e-5)
    assert found == epsilon(spent[::-1], 1e-5)


def test_each_merge_spends_more_and_less_noise_spends_more() -> None:
    totals = [epsilon([1.3] * count, 1e-6) for count in range(6)]
    assert totals[0] == 0
    assert totals == sorted(set(totals))
    assert epsilon([1.3, 1.3, 0.5], 1e-6) > totals[3] > epsilon([1.3, 1.3, 9.0], 1e-6)
    assert epsilon([1.3], 1e-9) > epsilon([1.3], 1e-6)


@pytest.mark.parametrize("limit", [0.1, 4.377, 4.3772, 10.0, 50.0])
def test_as_many_merges_are_allowed_as_stay_within_the_limit(limit: float) -> None:
    table = PrivacyTable(clip=1.0, noise_multiplier=1.0, epsilon=limit)
    for before in ((), (2.0, 3.0)):
        count = allowed(before, table)
        assert count == 0 or epsilon((*before, *[1.0] * count), 1e-5) <= limit
        assert epsilon((*before, *[1.0] * (count + 1)), 1e-5) > limit


def test_noise_may_change_between_models_and_each_counts_as_it_was(tmp_path: Path) -> None:
    workspace = campaign_folder(tmp_path, ON, (2.0, 0.7, 1.0))
    assert multipliers(workspace, 3) == {1: 2.0, 2: 0.7, 3: 1.0}
    assert multipliers(workspace, 1) == {1: 2.0}
    told = privacy_settings(workspace, 3, load_configuration(workspace))
    assert told is not None
    assert told["epsilon"] == epsilon((2.0, 0.7, 1.0, 1.0), 1e-5)
    assert (told["limit"], told["allows"]) == (None, None)
    assert told["seed"] != privacy_settings(workspace, 3, load_configuration(workspace))["seed"]  # type: ignore[index]


@pytest.mark.parametrize("without", [None, 0.0])
def test_one_merge_without_noise_ends_every_guarantee(without: float | None, tmp_path: Path) -> None:
    workspace = campaign_folder(tmp_path, ON, (2.0, without))
    told = outlook(workspace, load_configuration(workspace), 2, 1)
    assert told is not None
    assert told["epsilon"] is None
    assert "no privacy guarantee" in line(told)
    workspace = campaign_folder(tmp_path, ON + "epsilon = 8.0\n", (2.0, without))
    with pytest.raises(BudgetRefused, match="model 0002 was made without noise"):
        check_plan(workspace, load_configuration(workspace), 2, 1)


def test_clipping_alone_is_no_guarantee_and_needs_no_seed(tmp_path: Path) -> None:
    workspace = campaign_folder(tmp_path, "[privacy]\nclip = 2.0\n")
    told = privacy_settings(workspace, 0, load_configuration(workspace))
    assert told is not None
    assert (told["epsilon"], told["seed"]) == (None, "")
    assert "no privacy guarantee" in line(told)


# What is refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[privacy]\nnoise_multiplier = 1.0", "noise_multiplier means nothing without privacy.clip"),
        ("[privacy]\nepsilon = 1.0", "epsilon means nothing without privacy.clip"),
        ("[privacy]\nclip = 1.0\nepsilon = 1.0", "cannot be kept without noise"),
        ("[privacy]\nclip = inf", "clip"),
        ("[privacy]\nclip = nan", "clip"),
        ("[privacy]\nclip = 1.0\nnoise_multiplier = 1e-200", "hides nothing"),
        (ON + "epsilon = inf", "epsilon"),
        (ON + "delta = 0.0", "delta must lie between"),
        (ON + "delta = 1.0", "delta must lie between"),
        (ON + "[evaluation]\ncross = true", "evaluation.cross sends each contribution"),
        (ON + '[gates]\nnorm = "refuse"', "gates.norm"),
        (ON + '[gates]\ncosine = "refuse"', "gates.cosine"),
    ],
)
def test_what_contradicts_privacy_is_no_configuration(text: str, words: str, tmp_path: Path) -> None:
    workspace = campaign_folder(tmp_path, text)
    with pytest.raises(ConfigurationError, match=words) as caught:
        load_configuration(workspace)
    assert str(tmp_path / "flctl.toml") in caught.value.hint


@pytest.mark.parametrize("text", ["", '[gates]\nnorm = "refuse"\n[evaluation]\ncross = true', "[privacy]\nclip = 1.0"])
def test_without_noise_nothing_else_is_forbidden(text: str, tmp_path: Path) -> None:
    workspace = campaign_folder(tmp_path, text)
    check_plan(workspace, load_configuration(workspace), 0, 5)


def test_a_rule_that_cannot_be_private_is_refused_with_the_plan(tmp_path: Path) -> None:
    workspace = campaign_folder(tmp_path, f'{ON}[aggregation]\nrule = "median"')
    with pytest.raises(ConfigurationError, match=r"rule median .* cannot be private"):
        check_plan(workspace, load_configuration(workspace), 0, 1)


def test_a_plan_is_held_to_the_limit(tmp_path: Path) -> None:
    workspace = campaign_folder(tmp_path, ON + "epsilon = 8.0\n", (1.0,))
    configuration = load_configuration(workspace)
    check_plan(workspace, configuration, 1, 1)
    with pytest.raises(BudgetRefused, match="allows 1 more model") as caught:
        check_plan(workspace, configuration, 1, 2)
    assert "flctl round --rounds 1" in caught.value.hint
    told = outlook(workspace, configuration, 1, 1)
    assert told is not None
    assert line(told) == "epsilon 6.573 at delta 1e-05; the limit of 8 allows no more models"
    workspace = campaign_folder(tmp_path, ON + "epsilon = 8.0\n", (1.0, 1.0))
    with pytest.raises(BudgetRefused, match="allows no more models") as caught:
        privacy_settings(workspace, 2, configuration)
    assert "--rounds" not in caught.value.hint


# A whole campaign


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """Two private rounds; to be looked at only."""
    campaign = Campaign(tmp_path_factory.mktemp("private"))
    campaign.profile("pisa", samples=30)
    campaign.set("[policy]", ON + "epsilon = 7.0\n[policy]")
    campaign.json("round", "--rounds", "2")
    return campaign


def test_the_models_are_the_clipped_sum_with_noise_of_the_stated_size(made: Campaign) -> None:
    for version in (1, 2):
        told = record(made.place, version)
        base, model = (
            weights(made.place / "models" / f"{version - 1:04d}"),
            weights(made.place / "models" / f"{version:04d}"),
        )
        given = contributions(made.place, version)
        norms = [math.sqrt(sum(((x[name] - base[name]) ** 2).sum() for name in base)) for _, x in given]
        assert [item["scale"] for item in told["contributions"]] == pytest.approx([min(1, 0.5 / n) for n in norms])
        clipped = {
            name: base[name]
            + sum(p * min(1, 0.5 / n) * (x[name] - base[name]) for (p, x), n in zip(given, norms, strict=True))
            for name in base
        }
        drawn = np.concatenate([(model[name] - clipped[name]).ravel() for name in base])
        assert drawn.std() == pytest.approx(1.0 * 0.5 * 0.75, rel=4 / math.sqrt(2 * drawn.size))


def test_records_state_what_is_spent(made: Campaign) -> None:
    first, second = (record(made.place, version)["privacy"] for version in (1, 2))
    assert first["epsilon"] == epsilon([1.0], 1e-5)
    assert second["epsilon"] == epsilon([1.0, 1.0], 1e-5)
    assert (first["allows"], second["allows"]) == (1, 0)
    assert {key: second[key] for key in ("clip", "noise_multiplier", "relation", "delta", "limit")} == {
        "clip": 0.5,
        "noise_multiplier": 1.0,
        "relation": "zero-out",
        "delta": 1e-5,
        "limit": 7.0,
    }
    assert len(bytes.fromhex(first["seed"])) == 32
    assert first["seed"] != second["seed"]
    (last,) = [entry for entry in made.journal() if entry["event"] == "model" and entry["version"] == 2]
    assert last["privacy"]["epsilon"] == second["epsilon"]


def test_people_are_told_what_is_spent(made: Campaign) -> None:
    said = "privacy: epsilon 6.573 at delta 1e-05; the limit of 7 allows no more models"
    assert said in made.flctl("status").stdout
    told = made.json("status")["data"]["model"]["privacy"]
    assert told["epsilon"] == record(made.place, 2)["privacy"]["epsilon"]
    assert "seed" not in told


def test_the_limit_ends_the_campaign_with_exit_code_9(made: Campaign) -> None:
    for more in ((), ("--dry-run",)):
        answer = made.json("round", *more, code=9)
        assert answer["errors"][0]["code"] == "budget_refused"
        assert "allows no more models" in answer["errors"][0]["message"]
    assert {run["round"] for run in made.json("status")["data"]["runs"]} == {1, 2}


def test_no_seed_is_anywhere_but_beside_its_model(made: Campaign) -> None:
    """Not at a site, in no journal, no record of a run, no output: whoever has it can take the noise off."""
    seeds = {record(made.place, version)["privacy"]["seed"]: version for version in (1, 2)}
    holders = []
    for path in made.root.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for seed, version in seeds.items():
            if seed.encode() in content.lower() or bytes.fromhex(seed) in content:
                holders.append((path.relative_to(made.root).as_posix(), version))
    assert sorted(holders) == [("camp/models/0001/flctl.json", 1), ("camp/models/0002/flctl.json", 2)]
    for site in made.sites:
        assert not list(made.remote(site).rglob("flctl.json"))
        assert len(list((made.remote(site) / "models").glob("000?"))) == 2
    assert all("seed" not in (entry.get("privacy") or {}) for entry in Journal(made.place / "journal.jsonl"))
    for command in (("status", "--json"), ("status",), ("verify", "2", "--json")):
        ran = made.flctl(*command)
        assert not any(seed in ran.stdout + ran.stderr for seed in seeds)


def test_a_private_model_comes_out_of_its_record_again(made: Campaign) -> None:
    from flctl.campaign.rebuilding import rebuild

    workspace = Workspace(made.place)
    for version in (1, 2):
        found = rebuild(workspace, version)
        assert (found.agrees, found.rebuilt) == (True, True)


def test_an_exported_model_goes_without_its_seed(made: Campaign, tmp_path: Path) -> None:
    ran = made.flctl("export", "2", "--out", str(tmp_path / "out"))
    assert ran.returncode == 0, ran.stderr
    seed = record(made.place, 2)["privacy"]["seed"].encode()
    assert all(seed not in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_a_limit_lowered_on_the_way_refuses_the_merge(tmp_path: Path) -> None:
    """Nothing is computed, and nothing is lost: with the limit lifted the same contributions are merged."""
    campaign = Campaign(tmp_path)
    campaign.set("[policy]", ON + "epsilon = 5.0\n[policy]")
    campaign.json("round", "--wait", "0", code=11)
    campaign.set("epsilon = 5.0", "epsilon = 1.0")
    assert campaign.json("round", code=9)["errors"][0]["code"] == "budget_refused"
    campaign.wait(lambda: _ticked(campaign), what="both contributions")
    answer = campaign.json("campaign", "tick", code=9)
    assert "privacy.epsilon is 1" in answer["errors"][0]["message"]
    assert not list((campaign.place / "models").glob("*0001*"))
    campaign.set("epsilon = 1.0", "epsilon = 5.0")
    assert campaign.json("round")["data"]["model"]["privacy"]["epsilon"] == epsilon([1.0], 1e-5)
    assert campaign.attempts("brno") == ["0001-1"]


def _ticked(campaign: Campaign) -> bool:
    campaign.flctl("campaign", "tick")
    return all(campaign.run(site)["stage"] == "fetched" for site in campaign.sites)


def test_without_the_package_no_private_plan_is_made(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "dp_accounting.py").write_text("raise ImportError('it is not installed')\n")
    campaign = Campaign(tmp_path)
    campaign.set("[policy]", ON + "[policy]")
    path = os.pathsep.join([str(tmp_path / "broken"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    ran = campaign.flctl("round", "--json", PYTHONPATH=path)
    answer = json.loads(ran.stdout)
    assert (ran.returncode, answer["errors"][0]["code"]) == (3, "configuration")
    assert answer["errors"][0]["hint"] == "pip install 'flctl[privacy]'"
    assert campaign.json("status")["data"]["runs"] == []
    campaign.set("noise_multiplier = 1.0", "")
    ran = campaign.flctl("round", PYTHONPATH=path)
    assert ran.returncode == 0, ran.stdout
    assert "privacy: updates are clipped to 0.5 without noise: no privacy guarantee" in ran.stdout


def test_privacy_is_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    assert "privacy:" not in campaign.flctl("round").stdout
    assert record(campaign.place, 1)["privacy"] is None
    assert all("scale" not in item for item in record(campaign.place, 1)["contributions"])
    assert "privacy:" not in campaign.flctl("status").stdout
    made = load_file(campaign.place / "models" / "0001" / "model.safetensors")
    assert all(np.isfinite(values).all() for values in made.values())
