"""A child process that ends with its parent, however the parent ends, and also while the child itself is stopped.

The parent holds the write end of the child's standard input. When it closes, the parent is gone, and the child exits by itself.
A child that SIGSTOP has stopped cannot do that, so on Linux the kernel is asked, too, to kill the child when the thread that
started it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl(2): the signal that this process gets when the thread that started it ends."""


def end_with_parent() -> None:
    """To be called first of all in a child process whose standard input is a pipe from its parent."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    threading.Thread(target=_exit_with_pipe, name="parent-watch", daemon=True).start()


def _exit_with_pipe() -> None:
    # The pipe is asked and not read, because it has the order in it, and because the lock of sys.stdin, held in a blocking
    # read, would stall the interpreter's own shutdown.
    pipe = select.poll()
    pipe.register(0, 0)  # poll reports a hang-up without being asked to
    pipe.poll()
    os._exit(1)
