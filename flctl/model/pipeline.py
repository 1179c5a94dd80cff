"""Pieces of work done side by side, their results taken in order."""

import os
import resource
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

from flctl.errors import ConfigurationError

Desk = TypeVar("Desk")
Job = TypeVar("Job")
Result = TypeVar("Result")

SPARE = 2  # desks beyond the threads: one whose result is being used, one whose result waits
OTHERS = 64  # files that are open besides: logs, locks, connections, what is written
MOST = 4  # beyond that, who takes the results is the slowest


def default_threads() -> int:
    """One core is left to who takes the results: in a merge, that hashes and writes them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable - 1, MOST))


def desks_for(wanted: int, *, files: int) -> int:
    """So many desks, or fewer if the system does not let them all hold `files` files open. ConfigurationError if not
    even one may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted * files + OTHERS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with suppress(OSError, ValueError):  # macOS says that there is no limit, and has one
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = min(wanted, (soft - OTHERS) // files)
    if wanted < 1:
        raise ConfigurationError(
            f"{files + OTHERS} files must be open at once, and this system allows {soft}",
            hint=f"allow more (ulimit -n {files + OTHERS}), or merge fewer contributions at a time",
        )
    return wanted


def in_order(
    jobs: Iterable[Job], desks: Sequence[Desk], work: Callable[[Desk, Job], Result], pool: ThreadPoolExecutor
) -> Iterator[Result]:
    """work(desk, job) for every job, in the pool's threads; the results in the order of the jobs. A desk is used by one
    job at a time, and again only after the result after its own was asked for, so a result may lie in its desk."""
    free = deque(desks)
    running: deque[tuple[Desk, Future[Result]]] = deque()
    waiting = iter(jobs)
    ended = False
    try:
        while True:
            while free and not ended:
                try:
                    job = next(waiting)
                except StopIteration:
                    ended = True
                    break
                desk = free.popleft()
                running.append((desk, pool.submit(work, desk, job)))
            if not running:
                return
            desk, future = running.popleft()
            yield future.result()
            free.append(desk)
    finally:
        for _, future in running:
            future.cancel()
        wait([future for _, future in running])
