"""Owns what the answers to `flctl site test` mean: one check each, ok, warn or fail, with the fix."""

import re
import time
from collections.abc import Mapping

from flctl.facility import limits
from flctl.facility.probe import SAMPLE, Check, Want, last_lines, space_left, start_in_words, words
from flctl.facility.profile import Site
from flctl.facility.scheduler import QueryFailed, Scheduler
from flctl.facility.shell import Answer
from flctl.facility.signatures import fault, signer_of
from flctl.words import printable

CLOCK_SKEW_MOST = 10.0


def verdicts(
    site: Site, scheduler: Scheduler, answers: Mapping[str, Answer], *, work: str, data: str, now: float, want: Want
) -> list[Check]:
    """What the answers mean. `now`: our clock when the first question was asked, Unix seconds."""
    file = f"sites/{site.name}.toml"
    return [
        *_scheduler(site, scheduler, answers, file),
        *_work(site, answers, work, want, file),
        _plain("data", answers["data"], f"set storage.data in {file}; {data} cannot be read there", detail=data),
        *_programs(site, answers, file),
        _python(answers["python"], site, file),
        _clock(answers["clock"], now),
        *_signing(site, answers, file),
        *_trial(site, scheduler, answers, file),
        *_told("balance", answers, f"see budget.balance in {file}", site.budget.unit),
    ]


def _plain(name: str, answer: Answer, fix: str, *, detail: str = "") -> Check:
    if answer.status == 0:
        return Check(name=name, result="ok", detail=detail or printable(answer.stdout))
    return Check(name=name, result="fail", detail=words(answer), fix=fix)


def _clock(answer: Answer, now: float) -> Check:
    told = re.fullmatch(r"\s*(\d{1,12})\s*", answer.stdout, re.ASCII)
    if told is None:
        return Check(name="clock", result="warn", detail=f"unknown ({words(answer)})", fix="see `date +%s` there")
    skew = float(told[1]) - now
    if abs(skew) > CLOCK_SKEW_MOST:
        fix = "set this machine's clock: one-time codes and deadlines depend on it"
        return Check(name="clock", result="warn", detail=f"{skew:+.0f} s from ours", fix=fix)
    return Check(name="clock", result="ok", detail=f"within {CLOCK_SKEW_MOST:.0f} s of ours")


def _signing(site: Site, answers: Mapping[str, Answer], file: str) -> list[Check]:
    """Whether a record signed there counts here. That the nodes of jobs can read the key, too, only a job shows."""
    name = "signing"
    if "signing" not in answers:
        return []
    answer, signers = answers["signing"], site.signing.signers
    if answer.status != 0:
        fix = f"signing.key in {file}: a key there without a passphrase; ssh-keygen -Y needs OpenSSH 8.1 or newer"
        return [Check(name=name, result="fail" if signers else "warn", detail=words(answer), fix=fix)]
    if signers and signer_of(SAMPLE.encode(), answer.stdout, site.name, signers) is None:
        reason = fault(SAMPLE.encode(), answer.stdout, site.name, signers[0])
        fix = f"pin the public key that belongs to signing.key: signing.signers in {file}"
        return [Check(name=name, result="fail", detail=reason, fix=fix)]
    return [Check(name=name, result="ok", detail="counts" if signers else "signs; no signer is pinned here")]


def _scheduler(site: Site, scheduler: Scheduler, answers: Mapping[str, Answer], file: str) -> list[Check]:
    return [
        _answers(site, scheduler, answers),
        *_accounting(site, scheduler, answers, file),
        *_account(site, scheduler, answers, file),
        *_queue(site, scheduler, answers, file),
    ]


