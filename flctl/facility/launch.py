"""Owns how a job's program is started N times: what the scheduler is asked for, the launcher, what ranks know."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from flctl.facility.profile import Shape, Site
from flctl.facility.shell import Plain

IGNORING = ("/bin/sh", "-c", Plain("trap '' USR1; exec \"$@\""), "flctl")


def select(shape: Shape) -> str:
    """The select statement of PBS (pbs_resources(7B)): so many chunks, a node each. mpiprocs: how often a node stands
    in PBS_NODEFILE; ompthreads: what OMP_NUM_THREADS is (else all of ncpus)."""
    several = shape.ranks > 1 and shape.cpus > 0
    counts = {
        "ncpus": shape.cpus,
        "ngpus": shape.gpus,
        "mpiprocs": shape.ranks if several else 0,
        "ompthreads": shape.cpus_per_rank if several else 0,
    }
    return shape.select or ":".join([str(shape.nodes), *(f"{name}={count}" for name, count in counts.items() if count)])


def launch_words(site: Site) -> tuple[str, ...]:
    """The words that start the program's ranks; `$FLCTL_RANKS` and the like are those of `rank_lines`.

    srun and mpiexec forward USR1 and start ranks with the default answer to it (Slurm 22.05, Open MPI 4.1), which is to
    end: torchrun behind srun must ignore it, as its ranks do (`ignoring`)."""
    words = tuple(site.environment.launch.split())
    place = torchrun_at(words)
    return words if not place else (*words[:place], *IGNORING, *words[place:])


def torchrun_at(words: Sequence[str]) -> int | None:
    """Where torchrun stands among words."""
    return next((place for place, word in enumerate(words) if PurePosixPath(word).name == "torchrun"), None)


def rank_lines(site: Site) -> list[str]:
    """The shell lines that tell a launcher and its ranks how many they are, and where they meet: on the node of the job
    script, which is the first one. Slurm's srun takes nodes and ranks from the job, but no longer the cpus (22.05);
    torchrun gets those of the node."""
    shape = site.shape
    lines = [
        f"export FLCTL_NODES={shape.nodes} FLCTL_RANKS_PER_NODE={shape.ranks} FLCTL_RANKS={shape.nodes * shape.ranks}",
        "export MASTER_ADDR=$(uname -n) MASTER_PORT=$((12000 + ($(id -u) + $$) % 20000))",
    ]
    if site.scheduler.kind == "slurm":
        share = shape.cpus if torchrun_at(site.environment.launch.split()) is not None else shape.cpus_per_rank
        cpus = f" SRUN_CPUS_PER_TASK={share}" if share else ""
        lines.append(f"export SLURM_KILL_BAD_EXIT=1{cpus}")
    if shape.ranks > 1 and shape.cpus_per_rank:
        lines.append(f"export OMP_NUM_THREADS={shape.cpus_per_rank}")
    return lines


def ignoring(site: Site) -> tuple[str, ...]:
    """What a program begins with that another one starts: USR1 ignored, as in the job script, until it asks for it.
    Launchers and Apptainer pass signals on, but start what they start with the default answer to each."""
    environment = site.environment
    return IGNORING if environment.launch or environment.container.program else ()
