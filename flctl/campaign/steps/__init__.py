"""The steps of a run at its site: deliver, submit, check, fetch. Each takes a run one stage on, or tells that it must
wait by giving it back unchanged; each may be repeated after any interruption."""

from flctl.campaign.steps.check import cancel, check
from flctl.campaign.steps.deliver import deliver
from flctl.campaign.steps.fetch import fetch
from flctl.campaign.steps.submit import submit

__all__ = ["cancel", "check", "deliver", "fetch", "submit"]
