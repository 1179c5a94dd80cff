"""Rules, their state, gates and looks back in a campaign of local sites: the real program, real jobs."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.campaigns import Campaign

Weights = dict[str, np.ndarray]


def record(place: Path, version: int) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((place / "models" / f"{version:04d}" / "flctl.json").read_text())
    return data


def weights(folder: Path, dtype: Any = np.float64) -> Weights:
    return {name: values.astype(dtype) for name, values in load_file(folder / "model.safetensors").items()}


def contributions(place: Path, version: int, dtype: Any = np.float64) -> list[tuple[np.float64, Weights]]:
    """(p_k, x_k) by site and run number, p_k from the samples that the runs' records state."""
    given = sorted(record(place, version)["contributions"], key=lambda item: (item["site"], item["number"]))
    runs = [place / "runs" / item["site"] / f"{item['number']:04d}" for item in given]
    samples = [json.loads((run / "run.json").read_text())["contribution"]["samples"] for run in runs]
    folders = [run / str(item["attempt"]) / "out" for run, item in zip(runs, given, strict=True)]
    return [
        (np.float64(n) / np.float64(sum(samples)), weights(folder, dtype))
        for n, folder in zip(samples, folders, strict=True)
    ]


def updates(place: Path, version: int) -> Weights:
    """Delta = sum_k p_k (x_k - w) in float64."""
    base = weights(place / "models" / f"{version - 1:04d}")
    given = contributions(place, version)
    return {name: sum(p * (x[name] - w) for p, x in given) for name, w in base.items()}  # type: ignore[misc]


def adam(w: Any, delta: Any, state: dict[str, Any]) -> Any:
    state["momentum"] = 0.9 * state.get("momentum", 0.0) + 0.1 * delta
    state["variance"] = 0.99 * state.get("variance", 1e-3**2) + 0.01 * delta**2
    return w + 0.05 * state["momentum"] / (np.sqrt(state["variance"]) + 1e-3)


def average_momentum(w: Any, delta: Any, state: dict[str, Any]) -> Any:
    state["momentum"] = 0.8 * state.get("momentum", 0.0) + delta
    return w + state["momentum"]


def nesterov(w: Any, delta: Any, state: dict[str, Any]) -> Any:
    state["momentum"] = 0.9 * state.get("momentum", 0.0) + delta
    return w + 0.7 * (delta + 0.9 * state["momentum"])


RULES: dict[str, tuple[str, Callable[[Any, Any, dict[str, Any]], Any]]] = {
    "fedadam": ("{lr = 0.05}", adam),
    "fedavgm": ("{momentum = 0.8}", average_momentum),
    "diloco": ("{}", nesterov),
}


def choose(campaign: Campaign, rule: str, more: str = "", before: str = "fedavg") -> None:
    campaign.set(f'rule = "{before}"', f'rule = "{rule}"\n{more}')


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """Two rounds of FedAdam with uneven samples; to be looked at only."""
    campaign = Campaign(tmp_path_factory.mktemp("adam"))
    campaign.profile("pisa", samples=30)
    choose(campaign, "fedadam", "options = {lr = 0.05}")
    campaign.json("round", "--rounds", "2")
    return campaign


@pytest.fixture
def copy(made: Campaign, tmp_path: Path) -> Path:
    """The campaign's folder again, to be spoilt."""
    return shutil.copytree(made.place, tmp_path / "copy")


def agrees_with_numpy(place: Path, rule: str) -> None:
    states: dict[str, dict[str, Any]] = {}
    for version in (1, 2):
        base, new = (weights(place / "models" / f"{number:04d}") for number in (version - 1, version))
        delta = updates(place, version)
        for name, values in new.items():
            expected = RULES[rule][1](base[name], delta[name], states.setdefault(name, {}))
            np.testing.assert_allclose(values, expected, rtol=2e-6, atol=2e-7)
        for kept in record(place, version)["state"]["files"]:
            if kept["path"].endswith(".safetensors"):
                tensor_set = kept["path"].split("/")[0]
                for name, values in weights(place / "models" / f"{version:04d}" / "state" / tensor_set).items():
                    np.testing.assert_allclose(values, states[name][tensor_set], rtol=2e-5, atol=1e-8)


