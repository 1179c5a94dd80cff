"""Owns whether a job of a site's shape fits its partition, queue and QOS, and which other one would take it."""

from collections.abc import Collection, Mapping, Sequence

from flctl.facility.profile import Queue, Shape, Site
from flctl.facility.scheduler import QueueSeen


def too_much(site: Site, now: float) -> tuple[str, ...]:
    """What the tables [queues.NAME] of the profile do not allow a job submitted now (Unix seconds): `4 nodes for
    6:00:00: batch allows 2:00:00; use extended`."""
    return _broken(site.shape, _names(site, now), site.queues, site.queues)


def too_much_there(site: Site, seen: Sequence[QueueSeen], now: float) -> tuple[str, ...]:
    """The same of what the scheduler itself says; also that there is no such partition or queue, or that it is shut."""
    if not seen:
        return ()
    there = {queue.name: queue for queue in seen}
    group = _names(site, now)[0]
    if unknown := [name for name in group if name not in there]:
        kind = "queue" if site.scheduler.kind == "pbs" else "partition"
        return (f"there is no {kind} {', '.join(unknown)}; there is: {', '.join(sorted(there)[:20])}",)
    limits = {
        name: Queue(
            min_nodes=queue.min_nodes or 0, max_nodes=queue.max_nodes or 0, max_walltime=queue.max_walltime or 0
        )
        for name, queue in there.items()
    }
    open_ones = tuple(name for name in group if there[name].open)
    others = {name: limits[name] for name in site.queues if name in limits and there[name].open}
    if group and not open_ones:
        return (f"{', '.join(group)} takes no jobs now" + _advice(site.shape, group, others),)
    return _broken(site.shape, (open_ones,), limits, others)


def named(site: Site, now: float) -> str:
    """The partition or queue, the QOS, and the reservation if a job submitted now would get it."""
    shape = site.shape
    words = [shape.partition or shape.queue, shape.qos and f"QOS {shape.qos}"]
    if shape.reservation.holds(now, shape.walltime):
        words.append(f"reservation {shape.reservation.name}")
    return ", ".join(word for word in words if word)


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def clock(seconds: int) -> str:
    """A walltime to be read: H:MM:SS."""
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def size(count: float) -> str:
    """Bytes to be read: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _names(site: Site, now: float) -> tuple[tuple[str, ...], ...]:
    """Groups of names; a job must fit one of each. A reservation of PBS is a queue of its own, with its own limits."""
    shape = site.shape
    inside = site.scheduler.kind == "pbs" and shape.reservation.holds(now, shape.walltime)
    queues = () if inside else tuple(name for name in (shape.partition or shape.queue).split(",") if name)
    return (queues, (shape.qos,) if shape.qos else ())


def _broken(
    shape: Shape, groups: Sequence[Sequence[str]], limits: Mapping[str, Queue], others: Mapping[str, Queue]
) -> tuple[str, ...]:
    broken, taken = [], {name for group in groups for name in group}
    for group in groups:
        reasons = {name: _reason(shape, limits[name]) for name in group if name in limits}
        if len(reasons) == len(group) and reasons and all(reasons.values()):
            asked = f"{count(shape.nodes, 'node')} for {clock(shape.walltime)}"
            found = ", ".join(f"{name} {reason}" for name, reason in reasons.items())
            broken.append(f"{asked}: {found}{_advice(shape, taken, others)}")
    return tuple(broken)


def _advice(shape: Shape, taken: Collection[str], others: Mapping[str, Queue]) -> str:
    fitting = [name for name, queue in others.items() if name not in taken and not _reason(shape, queue)]
    return f"; use {' or '.join(fitting)}" if fitting else ""


def _reason(shape: Shape, queue: Queue) -> str:
    """What of a queue the shape breaks; empty if it fits."""
    reasons = []
    if queue.max_walltime and shape.walltime > queue.max_walltime:
        reasons.append(f"allows {clock(queue.max_walltime)}")
    if queue.max_nodes and shape.nodes > queue.max_nodes:
        reasons.append(f"allows {count(queue.max_nodes, 'node')}")
    if shape.nodes < queue.min_nodes:
        reasons.append(f"wants {queue.min_nodes} nodes or more")
    if queue.max_node_hours and shape.nodes * shape.walltime / 3600 > queue.max_node_hours:
        reasons.append(f"allows {queue.max_node_hours:g} node-hours a job")
    return " and ".join(reasons)
