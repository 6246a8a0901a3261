"""Ctrl-C while a server works: the call is cancelled, whatever the interpreter was doing just then.

Left alone, the interrupt is an exception wherever the main thread happens to be. Inside of a callback of gRPC's it would only
be printed, and the command would go on waiting.
"""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Protocol


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class CtrlC:
    """A block in which the first Ctrl-C cancels the call, and then ends with `KeyboardInterrupt`. A second one is as usual."""

    def __init__(self) -> None:
        self._call: Cancellable | None = None
        self._is_pressed = False
        self._before = signal.getsignal(signal.SIGINT)

    def cancels(self, call: Cancellable) -> None:
        """This is the call; it is over at once if Ctrl-C came before it."""
        self._call = call
        if self._is_pressed:
            call.cancel()

    def __enter__(self) -> CtrlC:
        if threading.current_thread() is threading.main_thread():  # signals come to no other
            signal.signal(signal.SIGINT, self._on_press)
        return self

    def _on_press(self, *_: object) -> None:
        if self._is_pressed:
            raise KeyboardInterrupt
        self._is_pressed = True
        if self._call is not None:
            self._call.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._before)
        if self._is_pressed and isinstance(error, Exception):
            raise KeyboardInterrupt from None
