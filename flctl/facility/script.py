"""Owns job scripts: a template of the user's and the values of one attempt -> the text that a scheduler runs."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from flctl.errors import ConfigurationError
from flctl.facility.launch import ignoring, launch_words, rank_lines, select
from flctl.facility.profile import Site
from flctl.facility.shell import Plain
from flctl.facility.table import nearest

PLACEHOLDER = re.compile(r"\{\{\s*([^{}\s]*)\s*\}\}")
DIRECTIVE = re.compile(r"#(?:SBATCH|PBS)\s")
COMMENT = re.compile(r"\s*#(?!(?:SBATCH|PBS)\s)")
PYTHON = (".py", ".zip")
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
DIRECTIVE_VALUE = re.compile(r"[A-Za-z0-9_.,:/@+=-]*")


@dataclass(frozen=True, slots=True)
class Words:
    """Shell words in which $NAME and ${NAME} stay the shell's; everything else means itself."""

    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lines:
    """Whole lines, inserted as they are in place of a line that holds nothing but the placeholder."""

    lines: tuple[str, ...]


Value = str | Words | Lines


def render(template: str, values: Mapping[str, Value], *, source: str) -> str:
    """The template with each `{{name}}` replaced; `$` stays the shell's. `source` names the template in errors.

    Comments stay as they are. In a shell line the value is one quoted word. In a directive (#SBATCH) it is plain text
    of harmless characters, and a directive with an empty value goes away. ConfigurationError for an unknown name, a
    value that is not printable text, and a placeholder inside quotes."""
    lines: list[str] = []
    for number, line in enumerate(template.removesuffix("\n").split("\n"), 1):
        try:
            lines += _rendered(line, values)
        except ValueError as error:
            raise ConfigurationError(f"{source}, line {number}: {error}", hint=f"correct {source}") from None
    return "\n".join(lines) + "\n"


def job_script(
    site: Site,
    template: str,
    *,
    token: str,
    campaign: str,
    run: PurePosixPath,
    workdir: PurePosixPath,
    payload: PurePosixPath,
    data: str,
    now: float,
    command: Sequence[str] = (),
    frozen: str | None = None,
) -> str:
    """The job script of one attempt, to be submitted about `now` (Unix seconds); the paths are absolute ones at the
    site. `command`: the words that are run in the place of train.py; `frozen`: the folder of the frozen base of
    adapters."""
    folders = {"run": run, "workdir": workdir, "payload": payload}
    values = job_values(site, token=token, campaign=campaign, data=data, now=now, command=command, **folders)
    if frozen:
        values["container"] = Words((*container_words(site, workdir, data, frozen), *ignoring(site)))
    return render(template, values, source=f"templates/{site.scheduler.kind}.sh")


def job_values(
    site: Site,
    *,
    token: str,
    campaign: str,
    run: PurePosixPath,
    workdir: PurePosixPath,
    payload: PurePosixPath,
    data: str,
    now: float,
    command: Sequence[str] = (),
) -> dict[str, Value]:
    """Every name that a job template may use."""
    interpreter, program = program_words(site, command or (Plain(f"{payload}/train.py"),))
    shape, environment = site.shape, site.environment
    reservation = shape.reservation.name if shape.reservation.holds(now, shape.walltime) else ""
    sign = "#PBS" if site.scheduler.kind == "pbs" else "#SBATCH"
    return {
        "token": token,
        "campaign": campaign,
        "site": site.name,
        "run": str(run),
        "workdir": str(workdir),
        "payload": str(payload),
        "data": data,
        "account": shape.account,
        "partition": shape.partition,
        "qos": shape.qos,
        "reservation": reservation,
        "queue": reservation.partition(".")[0] or shape.queue,  # of PBS: R123.SERVER is the queue R123
        "dependency": shape.dependency,
        "select": select(shape),
        "place": shape.place,
        "filesystems": shape.filesystems,
        "nodes": str(shape.nodes),
        "gpus": str(shape.gpus or ""),
        "ranks": str(shape.ranks),
        "cpus": str(shape.cpus_per_rank or ""),
        "walltime": clock(shape.walltime, days=site.scheduler.kind != "pbs"),
        "walltime_seconds": str(shape.walltime),
        "warning": str(shape.warning),
        "directives": Lines(tuple(f"{sign} {option}" for option in shape.extra)),
        "environment": Lines((*rank_lines(site), *environment_lines(site))),
        "seal_python": environment.seal_python,
        "signing_key": Words((site.signing.key,)),
        "launch": Words(launch_words(site)),
        "container": Words((*container_words(site, workdir, data), *ignoring(site))),
        "python": interpreter,
        "trainer": program,
    }


