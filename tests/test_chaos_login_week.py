"""A sample of the chaos row "login week": some simulated hours against real sshds that check codes."""

from tests.chaos import login_week


def test_connections_that_are_cut_every_hour_cost_no_more_logins_than_the_days_and_lock_nobody_out() -> None:
    told = login_week.lived_through(9, seed=3, per_day=6)
    assert told["notes"] == []
    assert told["cuts"] > 6, "each would cost a login"
    assert 3 <= told["worst"] <= 6
    assert told["models"] >= 1
