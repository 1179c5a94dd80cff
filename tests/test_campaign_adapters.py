"""Campaigns whose model is a LoRA adapter: only the adapter travels, and the frozen base comes to each site once."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from flctl.campaign.workspace import write_json
from tests.campaigns import Campaign, make_model

LORA = ("--lora", "r=4,alpha=8,targets=q_proj+v_proj")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def begun(root: Path, *sites: str) -> Campaign:
    return Campaign(root, sites or ("brno",), "float32", *LORA)


def frozen_at(campaign: Campaign, site: str = "brno") -> Path:
    (folder,) = (campaign.root / site / "work" / "staged").glob("frozen-*")
    return folder


def sent(campaign: Campaign, site: str = "brno") -> list[str]:
    """What was pushed of models, in order; of what lies outside of the campaign's folder the last two names."""
    files = [line for line in campaign.journal() if line["event"] == "file" and line["direction"] == "out"]
    paths = [line["path"] for line in files if line["site"] == site]
    return ["/".join(path.split("/")[-2:]) for path in paths if "models/" in path or path.startswith("/")]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def record(campaign: Campaign, version: int) -> dict[str, Any]:
    return json.loads((campaign.place / "models" / f"{version:04d}" / "flctl.json").read_text())


def outs(campaign: Campaign, version: int) -> list[tuple[int, dict[str, numpy.ndarray]]]:
    """(samples, tensors) of the contributions to a version, by site."""
    given = sorted(record(campaign, version)["contributions"], key=lambda item: item["site"])
    folders = [campaign.place / "runs" / i["site"] / f"{i['number']:04d}" / str(i["attempt"]) / "out" for i in given]
    return [(item["samples"], load_file(folder / WEIGHTS)) for item, folder in zip(given, folders, strict=True)]


def check_is_mean_of_factors(campaign: Campaign, version: int) -> None:
    given = outs(campaign, version)
    total = sum(samples for samples, _ in given)
    made = load_file(campaign.place / "models" / f"{version:04d}" / WEIGHTS)
    for name, values in made.items():
        expected = numpy.zeros_like(values)
        for samples, tensors in given:
            expected = expected + numpy.float32(samples / total) * tensors[name]
        assert numpy.array_equal(values, expected), name


def test_two_rounds_move_the_base_once_and_the_adapter_each_time(tmp_path: Path) -> None:
    campaign = begun(tmp_path, "brno", "pisa")
    campaign.profile("pisa", samples=30)
    planned = campaign.json("plan", "--rounds", "2")["data"]
    base = sum(path.stat().st_size for path in (tmp_path / "start").iterdir())
    adapter = sum(
        len(data) for name, data in content_of(campaign.place / "models" / "0000").items() if "adapter" in name
    )
    for view in planned["sites"]:
        assert (view["bytes_frozen"], view["bytes_out"]) == (base, adapter)
        assert adapter < view["bytes_in"] + 2000 and view["need"] == 3 * adapter + base
    assert campaign.flctl("round", "--rounds", "2").returncode == 0
    check_is_mean_of_factors(campaign, 1)
    check_is_mean_of_factors(campaign, 2)
    for site in campaign.sites:
        assert content_of(frozen_at(campaign, site)) == content_of(tmp_path / "start")
        name = frozen_at(campaign, site).name
        models = [f"{place}/{file}" for place in ("0000", "0001") for file in (CONFIG, WEIGHTS)]
        assert sorted(sent(campaign, site)) == sorted(
            [*models, *(f"{name}/{f}" for f in content_of(tmp_path / "start"))]
        )
        logs = [path.read_text() for path in campaign.remote(site).glob("runs/*/log")]
        assert len(logs) == 2 and all("the frozen base has 20 tensors" in log for log in logs)
    came = {line["path"].rsplit("/", 1)[1] for line in campaign.journal() if line.get("direction") == "in"}
    assert {name for name in came if "adapter" in name} == {WEIGHTS}
    # The sites wrote a config of their own (r = 99): nobody looked at it.
    first = (campaign.place / "models" / "0000" / CONFIG).read_bytes()
    assert (campaign.place / "models" / "0002" / CONFIG).read_bytes() == first and json.loads(first)["r"] == 4
    assert (campaign.place / "runs" / "brno" / "0002" / "1" / "out" / CONFIG).read_bytes() == first
    status = campaign.json("status")["data"]["model"]["adapter"]
    assert status == {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "frozen": record(campaign, 2)["frozen"],
    }
    assert "a LoRA adapter: r=4, alpha=8 on q_proj, v_proj" in campaign.flctl("status").stdout
    assert campaign.json("verify")["data"]["agrees"]
    rows = [row for row in campaign.json("audit")["data"]["crossings"] if row["site"] == "brno"]
    crossed = [(row["kind"], row["files"]) for row in rows if row["kind"] in ("frozen base", "model file")]
    assert sorted(crossed) == [("frozen base", len(content_of(tmp_path / "start"))), *[("model file", 1)] * 2]
    again = campaign.json("plan", "--rounds", "1")["data"]["sites"]
    assert [view["bytes_frozen"] for view in again] == [0, 0]
    assert campaign.flctl("gc", "--keep", "1").returncode == 0
    assert content_of(frozen_at(campaign)) == content_of(tmp_path / "start")


