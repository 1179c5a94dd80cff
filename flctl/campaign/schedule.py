"""Owns the texts that make a machine tick: a crontab line and a systemd timer."""

import shlex
from collections.abc import Sequence
from pathlib import Path


def crontab_line(program: Sequence[str], campaign: Path, minutes: int) -> str:
    """A crontab line that runs `program` (its words); cron reads an unescaped % as a newline."""
    command = shlex.join([*program, "-C", str(campaign), "campaign", "tick"])
    log = shlex.quote(str(campaign / "tick.log"))
    return f"*/{minutes} * * * * {command} >>{log} 2>&1".replace("%", r"\%")


def systemd_units(program: Sequence[str], campaign: Path, label: str, minutes: int) -> dict[str, str]:
    """A service and its timer for `systemctl --user`, by file name."""
    service = (
        "[Unit]\n"
        f"Description=flctl campaign {label}: one tick\n\n"
        "[Service]\n"
        "Type=oneshot\n"
        f"ExecStart={' '.join(_word(word) for word in (*program, '-C', str(campaign)))} campaign tick\n"
        "KillSignal=SIGTERM\n"
        "TimeoutStartSec=infinity\n"
    )
    timer = (
        "[Unit]\n"
        f"Description=flctl campaign {label}\n\n"
        "[Timer]\n"
        f"OnCalendar=*:0/{minutes}\n"
        "Persistent=true\n"
        "RandomizedDelaySec=20\n\n"
        "[Install]\n"
        "WantedBy=timers.target\n"
    )
    return {f"flctl-{label}.service": service, f"flctl-{label}.timer": timer}


def _word(text: str) -> str:
    """One word of an ExecStart line: quoted, with systemd's own specifiers and variables escaped."""
    text = text.replace("%", "%%").replace("$", "$$").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"' if any(c in text for c in ' "\\') else text
