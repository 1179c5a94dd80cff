"""Classes of failure from real jobs to `flctl status`; and the run whose state an order goes on from."""

import json
from pathlib import Path
from typing import Any

from flctl.campaign.deciding import last_fetched
from flctl.records import Job, Order, Run, Stage, Work
from tests.campaigns import Campaign

WORDS = {
    "memory": ("out of GPU memory: 64.0 GiB of 64.0 GiB in use", "micro_batch"),
    "diverged": ("the loss is nan at step 12", "a smaller lr"),
    "data": ("notes.jsonl, line 3: no JSON", "storage.data"),
    "tokenizer": ("its ids reach 40000, the model has 32000", "tokenizer"),
    "model": ("no architecture Strange", "transformers"),
    "options": ("lr is -1", "correct [train]"),
    "time": ("not one step fits before the deadline", "a longer walltime"),
}


def test_status_says_what_each_class_of_failure_was_and_what_to_try(tmp_path: Path) -> None:
    """A real job for each: a program that names the class in the last line of its log; flctl tries none of it again."""
    campaign = Campaign(tmp_path, (*WORDS, "strange"))
    for name, (words, _) in WORDS.items():
        campaign.profile(name, behave="fail", says=f"train.py: error [{name}]: {words}")
    campaign.profile("strange", behave="fail", says="flctl: error [strange]: of another kind")
    errors = campaign.json("round", code=6)["errors"]
    assert {error["site"] for error in errors} == {*WORDS, "strange"}
    rows = {row["site"]: row for row in campaign.json("status")["data"]["runs"]}
    lines = campaign.flctl("status").stdout.splitlines()
    for name, (words, remedy) in WORDS.items():
        row = rows[name]
        assert (row["attempt"], row["cause"], row["note"]) == (1, name, words)
        assert remedy in row["hint"] and row["hint"].endswith(f", then flctl retry {name}")
        place = lines.index(f"{name}: run 0001 failed: {words}")
        assert lines[place + 1] == f"  -> {row['hint']}, or flctl skip {name}"
    assert (rows["strange"]["cause"], rows["strange"]["note"]) == ("program", "of another kind")


def ordered(campaign: Campaign) -> list[tuple[str, Any]]:
    """(attempt, `continues`) of every training that pisa was ordered, as its order.json has it."""
    orders = sorted((campaign.remote("pisa") / "runs").glob("*/order.json"))
    found = [(path.parent.name, json.loads(path.read_text())) for path in orders]
    return [(name, order["continues"]) for name, order in found if order["work"] == "train"]


def test_a_training_goes_on_from_the_last_one_that_is_here(tmp_path: Path) -> None:
    """And a retry goes on from the same."""
    campaign = Campaign(tmp_path, ("pisa",))
    assert campaign.json("round")["data"]["model"]["version"] == 1
    campaign.profile("pisa", behave="fail")
    campaign.json("round", code=6)
    campaign.profile("pisa")
    assert campaign.flctl("retry", "pisa").returncode == 0
    campaign.json("round")
    assert ordered(campaign) == [("0001-1", None), ("0002-1", 1), ("0002-2", 1)]


def test_what_was_left_out_or_refused_is_gone_on_from_by_none() -> None:
    def run(number: int, stage: Stage, work: Work = Work.TRAIN, *, skipped: bool = False) -> Run:
        order, job = Order(site="pisa", work=work, base=0, round=1), Job(token="f")
        return Run(number=number, order=order, stage=stage, job=job, skipped=skipped, created_at=0, changed_at=0)

    runs = [run(1, Stage.FETCHED), run(2, Stage.FETCHED), run(3, Stage.FETCHED, skipped=True), run(4, Stage.FAILED)]
    assert last_fetched([*runs, run(5, Stage.FETCHED, Work.EVALUATE), run(6, Stage.ENDED)]) == 2
    assert last_fetched(runs[2:]) is None