def program_words(site: Site, command: Sequence[str]) -> tuple[Words, Words]:
    """A command as what stands for {{python}} and for {{trainer}}: the site's Python runs what is written in Python,
    and other programs run themselves."""
    if PurePosixPath(command[0]).suffix in PYTHON:
        return Words((site.environment.python,)), Words(tuple(command))
    return Words((command[0],)), Words(tuple(command[1:]))


def container_words(site: Site, *folders: object) -> tuple[str, ...]:
    """The words in front of python that run it in the site's container, if there is one. `folders` are bound besides
    those of the profile; ConfigurationError for one that --bind cannot name."""
    container = site.environment.container
    if not container.program:
        return ()
    bound = [*(Plain(_bindable(site, str(folder))) for folder in folders), *(_bind(site, b) for b in container.binds)]
    binds = [word for folder in bound for word in ("--bind", folder)]
    return (container.program, "exec", *container.gpu.split(), *binds, *container.options, container.image)


def _bind(site: Site, bind: str) -> str:
    """A bind of the profile: a folder, and maybe its place inside and `ro` or `rw`."""
    folder, _, rest = bind.partition(":")
    _bindable(site, folder)
    if rest in ("ro", "rw"):
        return f"{folder}:{folder}:{rest}"
    if rest and not re.fullmatch(r"/[^:,\s]*(?::r[ow])?", rest):
        _bindable(site, bind)
    return bind


def _bindable(site: Site, folder: str) -> str:
    """The folder, if --bind can name it: it parts its value at commas and colons, and a blank is no good either."""
    if re.search(r"[\s,:]", folder):
        raise ConfigurationError(
            f"{folder!r} cannot be bound into a container: its path holds a blank, a comma or a colon",
            hint=f"see storage and environment.container.binds in sites/{site.name}.toml; a link without one will do",
            site=site.name,
        )
    return folder


def environment_lines(site: Site) -> list[str]:
    """The shell lines (for bash) that a program of the site's environment needs before it: modules, what is unset,
    activation, offline or not, exports, proxy. A shell that is no login shell often lacks `module`; it is
    in /etc/profile."""
    environment, container = site.environment, site.environment.container
    loads = environment.modules or environment.modules_use
    lines = ["type module >/dev/null 2>&1 || . /etc/profile"] if loads else []
    lines += [f"module use {shell_word(folder)} || exit 1" for folder in environment.modules_use]
    lines += [f"module load {shlex.quote(module)} || exit 1" for module in environment.modules]
    if environment.unset:
        lines.append(f"unset {' '.join(environment.unset)}")
    lines += environment.activate
    if environment.offline:
        lines.append("export HF_HUB_OFFLINE=1")
    lines += [f"export {name}={shell_word(value)}" for name, value in environment.exports.items()]
    if environment.proxy:
        proxy = shlex.quote(environment.proxy)
        lines += [f"export {name}={proxy}" for name in PROXIES]
    return [*lines, _passed_on(container.program, environment.exports)] if container.program else lines


