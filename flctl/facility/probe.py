"""Owns what `flctl site test` asks in one login, in one program: what a round will need at a site."""

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flctl.facility.certificates import clock
from flctl.facility.profile import Site
from flctl.facility.scheduler import Scheduler
from flctl.facility.script import container_words, environment_lines, shell_word
from flctl.facility.shell import Answer, quote
from flctl.facility.signatures import NAMESPACE
from flctl.words import printable

Result = Literal["ok", "warn", "fail"]

PATIENCE = 60
"""Seconds for one question; for Python, which imports torch from a busy parallel file system, three times as much."""
HEARD = 4000
"""Bytes of a command of the site's own: more would take the room of the other answers."""
UNKNOWN_NAME = "flctlnosuchjob"
SAMPLE = "flctl"
QUERIES = frozenset({"queue", "accounting"})
"""The questions that are left out where the scheduler was asked for its jobs a short while ago."""
FREE = re.compile(r"\s(\d{1,18})\s+\d+\s+(-?\d{1,18})\s+\d+%\s+/[^\n]*\s*$", re.ASCII)
"""The last line of `df -P`; less than nothing is left where what root keeps for itself is used as well."""
VERSIONS = "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing looked at. `exit_code`: what a failure of it counts as; `fix`: what to do about it."""

    name: str
    result: Result
    detail: str
    fix: str = ""
    exit_code: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """What a round needs at a site: `size` bytes, which are `copies` of the model, and `files`; `seconds`: how long the
    plan still lasts at least."""

    size: int
    files: int
    copies: int = 0
    seconds: float = 0.0


def bounded(command: str, seconds: int = PATIENCE) -> str:
    """A command that is ended after so many seconds: one that hangs must not take the others' answers with it."""
    return f"$(command -v timeout >/dev/null && echo timeout -k 5 {seconds}) sh -c {quote(command)}"


def in_login_shell(command: str) -> str:
    """The end of what a command says in a login shell, with the command's status; what the shell prints is dropped."""
    heard = f"set -o pipefail; {command} 2>&1 | tail -c {HEARD} >&9"
    return f"bash -lc {quote(heard)} 9>&1 >/dev/null 2>&1"


def trial_command(scheduler: Scheduler, script: str) -> str:
    """Show the scheduler a job script, which lies in a new folder of /tmp meanwhile; empty where it has no dry run."""
    folder = f"/tmp/flctl-{secrets.token_hex(8)}"
    command = scheduler.trial(f"{folder}/job.sh") if script else None
    if command is None:
        return ""
    made = f"umask 077; mkdir {folder} && printf %s {quote(script)} >{folder}/job.sh"
    return f"({made} && {bounded(command, 2 * PATIENCE)}\nstatus=$?; rm -rf {folder}; exit $status)"


def space_commands(work: str) -> dict[str, str]:
    """What is free where `work` lies, or would lie, for `space_left`."""
    found = f'place={quote(work)}; while test ! -d "$place"; do place=$(dirname "$place"); done; cd "$place"'
    return {"space": bounded(f"{found} && df -Pk ."), "inodes": bounded(f"{found} && df -Pi .")}


def space_left(answer: Answer) -> int | None:
    """KiB or inodes free, as `df -P` tells; None where it does not (some file systems have no number of inodes)."""
    match = FREE.search(answer.stdout[-HEARD:]) if answer.status == 0 else None
    return max(0, int(match[2])) if match and int(match[1]) else None


