"""Ctrl-C at whatever moment it comes."""

from __future__ import annotations

import signal

import pytest

from mii_serve.cli.interrupt import CtrlC
from mii_serve.errors import RequestCancelledError


class Call:
    def __init__(self) -> None:
        self.num_cancels = 0

    def cancel(self) -> None:
        self.num_cancels += 1


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_it_cancels_the_call_and_raises_nothing_where_it_came():
    call, seen = Call(), []
    with pytest.raises(KeyboardInterrupt), CtrlC() as ctrl_c:
        ctrl_c.cancels(call)
        press()
        seen.append("went on")  # as inside of a callback that would lose an exception
        raise RequestCancelledError("cancelled")
    assert (call.num_cancels, seen) == (1, ["went on"])


def test_before_there_is_a_call_it_ends_the_call_that_comes():
    call = Call()
    with pytest.raises(KeyboardInterrupt), CtrlC() as ctrl_c:
        press()
        ctrl_c.cancels(call)
        assert call.num_cancels == 1
        raise RequestCancelledError("cancelled")


def test_what_was_done_in_time_is_kept():
    with CtrlC() as ctrl_c:
        ctrl_c.cancels(Call())
        press()


def test_a_second_one_interrupts_wherever_it_comes_and_afterwards_all_is_as_before():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), CtrlC():
        press()
        press()
        raise AssertionError("not interrupted")
    assert signal.getsignal(signal.SIGINT) is before


def test_other_errors_are_let_through():
    with pytest.raises(RequestCancelledError), CtrlC():
        raise RequestCancelledError("by the server")
