"""Which failed calls are tried again, how often and when. No I/O: the clients sleep and call."""

from __future__ import annotations

import random
import time

from mii_serve.errors import ConfigError, MiiServeError, ModerationFailedError, QueueFullError, UnavailableError

MAX_RETRIES = 2
FIRST_BACKOFF_S = 0.2
LONGEST_PAUSE_S = 60.0
"""A server that wants a longer pause than this is full, which the caller should know."""


def checked_retries(max_retries: int) -> int:
    """Raises:
    ConfigError: not a whole number, 0 or more.
    """
    if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
        raise ConfigError("max_retries", f"must be a whole number, 0 or more, got {max_retries!r}")
    return max_retries


class Attempts:
    """How often one call is tried, and with how much time.

    An image is a function of its parameters, so a call whose answer was lost may be repeated, and a server without room may be
    asked again when it said it will have some. An image that content safety could not judge is not asked for again: it would
    be made once more only to be withheld again.
    """

    def __init__(self, max_retries: int, timeout: float | None) -> None:
        self._num_left = max_retries
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._backoff_s = FIRST_BACKOFF_S

    @property
    def left_s(self) -> float | None:
        """Seconds for the next attempt."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def pause_s(self, error: MiiServeError) -> float:
        """How long to wait before the next attempt.

        Raises:
            MiiServeError: the same error, where there is to be none.
        """
        if isinstance(error, QueueFullError) and error.retry_after_s is not None:
            pause_s = error.retry_after_s
        elif isinstance(error, UnavailableError) and not isinstance(error, ModerationFailedError):
            pause_s = self._backoff_s
            self._backoff_s *= 2
        else:
            raise error
        pause_s *= random.uniform(1.0, 1.25)  # callers refused at the same time do not all retry at the same time
        left_s = self.left_s
        if self._num_left == 0 or pause_s > (LONGEST_PAUSE_S if left_s is None else min(left_s, LONGEST_PAUSE_S)):
            raise error
        self._num_left -= 1
        return pause_s
