"""What the command's exit codes mean, and the one place where an error becomes a code and one line on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from mii_serve.errors import (
    ConfigError,
    DeadlineExceededError,
    InvalidRequestError,
    MiiServeError,
    UnavailableError,
)


class ExitCode(IntEnum):
    OK = 0
    FAILED = 1
    INVALID = 2
    UNAVAILABLE = 3
    DEADLINE_EXCEEDED = 4
    REJECTED = 5
    INTERRUPTED = 130


EPILOG = """\
exit codes:
  0    ok
  1    failed
  2    wrong usage, or an invalid parameter or setting
  3    server unreachable or not ready
  4    deadline exceeded
  5    the pictures are not those of the reference
  130  interrupted
"""

DEBUG_VARIABLE = "MII_SERVE_DEBUG"


def exit_code_of(error: MiiServeError) -> ExitCode:
    match error:
        case InvalidRequestError() | ConfigError():
            return ExitCode.INVALID
        case UnavailableError():
            return ExitCode.UNAVAILABLE
        case DeadlineExceededError():
            return ExitCode.DEADLINE_EXCEEDED
        case _:
            return ExitCode.FAILED


def say(text: str) -> None:
    """One line for the person at the terminal; stdout is for results."""
    print(" ".join(text.split()), file=sys.stderr, flush=True)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn an error that leaves the block into its exit code and one line; MII_SERVE_DEBUG=1 lets the traceback out."""
    is_debug = os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    try:
        yield
    except BrokenPipeError:
        # Whoever read stdout has gone; without this, Python's own flush at exit complains about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.FAILED)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(ExitCode.INTERRUPTED)
    except MiiServeError as error:
        if is_debug:
            raise
        say(f"error: {error}")
        sys.exit(exit_code_of(error))
    except Exception as error:  # the last stop before the user; the traceback stays one variable away
        if is_debug:
            raise
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        say(f"error: {kind}{error} ({DEBUG_VARIABLE}=1 shows where)")
        sys.exit(ExitCode.FAILED)
