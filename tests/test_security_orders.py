"""What a site says that it was ordered to do, and what it says of a campaign that is to be rebuilt, moves nothing to it
that the campaign does not send there."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flctl.campaign import driver, salvage
from flctl.campaign.adoption import _check_model
from flctl.campaign.config import AggregationTable, CampaignTable, Configuration, EvaluationTable
from flctl.campaign.creation import frame, toml_lines
from flctl.campaign.steps.attempt import ordered
from flctl.campaign.workspace import Workspace
from flctl.errors import AggregationRefused, TransferFailed
from flctl.records import FileEntry, Job, Order, Run, Work, token_of
from tests.campaigns import Campaign, make_model

ORDER = {"work": "train", "base": {"version": 1}, "round": 2, "steps": 4, "global_step": 4, "total_steps": 8}
OTHERS = [{"name": "pisa-0001-1", "sha256": "0" * 64}]
MERGE = {"rule": "fedavg", "options": {}, "master": False, "parts": []}
PLAIN = Configuration(campaign=CampaignTable(name="c", id="1"))
CROSS = replace(PLAIN, evaluation=EvaluationTable(cross=True))
THERE = replace(PLAIN, aggregation=AggregationTable(aggregate_at="brno"))


def read(configuration: Configuration, **fields: Any) -> Order:
    run = Run(
        number=2,
        order=Order(site="brno", work=Work.TRAIN, base=0, round=1),
        job=Job(token="f"),
        created_at=0,
        changed_at=0,
    )
    return ordered(run, json.dumps({**ORDER, **fields}), plan=1, configuration=configuration)


def test_a_site_that_writes_an_order_is_not_sent_what_others_contributed(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    workspace = Workspace(campaign.place)
    planted = tmp_path / "brno" / "work" / workspace.label / "runs" / "0003-1"
    planted.mkdir(parents=True)
    order = {**ORDER, "base": {"version": 0}, "round": 1, "work": "evaluate", "subjects": OTHERS, "number": 3}
    order |= {"campaign_id": workspace.id, "token": token_of(workspace.id, "brno", 3, 1)}
    (planted / "order.json").write_text(json.dumps(order))
    assert campaign.flctl("campaign", "start", "--rounds", "1").returncode == 0
    assert campaign.flctl("campaign", "tick").returncode == 0
    told = {entry["event"]: entry for entry in campaign.journal()}
    assert "adopted" not in told and (told["not adopted"]["site"], told["not adopted"]["number"]) == ("brno", 3)
    assert [run.number for run in workspace.runs("brno")] == [1]


@pytest.mark.parametrize(
    ("configuration", "fields"),
    [
        (PLAIN, {"subjects": OTHERS}),
        (CROSS, {"subjects": OTHERS}),
        (PLAIN, {"work": "evaluate", "subjects": OTHERS}),
        (THERE, {"work": "evaluate", "subjects": OTHERS}),
        *((CROSS, {"work": "evaluate", "subjects": [{**OTHERS[0], "name": name}]}) for name in ("0001-state", "../x")),
        (CROSS, {"work": "evaluate", "subjects": [{**OTHERS[0], "name": "../../x-0001-1"}]}),
        (CROSS, {"work": "evaluate", "subjects": [{**OTHERS[0], "name": "²"}]}),
        (PLAIN, {"work": "merge", "subjects": OTHERS, "merge": MERGE}),
        (CROSS, {"work": "merge", "subjects": OTHERS, "merge": MERGE}),
        (THERE, {"work": "merge", "subjects": OTHERS}),
        (THERE, {"merge": MERGE}),
    ],
)
def test_an_order_that_the_campaign_does_not_give_is_refused(configuration: Configuration, fields: Any) -> None:
    with pytest.raises(TransferFailed, match="none of this campaign"):
        read(configuration, **fields)


def test_an_order_that_the_campaign_gives_is_taken() -> None:
    assert read(PLAIN).work == Work.TRAIN
    assert read(PLAIN, work="evaluate", subjects=[{"name": "0001", "sha256": "0" * 64}]).work == Work.EVALUATE
    assert read(CROSS, work="evaluate", subjects=OTHERS).subjects[0].name == "pisa-0001-1"
    assert read(THERE, work="merge", subjects=OTHERS, merge=MERGE).merge is not None


@pytest.mark.parametrize(
    "order",
    [{}, {"work": "train"}, {**ORDER, "round": [1]}, {**ORDER, "base": {"version": -1}}, {**ORDER, "steps": 1e9}],
)
def test_an_order_that_is_none_is_refused(order: dict[str, Any]) -> None:
    run = Run(number=2, order=Order(site="brno", work=Work.TRAIN, base=0, round=1), job=Job(token="f"), created_at=0,
              changed_at=0)  # fmt: skip
    with pytest.raises(TransferFailed, match=r"cannot be read"):
        ordered(run, json.dumps(order), plan=1, configuration=PLAIN)


# A folder that is rebuilt

INJECTED = {
    "a": 'x"\n[gates]\nnorm = "off"\n[evaluation]\ncross = true\nb = "',
    'k = 1\n[gates]\nnorm = "off"\nx': 1,
    "quote": 'a"b\\c',
    "nothing": None,
    "table": {"x y": [1, "]"], "z": True},
    "lr": 5e-05,
}


@pytest.fixture
def rebuilt(tmp_path: Path) -> Workspace:
    return frame(tmp_path / "new", name="camp", id_="00ff00ff", profiles={}, seed=0)


def filled(rebuilt: Workspace, monkeypatch: pytest.MonkeyPatch, orders: list[tuple[str, Any]]) -> dict[str, Any]:
    monkeypatch.setattr(salvage, "load_profile", lambda workspace, name: SimpleNamespace(train={}))
    salvage._fill_in(rebuilt, orders)
    return tomllib.loads((rebuilt.root / "flctl.toml").read_text())


def test_what_a_site_was_told_to_train_with_adds_nothing_else(
    rebuilt: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = [("brno", {**ORDER, "train": INJECTED}), ("pisa", {**ORDER, "round": [1], "steps": "x", "train": {}})]
    before = tomllib.loads((rebuilt.root / "flctl.toml").read_text())
    found = filled(rebuilt, monkeypatch, orders)
    assert found.pop("train") == {"quote": 'a"b\\c', "table": {"x y": [1, "]"], "z": True}, "lr": 5e-05, "steps": 4}
    before.pop("train")
    assert found == before


def test_one_site_alone_does_not_have_contributions_travel(rebuilt: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = [{"name": "0001", "sha256": "0" * 64}, {"name": "linz-0001-1", "sha256": "0" * 64}]
    evaluates = {**ORDER, "work": "evaluate", "subjects": subjects}
    orders = [("brno", ORDER), ("pisa", ORDER), ("brno", evaluates)]
    assert filled(rebuilt, monkeypatch, orders)["evaluation"]["cross"] is False
    assert filled(rebuilt, monkeypatch, [*orders, ("pisa", evaluates)])["evaluation"]["cross"] is True


@pytest.mark.parametrize("name", ["pytorch_model.bin", "more.safetensors", ".hidden", "state/state.json"])
def test_a_model_that_a_site_holds_comes_with_nothing_beside_it(tmp_path: Path, name: str) -> None:
    folder = tmp_path / ".0003.draft"
    make_model(folder)
    files = tuple(
        FileEntry(path=path.relative_to(folder).as_posix(), size=1, sha256="")
        for path in folder.rglob("*")
        if path.is_file()
    )
    _check_model(folder, files, "brno")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(AggregationRefused):
        _check_model(folder, (*files, FileEntry(path=name, size=1, sha256="")), "brno")


def test_any_text_is_one_value_of_toml() -> None:
    table = {"a b": 'x"\\', "c": [True, {"d": "]"}], "e": {'f"': 1}}
    assert tomllib.loads(toml_lines(table)) == table


@pytest.mark.parametrize("since", ["1e300", "NaN", "-1", '"x"', "null"])
def test_a_driver_of_no_time_is_none(since: str) -> None:
    record = f'{{"host": "{"0" * 64}", "name": "n", "epoch": 2, "serial": 1, "since": {since}}}'
    assert driver._seen(record, "").driver is None
    assert driver._seen(record.replace(since, "1e9"), "").driver is not None