def test_campaigns_at_a_site_share_the_base_and_a_purge_brings_it_again(tmp_path: Path) -> None:
    campaign = begun(tmp_path)
    assert campaign.flctl("round").returncode == 0
    paths = str(campaign.place / "sites" / "brno.toml")
    made = campaign.flctl("init", str(tmp_path / "second"), "--sites", paths, "--model", str(tmp_path / "start"), *LORA)
    assert made.returncode == 0, made.stderr
    assert campaign.flctl("round", "--steps", "4", at=tmp_path / "second").returncode == 0
    pushed = [json.loads(line) for line in (tmp_path / "second" / "journal.jsonl").read_text().splitlines()]
    assert not [line for line in pushed if "frozen-" in line.get("path", "")]
    there = frozen_at(campaign)
    (there / "tokenizer.json").unlink()
    assert campaign.flctl("round").returncode == 0
    assert content_of(there) == content_of(tmp_path / "start")
    assert sent(campaign).count(f"{there.name}/model.safetensors") == 2


def test_a_base_that_changed_at_the_site_is_noticed_and_one_that_looks_the_same_is_not_read_again(
    tmp_path: Path,
) -> None:
    campaign = begun(tmp_path)
    assert campaign.flctl("round").returncode == 0
    weights = frozen_at(campaign) / "model.safetensors"
    looked, whole = weights.stat(), weights.read_bytes()
    weights.write_bytes(bytes(len(whole)))
    os.utime(weights, ns=(looked.st_atime_ns, looked.st_mtime_ns))
    note = (campaign.remote("brno") / "frozen.json").read_bytes()
    source = tmp_path / "start" / "model.safetensors"
    campaign.profile("brno", behave="silent")  # the zeros would be no model
    assert campaign.flctl("round").returncode != 0
    assert not any(weights.read_bytes()) and (campaign.remote("brno") / "frozen.json").read_bytes() == note
    os.utime(weights)
    campaign.profile("brno")
    assert campaign.flctl("retry", "brno").returncode == 0
    assert campaign.flctl("round").returncode == 0
    assert weights.read_bytes() == source.read_bytes()


def test_a_folder_that_the_site_has_already_is_checked_and_used_and_nothing_is_sent(tmp_path: Path) -> None:
    campaign = begun(tmp_path)
    own = tmp_path / "brno" / "models of all" / "llama"
    shutil.copytree(tmp_path / "start", own)
    (own / "pytorch_model.bin").write_bytes(b"what else lies there is nobody's business")
    (own / "model.safetensors").rename(own / "blob")
    (own / "model.safetensors").symlink_to("blob")  # as in the hub's cache
    profile = campaign.place / "sites" / "brno.toml"
    profile.write_text(profile.read_text().replace("[environment]", f'frozen = "{own}"\n\n[environment]'))
    (campaign.place / "flctl.toml").write_text(
        (campaign.place / "flctl.toml").read_text().replace(str(tmp_path / "start"), "/nowhere")
    )
    assert campaign.json("plan")["data"]["sites"][0]["bytes_frozen"] == 0
    assert campaign.flctl("round").returncode == 0
    assert not (tmp_path / "brno" / "work" / "staged").exists()
    order = json.loads((campaign.remote("brno") / "runs" / "0001-1" / "order.json").read_text())
    assert order["frozen"]["folder"] == str(own)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "rope_theta": 1}))
    failed = campaign.json("round", code=3)
    assert "storage.frozen is not the base" in failed["errors"][0]["message"]
    assert str(own / "config.json") in failed["errors"][0]["message"]
    assert "storage.frozen in sites/brno.toml" in failed["errors"][0]["hint"]


