"""Owns how seldom a site's scheduler is asked: by all processes together, once in `poll.every` seconds, for all jobs.

Schedulers' manuals, and facilities' rules, ask for it: squeue(1) "do not run it from loops", and accounting is asked
only for a job that the queue no longer shows. The files of a run may be looked at more often: they cost no scheduler
anything, and tell of most ends.
"""

import time
from dataclasses import replace

from flctl.campaign.session import Session


def may_ask(session: Session, queries: int = 1) -> bool:
    """Whether the scheduler may be asked now, `queries` times in one go. If so that is written down first, so that a
    process which is killed has asked as well. Only under the site's lock."""
    if session.site.scheduler.kind == "local":
        return True
    now, every = time.time(), session.site.poll.every
    contact = session.workspace.contact(session.site.name)
    left = contact.ask_after - now
    if 0 < left <= 2 * every:  # more than that is from before the clock was set back, or the profile changed
        return False
    session.workspace.save_contact(session.site.name, replace(contact, ask_after=now + queries * every))
    return True
