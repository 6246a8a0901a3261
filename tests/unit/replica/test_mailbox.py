"""What waits for a slow reader."""

from __future__ import annotations

import asyncio

import pytest
from replica_doubles import image_of, resolved, settle

from mii_serve.errors import EngineError
from mii_serve.replica.mailbox import Mailbox
from mii_serve.types import ImageFormat, Preview, Queued, Started, Step


def step(index: int, made: int) -> Step:
    return Step(image_index=index, step=made, num_steps=4)


def preview(index: int, made: int) -> Preview:
    return Preview(image_index=index, step=made, encoded=b"p", format=ImageFormat.PNG, height=8, width=8)


async def all_of(mailbox: Mailbox) -> list[object]:
    return [await mailbox.get() for _ in range(len(mailbox._entries))]


async def test_a_reader_that_keeps_up_gets_all_in_order():
    mailbox, got = Mailbox(), []
    for made in range(1, 5):
        mailbox.put(step(0, made))
        got.append(await mailbox.get())
    assert [event.step for event in got] == [1, 2, 3, 4]


async def test_a_slow_one_gets_the_latest_of_each_kind_and_image():
    mailbox = Mailbox()
    for made in range(1, 4):
        mailbox.put(Queued(num_samples_ahead=3 - made))
        for index in range(2):
            mailbox.put(step(index, made))
            mailbox.put(preview(index, made))
    assert await all_of(mailbox) == [Queued(num_samples_ahead=0), step(0, 3), preview(0, 3), step(1, 3), preview(1, 3)]


async def test_starts_and_images_are_all_kept():
    events = [Started(image_index=0), Started(image_index=1), *(image_of(resolved().params, index) for index in range(3))]
    mailbox = Mailbox()
    for event in events:
        mailbox.put(event)
    assert await all_of(mailbox) == events


async def test_an_error_is_raised_in_its_turn():
    mailbox = Mailbox()
    mailbox.put(step(0, 1))
    mailbox.put(EngineError("broken"))
    assert await mailbox.get() == step(0, 1)
    with pytest.raises(EngineError, match="broken"):
        await mailbox.get()


async def test_a_reader_waits_for_what_comes_and_may_leave():
    mailbox = Mailbox()
    waiting = asyncio.create_task(mailbox.get())
    await settle()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    again = asyncio.create_task(mailbox.get())
    await settle()
    mailbox.put(step(0, 1))
    assert await again == step(0, 1)
