"""The gates: may this contribution be averaged with others into a successor of its base."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from flctl.errors import AggregationRefused
from flctl.model.folder import check_model
from flctl.model.shards import CHUNK, Reader, Shards, open_shards
from flctl.model.tied import under_the_names_of

__all__ = ["Deviation", "Look", "Report", "check", "check_model", "compared", "deviation", "match"]

FEWEST = 3  # others, or own past values, that say what is usual
LEAST_SPREAD = 0.1  # of the median: a few values may lie close together by chance
FARTHEST = 1e6  # deviations; all that is farther away is told as this


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the gates saw: numbers of tensors, values and bytes of weights; l2 norms, in float64 and over the float
    tensors, of contribution - base and of the base."""

    tensors: int
    parameters: int
    bytes: int
    update_norm: float
    base_norm: float


def match(theirs: Shards, ours: Shards) -> Shards:
    """`theirs`, which has the same tensors, shapes and dtypes, whatever the shards and the names of tied tensors; else
    AggregationRefused naming tensors and site."""
    theirs = under_the_names_of(ours, theirs)
    for name, tensor in ours.tensors.items():
        given = theirs.tensors[name]
        if given.shape != tensor.shape:
            shapes = f"{list(given.shape)}, the base's has {list(tensor.shape)}"
            raise _refused(theirs, f"tensor {name!r} has shape {shapes}")
        if given.dtype != tensor.dtype:
            raise _refused(theirs, f"tensor {name!r} is {given.dtype}, the base's is {tensor.dtype}")
    return theirs


def check(contribution: Path, base: Path, *, site: str, chunk: int = CHUNK) -> Report:
    """The gates of a fetched contribution: the base's tensors, all finite. Raises AggregationRefused naming tensor and
    site. Streamed: the memory needed is that of a few chunks."""
    ours = open_shards(base)
    theirs = match(open_shards(contribution, site=site), ours)
    update, before = _norms(theirs, ours, chunk)
    return Report(
        tensors=len(ours.tensors),
        parameters=sum(tensor.count for tensor in ours.tensors.values()),
        bytes=sum(tensor.end - tensor.begin for tensor in ours.tensors.values()),
        update_norm=update,
        base_norm=before,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """Where a norm lies among `count` others: their median, and how far from it in their spread. None, None: they are
    too few to judge by."""

    count: int
    median: float | None = None
    deviations: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the gates before a merge saw of one contribution: the norm of its update, among the others of this merge and
    among those its site gave before, the cosine to the mean of the updates (None: not asked for, or too few), and by
    the gate's name (norm, cosine) why it is unusual, if it is."""

    norm: float
    others: Deviation
    past: Deviation
    cosine: float | None
    reasons: Mapping[str, str]

    @property
    def judged(self) -> bool:
        return any(figure is not None for figure in (self.others.deviations, self.past.deviations, self.cosine))

    @property
    def worst(self) -> float:
        """The farthest of its deviations."""
        return max(self.others.deviations or 0.0, self.past.deviations or 0.0)


def deviation(norm: float, others: Sequence[float]) -> Deviation:
    """|norm - median| / max(MAD, median / 10), MAD the median absolute deviation from the median (Hampel 1974,
    doi:10.1080/01621459.1974.10482962); a norm equal to the median deviates by 0, whatever the spread."""
    if len(others) < FEWEST:
        return Deviation(count=len(others))
    middle = median(others)
    distance = abs(norm - middle)
    spread = max(median(abs(other - middle) for other in others), LEAST_SPREAD * middle)
    far = distance / spread if spread > distance / FARTHEST else FARTHEST
    return Deviation(count=len(others), median=middle, deviations=far if distance else 0.0)


def compared(
    norms: Mapping[str, float],
    past: Mapping[str, Sequence[float]],
    cosines: Mapping[str, float],
    *,
    norm_limit: float | None,
    cosine_limit: float | None,
) -> dict[str, Look]:
    """Each contribution of a merge, by any label: its update's norm against the others' and its site's `past` ones, and
    its cosine to the mean of the updates, where that was measured. A limit of None: no judgement by that figure. Fewer
    than 3 others, past values or contributions are too few to judge by."""
    looks = {}
    for label, norm in norms.items():
        rivals = {
            "the other updates": [other for name, other in norms.items() if name != label],
            "this site's own before": past.get(label, ()),
        }
        found = {whose: deviation(norm, some if norm_limit is not None else ()) for whose, some in rivals.items()}
        far = [
            f"{seen.deviations:.3g} deviations from {seen.median:.4g}, the median of {whose}"
            for whose, seen in found.items()
            if norm_limit is not None and (seen.deviations or 0.0) > norm_limit
        ]
        cosine = cosines.get(label) if len(norms) >= FEWEST else None
        reasons = {}
        if far:
            reasons["norm"] = f"the update's norm {norm:.4g} is {' and '.join(far)} (limit {norm_limit:g})"
        if cosine is not None and cosine_limit is not None and cosine < cosine_limit:
            reasons["cosine"] = f"the update's cosine to the mean is {cosine:.3g} (limit {cosine_limit:g})"
        among, before = found.values()
        looks[label] = Look(norm=norm, others=among, past=before, cosine=cosine, reasons=reasons)
    return looks


def _norms(theirs: Shards, ours: Shards, chunk: int) -> tuple[float, float]:
    """(of the update, of the base). A NaN or an Inf anywhere makes a sum of squares NaN or Inf, so one look at each sum
    tells; only then are the values searched."""
    import torch

    from flctl.model.chunks import Chunk, steady_arithmetic

    buffer = Chunk(chunk)
    update, before = torch.empty(chunk, dtype=torch.float64), torch.empty(chunk, dtype=torch.float64)
    updates, befores = 0.0, 0.0
    with steady_arithmetic(), Reader(theirs) as their_reader, Reader(ours) as our_reader:
        for name, tensor in ours.tensors.items():
            for start, count in tensor.pieces(chunk) if tensor.averaged else ():
                x, b = update[:count], before[:count]
                b.copy_(buffer.load(our_reader, tensor, start, count))
                x.copy_(buffer.load(their_reader, theirs.tensors[name], start, count))
                befores += float(b.dot(b))
                updates += float(x.sub_(b).dot(x))
                if not math.isfinite(updates + befores):
                    raise _unusable(theirs, ours, name, chunk)
    return math.sqrt(updates), math.sqrt(befores)


def _unusable(theirs: Shards, ours: Shards, name: str, chunk: int) -> AggregationRefused:
    from flctl.model.chunks import Chunk, blemish

    buffer = Chunk(chunk)
    for shards in (ours, theirs):
        tensor = shards.tensors[name]
        with Reader(shards) as reader:
            for start, count in tensor.pieces(chunk):
                if what := blemish(buffer.load(reader, tensor, start, count)):
                    return _refused(shards, f"tensor {name!r} holds {what}")
    return _refused(theirs, f"tensor {name!r} holds values too large for a norm in float64")


def _refused(theirs: Shards, reason: str) -> AggregationRefused:
    return AggregationRefused(f"{theirs.folder}: {reason}", site=theirs.site)