def _passed_on(program: str, exports: Iterable[str]) -> str:
    """The line that lets the job's variables win over those of the image, and reach the program also with --cleanenv
    (see "Environment and Metadata" in Apptainer's guide). PATH and the like are the image's own."""
    names = ("PYTHONUNBUFFERED", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", *PROXIES, *RENDEZVOUS, *exports)
    passed = " ".join(name for name in dict.fromkeys(names) if name not in ("PATH", "LD_LIBRARY_PATH", "HOME"))
    export = f'export "{program.upper()}ENV_$name=${{!name}}"'
    return f'for name in "${{!FLCTL_@}}" {passed}; do [ -z "${{!name+x}}" ] || {export}; done'


def shell_word(text: str) -> str:
    """One shell word in which $NAME, ${NAME} and a leading ~/ are the shell's and everything else means itself; a Plain
    one is nothing but itself."""
    if isinstance(text, Plain):
        return shlex.quote(text)
    if text == "~" or text.startswith("~/"):
        text = "$HOME" + text[1:]
    if "$" not in text:
        return shlex.quote(text)
    if re.search(r"""["\\`!]|\$(?![A-Za-z_]|\{[A-Za-z_]\w*\})""", text):
        raise ValueError(f"{text!r} holds more of the shell than variables")
    return f'"{text}"'


def clock(seconds: int, *, days: bool = True) -> str:
    """A walltime as schedulers write it: HH:MM:SS, or D-HH:MM:SS from a day on; PBS knows no `days`."""
    day, rest = divmod(seconds, 86400) if days else (0, seconds)
    text = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{day}-{text}" if day else text


def _rendered(line: str, values: Mapping[str, Value]) -> list[str]:
    if not line.replace("\t", " ").isprintable():
        raise ValueError("holds a control character (saved with Windows line ends?)")
    if COMMENT.match(line):
        return [line]
    places = list(PLACEHOLDER.finditer(line))
    found = [_value(place[1], values) for place in places]
    if len(places) == 1 and isinstance(found[0], Lines):
        if places[0][0] != line.strip():
            raise ValueError(f"{places[0][0]} stands for whole lines: give it a line of its own")
        indent = line[: places[0].start()]
        return [indent + text for text in found[0].lines]
    directive = DIRECTIVE.match(line)
    if directive and "" in found:
        return []
    text, end = "", 0
    for place, value in zip(places, found, strict=True):
        if isinstance(value, Lines):
            raise ValueError(f"{place[0]} stands for whole lines: give it a line of its own")
        if not directive and _quoted(line[: place.start()]):
            raise ValueError(f"{place[0]} stands inside quotes: leave them away, the value brings its own")
        text += line[end : place.start()] + (_in_directive if directive else _in_shell)(place[1], value)
        end = place.end()
    return [text + line[end:]]


def _value(name: str, values: Mapping[str, Value]) -> Value:
    if name not in values:
        close = nearest(name, values)
        advice = f"did you mean {{{{{close}}}}}?" if close else f"known: {', '.join(sorted(values))}"
        raise ValueError(f"unknown name {{{{{name}}}}}; {advice}")
    value = values[name]
    parts = (value,) if isinstance(value, str) else value.words if isinstance(value, Words) else value.lines
    if not all(part.isprintable() for part in parts):
        raise ValueError(f"the value of {{{{{name}}}}} holds a control character")
    return value


def _in_directive(name: str, value: str | Words) -> str:
    text = value if isinstance(value, str) else " ".join(value.words)
    if not DIRECTIVE_VALUE.fullmatch(text):
        raise ValueError(f"{{{{{name}}}}} is {text!r}, which may not stand in a directive of the scheduler")
    return text


def _in_shell(name: str, value: str | Words) -> str:
    if isinstance(value, str):
        return shlex.quote(value)
    try:
        return " ".join(shell_word(word) for word in value.words)
    except ValueError as error:
        raise ValueError(f"the value of {{{{{name}}}}}: {error}") from None


def _quoted(prefix: str) -> bool:
    """Whether a shell that has read this much of a line is inside quotes."""
    inside = ""
    characters = iter(prefix)
    for character in characters:
        if character == "\\" and inside != "'":
            next(characters, None)
        elif character == inside:
            inside = ""
        elif not inside and character in "'\"":
            inside = character
    return bool(inside)
