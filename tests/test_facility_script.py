"""Job scripts: what rendering inserts, what it refuses, and that the shipped templates do right under a real bash."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flctl.errors import ConfigurationError
from flctl.facility.profile import Container, Environment, Scheduler, Shape, Site
from flctl.facility.script import (
    Lines,
    Plain,
    Words,
    container_words,
    environment_lines,
    job_script,
    job_values,
    render,
    shell_word,
)
from tests.testbed.procs import wait_until

ROOT = Path(__file__).parent.parent
TEMPLATES = ROOT / "templates"
PAYLOAD = ROOT / "flctl" / "payload"
RANK = ROOT / "tests" / "data" / "rank.py"

SITE = Site(
    schema=1,
    name="here",
    scheduler=Scheduler(kind="slurm", account="project", partition="gpu"),
    shapes={"prod": Shape(walltime=14400, gpus=4, extra=("--mem=0", "--constraint=a100"))},
)


def script(site: Site, folder: str = "/work/c-1234", data: str = "/data") -> str:
    root = PurePosixPath(folder)
    return job_script(
        site,
        (TEMPLATES / f"{site.scheduler.kind}.sh").read_text(encoding="utf-8"),
        token="fa1b2",
        campaign="demo",
        run=root / "runs" / "0001-1",
        workdir=root,
        payload=root / "payload" / "ab",
        data=data,
        now=0.0,
    )


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def bash(text: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        ["bash", "-c", text, "bash", *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return done.stdout


# ---- rendering ----


def test_a_shell_line_gets_one_quoted_word() -> None:
    value = 'it\'s $HOME; `id` "x" \\ *'
    text = render("printf %s {{it}}/file {{ it }}\n", {"it": value}, source="t")
    assert bash(text) == f"{value}/file{value}"


@given(st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=40).filter(str.isprintable))
def test_any_printable_value_reaches_the_program_as_it_is(value: str) -> None:
    text = render("printf '%s' x{{it}}\n", {"it": value}, source="t")
    assert bash(text, LC_ALL="C.UTF-8") == f"x{value}"


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b", "a\x1b[2J", "a\x85b", "a\u2028b", "a\u202eb"])
@pytest.mark.parametrize("line", ["#SBATCH --account={{it}}", "echo {{it}}"])
def test_a_value_with_a_control_character_is_refused(line: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"the value of \{\{it\}\} holds a control character"):
        render(line, {"it": value}, source="t")
    with pytest.raises(ConfigurationError, match="control character"):
        render("{{it}}", {"it": Lines((value,))}, source="t")


@pytest.mark.parametrize("value", ["a b", "a;id", "$(id)", "a'b", "a%j", "ä", "a\\b", "<a>"])
def test_a_directive_takes_harmless_characters_only(value: str) -> None:
    with pytest.raises(ConfigurationError, match="may not stand in a directive"):
        render("#SBATCH --account={{it}}", {"it": value}, source="t")


def test_a_directive_with_an_empty_value_goes_away() -> None:
    text = "#SBATCH --qos={{qos}}\n#SBATCH --nodes={{nodes}}\n##SBATCH --x={{unknown}}\n"
    assert render(text, {"qos": "", "nodes": "2"}, source="t") == "#SBATCH --nodes=2\n##SBATCH --x={{unknown}}\n"


def test_an_unknown_name_is_told_with_line_and_nearest_name() -> None:
    with pytest.raises(ConfigurationError) as caught:
        render("#!/bin/bash\n\necho {{walltme}}\n", {"walltime": "1", "run": "/r"}, source="templates/slurm.sh")
    assert str(caught.value) == "templates/slurm.sh, line 3: unknown name {{walltme}}; did you mean {{walltime}}?"


@pytest.mark.parametrize("line", ['echo "{{it}}"', "echo '{{it}}'", 'x="a b" y="{{it}}/c"', 'echo "it\'s {{it}}"'])
def test_a_placeholder_inside_quotes_is_refused(line: str) -> None:
    with pytest.raises(ConfigurationError, match="stands inside quotes"):
        render(line, {"it": "a b"}, source="t")


@pytest.mark.parametrize("line", ['echo "x" {{it}}', "echo \\' {{it}}", "echo '\"' {{it}}", 'echo "\\"" {{it}}'])
def test_quotes_that_are_closed_again_do_not_matter(line: str) -> None:
    assert render(line, {"it": "a b"}, source="t").endswith("'a b'\n")


def test_dollars_comments_and_other_braces_stay_the_shells() -> None:
    text = "# {{anything}} is left\nx=${y:-1} $((1+1)) {a,{b,c}} $z\n"
    assert render(text, {}, source="t") == text


def test_lines_stand_alone_and_keep_the_indentation() -> None:
    values = {"it": Lines(("a", "b c")), "none": Lines(())}
    assert render("f() {\n  {{it}}\n  {{none}}\n}\n", values, source="t") == "f() {\n  a\n  b c\n}\n"
    with pytest.raises(ConfigurationError, match="give it a line of its own"):
        render("echo {{it}}", values, source="t")


def test_words_keep_variables_and_nothing_else() -> None:
    text = render("printf '[%s]' {{it}}", {"it": Words(("$A/x y", "~/b", "c;d", "${A}e"))}, source="t")
    assert bash(text, A="1 2", HOME="/h") == "[1 2/x y][/h/b][c;d][1 2e]"
    assert render("exec {{it}} python", {"it": Words(())}, source="t") == "exec  python\n"


@pytest.mark.parametrize("text", ["$(id)", '$A"b', "$A`id`", "$A\\b", "$1", "a$", "${A:-b}", "$A!b"])
def test_a_word_with_more_than_variables_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="more of the shell than variables"):
        shell_word(text)


def test_windows_line_ends_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="line 1: holds a control character"):
        render("#!/bin/bash\r\n", {}, source="t")


# ---- the values ----


def test_the_slurm_script_asks_for_what_the_profile_says() -> None:
    assert directives(script(SITE)) == [
        "--job-name=fa1b2",
        "--account=project",
        "--partition=gpu",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=4",
        "--time=04:00:00",
        "--signal=B:USR1@120",
        "--no-requeue",
        "--output=/work/c-1234/runs/0001-1/log",
        "--open-mode=append",
        "--export=NONE",
        "--mem=0",
        "--constraint=a100",
    ]


def test_all_directives_come_before_the_first_command() -> None:
    """sbatch reads no further."""
    lines = [line for line in script(SITE).splitlines() if line]
    first = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


@pytest.mark.parametrize(
    ("seconds", "time", "warning"),
    [(5, "00:00:05", 1), (60, "00:01:00", 6), (1800, "00:30:00", 120), (345_661, "4-00:01:01", 120)],
)
def test_walltime_and_warning(seconds: int, time: str, warning: int) -> None:
    text = script(replace(SITE, shapes={"prod": Shape(walltime=seconds)}))
    assert {f"--time={time}", f"--signal=B:USR1@{warning}"} <= set(directives(text))
    assert f"--walltime {seconds} " in text


def test_the_environment_comes_in_its_order() -> None:
    environment = Environment(
        modules=("a/1", "b/2"),
        activate=('. "$WORK/venv/bin/activate"',),
        exports={"ONE": "a b", "TWO": "$TMPDIR/x"},
        proxy="http://proxy:3128",
    )
    assert environment_lines(replace(SITE, environment=environment)) == [
        "type module >/dev/null 2>&1 || . /etc/profile",
        "module load a/1 || exit 1",
        "module load b/2 || exit 1",
        '. "$WORK/venv/bin/activate"',
        "export HF_HUB_OFFLINE=1",
        "export ONE='a b'",
        'export TWO="$TMPDIR/x"',
        *(f"export {name}=http://proxy:3128" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")),
    ]
    assert environment_lines(SITE) == ["export HF_HUB_OFFLINE=1"]


def test_the_whole_environment_comes_in_its_order() -> None:
    environment = Environment(
        modules_use=("$WORK/modules", "/soft/m f"), modules=("a/1",), unset=("PYTHONPATH", "X"), offline=False
    )
    assert environment_lines(replace(SITE, environment=environment)) == [
        "type module >/dev/null 2>&1 || . /etc/profile",
        'module use "$WORK/modules" || exit 1',
        "module use '/soft/m f' || exit 1",
        "module load a/1 || exit 1",
        "unset PYTHONPATH X",
    ]


def contained(*binds: str, program: str = "apptainer", **fields: Any) -> Site:
    container = Container(program=program, image="$WORK/a.sif", binds=binds, **fields)  # type: ignore[arg-type]
    return replace(SITE, environment=Environment(container=container))


def test_the_container_stands_in_front_of_python() -> None:
    site = contained("$SCRATCH", "/soft:/opt/soft:ro", "/ro:ro", gpu="--nv --fakeroot", options=("--cleanenv",))
    (line,) = [line for line in script(site).splitlines() if "apptainer exec" in line]
    assert line == (
        '  exec  apptainer exec --nv --fakeroot --bind /work/c-1234 --bind /data --bind "$SCRATCH"'
        ' --bind /soft:/opt/soft:ro --bind /ro:/ro:ro --cleanenv "$WORK/a.sif"'
        """ /bin/sh -c 'trap '"'"''"'"' USR1; exec "$@"' flctl python3 /work/c-1234/payload/ab/train.py"""
    )
    assert container_words(SITE, "/work", "/data of mine, too") == ()


def test_a_merge_runs_in_the_container_as_well() -> None:
    root = PurePosixPath("/work/c")
    folders = {"run": root / "runs" / "0001-1", "workdir": root, "payload": root / "payload" / "ab"}
    text = (TEMPLATES / "slurm.sh").read_text(encoding="utf-8")
    zipped = root / "payload" / "cd" / "merge.zip"
    made = job_script(contained(), text, token="f", campaign="c", data="/d", now=0.0, command=(str(zipped),), **folders)
    assert f"flctl python3 {zipped}\n" in made and made.count("apptainer exec") == 1


@pytest.mark.parametrize("place", ["/a b", "/a,b", "/a:b", "/a\tb"])
def test_a_path_that_cannot_be_bound_is_refused(place: str) -> None:
    for words in (lambda: container_words(contained(), "/work", place), lambda: container_words(contained(place))):
        with pytest.raises(ConfigurationError, match="cannot be bound into a container"):
            words()


def test_a_path_that_holds_a_dollar_is_bound_as_it_is() -> None:
    text = render("printf '[%s]' {{it}}", {"it": Words(container_words(contained(), "/w/$HOME")[2:4])}, source="t")
    assert bash(text, HOME="/h") == "[--bind][/w/$HOME]"
    assert shell_word(Plain('$(id)"`')) == "'$(id)\"`'"


def test_variables_of_the_job_win_over_those_of_the_image() -> None:
    exports = {"ONE": "a b", "PATH": "/x:$PATH", "HF_HUB_OFFLINE": "0"}
    for program in ("apptainer", "singularity"):
        container = Container(program=program, image="/i")  # type: ignore[arg-type]
        environment = Environment(container=container, exports=exports, offline=False)
        line = environment_lines(replace(SITE, environment=environment))[-1]
        found = bash(f"export ONE='a b' FLCTL_A=1 FLCTL_B='2 3' http_proxy=\n{line}\nenv", HF_HUB_OFFLINE="0")
        prefix = f"{program.upper()}ENV_"
        passed = {word.removeprefix(prefix) for word in found.splitlines() if word.startswith(prefix)}
        assert passed == {"ONE=a b", "FLCTL_A=1", "FLCTL_B=2 3", "http_proxy=", "HF_HUB_OFFLINE=0"}


def test_every_value_is_documented() -> None:
    path = PurePosixPath("/a")
    values = job_values(SITE, token="f", campaign="c", run=path, workdir=path, payload=path, data="/d", now=0.0)
    told = (ROOT / "docs" / "sites.md").read_text(encoding="utf-8").partition("## The job script")[2]
    assert [name for name in values if f"`{name}`" not in told] == []


@pytest.mark.parametrize("kind", ["slurm", "local"])
def test_the_shipped_templates_are_right_for_bash(kind: str) -> None:
    text = script(replace(SITE, scheduler=Scheduler(kind=kind)), "/a b/it's" if kind == "local" else "/a-b")  # type: ignore[arg-type]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=20)
    assert "{{" not in "".join(line for line in text.splitlines() if not line.startswith("#"))


def test_the_shipped_templates_differ_only_in_what_slurm_needs() -> None:
    def body(kind: str) -> list[str]:
        lines = (TEMPLATES / f"{kind}.sh").read_text(encoding="utf-8").splitlines()
        lines = lines[lines.index("umask 077") :]
        return [line.replace("SLURM_JOB_ID", "FLCTL_JOB_ID") for line in lines]

    assert body("slurm") == body("local")


# ---- the shipped template under a real bash, with the real seal.py ----

TRAINER = """\
import json, os, signal, sys
def ready(word):
    with open("said", "w") as pipe:
        pipe.write(word)
