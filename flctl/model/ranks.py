"""The processes that make one model together: who is who, and what all of them learn when one fails."""

import os
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from flctl.errors import ConfigurationError

T = TypeVar("T")

# What mpiexec of Open MPI, of MPICH and its kin, and srun with PMIx or PMI-2 tell the processes they start.
STARTED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
TROUBLE = 1


@dataclass(frozen=True, slots=True)
class Ranks:
    """One of `size` processes; `rank` counts from 0. All must make the same calls in the same order, but `troubled`."""

    rank: int = 0
    size: int = 1
    world: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def shared(self, value: T) -> T:
        """The first rank's value."""
        return value if self.world is None else self.world.bcast(value)

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        return [value] if self.world is None else self.world.allgather(value)

    def together(self, action: Callable[[], T]) -> T:
        """What `action` gives on this rank, once it is over on all. If it fails on any, the error of the lowest such
        rank is raised on all; the others are told meanwhile, by `troubled`."""
        result, error = None, None
        try:
            result = action()
        except Exception as caught:
            if self.world is None:
                raise
            error = caught
            self._tell()
        errors = self.gathered(error)
        for rank, found in enumerate(errors):
            if found is not None and rank != self.rank:
                self.world.recv(source=rank, tag=TROUBLE)
        for found in errors:
            if found is not None:
                vars(found)["agreed"] = True  # all ranks raise it, so none waits for this one
                raise found
        return typing.cast(T, result)

    def troubled(self) -> bool:
        """Whether what all ranks do has failed on another one."""
        return self.world is not None and bool(self.world.Iprobe(tag=TROUBLE))

    def _tell(self) -> None:
        for other in range(self.size):
            if other != self.rank:
                self.world.isend(None, dest=other, tag=TROUBLE)


ALONE = Ranks()


def world() -> Ranks:
    """The ranks that mpiexec or srun started, or this process alone. MPI is not touched without need."""
    if not any(name in os.environ for name in STARTED):
        return ALONE
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigurationError(
            f"started by mpiexec, but MPI cannot be loaded: {error}",
            hint="install an MPI library and mpi4py, or run without mpiexec",
        ) from error
    size = MPI.COMM_WORLD.Get_size()
    return Ranks(MPI.COMM_WORLD.Get_rank(), size, MPI.COMM_WORLD) if size > 1 else ALONE
