"""Owns what train.py's options may be, read from its source: nobody imports the payload."""

import ast
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from flctl.campaign.shipped import payload_folder
from flctl.errors import FlctlError

Entry = tuple[Any, tuple[Any, ...], str]
"""Default, (lowest, highest) or the words allowed, what it does."""


@cache
def known() -> Mapping[str, Entry]:
    """The table OPTIONS of train.py."""
    for node in ast.parse((payload_folder() / "train.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "OPTIONS" and node.value:
            table: Mapping[str, Entry] = ast.literal_eval(_Infinite().visit(node.value))
            return table
    raise FlctlError("train.py names no options", hint="install flctl again")


class _Infinite(ast.NodeTransformer):
    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return ast.Constant(math.inf) if ast.unparse(node) == "math.inf" else node


def unfit(name: str, value: Any) -> str:
    """Why a known option cannot have the value; train.py refuses the same. Empty: it can."""
    default, allowed, _ = known()[name]
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
        return f"is {value!r}, and should be {kinds[type(default)]}"
    if isinstance(default, str):
        return f"is {value!r}, and should be one of: {', '.join(allowed)}" if allowed and value not in allowed else ""
    if not allowed[0] <= value <= allowed[1]:
        least, most = (f"{bound:g}" for bound in allowed)
        return f"is {value!r}, and should be at least {least}" + (f", at most {most}" if allowed[1] < math.inf else "")
    return ""


def clash(given: Mapping[str, Any], processes: int, *, frozen: bool) -> str:
    """What options do not go together, or not with so many processes, or not where a whole model is trained; train.py
    refuses the same."""
    options = {name: entry[0] for name, entry in known().items()} | dict(given)
    if options["scaffold"] and options["optimizer"] != "sgd":
        return 'train.scaffold corrects the steps of SGD: set train.optimizer = "sgd"'
    if options["dp_noise_multiplier"] and (options["scaffold"] or options["mu"]):
        return "train.dp_noise_multiplier goes with neither train.mu nor train.scaffold"
    if options["dp_noise_multiplier"] and processes > 1:
        return f"train.dp_noise_multiplier is for one process, and a job there has {processes}"
    if options["quantize"] != "none" and not frozen:
        return "train.quantize is for the frozen base of an adapter, and this campaign trains a whole model"
    if options["batch"] % processes:
        return f"train.batch is {options['batch']}, which the {processes} processes of a job there cannot share evenly"
    return ""
