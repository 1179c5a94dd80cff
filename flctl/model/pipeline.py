"""Pieces of work done side by side, their results taken in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

Desk = TypeVar("Desk")
Job = TypeVar("Job")
Result = TypeVar("Result")

SPARE = 2  # desks beyond the threads: one whose result is being used, one whose result waits
MOST = 4  # beyond that, who takes the results is the slowest


def default_threads() -> int:
    """One core is left to who takes the results: in a merge, that hashes and writes them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable - 1, MOST))


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