def save(*_):
    json.dump({"steps": 2, "samples": 4, "tokens": 8}, open(os.environ["FLCTL_OUT"] + "/metrics.json", "w"))
    open(os.environ["FLCTL_OUT"] + "/model.safetensors", "w").write("weights")
    sys.exit(0)
"""

SAVES = TRAINER + "save()\n"
WAITS = TRAINER + "[signal.signal(s, save) for s in (signal.SIGUSR1, signal.SIGTERM)]; ready('on'); signal.pause()\n"
IGNORES = TRAINER + "ready('on'); open('go').read(); save()\n"


class Job:
    """An attempt's folder at a site, ready to start; the site's path holds a blank and a quote."""

    def __init__(
        self,
        folder: Path,
        trainer: str,
        environment: Environment,
        *,
        name: str = "it's here",
        data: str = "/data of mine",
        shape: Shape | None = None,
    ) -> None:
        self.root = folder / name
        self.run = self.root / "runs" / "0001-1"
        for place in (self.run, self.root / "models" / "0003", self.root / "payload" / "ab"):
            place.mkdir(parents=True)
        (self.root / "models" / "0003" / "config.json").write_text("{}")
        (self.root / "payload" / "ab" / "seal.py").write_bytes((PAYLOAD / "seal.py").read_bytes())
        (self.root / "payload" / "ab" / "train.py").write_text(trainer)
        order = {"schema": 1, "token": "fa1b2", "campaign": "c", "site": "here", "number": 1, "attempt": 1, "seed": 5}
        order |= {"work": "train", "base": {"version": 3}, "steps": 2, "global_step": 6, "total_steps": 8}
        (self.run / "order.json").write_text(json.dumps(order))
        for pipe in ("said", "go"):
            os.mkfifo(self.run / pipe)
        shapes = {"prod": shape} if shape else SITE.shapes
        site = replace(SITE, scheduler=Scheduler(kind="local"), environment=environment, shapes=shapes)
        (self.run / "job.sh").write_text(script(site, str(self.root), data))

    @contextmanager
    def started(self) -> Iterator["subprocess.Popen[str]"]:
        with (self.run / "log").open("a") as log:
            process = subprocess.Popen(
                ["bash", str(self.run / "job.sh")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                env={"PATH": os.environ["PATH"], "FLCTL_JOB_ID": "17.4", "HOME": str(self.root)},
                start_new_session=True,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(20)

    def hear(self) -> str:
        """The word that the trainer says once it runs."""
        pipe = os.open(self.run / "said", os.O_RDONLY | os.O_NONBLOCK)
        try:
            assert select.select([pipe], [], [], 20)[0], self.log
            return os.read(pipe, 100).decode()
        finally:
            os.close(pipe)

    def done(self) -> Any:
        return json.loads((self.run / "done.json").read_text())

    @property
    def log(self) -> str:
        return (self.run / "log").read_text()


def job(tmp_path: Path, trainer: str, **environment: Any) -> Job:
    return Job(tmp_path, trainer, Environment(python=sys.executable, **environment))


def test_a_program_that_succeeds_is_recorded_with_its_files(tmp_path: Path) -> None:
    it = job(tmp_path, SAVES)
    with it.started() as process:
        assert process.wait(30) == 0, it.log
    done = it.done()
    assert (done["outcome"], done["exit_status"], done["job_id"], done["steps"]) == ("done", 0, "17.4", 2)
    assert sorted(entry["path"] for entry in done["files"]) == ["metrics.json", "model.safetensors"]
    assert (it.run / "done.json").stat().st_mode & 0o077 == 0
    assert (it.run / "out" / "model.safetensors").stat().st_mode & 0o077 == 0


def test_the_program_gets_its_environment(tmp_path: Path) -> None:
    trainer = TRAINER + "json.dump(dict(os.environ), open('environment', 'w')); save()\n"
    it = job(tmp_path, trainer, exports={"ONE": "$HOME/x y"}, activate=("ADDED=yes; export ADDED; : $UNSET",))
    with it.started() as process:
        assert process.wait(30) == 0, it.log
    given = json.loads((it.run / "environment").read_text())
    assert given["FLCTL_MODEL"] == str(it.root / "models" / "0003")
    assert given["FLCTL_DATA"] == "/data of mine"
    assert (given["ONE"], given["ADDED"], given["HF_HUB_OFFLINE"]) == (f"{it.root}/x y", "yes", "1")


def test_a_program_that_fails_is_recorded_with_its_status(tmp_path: Path) -> None:
    it = job(tmp_path, TRAINER + "print('flctl: error: no data'); sys.exit(9)\n")
    with it.started() as process:
        assert process.wait(30) == 9
    done = it.done()
    assert (done["outcome"], done["exit_status"], done["files"]) == ("failed", 9, [])
    assert "no data" in done["reason"]


@pytest.mark.parametrize(
    ("environment", "status"),
    [({"activate": ("exit 3",)}, 3), ({"launch": "/nowhere/launcher"}, 127), ({"modules": ("a/1",)}, 1)],
    ids=["activation", "launcher", "module"],
)
def test_an_environment_that_fails_is_recorded(tmp_path: Path, environment: dict[str, Any], status: int) -> None:
    it = job(tmp_path, SAVES, **environment)
    with it.started() as process:
        assert process.wait(30) == status, it.log
    assert (it.done()["outcome"], it.done()["exit_status"]) == ("failed", status)


def test_what_the_environment_breaks_does_not_reach_the_record(tmp_path: Path) -> None:
    """Activation may set another Python's home or path; seal.py runs as it did at the start."""
    breaks = "export PATH=/nowhere PYTHONHOME=/nowhere"
    it = job(tmp_path, SAVES, activate=(breaks,), launch="/usr/bin/env -u PYTHONHOME")
    with it.started() as process:
        assert process.wait(30) == 0, it.log
    assert it.done()["outcome"] == "done"


