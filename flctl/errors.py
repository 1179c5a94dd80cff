"""The tree of errors; each class has an exit code, each instance says what failed, why, and what to type next.

FlctlError                 1  internal: a defect of flctl
|-- UsageError             2  the command line cannot be meant
|-- ConfigurationError     3  flctl.toml, a profile, a template, a secret's reference, a model folder
|-- LoginNeeded            4  refused login, no agent, a code that may not be automated
|   `-- LoginTooSoon       4  not now, but at a moment that is known: the last login was too short a time ago
|       |-- CodeSpent      4  this time step's one-time code is used; the next one starts then
|       `-- LoginPaused    4  the day's logins are used up, or a cool-down is on: not for minutes or hours
|-- SiteUnreachable        5  no route, refused, reset, timed out
|-- JobFailed              6  a job ended without a valid record of success, or was refused by the scheduler
|-- TransferFailed         7  rsync failed, or a hash differs
|-- AggregationRefused     8  a contribution that may not be averaged, or too few of them
|-- BudgetRefused          9  a budget or a quota would be exceeded
|-- Locked                10  another flctl holds the lock for more than 5 s, or another host drives the campaign
|-- WaitElapsed           11  --wait ran out
|-- HostKeyRefused        12  unknown or changed host key
`-- Interrupted          130  Ctrl-C, SIGTERM, SIGHUP
"""

from flctl.words import plain, printable


class FlctlError(Exception):
    """Something failed: `message` says what and why, `hint` what to type next, `site` where (None: at home). Others'
    words in them are made harmless (flctl/words.py), wherever they came from."""

    exit_code = 1
    code = "internal"

    def __init__(self, message: str, *, hint: str = "", site: str | None = None) -> None:
        super().__init__(message)
        self.message = plain(message)
        self.hint = plain(hint)
        self.site = site

    def __str__(self) -> str:
        where = f"{self.site}: " if self.site else ""
        return f"{where}{self.message}"


class UsageError(FlctlError):
    exit_code = 2
    code = "usage"


class ConfigurationError(FlctlError):
    exit_code = 3
    code = "configuration"


class LoginNeeded(FlctlError):
    """A login was refused, or could not be tried: `attempted` says which. A refused one holds the site."""

    exit_code = 4
    code = "login_needed"
    attempted = True


class LoginTooSoon(LoginNeeded):
    """No login was tried, because it may not be now; from `until` (Unix seconds) on it may."""

    attempted = False

    def __init__(self, message: str, *, until: float, hint: str = "", site: str | None = None) -> None:
        super().__init__(message, hint=hint, site=site)
        self.until = until


class CodeSpent(LoginTooSoon):
    """The current time step's code was already used; the next step begins at `until`."""


class LoginPaused(LoginTooSoon):
    """No login may be tried before `until`: too many were tried, or the last ones ended badly."""

    code = "login_paused"


class SiteUnreachable(FlctlError):
    exit_code = 5
    code = "site_unreachable"


class JobFailed(FlctlError):
    exit_code = 6
    code = "job_failed"


class TransferFailed(FlctlError):
    exit_code = 7
    code = "transfer_failed"


class AggregationRefused(FlctlError):
    exit_code = 8
    code = "aggregation_refused"


class BudgetRefused(FlctlError):
    exit_code = 9
    code = "budget_refused"


class Locked(FlctlError):
    exit_code = 10
    code = "locked"


class WaitElapsed(FlctlError):
    exit_code = 11
    code = "wait_elapsed"


class HostKeyRefused(FlctlError):
    exit_code = 12
    code = "host_key"


class Interrupted(FlctlError):
    exit_code = 130
    code = "interrupted"


def defect(error: Exception) -> FlctlError:
    """An exception that is not ours, as the error it is: exit code 1, with the place where it happened."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno})" if trace else ""
    return FlctlError(
        f"internal error: {type(error).__name__}: {printable(str(error))}{place}",
        hint="this is a defect of flctl; nothing is lost. FLCTL_DEBUG=1 shows more",
    )


PRECEDENCE = (130, 1, 3, 12, 10, 4, 5, 9, 7, 6, 8, 11)


def exit_code_of(codes: "list[int]") -> int:
    """The exit code of a command that met several errors: the first of PRECEDENCE that is among them."""
    for code in PRECEDENCE:
        if code in codes:
            return code
    return codes[0] if codes else 0
