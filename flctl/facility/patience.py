"""Owns how long flctl waits for a site, in seconds: a peer that has fallen silent is noticed within 90, whatever was
under way. A long quiet command is no silence: its host answers when it is asked whether it is alive."""

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

CONNECT = 20
"""For one address to take a connection; for the greeting and the exchange of keys; for a channel."""

RESOLVE = 30.0
"""For the addresses of a host's name: a resolver may ask one silent name server after the other for minutes."""

CONNECT_ALL = 60.0
"""For one of the addresses of a host to take a connection, from the look for its addresses on."""

AGENT = 20.0
"""For an ssh-agent to list its keys."""

AUTH = 60.0
"""For a server's answer to one proof of who we are."""

LOGIN = 80.0
"""For the system's ssh to be let in with all its questions answered, from its start."""

ALIVE_INTERVAL, ALIVE_COUNT = 15, 4
"""How often a peer is asked whether it is alive, and how many questions it may leave unanswered. OpenSSH gives up when
the next one would be due, after 75 s, and after their product while keys are exchanged and it logs in; our own
connections give up after 60 s. rsync's --timeout does not notice a black hole, and nothing in paramiko does."""

SESSION = 5.0
"""For a server that allows one session at a time to see that the last one has ended."""

QUERY = 60
"""For a scheduler's answer, after which the rest is asked without it. A sacct whose slurmdbd hangs (SIGSTOP) waits for
eight times Slurm's MessageTimeout, an squeue for one, a scancel for two (seen with 22.05); sites set 10 to 100."""

ENDING = 15.0
"""For the exit status of a program whose output has ended."""

IDLE = 600
"""Without any data, after which rsync gives up."""

SLOW_WINDOW, SLOW_BYTES = 1800.0, 4 << 20
"""A transfer that moves less than so many bytes in so many seconds (2.3 KB/s) is given up: the link is of no use."""

PERSON = 300.0
"""For a person to answer a server's questions; most servers hang up after 120."""


def within(seconds: float, action: Callable[[], Result], silence: str) -> Result:
    """What an action returns or raises that nothing else bounds; OSError with the words `silence` if it has done
    neither after so many seconds. It is then left behind in its thread."""
    found: list[Result] = []
    raised: list[Exception] = []

    def act() -> None:
        try:
            found.append(action())
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=act, name=f"at most {seconds:.0f} s", daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not found:
        raise OSError(silence)
    return found[0]
