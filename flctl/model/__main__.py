"""The first file of the zip that merges at a site: where it cannot, it says why, in any Python from 3.6 on."""

import os
import sys

RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "RANK")


def refuse(why: str) -> int:
    print("flctl: error: merging needs " + why + "; see environment.python of the site's profile", flush=True)
    return 1


def main() -> int:
    if any(os.environ.get(name, "0") != "0" for name in RANKS):
        return 0  # the launcher of the site's training started several processes; the first one merges
    if sys.version_info < (3, 11):  # noqa: UP036  the site's Python may be any
        return refuse(f"Python 3.11 or newer, and {sys.executable} is {sys.version.split()[0]}")
    try:
        import torch  # noqa: F401  said here, since what follows cannot do without
    except (ImportError, OSError) as error:
        return refuse(f"torch, and {sys.executable} has none: {error}")
    from flctl.model.remote import merge_here

    return merge_here()


if __name__ == "__main__":
    sys.exit(main())
