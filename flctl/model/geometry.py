"""How the updates of one merge lie to each other: inner products over all float tensors, streamed."""

from collections.abc import Sequence

from flctl.model.shards import Shards


def gram(ours: Shards, theirs: Sequence[Shards], bases: Sequence[Shards | None]) -> list[list[float]]:
    """sum over all values of (x_i - b_i)(x_j - b_j), in float64."""
    raise NotImplementedError
