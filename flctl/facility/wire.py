"""Owns paramiko's transport as flctl uses it: what a server says when it hangs up is kept."""

import contextlib
import logging
import threading
from collections.abc import Iterator

import paramiko

from flctl.words import printable

# What paramiko thinks worth telling reaches the user as one of our errors.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


class Wire(paramiko.Transport):  # type: ignore[misc]
    """paramiko's transport, which also keeps what the server says when it hangs up."""

    farewell = ""

    def _parse_disconnect(self, message: paramiko.Message) -> None:
        message.get_int()
        self.farewell = printable(message.get_text())

    @contextlib.contextmanager
    def bounded(self, seconds: float) -> Iterator[None]:
        """Close the connection when the block takes longer. paramiko's own limits are moments of the wall clock, which
        never come if that is set back meanwhile."""
        alarm = threading.Timer(seconds, self.close)
        alarm.daemon = True
        alarm.start()
        try:
            yield
        finally:
            alarm.cancel()
