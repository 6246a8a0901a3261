"""Threads that work for a coroutine."""

from __future__ import annotations

import asyncio
import threading

import pytest
from patience import PATIENCE_S

from mii_serve.server.threads import in_thread


@pytest.mark.parametrize("error", [None, ValueError("broken")])
async def test_a_cancelled_caller_goes_on_only_when_the_thread_has_ended(error: Exception | None):
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        may_end.wait(PATIENCE_S)
        ended.set()
        if error is not None:
            raise error

    task = asyncio.create_task(in_thread(work))
    await asyncio.to_thread(began.wait, PATIENCE_S)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=0.05)
    assert not done and not ended.is_set()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_what_the_function_returns_or_raises_is_the_callers():
    assert await in_thread(max, 1, 2) == 2
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 1, 0)