def test_the_base_may_move_here_and_may_go_once_the_sites_have_it(tmp_path: Path) -> None:
    campaign = begun(tmp_path)
    (tmp_path / "start").rename(tmp_path / "moved")
    failed = campaign.json("round", code=3)["errors"][0]
    assert str(tmp_path / "start") in failed["message"] and "campaign.frozen" in failed["hint"]
    assert not (campaign.root / "brno" / "work").exists()
    campaign.set(str(tmp_path / "start"), str(tmp_path / "moved"))
    assert campaign.flctl("round").returncode == 0
    assert campaign.json("verify")["data"]["agrees"]
    shutil.rmtree(tmp_path / "moved")
    assert campaign.flctl("round").returncode == 0
    ran = campaign.flctl("export", "newest", "--merged", "--out", str(tmp_path / "merged"))
    assert ran.returncode == 3 and "campaign.frozen" in ran.stderr and not (tmp_path / "merged").exists()


def test_staging_brings_the_base_before_the_first_round(tmp_path: Path) -> None:
    campaign = begun(tmp_path)
    staged = campaign.json("site", "stage", "brno", "--model")["data"]["staged"]
    assert [item["name"] for item in staged] == [frozen_at(campaign).name, "0000"]
    inode = (frozen_at(campaign) / "model.safetensors").stat().st_ino
    assert campaign.flctl("round").returncode == 0
    assert (frozen_at(campaign) / "model.safetensors").stat().st_ino == inode
    assert sent(campaign).count(f"{frozen_at(campaign).name}/model.safetensors") == 1


@pytest.mark.parametrize(("behave", "words"), [("shape", "shape"), ("missing", "missing"), ("nan", "NaN")])
def test_what_is_no_adapter_of_this_kind_is_refused(behave: str, words: str, tmp_path: Path) -> None:
    """Another rank is another shape."""
    campaign = begun(tmp_path)
    campaign.profile("brno", behave=behave)
    failed = campaign.json("round", code=8)["errors"][0]
    assert words in failed["message"] and "lora_" in failed["message"]


def products(tensors: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """What each module adds but for the scaling."""
    return {
        name: tensors[name.replace("lora_A", "lora_B")].astype(float) @ values.astype(float)
        for name, values in tensors.items()
        if "lora_A" in name
    }


def test_svd_averages_what_the_adapters_add_and_can_be_verified(tmp_path: Path) -> None:
    campaign = begun(tmp_path, "brno", "pisa")
    campaign.set('adapters = "mean" ', 'adapters = "svd" ')
    assert campaign.flctl("round").returncode == 0
    given, made = outs(campaign, 1), load_file(campaign.place / "models" / "0001" / WEIGHTS)
    total = sum(samples for samples, _ in given)
    lost = energy = 0.0
    for name, product in products(made).items():
        wanted = sum(samples / total * products(tensors)[name] for samples, tensors in given)
        u, values, vt = numpy.linalg.svd(wanted)
        best = (u[:, :4] * values[:4]) @ vt[:4]
        assert numpy.allclose(product, best, atol=1e-6)
        lost, energy = lost + (values[4:] ** 2).sum(), energy + (values**2).sum()
    assert record(campaign, 1)["adapters"]["method"] == "svd"
    assert record(campaign, 1)["adapters"]["lost"] == pytest.approx(lost / energy, rel=1e-6)
    assert campaign.json("verify")["data"]["rebuilt"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('adapters = "mean" ', 'adapters = "stack" ', "adds up the ranks"),
        ('rule = "fedavg"', 'rule = "fedadam"\nadapters = "svd"', "only fedavg"),
        ('rule = "fedavg"', 'rule = "fedavg"\naggregate_at = "brno"\nadapters = "svd"', "made at home"),
    ],
)
def test_ways_that_cannot_work_are_refused_when_the_plan_is_made(
    old: str, new: str, words: str, tmp_path: Path
) -> None:
    campaign = begun(tmp_path)
    if "rule" in old:
        campaign.set('adapters = "mean" ', "#")
    campaign.set(old, new)
    failed = campaign.json("round", code=3)["errors"][0]
    assert "aggregation.adapters" in failed["message"] and words in failed["message"]


def test_a_campaign_of_whole_models_has_no_way_to_average_adapters(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, ("brno",))
    campaign.set('rule = "fedavg"', 'rule = "fedavg"\nadapters = "svd"')
    assert "are no adapters" in campaign.json("round", code=3)["errors"][0]["message"]
    ran = campaign.flctl("export", "0", "--merged", "--out", str(tmp_path / "out"))
    assert ran.returncode == 2 and "no adapters" in ran.stderr


