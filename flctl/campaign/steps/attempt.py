"""Where one attempt of a run lies at its site, and what it is called."""

from pathlib import PurePosixPath

from flctl.campaign.session import Session
from flctl.records import Run


def attempt_name(run: Run) -> str:
    return f"{run.number:04d}-{run.attempt}"


def remote_folder(session: Session, run: Run) -> PurePosixPath:
    return session.root / "runs" / attempt_name(run)
