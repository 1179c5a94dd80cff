"""Owns the checks behind `flctl site test`: what a round will need of a site, asked in one program."""

from dataclasses import dataclass
from typing import Literal

from flctl.facility.profile import Site
from flctl.facility.scheduler import QueryFailed, Scheduler
from flctl.facility.script import environment_lines, shell_word
from flctl.facility.shell import Answer, quote

Result = Literal["ok", "warn", "fail"]

CLOCK_SKEW_MOST = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing looked at. `exit_code`: what a failure of it counts as; `fix`: what to do about it."""

    name: str
    result: Result
    detail: str
    fix: str = ""
    exit_code: int = 3


def questions(site: Site, scheduler: Scheduler, work: str, data: str) -> dict[str, str]:
    """The commands that `verdicts` needs the answers of, by name."""
    seal = quote(site.environment.seal_python)
    versions = "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
    program = "\n".join([*environment_lines(site), f"{shell_word(site.environment.python)} -c {quote(versions)}"])
    return {
        "clock": "date +%s",
        "tools": "command -v sha256sum mv mkdir tail head >/dev/null && echo found",
        "seal": f"{seal} -c 'import sys; print(sys.version.split()[0]); sys.exit(sys.version_info < (3, 6))'",
        "queue": scheduler.queue(),
        "work": f"mkdir -p {quote(work)} && cd {quote(work)} && : >.flctl-test && rm .flctl-test "
        "&& df -Pk . | tail -n 1",
        "data": f"test -r {quote(data)} && {{ test ! -d {quote(data)} || test -x {quote(data)}; }} && echo there",
        "python": f"bash -c {quote(program)}",
    }


def verdicts(
    site: Site, scheduler: Scheduler, answers: dict[str, Answer], *, work: str, data: str, now: float, need: int
) -> list[Check]:
    """What the answers mean. `now`: our clock when they came, Unix seconds; `need`: bytes a round wants there."""
    file = f"sites/{site.name}.toml"
    return [
        _plain("login host's tools", answers["tools"], f"{site.login.host or 'the site'} lacks coreutils"),
        _plain(
            "python for seal.py", answers["seal"], f"set environment.seal_python in {file} to a Python 3.6 or newer"
        ),
        _clock(answers["clock"], now),
        _queue(site, scheduler, answers["queue"]),
        _work(answers["work"], work, need, file),
        _plain("data", answers["data"], f"set storage.data in {file}; {data} cannot be read there", detail=data),
        _python(answers["python"], site, file),
    ]


def _plain(name: str, answer: Answer, fix: str, *, detail: str = "") -> Check:
    if answer.status == 0:
        return Check(name=name, result="ok", detail=detail or answer.stdout.strip())
    return Check(name=name, result="fail", detail=_words(answer), fix=fix)


def _words(answer: Answer) -> str:
    text = (answer.stderr.strip() or answer.stdout.strip() or f"exit status {answer.status}").splitlines()[-1]
    return "".join(c for c in text if c.isprintable())[:200]


def _clock(answer: Answer, now: float) -> Check:
    skew = float(answer.stdout) - now if answer.stdout.strip().isdigit() else 0.0
    if abs(skew) > CLOCK_SKEW_MOST:
        fix = "set this machine's clock: one-time codes and deadlines depend on it"
        return Check(name="clock", result="warn", detail=f"{skew:+.0f} s from ours", fix=fix)
    return Check(name="clock", result="ok", detail=f"within {CLOCK_SKEW_MOST:.0f} s of ours")


def _queue(site: Site, scheduler: Scheduler, answer: Answer) -> Check:
    try:
        seen = scheduler.seen(answer.status, answer.stdout, answer.stderr)
    except QueryFailed as failure:
        fix = f"does {site.scheduler.kind} answer there? try its queue command by hand"
        return Check(name="scheduler", result="fail", detail=str(failure)[:200], fix=fix, exit_code=6)
    return Check(
        name="scheduler", result="ok", detail=f"{site.scheduler.kind} answers; {len(seen)} jobs of yours listed"
    )


def _work(answer: Answer, work: str, need: int, file: str) -> Check:
    if answer.status != 0:
        return Check(name="work folder", result="fail", detail=_words(answer), fix=f"set storage.work in {file}")
    fields = answer.stdout.split()
    free = int(fields[3]) * 1024 if len(fields) > 3 and fields[3].isdigit() else None
    if free is not None and free < need:
        detail = f"{work}: {free / 1e9:.1f} GB free, a round wants {need / 1e9:.1f} GB"
        return Check(name="work folder", result="fail", detail=detail, fix="make room there", exit_code=9)
    shown = "" if free is None else f", {free / 1e9:.1f} GB free"
    return Check(name="work folder", result="ok", detail=f"{work} can be written{shown}")


def _python(answer: Answer, site: Site, file: str) -> Check:
    if answer.status != 0:
        fix = f"see docs/sites.md for building it; environment.python in {file} says which one"
        return Check(name="python for training", result="warn", detail=_words(answer), fix=fix)
    return Check(name="python for training", result="ok", detail=answer.stdout.strip().splitlines()[-1])