def test_a_site_merges_adapters_and_all_evaluate_each_other(tmp_path: Path) -> None:
    campaign = begun(tmp_path, "brno", "pisa")
    campaign.set('rule = "fedavg"', 'rule = "fedadam"\naggregate_at = "pisa"')
    campaign.set("cross = false", "cross = true")
    assert campaign.flctl("round").returncode == 0
    assert record(campaign, 1)["made_by"]["site"] == "pisa" and record(campaign, 1)["frozen"]
    assert campaign.json("verify")["data"]["agrees"]
    orders = [json.loads(path.read_text()) for path in campaign.place.glob("runs/*/*/*/order.json")]
    assert {order["work"]: "frozen" in order for order in orders} == {"train": True, "evaluate": True, "merge": False}


def test_a_lost_folder_is_rebuilt_with_its_base(tmp_path: Path) -> None:
    campaign = begun(tmp_path)
    assert campaign.flctl("round", "--rounds", "2").returncode == 0
    label, profile = campaign.remote("brno").name, tmp_path / "brno.toml"
    before = json.loads((campaign.place / "frozen.json").read_text())
    made = campaign.flctl("adopt", str(tmp_path / "new"), "--sites", str(profile), "--id", label, at=tmp_path)
    assert made.returncode == 0, made.stdout + made.stderr
    assert json.loads((tmp_path / "new" / "frozen.json").read_text())["files"] == before["files"]
    ran = campaign.flctl("round", at=tmp_path / "new")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    newest = max((tmp_path / "new" / "models").glob("[0-9]*/flctl.json"))
    assert json.loads(newest.read_text())["frozen"] == before["sha256"]


def test_a_record_of_the_base_that_is_lost_or_changed_is_noticed_and_made_again(tmp_path: Path) -> None:
    campaign = begun(tmp_path)
    assert campaign.flctl("round").returncode == 0
    path = campaign.place / "frozen.json"
    sound = json.loads(path.read_text())
    path.unlink()
    assert "frozen.json is missing" in campaign.json("round", code=3)["errors"][0]["message"]
    assert campaign.flctl("audit").returncode != 0
    assert campaign.flctl("adopt").returncode == 0
    assert json.loads(path.read_text()) == sound
    write_json(path, {**sound, "sha256": "0" * 64})
    assert "is not of the base" in campaign.flctl("audit").stdout


def test_an_adapter_that_exists_is_gone_on_with(tmp_path: Path) -> None:
    first = begun(tmp_path)
    given = tmp_path / "given"
    given.mkdir()
    for name in (WEIGHTS, CONFIG):
        shutil.copy(first.place / "models" / "0000" / name, given)
    tensors = {name: values + 1 for name, values in load_file(given / WEIGHTS).items()}
    save_file(tensors, given / WEIGHTS)
    (given / "optimizer.pt").write_bytes(b"x")
    (given / "README.md").write_text("about the author")
    words = ("init", str(tmp_path / "second"), "--sites", str(tmp_path / "brno.toml"))
    base = ("--model", str(tmp_path / "start"))
    made = first.flctl(*words, *base, "--adapter", str(given), at=tmp_path)
    assert made.returncode == 0, made.stderr
    files = content_of(tmp_path / "second" / "models" / "0000")
    assert files.keys() == {WEIGHTS, CONFIG, "flctl.json"} and files[WEIGHTS] == (given / WEIGHTS).read_bytes()
    words = (*words[:1], str(tmp_path / "third"), *words[2:])
    both = first.flctl(*words, *base, "--adapter", str(given), *LORA, at=tmp_path)
    assert both.returncode == 2 and "one of the two" in both.stderr
    alone = first.flctl(*words, "--model", str(given), at=tmp_path)
    assert alone.returncode == 3 and "--adapter" in alone.stderr
    make_model(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "hidden_size": 32, "head_dim": 8}))
    other = first.flctl(*words, "--model", str(tmp_path / "other"), "--adapter", str(given), at=tmp_path)
    assert other.returncode == 3 and "does not fit the base" in other.stderr
    assert not (tmp_path / "third").exists()


def test_a_base_of_links_is_refused_with_the_way_out(tmp_path: Path) -> None:
    make_model(tmp_path / "blobs")
    (tmp_path / "start").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "start" / path.name).symlink_to(path)
    campaign = begun(tmp_path / "sound")
    words = ("init", str(tmp_path / "camp"), "--sites", str(tmp_path / "sound" / "brno.toml"))
    made = campaign.flctl(*words, "--model", str(tmp_path / "start"), *LORA, at=tmp_path)
    assert made.returncode == 3 and "cp -rLl" in made.stderr and not (tmp_path / "camp").exists()
