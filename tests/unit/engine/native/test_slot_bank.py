"""What is kept of a sample from its first step to its last."""

from __future__ import annotations

import pytest
import torch

from mii_serve.engine.native.slots import SlotBank


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


class TestSlots:
    def test_a_freed_slot_starts_from_zeros_again(self):
        bank = SlotBank(1, (4, 2, 2), torch.device("cpu"))
        slot = bank.take(torch.ones(4, 2, 2))
        bank.state[slot] = float("nan")
        bank.give_back(slot)
        again = bank.take(torch.full((4, 2, 2), 3.0))
        assert bank.state[again, 0].eq(3).all() and bank.state[again, 1:].eq(0).all()

    def test_the_padding_slot_is_nobodys(self):
        bank = SlotBank(2, (4, 2, 2), torch.device("cpu"))
        taken = {bank.take(torch.ones(4, 2, 2)) for _ in range(2)}
        assert bank.padding_slot not in taken and bank.state.shape[0] == 3
        assert not bank.is_empty