def questions(site: Site, scheduler: Scheduler, *, work: str, data: str, script: str) -> dict[str, str]:
    """The commands that `verdicts` needs the answers of, by name. `script`: a job script for the dry run, if any."""
    environment = site.environment
    seal = quote(environment.seal_python)
    readable = f"test -r {quote(data)} && {{ test ! -d {quote(data)} || test -x {quote(data)}; }} && echo there"
    asked = {
        "clock": "date +%s",
        "who": 'echo "$(id -un) on $(uname -n)"',
        "noise": 'echo : | "${SHELL:-/bin/sh}" -l 2>&1',
        "tools": "command -v sha256sum mv mkdir tail head df stat >/dev/null && echo found",
        "seal": f"{seal} -c 'import sys; print(sys.version.split()[0]); sys.exit(sys.version_info < (3, 6))'",
        "version": scheduler.version(),
        "queue": scheduler.queue(),
        "accounting": scheduler.accounting([UNKNOWN_NAME]) or "",
        "accounts": scheduler.accounts() or "",
        "queues": scheduler.queues() or "",
        "work": f"mkdir -p {quote(work)} && cd {quote(work)} && : >.flctl-test && rm .flctl-test",
        "quota": site.storage.quota and in_login_shell(site.storage.quota),
        "balance": site.budget.balance and in_login_shell(site.budget.balance),
        "data": readable,
        "rsync": "" if site.transfer.host else f"{quote(site.transfer.rsync or 'rsync')} --version | head -n 1",
        "modules": f"bash -c {quote(chr(10).join(_modules(site)))}" if _modules(site) else "",
        "container": f"bash -c {quote(_container(site))}" if environment.container.program else "",
        "signing": signing_command(site.signing.key) if site.signing.key else "",
    }
    python = "\n".join([*environment_lines(site), f"{python_words(site)} -c {quote(VERSIONS)}"])
    return {
        **{name: bounded(command) for name, command in asked.items() if command},
        **space_commands(work),
        "python": bounded(f"bash -c {quote(python)}", 3 * PATIENCE),
        **({"trial": trial} if (trial := trial_command(scheduler, script)) else {}),
    }


def signing_command(key: str) -> str:
    """Sign a word as a job signs its record."""
    return f"printf {SAMPLE} | SSH_ASKPASS_REQUIRE=never ssh-keygen -Y sign -n {NAMESPACE} -f {shell_word(key)}"


def python_words(site: Site) -> str:
    """The trainer's Python as shell words, in the container if there is one."""
    return " ".join(shell_word(word) for word in (*container_words(site), site.environment.python))


def _modules(site: Site) -> list[str]:
    return [line for line in environment_lines(site) if line.startswith(("type module ", "module "))]


def _container(site: Site) -> str:
    program, image = site.environment.container.program, shell_word(site.environment.container.image)
    found = f'command -v {program} >/dev/null || {{ echo "there is no {program}" >&2; exit 1; }}'
    readable = f'test -r {image} || {{ echo "the image "{image}" cannot be read" >&2; exit 1; }}'
    return "\n".join([*_modules(site), found, readable, f"{program} --version"])


def noise(stdout: str, stderr: str, answers: Mapping[str, Answer]) -> Check:
    """What shells print that were not asked to: outside the frames of the answers, and on stderr."""
    name, said = "shell noise", printable(f"{stdout} {stderr}", 120)
    if said:
        harm = "scp and rsync by hand cannot" if stdout.strip() else "so does rsync, as long as it is on stderr only"
        fix = (
            "let ~/.bashrc and its like print nothing when the shell is not interactive (first line: case $- in *i*) ;;"
            f" *) return;; esac): flctl reads round it, {harm}"
        )
        return Check(name=name, result="warn", detail=f"each command there prints {said!r} besides", fix=fix)
    said = printable(answers["noise"].stdout, 120)
    if said:
        return Check(name=name, result="ok", detail=f"a login shell prints {said!r}; other shells nothing: harmless")
    return Check(name=name, result="ok", detail="shells print nothing of their own")


def around(output: str, nonce: str) -> str:
    """What stands before the first and after the last frame of a program's answers."""
    before = output.split(f"\n{nonce} out ", 1)[0] if f"\n{nonce} out " in output else ""
    after = re.sub(r"\A\w+\n", "", output.rsplit(f"\n{nonce} end ", 1)[-1]) if f"{nonce} end " in output else ""
    return f"{before} {after}".strip()


def words(answer: Answer) -> str:
    """The last line of what a command that failed said."""
    if answer.status in (124, 137) and not answer.stderr.strip():
        return "no answer in time"
    text = (answer.stderr.strip() or answer.stdout.strip() or f"exit status {answer.status}").splitlines()[-1]
    return printable(text, 200)


def last_lines(answer: Answer, unit: str = "") -> str:
    """The end of what a command of the site's own said, on one line."""
    lines = [printable(line, 120) for line in answer.stdout.splitlines() if line.strip()][-6:]
    return " | ".join([*([f"in {unit}"] if unit else []), *lines]) or "silent"


def start_in_words(start: float | None) -> str:
    """An expected start (Unix seconds), labelled as what it is."""
    if start is None:
        return "no estimate of its start"
    return f"estimate: starts {'at once' if start - time.time() < 60 else 'at ' + clock(start)}"