def test_two_rounds_of_fedadam_are_those_of_numpy(made: Campaign) -> None:
    agrees_with_numpy(made.place, "fedadam")


@pytest.mark.parametrize("rule", ["fedavgm", "diloco"])
def test_two_rounds_of_an_optimiser_with_momentum_are_those_of_numpy(rule: str, tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    campaign.profile("pisa", samples=30)
    choose(campaign, rule, f"options = {RULES[rule][0]}")
    campaign.json("round", "--rounds", "2")
    agrees_with_numpy(campaign.place, rule)


def test_the_record_says_all_that_made_the_model(made: Campaign) -> None:
    told = record(made.place, 2)
    assert (told["rule"], told["weights"], told["master"]) == ("fedadam", "samples", False)
    assert told["options"] == {"dialect": "paper", "lr": 0.05, "tau": 1e-3, "beta1": 0.9, "beta2": 0.99}
    assert [(item["site"], item["base"], item["coefficient"]) for item in told["contributions"]] == [
        ("brno", 1, 0.25),
        ("pisa", 1, 0.75),
    ]
    assert (told["state"]["rule"], told["state"]["step"], record(made.place, 1)["state"]["step"]) == ("fedadam", 2, 1)
    assert {row["verdict"] for row in told["gates"]["contributions"]} == {"too few to judge"}
    assert all(row["norm"] > 0 for row in told["gates"]["contributions"])
    assert set(told["made_by"]) == {"flctl", "torch"}


def test_the_state_lies_beside_the_model_and_is_no_part_of_it(made: Campaign) -> None:
    from flctl.codec import from_data
    from flctl.records import FileEntry, folder_sha256

    told, folder = record(made.place, 2), made.place / "models" / "0002"
    assert not any(entry["path"].startswith("state") for entry in told["files"])
    assert folder_sha256(from_data(tuple[FileEntry, ...], told["files"])) == told["sha256"]
    kept = {path.relative_to(folder / "state").as_posix() for path in (folder / "state").rglob("*") if path.is_file()}
    assert kept == {entry["path"] for entry in told["state"]["files"]}
    assert kept == {"momentum/model.safetensors", "variance/model.safetensors", "state.json"}
    assert json.loads((folder / "state" / "state.json").read_text())["model"] == told["sha256"]


def test_the_state_never_leaves_home_nor_travels_with_contributions(made: Campaign) -> None:
    for site in made.sites:
        there = [path for path in made.remote(site).rglob("*") if "state" in path.relative_to(made.remote(site)).parts]
        assert there == [made.remote(site) / "state"]  # the trainer's own
        assert sorted(path.name for path in (made.remote(site) / "models").iterdir()) == ["0000", "0001"]
        assert not [path for path in (made.place / "runs" / site).rglob("*") if "state" in path.name]
    sent = [entry["path"] for entry in made.journal() if entry["event"] == "file"]
    assert not any("state" in path for path in sent)


@pytest.mark.parametrize("version", ["0", "1", "newest"])
def test_what_a_campaign_made_comes_out_again_with_every_bit(made: Campaign, version: str) -> None:
    before = sorted(str(path) for path in (made.place / "models").rglob("*"))
    found = made.json("verify", version)["data"]
    assert found["agrees"]
    assert found["rebuilt"] == (version != "0")
    assert found["differing"] == found["missing"] == found["remade"] == []
    assert sorted(str(path) for path in (made.place / "models").rglob("*")) == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


SPOILT = {
    "runs/pisa/0002/1/out/model.safetensors": False,
    "models/0002/model.safetensors": True,
    "models/0002/config.json": True,
    "models/0002/state/variance/model.safetensors": True,
    "models/0002/state/state.json": True,
    "models/0001/model.safetensors": False,
    "models/0001/state/momentum/model.safetensors": False,
}


@pytest.mark.parametrize("path", SPOILT)
@pytest.mark.parametrize("gone", [False, True], ids=["flipped", "gone"])
def test_a_flipped_byte_or_a_lost_file_is_found_by_name(path: str, gone: bool, copy: Path) -> None:
    from flctl.campaign.rebuilding import rebuild
    from flctl.campaign.workspace import Workspace

    (copy / path).unlink() if gone else flip(copy / path)
    found = rebuild(Workspace(copy))
    assert not found.agrees
    assert (found.missing if gone else found.differing) == (path,)
    assert found.rebuilt == SPOILT[path]
    assert (found.differing if gone else found.missing, found.remade) == ((), ())
    assert not list((copy / "models").glob(".*"))


def test_the_program_says_no_names_the_file_and_exits_with_8(made: Campaign, copy: Path) -> None:
    flip(copy / "runs" / "brno" / "0001" / "1" / "out" / "model.safetensors")
    said = made.flctl("-C", str(copy), "verify", "1")
    assert said.returncode == 8
    assert "runs/brno/0001/1/out/model.safetensors" in said.stdout + said.stderr


def change(place: Path, version: int, edit: Callable[[dict[str, Any]], object]) -> None:
    told = record(place, version)
    told.pop("check", None)  # whoever forges a record does not leave a checksum that betrays it
    edit(told)
    (place / "models" / f"{version:04d}" / "flctl.json").write_text(json.dumps(told))


FALSE: dict[str, Callable[[dict[str, Any]], object]] = {
    "options": lambda told: told["options"].update(lr=0.06),
    "rule": lambda told: told.update(rule="fedyogi"),
    "weight": lambda told: told["contributions"][0].update(weight=11.0),
}


@pytest.mark.parametrize("what", FALSE)
def test_a_record_that_says_something_else_than_what_was_done_is_found(what: str, copy: Path) -> None:
    from flctl.campaign.rebuilding import rebuild
    from flctl.campaign.workspace import Workspace

    change(copy, 1, FALSE[what])
    found = rebuild(Workspace(copy), 1)
    assert not found.agrees
    assert "models/0001/model.safetensors" in found.remade
    assert "models/0001/config.json" not in found.remade
    assert found.differing == found.missing == ()


def test_a_contribution_is_known_by_the_models_record_when_its_runs_is_gone(copy: Path) -> None:
    from flctl.campaign.rebuilding import rebuild
    from flctl.campaign.workspace import Workspace

    (copy / "runs" / "pisa" / "0001" / "run.json").unlink()
    assert rebuild(Workspace(copy), 1).agrees
    flip(copy / "runs" / "pisa" / "0001" / "1" / "out" / "model.safetensors")
    assert rebuild(Workspace(copy), 1).differing == ("runs/pisa/0001/1/out",)
    shutil.rmtree(copy / "runs" / "pisa")
    assert rebuild(Workspace(copy), 1).missing == ("runs/pisa/0001/1/out",)


@pytest.mark.parametrize("phase", ["checking files", "making model 0002 again"])
def test_a_look_back_can_be_stopped_and_leaves_nothing(phase: str, copy: Path) -> None:
    from flctl.campaign.rebuilding import rebuild
    from flctl.campaign.workspace import Workspace
    from flctl.errors import Interrupted

    heard: list[str] = []
    with pytest.raises(Interrupted):
        rebuild(
            Workspace(copy),
            progress=lambda what, done, total: heard.append(what),
            stop=lambda: phase in heard,
        )
    assert not list((copy / "models").glob(".*"))


def test_a_version_that_is_not_there_is_a_usage_error(made: Campaign) -> None:
    assert "it has 0000 to 0002" in made.json("verify", "9", code=2)["errors"][0]["hint"]


def test_an_export_opens_and_holds_the_model_alone(made: Campaign, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = made.flctl("export", "2", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        entry["path"] for entry in record(made.place, 2)["files"]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, values in load_file(made.place / "models" / "0002" / "model.safetensors").items():
        assert (model.state_dict()[name].numpy() == values).all()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("a")
    refused = made.flctl("export", "2", "--out", str(tmp_path / "out"))
    assert refused.returncode == 3
    assert "never overwrites" in refused.stderr


def test_a_model_that_changed_is_not_exported(made: Campaign, copy: Path, tmp_path: Path) -> None:
    flip(copy / "models" / "0002" / "model.safetensors")
    refused = made.flctl("-C", str(copy), "export", "2", "--out", str(tmp_path / "out"))
    assert refused.returncode == 3
    assert "models/0002/model.safetensors" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_two_exports_to_one_folder_do_not_take_each_other_s_draft(made: Campaign, tmp_path: Path) -> None:
    from flctl.model.place import alone

    with alone(tmp_path / "out") as draft:
        draft.mkdir()
        refused = made.flctl("export", "2", "--out", str(tmp_path / "out"))
        assert refused.returncode == 10
        assert "another flctl is making" in refused.stderr
        assert draft.exists()
    assert list(tmp_path.iterdir()) == []


def test_an_export_whose_place_is_taken_meanwhile_leaves_that_as_it_is(copy: Path, tmp_path: Path) -> None:
    """The config comes through a pipe, so that the export waits for us in the middle."""
    from flctl.campaign.rebuilding import export
    from flctl.campaign.workspace import Workspace
    from flctl.errors import ConfigurationError

    config = copy / "models" / "0002" / "config.json"
    content = config.read_bytes()
    config.unlink()
    os.mkfifo(config)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(export, Workspace(copy), 2, tmp_path / "out")
        with config.open("wb") as pipe:  # opens once it is read
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").touch()
            pipe.write(content)
        with pytest.raises(ConfigurationError, match="not empty"):
            done.result()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_export_below_a_file_is_refused(made: Campaign, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = made.flctl("export", "2", "--out", str(tmp_path / "file" / "out"))
    assert refused.returncode == 3
    assert "Traceback" not in refused.stderr


def test_another_rule_begins_a_state_of_its_own(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, sites=("brno",))
    choose(campaign, "fedavgm")
    campaign.json("round", "--rounds", "2")
    choose(campaign, "diloco", before="fedavgm")
    campaign.json("round", "--rounds", "2")
    steps = [
        (record(campaign.place, version)["rule"], record(campaign.place, version)["state"]["step"])
        for version in (1, 2, 3, 4)
    ]
    assert steps == [("fedavgm", 1), ("fedavgm", 2), ("diloco", 1), ("diloco", 2)]
    base, new, delta = (
        weights(campaign.place / "models/0002"),
        weights(campaign.place / "models/0003"),
        updates(campaign.place, 3),
    )
    for name, values in new.items():
        np.testing.assert_allclose(values, nesterov(base[name], delta[name], {}), rtol=2e-6, atol=2e-7)
    choose(campaign, "fedavg", before="diloco")
    campaign.json("round")
    assert record(campaign.place, 5)["state"] is None
    for version in range(1, 6):
        assert campaign.json("verify", str(version))["data"]["agrees"]


def test_master_weights_keep_what_half_precision_loses(tmp_path: Path) -> None:
    """FedAvg over float16, bit by bit: the first master is sum fl(p_k x_k), the next is fl(master + sum fl(p_k u_k))
    with u_k = x_k - w and w the model in float16; the model is the master, rounded."""
    campaign = Campaign(tmp_path, dtype="float16")
    campaign.set('weights = "samples"', 'weights = "samples"\nmaster = true')
    for site in campaign.sites:
        campaign.profile(site, scale=0.0005)
    campaign.json("round", "--rounds", "2")
    models = campaign.place / "models"
    masters: Weights = {}
    for version in (1, 2):
        base, given = (
            weights(models / f"{version - 1:04d}", np.float32),
            contributions(campaign.place, version, np.float32),
        )
        new = load_file(models / f"{version:04d}" / "model.safetensors")
        kept = load_file(models / f"{version:04d}" / "state" / "master" / "model.safetensors")
        for name, w in base.items():
            total = np.zeros_like(w)
            for share, x in given:
                total += np.float32(share) * (x[name] if version == 1 else x[name] - w)
            masters[name] = total if version == 1 else total + masters[name]
            assert kept[name].dtype == np.float32
            assert np.array_equal(kept[name], masters[name])
            assert np.array_equal(new[name], masters[name].astype(np.float16))
    assert any((masters[name] != values.astype(np.float32)).any() for name, values in new.items())
    assert campaign.json("verify")["data"]["agrees"]


WRONG: dict[str, tuple[str, str, str]] = {
    "median_of_two": ('rule = "median"', "aggregation.rule", "fewer than 3"),
    "unknown_rule": ('rule = "fedadm"', "aggregation.rule", "did you mean fedadam?"),
    "unknown_option": ('rule = "fedadam"\noptions = {beta3 = 1.0}', "aggregation.options", "no option 'beta3'"),
    "impossible_value": ('rule = "trimmed_mean"\noptions = {beta = 0.5}', "aggregation.options", "below 0.5"),
    "asynchronous": ('rule = "fedasync"', "aggregation.rule", "asynchronous policy"),
    "buffered": ('rule = "fedbuff"', "aggregation.rule", "fedavg does what it does"),
    "adapters": ('rule = "fedavg"\nadapters = "svd"', "aggregation.adapters", "are no adapters"),
}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("untouched"), sites=("brno", "linz", "pisa"))


@pytest.mark.parametrize("case", WRONG)
def test_a_rule_that_cannot_work_is_refused_before_anything_is_ordered(case: str, untouched: Campaign) -> None:
    text, key, words = WRONG[case]
    untouched.set('rule = "fedavg"', text)
    try:
        for command in (("round",), ("round", "--dry-run"), ("campaign", "start", "--rounds", "1")):
            refused = untouched.flctl(*command, "--sites", "brno", "pisa")
            assert refused.returncode == 3, command
            assert key in refused.stderr
            assert words in refused.stderr
            assert "flctl.toml" in refused.stderr
    finally:
        untouched.set(text, 'rule = "fedavg"')
    assert not (untouched.place / "plan.json").exists()


def test_a_rule_must_work_with_as_few_contributions_as_min_sites_allows(untouched: Campaign) -> None:
    untouched.set('rule = "fedavg"', 'rule = "median"')
    untouched.set("min_sites = 0", "min_sites = 2")
    try:
        refused = untouched.flctl("round", "--dry-run")
        assert refused.returncode == 3
        assert "campaign.min_sites" in refused.stderr
        assert "2 lets a model be made of so few" in refused.stderr
    finally:
        untouched.set("min_sites = 2", "min_sites = 0")
    assert untouched.flctl("round", "--dry-run").returncode == 0
    untouched.set('rule = "median"', 'rule = "fedavg"')


def test_an_open_plan_is_not_gone_on_with_under_an_impossible_rule(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, sites=("brno",))
    campaign.flctl("campaign", "start", "--rounds", "1")
    choose(campaign, "krum")
    assert "aggregation.rule" in campaign.json("round", code=3)["errors"][0]["message"]
    choose(campaign, "fedavg", before="krum")
    assert campaign.json("round")["data"]["model"]["version"] == 1


def test_a_site_is_not_skipped_if_the_rule_cannot_do_without_it(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, sites=("brno", "linz", "pisa"))
    choose(campaign, "median")
    campaign.flctl("campaign", "start", "--rounds", "1")
    refused = campaign.flctl("skip", "pisa")
    assert refused.returncode == 3
    assert "median cannot merge the contributions of 2 sites" in refused.stderr
    assert json.loads((campaign.place / "plan.json").read_text())["skipped"] == []


def test_without_the_state_that_a_rule_left_nothing_is_merged(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, sites=("brno",))
    choose(campaign, "fedavgm")
    campaign.json("round")
    state = campaign.place / "models" / "0001" / "state"
    (state / "momentum").rename(state / "elsewhere")
    answer = campaign.json("round", code=3)
    assert "lacks momentum/model.safetensors" in answer["errors"][0]["message"]
    assert "backup" in answer["errors"][0]["hint"]
    state.rename(state.with_name("moved"))
    assert "the rule's state is missing" in campaign.json("round", code=3)["errors"][0]["message"]
    shutil.copytree(state.with_name("moved"), state)
    text = (state / "state.json").read_text()
    (state / "elsewhere").rename(state / "momentum")
    (state / "state.json").write_text(text.replace('"step": 1', '"step": 7'))
    assert "is not what flctl.json says" in campaign.json("round", code=3)["errors"][0]["message"]
    (state / "state.json").write_text(text)
    assert campaign.json("round")["data"]["model"]["version"] == 2
    assert campaign.submissions("brno") == 2


def test_a_file_that_is_not_what_its_site_sealed_is_never_merged(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    campaign.flctl("campaign", "start", "--rounds", "1")
    campaign.flctl("campaign", "tick")
    folder = campaign.remote("pisa") / "runs" / "0001-1"
    campaign.wait((folder / "done.json").exists)
    flip(folder / "out" / "model.safetensors")
    answers: list[dict[str, Any]] = []

    def is_refused() -> bool:
        answers.append(campaign.json("campaign", "tick", code=None))
        return bool(answers[-1]["errors"])

    campaign.wait(is_refused)
    error = answers[-1]["errors"][0]
    assert (error["site"], error["code"]) == ("pisa", "job_failed")
    assert "model.safetensors of run 0001-1 is not what its record says, at the site itself" in error["message"]
    assert not (campaign.place / "models" / "0001").exists()
    campaign.json("campaign", "tick", code=None)
    moved = (campaign.place / "journal.jsonl").read_text().count('"pisa", "path": "runs/0001-1/out/model.safetensors"')
    assert moved == 1  # to bring it again is no use: a person is asked
    campaign.flctl("retry", "pisa")
    assert campaign.json("round")["data"]["model"]["version"] == 1


def figures(place: Path, version: int) -> dict[str, Mapping[str, Any]]:
    return {row["site"]: row for row in record(place, version)["gates"]["contributions"]}


def test_an_update_unlike_the_others_is_warned_of_or_refused(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, sites=("brno", "graz", "linz", "pisa"))
    campaign.set("[fetch]", '[gates]\nnorm = "warn"\n\n[fetch]')
    campaign.profile("pisa", scale=1.0)
    said = campaign.flctl("round")
    assert said.returncode == 0, said.stderr
    assert "merged with a warning: pisa: run 0001: the update's norm" in said.stdout
    assert "merged with a warning: pisa: run 0001: the update's norm" in campaign.flctl("status").stdout
    (warning,) = campaign.json("status")["data"]["model"]["warnings"]
    assert warning.startswith("pisa: run 0001: the update's norm")
    seen = figures(campaign.place, 1)
    assert {site: row["verdict"] for site, row in seen.items()} == {
        "brno": "usual",
        "graz": "usual",
        "linz": "usual",
        "pisa": "unusual",
    }
    norms = {site: row["norm"] for site, row in seen.items()}
    assert seen["pisa"]["others"]["median"] == sorted(norms[site] for site in ("brno", "graz", "linz"))[1]
    assert seen["pisa"]["others"]["deviations"] > 100
    assert seen["pisa"]["past"] == {"count": 0, "median": None, "deviations": None}

    campaign.set('norm = "warn"', 'norm = "refuse"')
    answer = campaign.json("round", code=8)
    (error,) = answer["errors"]
    assert (error["site"], answer["data"]["model"]["version"]) == ("pisa", 1)
    assert "run 0002 is refused: the update's norm" in error["message"]
    assert campaign.run("pisa", 2)["stage"] == "failed"
    assert [e["site"] for e in campaign.journal() if e["event"] == "gate"] == ["pisa", "pisa"]
    campaign.profile("pisa")
    assert campaign.flctl("retry", "pisa").returncode == 0
    assert campaign.json("round")["data"]["model"] | {"warnings": []} == campaign.json("status")["data"]["model"]
    assert figures(campaign.place, 2)["pisa"]["verdict"] == "usual"


def test_an_update_against_the_others_direction_is_refused_where_that_is_asked_for(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, sites=("brno", "graz", "pisa"))
    campaign.set("[fetch]", '[gates]\nnorm = "off"\ncosine = "refuse"\ncosine_limit = 0.2\n\n[fetch]')
    for site in campaign.sites:
        campaign.profile(site, shift=-0.05 if site == "pisa" else 0.05)
    answer = campaign.json("round", code=8)
    assert "run 0001 is refused: the update's cosine to the mean is -0.8" in answer["errors"][0]["message"]
    assert answer["errors"][0]["site"] == "pisa"
    assert campaign.flctl("skip", "pisa").returncode == 0
    assert campaign.json("round")["data"]["model"]["version"] == 1
    assert {row["verdict"] for row in figures(campaign.place, 1).values()} == {"too few to judge"}


def test_an_update_unlike_what_its_site_gave_before_is_warned_of(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, sites=("brno",))
    campaign.json("round", "--rounds", "3")
    assert figures(campaign.place, 3)["brno"]["verdict"] == "too few to judge"
    campaign.profile("brno", scale=0.2)
    (warning,) = campaign.json("round")["data"]["model"]["warnings"]
    assert "the median of this site's own before (limit 6)" in warning
    assert figures(campaign.place, 4)["brno"]["past"]["count"] == 3