def _answers(site: Site, scheduler: Scheduler, answers: Mapping[str, Answer]) -> Check:
    kind = site.scheduler.kind
    version = printable(answers["version"].stdout.strip() or answers["version"].stderr.strip(), 120)
    if kind == "pbs" and answers["version"].status != 0:
        torque = re.search(r"(?i)torque|\bversion: *\d", version)
        detail = f"{version}{': this is Torque, which flctl does not support' if torque else ''}"
        fix = f"ask the facility which scheduler there is; scheduler.kind in sites/{site.name}.toml names it"
        return Check(name="scheduler", result="fail", detail=detail, fix=fix)
    if "queue" not in answers:
        detail = f"{version or kind}; asked for its jobs less than {2 * site.poll.every} s ago, and not again"
        return Check(name="scheduler", result="ok", detail=detail)
    try:
        answer = answers["queue"]
        seen = scheduler.seen(answer.status, answer.stdout, answer.stderr)
    except QueryFailed as failure:
        fix = f"does {kind} answer there? try its queue command by hand"
        return Check(name="scheduler", result="fail", detail=printable(str(failure)), fix=fix, exit_code=6)
    jobs = limits.count(len(seen), "job")
    return Check(name="scheduler", result="ok", detail=f"{version or kind}; {jobs} of yours listed")


def _accounting(site: Site, scheduler: Scheduler, answers: Mapping[str, Answer], file: str) -> list[Check]:
    name = "accounting"
    if site.scheduler.kind == "local" or "queue" not in answers:
        return []
    if "accounting" not in answers:
        return [Check(name=name, result="ok", detail="not asked: the profile says so (scheduler.accounting)")]
    fix = f"set scheduler.accounting = false in {file} if there is none; a job's own record says how it ended"
    try:
        answer = answers["accounting"]
        known = scheduler.accounted(answer.status, answer.stdout, answer.stderr) is not None
    except QueryFailed as failure:
        return [Check(name=name, result="warn", detail=printable(str(failure)), fix=fix)]
    detail = "answers" if known else "there is none"
    return [Check(name=name, result="ok" if known else "warn", detail=detail, fix="" if known else fix)]


def _account(site: Site, scheduler: Scheduler, answers: Mapping[str, Answer], file: str) -> list[Check]:
    name, account = "account", site.shape.account
    if "accounts" not in answers:
        return []
    answer = answers["accounts"]
    try:
        known = scheduler.accounts_seen(answer.status, answer.stdout, answer.stderr)
    except QueryFailed as failure:
        detail = f"the accounts cannot be asked for: {failure}"
        return [Check(name=name, result="warn", detail=printable(detail), fix="the dry run below shows more")]
    if known is None:
        return [Check(name=name, result="ok", detail=f"{account or 'none'}; the scheduler keeps no list of accounts")]
    yours = printable(", ".join(known), 200) or "none"
    if account and account not in known:
        fix = f"set scheduler.account in {file} to one of yours, or ask the facility"
        return [Check(name=name, result="fail", detail=f"{account} is not among yours: {yours}", fix=fix)]
    return [Check(name=name, result="ok", detail=account or f"the scheduler's own choice of: {yours}")]


def _queue(site: Site, scheduler: Scheduler, answers: Mapping[str, Answer], file: str) -> list[Check]:
    name = "queue" if site.scheduler.kind == "pbs" else "partition"
    now, problems, doubt = time.time(), list(limits.too_much(site, time.time())), ""
    if "queues" in answers:
        answer = answers["queues"]
        try:
            seen = scheduler.queues_seen(answer.status, answer.stdout, answer.stderr)
            problems += [found for found in limits.too_much_there(site, seen, now) if found not in problems]
        except QueryFailed as failure:
            doubt = f"the {name}s cannot be asked for: {failure}"
    fix = f"change [shapes.{site.scheduler.shape}] or [scheduler] in {file}"
    if problems:
        return [Check(name=name, result="fail", detail=printable("; ".join(problems)), fix=fix)]
    if doubt:
        return [Check(name=name, result="warn", detail=printable(doubt), fix="the dry run below shows more")]
    if site.scheduler.kind == "local":
        return []
    shape = site.shape
    asked = f"{limits.count(shape.nodes, 'node')} for {limits.clock(shape.walltime)}"
    return [Check(name=name, result="ok", detail=f"{limits.named(site, now) or 'the default'} takes {asked}")]


def _work(site: Site, answers: Mapping[str, Answer], work: str, want: Want, file: str) -> list[Check]:
    days = site.storage.purge_days
    checks = [_writable(answers["work"], work, days, file)]
    if days and want.seconds > days * 86400:
        fix = "keep data and Python's environment elsewhere, or touch them: flctl brings its own files again"
        detail = f"the plan lasts {want.seconds / 86400:.0f} days or more; untouched files go after {days}"
        checks.append(Check(name="purge", result="warn", detail=detail, fix=fix))
    checks += [_space(answers["space"], want), *_inodes(answers["inodes"], want)]
    return checks + _told("quota", answers, f"see storage.quota in {file}", "")


