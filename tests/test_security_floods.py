"""Answers of a site that are made to keep flctl busy: read in moments, whatever they hold. A search in Python's `re`
holds every thread of the process, so one site's answer would stop the others' steps."""

import subprocess
import sys

import pytest

from flctl.errors import SiteUnreachable
from flctl.facility.connection import OUTPUT_MOST
from flctl.facility.scheduler import QueryFailed
from flctl.facility.scheduler.pbs import Pbs
from flctl.facility.shell import COMPLAINTS_MOST, LINE_MOST, Program

BOUND = 60.0
"""Seconds. Each of these took hours, or minutes at least, before it was read in one pass."""

BEFORE = f"""
from flctl.facility import over_kept, probe, shell
from flctl.facility.scheduler import listing, pbs, qstat, slurm
MOST = {OUTPUT_MOST}
program = shell.Program.of({{"a": "true"}})
nonce = program.nonce
def answered(text):
    try:
        program.answers(text, {{"a": ""}}, site="s")
    except Exception as error:
        assert type(error).__name__ == "SiteUnreachable", error
def complained(words):
    text = f"\\n{{nonce}} out a\\n\\n{{nonce}} err a 1\\n{{(words * MOST)[:MOST]}}\\n{{nonce}} end a\\n"
    return program.answers(text, {{"a": ""}}, site="s")["a"].stderr
"""

FLOODS = {
    "marks of a beginning": "answered(f'\\n{nonce} out a\\n' * (MOST // 30))",
    "marks of an end": "answered(f'\\n{nonce} out a\\n' + f'\\n{nonce} err a 1\\n' * (MOST // 30))",
    "lines of a name (squeue)": "listing.jobs('1|RUNNING|1|1|1|1|x|n\\n' + 'a\\n' * (MOST // 2), slurm.activity_of)",
    "lines of qstat": "qstat.jobs('Job Id: 1.s\\n    Job_Name = a\\n    job_state = R\\n' + 'a\\n' * 4_000_000)",
    "words of sbatch": "slurm.Slurm().refusal(complained('sbatch: option '))",
    "words of sacct": "slurm.Slurm().accounted(0, '', complained('sacct '))",
    "words of sacctmgr": "slurm.Slurm().accounts_seen(0, '', complained('sacctmgr '))",
    "words of qsub": "pbs.Pbs().refusal(complained('qsub '))",
    "words of a limit": "pbs.Pbs().full(complained('would exceed '))",
    "lines of df": "probe.space_left(shell.Answer(status=0, stdout=' 1 1 1 1% /' * (MOST // 11) + '\\nx', stderr=''))",
}


@pytest.mark.parametrize("name", FLOODS)
def test_no_answer_keeps_flctl_busy(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{BEFORE}\n{FLOODS[name]}"], capture_output=True, text=True, timeout=BOUND, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("status", ["9" * 5000, "-1", "", "0x1", "٣", "1 1"])
def test_an_answer_without_an_exit_status_is_none(status: str) -> None:
    program = Program.of({"a": "true"})
    text = f"\n{program.nonce} out a\nx\n{program.nonce} err a {status}\n\n{program.nonce} end a\n"
    with pytest.raises(SiteUnreachable):
        program.answers(text, {"a": ""}, site="s")


def test_answers_stay_as_they_were() -> None:
    program = Program.of({"a": "printf 'x\\ny\\n'; echo no >&2; exit 3", "b": "true", "c": "printf '\\n\\n'"})
    ran = subprocess.run(["/bin/sh"], input=program.script, capture_output=True, text=True, check=True)
    answers = program.answers(f"noise{ran.stdout}noise", {"a": "", "b": "", "c": ""}, site="s")
    assert (answers["a"].status, answers["a"].stdout, answers["a"].stderr) == (3, "x\ny\n", "no")
    assert (answers["b"].status, answers["b"].stdout, answers["b"].stderr) == (0, "", "")
    assert answers["c"].stdout == "\n\n"


def test_of_long_complaints_the_beginning_is_read() -> None:
    program = Program.of({"a": "true"})
    said = "sbatch: error: first\n" + "x" * (2 * LINE_MOST) + "\n" + "y\n" * COMPLAINTS_MOST
    text = f"\n{program.nonce} out a\n\n{program.nonce} err a 1\n{said}\n{program.nonce} end a\n"
    read = program.answers(text, {"a": ""}, site="s")["a"].stderr
    assert read.startswith("sbatch: error: first\n" + "x" * LINE_MOST + "\ny\n") and len(read) <= COMPLAINTS_MOST


def test_a_listing_that_is_nested_without_end_is_none() -> None:
    with pytest.raises(QueryFailed):
        Pbs().queues_seen(0, '{"Queue":' + "[" * 200_000, "")
