"""Policies: pure functions over records and a given time. No files, no network, no clock."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from flctl.policy import evaluating, sync
from flctl.policy.view import Decision, View

Policy = Callable[[View, float], Decision]

POLICIES: Mapping[str, Policy] = MappingProxyType({"sync": sync.decide})


def decide(name: str, view: View, now: float) -> Decision:
    """What a policy says. A return to an earlier version that was decided comes first, and a plan that only evaluates
    is every policy's."""
    if (back := evaluating.returning(view)) is not None:
        return Decision(roll_back=back)
    if view.plan.evaluates is None:
        return POLICIES[name](view, now)
    if view.models[-1].version + 1 < view.plan.first:
        return sync.again(view)
    return evaluating.decide(view)


__all__ = ["POLICIES", "Decision", "Policy", "View", "decide"]