def test_the_warning_lets_the_program_save_and_counts_as_success(tmp_path: Path) -> None:
    it = job(tmp_path, WAITS)
    with it.started() as process:
        assert it.hear() == "on"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 0, it.log
    assert it.done()["outcome"] == "done"


def test_a_program_that_knows_no_warning_is_not_killed_by_it(tmp_path: Path) -> None:
    it = job(tmp_path, IGNORES)
    with it.started() as process:
        assert it.hear() == "on"
        for _ in range(3):
            process.send_signal(signal.SIGUSR1)
        (it.run / "go").write_text("on")
        assert process.wait(30) == 0, it.log
    assert it.done()["outcome"] == "done"


def test_the_warning_makes_the_file_that_every_rank_may_look_for(tmp_path: Path) -> None:
    """Ranks start with USR1 ignored, whatever their launcher does about it: `env` here resets it, as srun does."""
    looks = (
        "import time\nready(str(signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN))\nstop = os.environ['FLCTL_STOP']\n"
    )
    looks += "while not os.path.exists(stop): time.sleep(0.02)\nsave()\n"
    it = job(tmp_path, TRAINER + looks, launch="env --default-signal=USR1")
    with it.started() as process:
        assert it.hear() == "True"
        assert not (it.run / "stop").exists()
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 0, it.log
    assert it.done()["outcome"] == "done"


