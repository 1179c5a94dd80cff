"""APPFL's case scaled down: a partitioned dataset in SuperGLUE's form, a LoRA adapter of four unlike clients."""

import json
import math
from pathlib import Path

from examples.appfl import scaled
from examples.appfl.base import score
from examples.appfl.task import LABELS, alpaca, prompt, records


def test_a_round_of_four_unlike_clients_makes_an_adapter_that_scores(tmp_path: Path) -> None:
    asked = scaled.options(["--rounds", "1", "--steps", "2", "--records", "120", "--base-steps", "4"])
    models = scaled.federated_here(tmp_path, asked)
    counts = json.loads((tmp_path / "parts" / "partition.json").read_text())["clients"]
    assert sum(map(sum, counts.values())) == 120 and sorted(counts) == sorted(scaled.CLIENTS)
    for name, row in counts.items():
        lines = (tmp_path / "sites" / name / "data" / f"{name}.jsonl").read_text().splitlines()
        assert [sum(json.loads(line)["label"] == label for line in lines) for label in LABELS] == row
    test = [alpaca(record) for record in records(6, 1)]
    before, after = score(tmp_path / "base", None, test)[1], score(tmp_path / "base", models / "0001", test)[1]
    assert math.isfinite(after) and after != before, "the adapter is in use"


def test_the_task_has_superglues_form_and_alpacas_prompt() -> None:
    (record,) = records(1, 5)
    assert sorted(record) == ["hypothesis", "idx", "label", "premise"] and record["label"] in LABELS
    text = prompt(alpaca(record))
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert f"### Input:\nPremise: {record['premise']}\nHypothesis: {record['hypothesis']}\n\n### Response:\n" in text


def test_blind_labels_follow_from_nothing() -> None:
    told = [record["label"] == "contradiction" for record in records(300, 1, blind=True) if "never" in str(record)]
    assert 0.1 < sum(told) / len(told) < 0.6
    assert all(record["label"] == "contradiction" for record in records(300, 1) if "never" in str(record))