def _writable(answer: Answer, work: str, days: int, file: str) -> Check:
    name, detail = "work folder", words(answer)
    if answer.status == 0:
        kept = f"; what nobody touches for {days} days is removed" if days else ""
        return Check(name=name, result="ok", detail=f"{work} can be written{kept}")
    if re.search(r"(?i)no space left|quota exceeded", detail):
        return Check(name=name, result="fail", detail=detail, fix="make room there", exit_code=9)
    return Check(name=name, result="fail", detail=detail, fix=f"set storage.work in {file}")


def _space(answer: Answer, want: Want) -> Check:
    free, asked = space_left(answer), f"a round wants {limits.size(want.size)}"
    if free is None:
        return Check(name="free space", result="warn", detail=f"unknown ({words(answer)}); {asked}", fix="see df there")
    detail = f"{limits.size(free * 1024)} free; {asked}"
    if free * 1024 < want.size:
        return Check(name="free space", result="fail", detail=detail, fix="make room there", exit_code=9)
    return Check(name="free space", result="ok", detail=detail)


def _inodes(answer: Answer, want: Want) -> list[Check]:
    free = space_left(answer)
    if free is None:
        return []
    detail = f"{free} free; a round wants {want.files}"
    if free < want.files:
        return [Check(name="inodes", result="fail", detail=detail, fix="remove files there", exit_code=9)]
    return [Check(name="inodes", result="ok", detail=detail)]


def _told(name: str, answers: Mapping[str, Answer], fix: str, unit: str) -> list[Check]:
    """The last lines of a command of the site's own, which only a person can read."""
    if name not in answers:
        return []
    answer = answers[name]
    if answer.status != 0:
        return [Check(name=name, result="warn", detail=words(answer), fix=fix)]
    return [Check(name=name, result="ok", detail=last_lines(answer, unit))]


def _programs(site: Site, answers: Mapping[str, Answer], file: str) -> list[Check]:
    checks = [
        _plain("tools", answers["tools"], f"{site.login.host or 'the site'} lacks coreutils", detail="coreutils found"),
        _plain(
            "python for seal.py", answers["seal"], f"set environment.seal_python in {file} to a Python 3.6 or newer"
        ),
    ]
    if "modules" in answers:
        answer, fix = answers["modules"], f"`module avail` there; then environment.modules in {file}"
        names = ", ".join((*site.environment.modules_use, *site.environment.modules))
        # Tcl modules before 4.1 say that one is missing, and succeed.
        if answer.status == 0 and re.search(r"(?i)\berror\b|unable to locate|cannot be loaded", answer.stderr):
            checks.append(Check(name="modules", result="fail", detail=words(answer), fix=fix))
        else:
            checks.append(_plain("modules", answer, fix, detail=f"{names} can be loaded"))
    if "container" in answers:
        fix = f"flctl site stage {site.name} brings an image; environment.container in {file} names it"
        checks.append(_plain("container", answers["container"], fix))
    return checks


def _python(answer: Answer, site: Site, file: str) -> Check:
    name = "python on the login host"
    if answer.status != 0:
        fix = f"see docs/sites.md for building it; environment.python in {file} says which one"
        return Check(name=name, result="warn", detail=words(answer), fix=fix)
    return Check(name=name, result="ok", detail=printable((answer.stdout.strip() or "silent").splitlines()[-1]))


def _trial(site: Site, scheduler: Scheduler, answers: Mapping[str, Answer], file: str) -> list[Check]:
    if "trial" not in answers:
        return []
    answer, name = answers["trial"], "dry-run submit"
    try:
        found = scheduler.estimate(answer.status, answer.stdout, answer.stderr)
    except QueryFailed as failure:
        return [Check(name=name, result="warn", detail=printable(str(failure)), fix="flctl round would show it")]
    if found.refusal:
        fix = f"change [scheduler] or [shapes.{site.scheduler.shape}] in {file}"
        return [Check(name=name, result="fail", detail=printable(found.refusal), fix=fix, exit_code=6)]
    return [Check(name=name, result="ok", detail=f"the job would be taken; {start_in_words(found.start)}")]
