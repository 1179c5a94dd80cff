"""Stands for Apptainer's `exec`, in what flctl uses of it; run as root. An image is a folder with a file `env`.

What is inside sees the system, a /tmp of its own and what is bound, no other path, and starts where we were started if
it can. Its variables are the caller's (none with --cleanenv), then the image's, then those given as APPTAINERENV_NAME.
We stay, pass every signal on, and end as it ends; it begins with the default answer to every signal, as what a Go
program starts does (internal/pkg/runtime/engine/singularity/monitor_linux.go of Apptainer; Go's os/signal).
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc", "/dev", "/proc", "/sys", sys.base_prefix)
FLAGS = ("--nv", "--rocm", "--cleanenv")


def main(words: list[str]) -> int:
    Path(os.environ["APPTAINER_LOG"]).write_text(json.dumps(words))
    if words.pop(0) != "exec":
        return fail("only exec is known")
    binds, flags = [], set()
    while words[0].startswith("-"):
        word = words.pop(0)
        if word == "--bind":
            binds += [tuple((*part.split(":"), part.split(":")[0], "rw")[:3]) for part in words.pop(0).split(",")]
        elif word in FLAGS:
            flags.add(word)
        else:
            return fail(f"unknown flag: {word}")
    image = Path(words.pop(0))
    if not (image / "env").is_file():
        return fail(f"could not open image {image}")
    for source, _, _ in binds:
        if not Path(source).exists():
            return fail(f"mount source {source} doesn't exist")
    plan = {"image": str(image), "binds": binds, "words": words, "clean": "--cleanenv" in flags, "at": os.getcwd()}
    child = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", sys.executable, __file__, "--inside", json.dumps(plan)]
    )
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        signal.signal(number, lambda number, frame: child.send_signal(number))
    return child.wait() if child.returncode is None or child.returncode >= 0 else 128 - child.returncode


def inside(plan: dict) -> None:  # type: ignore[type-arg]
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    root = Path("/mnt")
    mount("-t", "tmpfs", "none", str(root))
    (root / "tmp").mkdir(mode=0o1777)
    for place in SYSTEM:
        if Path(place).exists():
            bind(root, place, place)
    for source, target, mode in plan["binds"]:
        bind(root, source, target, mode)
    variables = {} if plan["clean"] else dict(os.environ)
    variables |= dict(line.split("=", 1) for line in (Path(plan["image"]) / "env").read_text().split())
    given = {name[13:]: value for name, value in os.environ.items() if name.startswith("APPTAINERENV_")}
    variables = {name: value for name, value in (variables | given).items() if not name.startswith("APPTAINERENV_")}
    os.chroot(root)
    os.chdir(plan["at"] if Path(plan["at"]).is_dir() else "/")
    os.execvpe(plan["words"][0], plan["words"], variables | {"PATH": "/usr/bin:/bin"})


def bind(root: Path, source: str, target: str, mode: str = "rw") -> None:
    place = root / target.lstrip("/")
    if Path(source).is_dir():
        place.mkdir(parents=True, exist_ok=True)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    mount("--bind", source, str(place))
    if mode == "ro":
        mount("-o", "remount,bind,ro", str(place))


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def fail(why: str) -> int:
    print(f"FATAL:   {why}", file=sys.stderr)
    return 255


if __name__ == "__main__":
    if sys.argv[1] == "--inside":
        inside(json.loads(sys.argv[2]))
    sys.exit(main(sys.argv[1:]))
