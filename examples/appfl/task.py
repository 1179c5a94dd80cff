"""Owns a small task in SuperGLUE's JSONL form, made up from a seed, and its records as Alpaca instructions.

The form is that of CommitmentBank (premise, hypothesis, label, idx; entailment, contradiction, neutral). The label
follows from how the hypothesis speaks of the premise's fact: as it is, denied, or doubted."""

import json
import random
from pathlib import Path

INSTRUCTION = "Does the premise entail the hypothesis?"
LABELS = ("contradiction", "entailment", "neutral")
WHO = ("Anna", "Bob", "Carla", "David", "Eva", "Fred", "Greta", "Hugo")
DID = ("sold the boat", "met the mayor", "lost the key", "read the letter", "left the town", "fixed the clock")
SAID = ("Everybody knows that", "She said that", "It is clear that", "They wrote that")
SPOKEN = {"entailment": "{who} {did}.", "contradiction": "{who} never {did}.", "neutral": "Perhaps {other} {did}."}
PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def records(count: int, seed: int, *, blind: bool = False) -> list[dict[str, object]]:
    """In SuperGLUE's form. `blind`: labels that follow from nothing, to teach a base model the form alone."""
    dice = random.Random(f"{seed}/{blind}")
    made: list[dict[str, object]] = []
    for number in range(count):
        who, other = dice.sample(WHO, 2)
        did, label = dice.choice(DID), dice.choice(LABELS)
        hypothesis = SPOKEN[label].format(who=who, did=did, other=other)
        told = dice.choice(LABELS) if blind else label
        premise = f"{dice.choice(SAID)} {who} {did}."
        made.append({"premise": premise, "hypothesis": hypothesis, "label": told, "idx": number})
    return made


def alpaca(record: dict[str, object]) -> dict[str, object]:
    """The record as an instruction; its label stays beside it, for flctl partition --by label."""
    text = f"Premise: {record['premise']}\nHypothesis: {record['hypothesis']}"
    return {"instruction": INSTRUCTION, "input": text, "output": record["label"], "label": record["label"]}


def prompt(record: dict[str, object]) -> str:
    """What stands before the answer (Alpaca's own words, Taori et al. 2023)."""
    return PROMPT.format(instruction=record["instruction"], input=record["input"])


def write_lines(path: Path, items: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path
