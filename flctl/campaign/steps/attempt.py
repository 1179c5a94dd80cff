"""Where one attempt of a run lies at its site, and what it is called."""

import re
from pathlib import PurePosixPath

from flctl.campaign.config import Configuration
from flctl.campaign.session import Session
from flctl.campaign.testimony import table_of
from flctl.codec import from_data
from flctl.errors import TransferFailed
from flctl.records import Order, Run, SiteMerge, Subject, Work
from flctl.words import printable


def attempt_name(run: Run) -> str:
    return f"{run.number:04d}-{run.attempt}"


def remote_folder(session: Session, run: Run) -> PurePosixPath:
    return session.root / "runs" / attempt_name(run)


VERSION = re.compile(r"[0-9]{4,9}")
CONTRIBUTION = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}-[0-9]{4,9}-[0-9]{1,9}")


def ordered(run: Run, text: str, *, plan: int, configuration: Configuration) -> Order:
    """What an order.json at the run's site asks for; TransferFailed if it cannot be read, or if this campaign asks no
    site for that: who owns the account there may have written it."""
    try:
        order = table_of(text) or {}
        found = Order(
            site=run.site,
            work=Work(order["work"]),
            plan=plan,
            base=_whole(order["base"]["version"]),
            round=_whole(order["round"]),
            steps=_whole(order["steps"]),
            global_step=_whole(order["global_step"]),
            total_steps=_whole(order["total_steps"]),
            continues=None if order.get("continues") is None else _whole(order["continues"]),
            subjects=tuple(from_data(Subject, item) for item in order.get("subjects", [])),
            merge=from_data(SiteMerge, order["merge"]) if "merge" in order else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TransferFailed(
            f"order.json of run {attempt_name(run)} at the site cannot be read: {error!r}",
            hint=f"look at the run's folder there, then flctl cancel {run.site}",
            site=run.site,
        ) from error
    if not _is_for(found, configuration):
        raise TransferFailed(
            f"order.json of run {attempt_name(run)} at the site is none of this campaign: it is to "
            f"{found.work} {printable(', '.join(subject.name for subject in found.subjects), 200)}".rstrip(),
            hint="were [evaluation] cross or aggregation.aggregate_at changed in flctl.toml? put them back; else look "
            f"at the run's folder there, then flctl cancel {run.site}",
            site=run.site,
        )
    return found


def _is_for(order: Order, configuration: Configuration) -> bool:
    """Whether flctl may have given this order: what the order names is sent to the site, and contributions of other
    sites go there only where the campaign says so."""
    names = [subject.name for subject in order.subjects]
    if order.work == Work.MERGE:
        return order.merge is not None and order.site == configuration.aggregation.aggregate_at
    if order.work == Work.TRAIN:
        return not names and order.merge is None
    others = [name for name in names if not VERSION.fullmatch(name)]
    cross = configuration.evaluation.cross and all(CONTRIBUTION.fullmatch(name) for name in others)
    return order.merge is None and (cross or not others)


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number")
    return value