def test_both_ranks_of_mpiexec_are_warned(tmp_path: Path) -> None:
    """One knows the signal only, the other the file only."""
    launch = "mpiexec --oversubscribe --allow-run-as-root -n $FLCTL_RANKS"
    environment = Environment(python=sys.executable, launch=launch)
    it = Job(tmp_path, RANK.read_text(), environment, shape=Shape(walltime=600, ranks=2, cpus=2))
    (it.root / "models" / "0003" / "model.safetensors").write_text("weights")
    with it.started() as process:
        for rank in (0, 1):
            wait_until(lambda rank=rank: (it.run / f"up.{rank}").exists() or process.poll() is not None, f"rank {rank}")
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 0, it.log
    first, second = (json.loads((it.run / f"rank.{rank}").read_text()) for rank in (0, 1))
    assert first["ignored"] and second["ignored"] and first["signals"] and not second["signals"] and second["file"]
    assert (first["environment"]["FLCTL_RANKS"], first["environment"]["OMP_NUM_THREADS"]) == ("2", "1")
    assert it.done()["outcome"] == "done"


@pytest.mark.parametrize("to_all", [False, True], ids=["to the script", "to all processes"])
def test_the_end_makes_it_failed_even_if_the_program_saved(tmp_path: Path, to_all: bool) -> None:
    """Slurm sends SIGTERM to every process of the job."""
    it = job(tmp_path, WAITS)
    with it.started() as process:
        assert it.hear() == "on"
        if to_all:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        assert process.wait(30) in (0, 143), "the record counts; bash may have forgotten the program's own status"
    done = it.done()
    assert (done["outcome"], done["exit_status"], done["files"]) == ("failed", 143, [])
    assert "SIGTERM" in done["reason"]


