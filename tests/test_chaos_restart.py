"""The row "restart" of the chaos harness, a small sample: what it measures, not how fast this machine is."""

from pathlib import Path

from tests.chaos import restart

TRACE = """\
100 10.000000 execve("/x/flctl", ["flctl"], 0x7ffd /* 5 vars */) = 0
101 10.600000 write(5</x/points>, "login karolina\\n", 15) = 15
101 10.900000 write(5</x/points>, "login-count karolina\\n", 21) = 21
101 10.950000 write(5</x/points>, "journaled login\\n", 16) = 16
101 11.100000 write(5</x/points>, "logged-in karolina\\n", 19) = 19
101 11.150000 write(7</x/other>, "check karolina\\n", 15) = 15
101 11.200000 write(5</x/points>, "check karolina\\n", 15) = 15
"""


def test_the_login_is_left_out_and_the_first_useful_action_counts() -> None:
    found = restart.elapsed(TRACE, Path("/x/points"))
    assert found is not None
    assert abs(found - 0.7) < 1e-6
    assert restart.elapsed("\n".join(TRACE.splitlines()[:-1]), Path("/x/points")) is None
