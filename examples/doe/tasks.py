"""Owns 14 small chemistry tasks that are made up from a seed: the names and groups of SMolInstruct's 14 tasks, with
molecules that a grammar draws and answers that follow from them by rule, so that nothing is downloaded.

Four groups, one per site. Molecules are unbranched chains of carbon with a group at the end, little enough for a model
of a hundred thousand parameters to learn."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

MASSES = {"H": 1.008, "C": 12.011, "N": 14.007, "O": 15.999, "S": 32.06, "F": 18.998, "Cl": 35.45}
STEMS = ("meth", "eth", "prop", "but", "pent", "hex", "hept", "oct")
ENDS = {"": ("ane", "C"), "O": ("anol", "an alcohol"), "N": ("anamine", "an amine"), "S": ("anethiol", "a thiol")}
ENDS |= {"Cl": ("yl chloride", "a chloride"), "F": ("yl fluoride", "a fluoride"), "C(=O)O": ("anoic acid", "an acid")}


def molecule(dice: random.Random) -> tuple[str, str]:
    """(SMILES, name), such as CCCO and propanol."""
    length, end = dice.randint(1, len(STEMS)), dice.choice(sorted(ENDS))
    carbons = length - 1 if end == "C(=O)O" else length
    return "C" * carbons + end, STEMS[length - 1] + ENDS[end][0]


def atoms(smiles: str) -> Counter[str]:
    """Of a molecule as `molecule` draws them, hydrogens included."""
    if smiles.endswith("C(=O)O"):
        carbons = len(smiles) - 5
        return Counter({"C": carbons, "H": 2 * carbons, "O": 2})
    end = next((name for name in ("Cl", "F", "O", "N", "S") if smiles.endswith(name)), "")
    carbons = smiles.removesuffix(end).count("C")
    bound = {"O": 0, "S": 0, "N": 1, "Cl": -1, "F": -1, "": 0}[end]
    return Counter({"C": carbons, "H": 2 * carbons + 2 + bound, **({end: 1} if end else {})})


def formula(smiles: str) -> str:
    found = atoms(smiles)
    order = ["C", "H", *sorted(set(found) - {"C", "H"})]
    return "".join(f"{name}{found[name] if found[name] > 1 else ''}" for name in order if found[name])


def mass(smiles: str) -> float:
    return sum(count * MASSES[name] for name, count in atoms(smiles).items())


def kind(smiles: str) -> str:
    end = next((end for end in sorted(ENDS, key=len, reverse=True) if end and smiles.endswith(end)), "")
    return ENDS[end][1] if end else "an alkane"


def _oxidised(smiles: str) -> str:
    return smiles.removesuffix("O")[:-1] + "C(=O)O"


Task = Callable[[random.Random], tuple[str, str]]


def _name(question: str, answer: Callable[[str, str], str], ask: Callable[[str, str], str]) -> Task:
    def task(dice: random.Random) -> tuple[str, str]:
        smiles, name = molecule(dice)
        return question.format(ask(smiles, name)), answer(smiles, name)

    return task


def _of_smiles(question: str, answer: Callable[[str], str]) -> Task:
    return _name(question, lambda smiles, name: answer(smiles), lambda smiles, name: smiles)


def _forward(dice: random.Random) -> tuple[str, str]:
    start = "C" * dice.randint(1, 8) + "O"
    return f"What does {start} become when oxidised?", _oxidised(start)


def _back(dice: random.Random) -> tuple[str, str]:
    start = "C" * dice.randint(1, 8) + "O"
    return f"What was oxidised to {_oxidised(start)}?", start


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _oxygens(smiles: str) -> int:
    return atoms(smiles)["O"]


# SMolInstruct's groups (Yu et al., arXiv:2402.09391) and names; the six properties stand for ESOL, Lipo, BBBP, ...
GROUPS: dict[str, dict[str, Task]] = {
    "names": {
        "name_conversion-i2f": _name("Formula of {}?", lambda smiles, name: formula(smiles), lambda smiles, name: name),
        "name_conversion-i2s": _name("SMILES of {}?", lambda smiles, name: smiles, lambda smiles, name: name),
        "name_conversion-s2f": _of_smiles("Formula of {}?", formula),
        "name_conversion-s2i": _name("Name of {}?", lambda smiles, name: name, lambda smiles, name: smiles),
    },
    "properties": {
        "property_prediction-esol": _of_smiles("Molar mass of {}?", lambda smiles: f"{mass(smiles):.1f}"),
        "property_prediction-lipo": _of_smiles(
            "Carbons less oxygens in {}?", lambda s: str(s.count("C") - _oxygens(s))
        ),
        "property_prediction-bbbp": _of_smiles("Is {} lighter than 80?", lambda smiles: _yes(mass(smiles) < 80)),
        "property_prediction-clintox": _of_smiles("Is there a halogen in {}?", lambda s: _yes(s.endswith(("Cl", "F")))),
        "property_prediction-hiv": _of_smiles("Is there nitrogen in {}?", lambda smiles: _yes("N" in smiles)),
        "property_prediction-sider": _of_smiles("Is {} an acid?", lambda smiles: _yes(smiles.endswith("C(=O)O"))),
    },
    "descriptions": {
        "molecule_captioning": _of_smiles(
            "Describe {}.", lambda smiles: f"It is {kind(smiles)} with {atoms(smiles)['C']} carbons."
        ),
        "molecule_generation": _name(
            "Draw {}.",
            lambda smiles, name: smiles,
            lambda smiles, name: f"{kind(smiles)} with {atoms(smiles)['C']} carbons",
        ),
    },
    "reactions": {"forward_synthesis": _forward, "retrosynthesis": _back},
}


def write_group(group: str, path: Path, *, seed: int, records: int) -> None:
    """So many records of each task of the group as JSON lines (task, instruction, input, output, text), shuffled."""
    lines = []
    for name, task in GROUPS[group].items():
        dice = random.Random(f"{seed}/{name}")
        for _ in range(records):
            question, answer = task(dice)
            text = f"{question}\n{answer}\n"
            lines.append({"task": name, "instruction": question, "input": "", "output": answer, "text": text})
    random.Random(f"{seed}/{group}").shuffle(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