def test_the_end_is_recorded_before_the_program_has_ended(tmp_path: Path) -> None:
    """SIGKILL follows within seconds: a program that takes its time must not cost the record."""
    slow = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}); ready('on')\n"
    it = job(tmp_path, TRAINER + slow + "signal.sigwait({signal.SIGTERM}); open('go').read()\n")
    with it.started() as process:
        assert it.hear() == "on"
        process.terminate()
        go = os.open(it.run / "go", os.O_RDWR)  # the program ends only once this is closed
        try:
            while not (it.run / "done.json").exists():
                assert process.poll() is None
                select.select([], [], [], 0.02)
            assert it.done()["outcome"] == "failed"
        finally:
            os.close(go)
        assert process.wait(30) == 0


# ---- in a container ----


def in_container(tmp_path: Path, trainer: str, *options: str, image: str = "image", **environment: Any) -> Job:
    """A job whose trainer runs in a container; tests/data/apptainer.py says what stands for Apptainer."""
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "env").write_text("OF_IMAGE=yes HF_HUB_OFFLINE=0 FLCTL_SEED=1")
    for name in ("data", "extra", "unbound"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    double = tmp_path / "bin" / "apptainer"
    double.parent.mkdir()
    double.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "tests" / "data" / "apptainer.py"} "$@"\n')
    double.chmod(0o755)
    container = Container(
        program="apptainer",
        image=str(tmp_path / image),
        gpu="--nv",
        binds=(f"{tmp_path}/extra:/extra:ro",),
        options=options,
    )
    path = f'export PATH="{tmp_path}/bin:$PATH" APPTAINER_LOG={tmp_path}/argv'
    made = Environment(python="/usr/bin/python3", container=container, activate=(path,), **environment)
    return Job(tmp_path, trainer, made, name="it's-here", data=str(tmp_path / "data"))


