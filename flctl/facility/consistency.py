"""Owns what may not stand together in a profile, although each value is right by itself."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flctl.facility.table import dotted, nearest

if TYPE_CHECKING:
    from flctl.facility.profile import Site

SLURM_OURS = frozenset(
    {"job-name", "requeue", "no-requeue", "output", "error", "open-mode", "signal", "array", "wait", "wrap", "chdir"}
    | {"parsable", "test-only", "account", "partition", "qos", "reservation", "nodes", "time", "dependency"}
    | {"ntasks-per-node"}
)
"""Options of sbatch that the job template gives itself; a second one would break the claim, the log or the record."""

PBS_OURS = frozenset("NrojeJVASqazh") | {"l walltime", "l select", "l place", "l filesystems", "W depend", "W block"}
"""The same of qsub."""


def contradictions(site: "Site") -> list[str]:
    """What is wrong between values that are each right, as lines that begin with the key."""
    return [*_names(site), *_login(site), *_scheduler(site), *_ranks(site), *_signing(site), *_elsewhere(site)]


def _names(site: "Site") -> Iterator[str]:
    if site.scheduler.shape not in site.shapes:
        close = nearest(site.scheduler.shape, site.shapes)
        advice = f"did you mean {close!r}?" if close else f"there is: {', '.join(site.shapes) or 'none'}"
        yield f"scheduler.shape: there is no [{dotted(('shapes', site.scheduler.shape))}]; {advice}"
    for name, queue in site.queues.items():
        if queue.max_nodes and queue.min_nodes > queue.max_nodes:
            yield f"{dotted(('queues', name, 'min_nodes'))}: more than max_nodes"


def _login(site: "Site") -> Iterator[str]:
    login, totp = site.login, site.login.totp
    if site.connection == "local":
        for key, value in (("host", login.host), ("proxy_jump", login.proxy_jump)):
            if value:
                yield f'login.{key}: must be left out where connection = "local"'
    if login.certificate and login.kind != "certificate":
        yield f'login.certificate: needs login.kind = "certificate", not {login.kind!r}'
    if login.certificate and login.key == "agent":
        yield "login.certificate: needs login.key, the file of the key that it certifies"
    if login.renew and login.kind != "certificate":
        yield f'login.renew: needs login.kind = "certificate", not {login.kind!r}'
    if login.renew_unattended and not login.renew:
        yield "login.renew_unattended: needs login.renew, the program that gets a new certificate"
    if totp.automation == "permitted" and login.kind not in ("key+totp", "password+totp", "totp"):
        yield f"login.totp.automation: needs a login.kind with totp in it, not {login.kind!r}"
    if totp.automation == "permitted" and not totp.permission:
        yield "login.totp.permission: must say where the facility permits automated codes"
    if login.password.secret and login.kind != "password+totp":
        yield f'login.password.secret: needs login.kind = "password+totp", not {login.kind!r}'


def _signing(site: "Site") -> Iterator[str]:
    if site.signing.signers and not site.signing.key:
        yield "signing.key: must be the private key there that makes the signatures which signing.signers asks for"


def _scheduler(site: "Site") -> Iterator[str]:
    kind = site.scheduler.kind
    strange = {"slurm": ("queue", "place", "filesystems", "select"), "pbs": ("partition", "qos")}.get(kind, ())
    tables = [(("scheduler",), site.scheduler), *((("shapes", name), shape) for name, shape in site.shapes.items())]
    for place, table in tables:
        for key in strange:
            if getattr(table, key, ""):
                other = {"queue": "; Slurm calls it partition", "partition": "; PBS calls it queue"}.get(key, "")
                yield f'{dotted((*place, key))}: is nothing for scheduler.kind = "{kind}"{other}'
        for option in table.extra:  # type: ignore[attr-defined]
            yield from (f"{dotted((*place, 'extra'))}: {why}" for why in _option(option, kind))
        reservation = table.reservation  # type: ignore[attr-defined]
        if reservation.end and reservation.start >= reservation.end:
            yield f"{dotted((*place, 'reservation', 'end'))}: is not after its start"


def _ranks(site: "Site") -> Iterator[str]:
    """A shape asks for processes, environment.launch starts them; a trainer of the user's own may do so itself."""
    environment, words = site.environment, site.environment.launch.split()
    for name, shape in site.shapes.items():
        if shape.cpus % shape.ranks:
            here = dotted(("shapes", name, "cpus"))
            yield f"{here}: {shape.cpus} per node cannot be shared evenly by ranks = {shape.ranks}"
    used = site.shapes.get(site.scheduler.shape)
    if used and used.nodes * used.ranks > 1 and not (words or environment.trainer or site.train.get("command")):
        yield (
            f"environment.launch: must say what starts the {used.nodes * used.ranks} processes of "
            f"{dotted(('shapes', site.scheduler.shape))}, such as "
            '"srun" or "mpiexec -n $FLCTL_RANKS" (docs/sites.md)'
        )
    if any(word.rpartition("/")[2] == "torchrun" for word in words) and "--no-python" not in words:
        yield "environment.launch: torchrun needs --no-python, since environment.python follows it (docs/sites.md)"


def _option(option: str, kind: str) -> Iterator[str]:
    """Why an option of the profile's own may not be given to this scheduler."""
    long = option.startswith("--")
    if long != (kind != "pbs"):
        yield f"{option!r} is not an option of this scheduler: {'-l name=value' if kind == 'pbs' else '--name=value'}"
        return
    name = option[2:].split("=")[0] if long else option[1:]
    if not long:
        flag, value = name[0], name[1:].strip()
        name = f"{flag} {re.split('[=:]', value)[0]}" if flag in "lW" else flag
    if name in (SLURM_OURS if long else PBS_OURS):
        shown = option.split("=")[0]
        yield f"{shown} is set by the job template: use the profile's own key for it, or leave it out"


def _elsewhere(site: "Site") -> Iterator[str]:
    transfer, container = site.transfer, site.environment.container
    if site.connection == "local" and transfer.host:
        yield 'transfer.host: must be left out where connection = "local"'
    if not transfer.shell and not transfer.host:
        yield "transfer.shell: only a transfer host of its own may lack a shell"
    if container.program and not container.image:
        yield "environment.container.image: must say where the image lies at the site"
    if container.image and not container.program:
        yield 'environment.container.program: must say what runs the image: "apptainer" or "singularity"'
