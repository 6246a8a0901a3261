"""What the command's exit codes mean, and the one place where an error becomes a code and one line on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import TextIO

from mii_serve.errors import (
    ConfigError,
    DeadlineExceededError,
    InvalidRequestError,
    MiiServeError,
    UnavailableError,
)
from mii_serve.extras import MissingExtraError, extra_with, how_to_get


class ExitCode(IntEnum):
    OK = 0
    FAILED = 1
    INVALID = 2
    UNAVAILABLE = 3
    DEADLINE_EXCEEDED = 4
    REJECTED = 5
    NOT_INSTALLED = 6
    INTERRUPTED = 130


EPILOG = """\
exit codes:
  0    ok
  1    failed
  2    wrong usage, or an invalid parameter or setting
  3    server unreachable or not ready
  4    deadline exceeded
  5    images differ from the reference's
  6    the command needs an extra of the package that is not installed
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


_is_json = False
_LEVELS = {"error": "ERROR", "warning": "WARNING"}
"""By how a line begins."""


def say_as_json() -> None:
    """From now on, what is said on stderr has the form of a log's lines."""
    global _is_json
    _is_json = True


def say(text: str) -> None:
    """Print one line on stderr; stdout is for results."""
    line = " ".join(text.split())
    if _is_json:
        from mii_serve.logs import json_line

        line = json_line(line, _LEVELS.get(line.partition(":")[0], "INFO"), "mii_serve.cli")
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # the reader of stderr has gone, or its disk is full
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Let what is written to this stream go nowhere; else Python's own flush at exit fails too, and with it the exit code."""
    with Path(os.devnull).open("w") as nowhere, suppress(OSError, ValueError):
        os.dup2(nowhere.fileno(), stream.fileno())


def open_standard_streams() -> None:
    """Open what the caller has closed of stdin, stdout and stderr, to nowhere.

    A closed descriptor is given to the next file or socket, and what is printed would go there.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened == number:
                os.set_inheritable(number, True)
            else:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn an error that leaves the block into its exit code and one line; MII_SERVE_DEBUG=1 lets the traceback out."""
    is_debug = os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    try:
        yield
    except BrokenPipeError:
        silence(sys.stdout)  # its reader has gone
        sys.exit(ExitCode.FAILED)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(ExitCode.INTERRUPTED)
    except MiiServeError as error:
        if is_debug:
            raise
        say(f"error: {error}")
        sys.exit(exit_code_of(error))
    except ModuleNotFoundError as error:
        if is_debug:
            raise
        say(f"error: {_missing(error)}")
        sys.exit(ExitCode.NOT_INSTALLED)
    except Exception as error:  # the last stop before the user; the traceback stays one variable away
        if is_debug:
            raise
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        say(f"error: {kind}{error} ({DEBUG_VARIABLE}=1 shows the traceback)")
        sys.exit(ExitCode.FAILED)


def _missing(error: ModuleNotFoundError) -> str:
    module = error.name or str(error)
    extra = error.extra if isinstance(error, MissingExtraError) else extra_with(module)
    if extra is None:
        return f"{module} is not installed, and no extra of mii_serve includes it ({DEBUG_VARIABLE}=1 shows the traceback)"
    return f"{module} is not installed: {how_to_get(extra)}"