LOOKS = (
    TRAINER
    + """
here = {"cwd": os.getcwd(), "env": dict(os.environ), "data": open(os.environ["FLCTL_DATA"] + "/file").read()}
here |= {"model": os.listdir(os.environ["FLCTL_MODEL"]), "extra": open("/extra/file").read()}
here |= {"unbound": os.path.exists(os.environ["FLCTL_DATA"].replace("/data", "/unbound"))}
try:
    open("/extra/file", "w")
except OSError as error:
    here["refused"] = error.errno
json.dump(here, open("seen", "w"))
save()
"""
)


@pytest.mark.parametrize("options", [(), ("--cleanenv",)], ids=["as it is", "clean"])
def test_a_trainer_in_a_container_has_what_it_needs(tmp_path: Path, options: tuple[str, ...]) -> None:
    it = in_container(tmp_path, LOOKS, *options, exports={"ONE": "a b"})
    with it.started() as process:
        assert process.wait(60) == 0, it.log
    done, seen = it.done(), json.loads((it.run / "seen").read_text())
    assert (done["outcome"], sorted(entry["path"] for entry in done["files"])) == (
        "done",
        ["metrics.json", "model.safetensors"],
    )
    assert (seen["cwd"], seen["data"], seen["extra"], seen["unbound"]) == (str(it.run), "data", "extra", False)
    assert seen["model"] == ["config.json"] and seen["refused"] == 30  # EROFS
    env = seen["env"]
    assert env["FLCTL_MODEL"] == str(it.root / "models" / "0003") and env["FLCTL_SEED"] == "5"
    assert (env["ONE"], env["HF_HUB_OFFLINE"], env["PYTHONUNBUFFERED"], env["OF_IMAGE"]) == ("a b", "1", "1", "yes")
    assert env["PATH"] == "/usr/bin:/bin" and ("FLCTL_JOB_ID" in env)
    argv = json.loads((tmp_path / "argv").read_text())
    binds = ["--bind", str(it.root), "--bind", str(tmp_path / "data"), "--bind", f"{tmp_path}/extra:/extra:ro"]
    assert argv[: 8 + len(options)] == ["exec", "--nv", *binds, *options]


