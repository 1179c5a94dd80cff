"""Row "etiquette": how often a site's scheduler is asked, by the logs of its own daemons, whatever is typed meanwhile.

One trial is a campaign at karolina (which has accounting) of several rounds, with jobs of the same user beside it. A
`round` goes on, is killed and begun again; every second there is a tick, as from cron, and a `status`; `site test`,
`retry` and `cancel` come in between; one job is killed, so that accounting has to be asked. The controller stops for a
while. In the full aim the profile's own interval counts (60 s); in a sample it is EVERY.
"""

import contextlib
import itertools
import random
import signal
import subprocess
import time
from collections.abc import Sequence

from tests.chaos.beds import made
from tests.chaos.results import Result
from tests.federation import Federation
from tests.test_cli_round_testbed import killed
from tests.testbed import Testbed

EVERY, DEFAULT = 4, 60
"""Seconds between two queries, in a sample and by default."""
INTERVALS = 4
"""For so many of them a trial lasts at least."""
LATENCY = 1.0
"""Seconds by which a request may come to the log later than it was sent: ssh, and a busy machine."""


def run(*, seed: int, trials: int | None = None, bed: Testbed | None = None) -> Result:
    """`trials` None: one trial with the default interval."""
    began, notes, closest, asked = time.monotonic(), list[str](), list[float](), 0
    every = DEFAULT if trials is None else EVERY
    with contextlib.ExitStack() as stack:
        bed = bed or stack.enter_context(made(None))
        for number in range(trials or 1):
            queue, accounting = trial(bed, random.Random(seed + number), every)
            gaps = [*pairs(queue), *pairs(accounting)]
            closest.append(min(gaps, default=float("inf")))
            asked += len(queue) + len(accounting)
            if len(queue) < 2 or not accounting:
                notes.append(f"trial {number}: {len(queue)} squeue and {len(accounting)} sacct: too few to judge")
            notes += [f"trial {number}: two queries within {gap:.1f} s" for gap in gaps if gap < every - LATENCY]
            most = densest(sorted([*queue, *accounting]), every * INTERVALS)
            if most > INTERVALS + 1:
                notes.append(f"trial {number}: {most} queries in {every * INTERVALS} s")
    figures = {
        "every": every,
        "queries": asked,
        "closest": round(min(closest), 1),
        "worst": f"{min(closest):.1f} s apart",
    }
    seconds = time.monotonic() - began
    return Result(
        row="etiquette", trials=trials or 1, failures=len(notes), seconds=seconds, figures=figures, notes=notes
    )


def pairs(moments: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(moments)]


def densest(moments: Sequence[float], span: float) -> int:
    """The most moments within `span` seconds."""
    return max((sum(first <= other < first + span for other in moments) for first in moments), default=0)


def without_piled(moments: Sequence[float], frozen: float, thawed: float, every: float) -> list[float]:
    """Without what came to the log when the controller was thawed: what was sent meanwhile is all written down then.
    More than could have been sent stays."""
    piled = [moment for moment in moments if thawed <= moment < thawed + 2 * LATENCY]
    if len(piled) > 2 + (thawed - frozen) // every:
        return list(moments)
    return [moment for moment in moments if moment not in piled]


def trial(bed: Testbed, rng: random.Random, every: int) -> tuple[list[float], list[float]]:
    """When squeue and when sacct were asked for."""
    bed.reset()
    facility = bed.facilities["karolina"]
    cluster, uid = facility.slurm, facility.account.uid
    assert cluster.accounting is not None
    poll = {"every": every, "most": 10 * every, "absence": every, "claim_window": 5 * every}
    federation = Federation(bed, "polite", karolina={"poll": poll, "train": {"behave": "hang"}})
    beside(bed, 5)
    since = time.time()
    process = federation.popen("round", "--sites", "karolina", "--rounds", "3")
    federation.wait(lambda: federation.jobs_started("karolina") or process.poll() is not None)
    frozen: list[float] = []
    events = [
        lambda: (frozen.append(time.time()), cluster.controller.freeze()),
        lambda: (frozen.append(time.time()), cluster.controller.thaw()),
        lambda: lose(federation),
    ]
    until, step = time.monotonic() + every * INTERVALS, 0
    cap = until + 3 * every * INTERVALS

    def queue() -> list[float]:
        moments = [moment for moment in cluster.requests("REQUEST_JOB_USER_INFO", uid) if moment >= since - 1]
        return without_piled(moments, frozen[0], frozen[1], every) if len(frozen) > 1 else moments

    def accounting() -> list[float]:
        return [moment for moment in cluster.accounting.queries(uid) if moment >= since - 1]

    try:
        while time.monotonic() < until or ((len(queue()) < 2 or not accounting()) and time.monotonic() < cap):
            step += 1
            federation.flctl("campaign", "tick")
            federation.flctl("status")
            if rng.random() < 0.2:
                federation.flctl("site", "test", "karolina")
            if rng.random() < 0.2:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                process = federation.popen("round")
            if rng.random() < 0.1:
                federation.flctl("retry", "karolina")
            if events and step % 3 == 0:
                events.pop(0)()
            time.sleep(1)
        federation.flctl("cancel", "karolina")
    finally:
        frozen.append(time.time())
        cluster.controller.thaw()
        process.kill()
        process.communicate()
    return queue(), accounting()


def beside(bed: Testbed, count: int) -> None:
    """Held jobs of the same user, which no query may take for ours and which cost none of their own."""
    facility = bed.facilities["karolina"]
    for _ in range(count):
        subprocess.run(
            ["sbatch", "--hold", "--output=/dev/null", "--wrap=true"],
            env={"PATH": "/usr/bin:/bin", **facility.slurm.environment},
            user=facility.account.uid,
            group=facility.account.gid,
            extra_groups=[],
            cwd="/",
            check=True,
            capture_output=True,
        )


def lose(federation: Federation) -> None:
    """The newest attempt's job is killed without a trace."""
    if job := federation.run("karolina").get("job", {}).get("id"):
        killed(federation, job)
