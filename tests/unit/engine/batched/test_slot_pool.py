"""What is kept of a sample from its first step to its last."""

from __future__ import annotations

import pytest
import torch

from mii_serve.engine.batched.slot_pool import SlotPool


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


def test_a_freed_slot_starts_from_zeros_again():
    pool = SlotPool(1, (4, 2, 2), torch.device("cpu"))
    slot = pool.acquire(torch.ones(4, 2, 2))
    pool.state[slot] = float("nan")
    pool.release(slot)
    again = pool.acquire(torch.full((4, 2, 2), 3.0))
    assert pool.state[again, 0].eq(3).all() and pool.state[again, 1:].eq(0).all()


def test_the_padding_slot_is_never_given_to_a_sample():
    pool = SlotPool(2, (4, 2, 2), torch.device("cpu"))
    taken = {pool.acquire(torch.ones(4, 2, 2)) for _ in range(2)}
    assert pool.padding_slot not in taken and pool.state.shape[0] == 3
    assert not pool.is_empty
