"""Policies: pure functions over records and a given time. No files, no network, no clock."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from flctl.policy import sync
from flctl.policy.view import Decision, View

Policy = Callable[[View, float], Decision]

POLICIES: Mapping[str, Policy] = MappingProxyType({"sync": sync.decide})

__all__ = ["POLICIES", "Decision", "Policy", "View"]