def test_the_warning_reaches_a_program_in_a_container(tmp_path: Path) -> None:
    it = in_container(tmp_path, WAITS)
    with it.started() as process:
        assert it.hear() == "on"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 0, it.log
    assert it.done()["outcome"] == "done"


def test_a_program_in_a_container_that_knows_no_warning_is_not_killed_by_it(tmp_path: Path) -> None:
    """Apptainer starts it with the default answer to every signal, whatever the job script ignores."""
    it = in_container(tmp_path, IGNORES)
    with it.started() as process:
        assert it.hear() == "on"
        for _ in range(3):
            process.send_signal(signal.SIGUSR1)
        (it.run / "go").write_text("on")
        assert process.wait(30) == 0, it.log
    assert it.done()["outcome"] == "done"


def test_the_end_reaches_a_program_in_a_container_and_is_recorded(tmp_path: Path) -> None:
    it = in_container(tmp_path, WAITS)
    with it.started() as process:
        assert it.hear() == "on"
        process.terminate()
        process.wait(30)
    assert (it.done()["outcome"], it.done()["exit_status"]) == ("failed", 143)
    assert (it.run / "out" / "model.safetensors").exists(), "it was told, and saved"


def test_an_image_that_is_not_there_is_recorded(tmp_path: Path) -> None:
    it = in_container(tmp_path, SAVES, image="none")
    with it.started() as process:
        assert process.wait(30) == 255
    assert (it.done()["outcome"], it.done()["exit_status"]) == ("failed", 255)
    assert "could not open image" in it.log


def test_a_copy_that_is_not_the_owner_neither_trains_nor_writes(tmp_path: Path) -> None:
    it = job(tmp_path, SAVES)
    seal = it.root / "payload" / "ab" / "seal.py"
    subprocess.run(["python3", seal, "revoke", "--run", it.run, "--nonce", "us"], check=True, stdout=subprocess.DEVNULL)
    told = (
        f"import runpy, sys\nprint('called', sys.argv[1], file=sys.stderr)\nrunpy.run_path({str(PAYLOAD / 'seal.py')!r}"
    )
    seal.write_text(told + ", run_name='__main__')\n")
    with it.started() as process:
        assert process.wait(30) == 75
    assert "called start" in it.log and "called finish" not in it.log
    assert not (it.run / "done.json").exists()
    assert not (it.run / "out").exists()


def test_a_second_start_of_the_same_script_leaves_the_first_ones_record(tmp_path: Path) -> None:
    it = job(tmp_path, SAVES)
    with it.started() as process:
        assert process.wait(30) == 0
    first = (it.run / "done.json").read_bytes()
    with it.started() as process:
        assert process.wait(30) == 75
    assert (it.run / "done.json").read_bytes() == first


def test_a_base_that_is_missing_is_recorded_as_failed(tmp_path: Path) -> None:
    it = job(tmp_path, SAVES)
    (it.root / "models" / "0003" / "config.json").unlink()
    (it.root / "models" / "0003").rmdir()
    with it.started() as process:
        assert process.wait(30) not in (0, 75)
    done = it.done()
    assert done["outcome"] == "failed" and "0003" in done["reason"]
