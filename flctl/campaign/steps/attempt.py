"""Where one attempt of a run lies at its site, and what it is called."""

import json
from pathlib import PurePosixPath

from flctl.campaign.session import Session
from flctl.codec import from_data
from flctl.errors import TransferFailed
from flctl.records import Order, Run, SiteMerge, Subject, Work


def attempt_name(run: Run) -> str:
    return f"{run.number:04d}-{run.attempt}"


def remote_folder(session: Session, run: Run) -> PurePosixPath:
    return session.root / "runs" / attempt_name(run)


def ordered(run: Run, text: str, *, plan: int) -> Order:
    """What an order.json at the run's site asks for; TransferFailed if it cannot be read."""
    try:
        order = json.loads(text)
        return Order(
            site=run.site,
            work=Work(order["work"]),
            plan=plan,
            base=_whole(order["base"]["version"]),
            round=_whole(order["round"]),
            steps=_whole(order["steps"]),
            global_step=_whole(order["global_step"]),
            total_steps=_whole(order["total_steps"]),
            subjects=tuple(from_data(Subject, item) for item in order.get("subjects", [])),
            merge=from_data(SiteMerge, order["merge"]) if "merge" in order else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TransferFailed(
            f"order.json of run {attempt_name(run)} at the site cannot be read: {error!r}",
            hint=f"look at the run's folder there, then flctl cancel {run.site}",
            site=run.site,
        ) from error


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number")
    return value
