"""A turn's tensors say what its moves say, whatever the turn is padded to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mii_serve.engine.native.lattice import TurnSize
from mii_serve.engine.native.turn import Move, Turn, size_of

PADDING_SLOT = 9


def move(slot: int, *, negative: int | None = None, noise: torch.Tensor | None = None) -> Move:
    return Move(
        slot=slot,
        time=10 + slot,
        prompt=20 + slot,
        negative_prompt=negative,
        guidance_scale=7.5 if negative is not None else 1.0,
        input_scale=0.5 + slot,
        matrix=np.arange(35, dtype=np.float32).reshape(5, 7) + slot,
        noise=noise,
    )


MOVES = (move(3, negative=30), move(1), move(2, negative=31))


@pytest.fixture(params=[(3, 5), (3, 6), (4, 8), (6, 9)], ids=str)
def turn(request):
    filled = Turn(TurnSize(*request.param, 4, 4), 4, torch.device("cpu"))
    filled.fill(MOVES, PADDING_SLOT)
    return filled


def test_the_size_counts_a_row_more_for_each_guided_sample():
    assert size_of(MOVES, 4, 4) == TurnSize(3, 5, 4, 4)


def test_each_sample_has_its_own_numbers(turn):
    assert turn.slots[:3].tolist() == [3, 1, 2]
    assert turn.times[:3].tolist() == [13, 11, 12]
    assert turn.input_scale[:3].tolist() == [3.5, 1.5, 2.5]
    for row, made in enumerate(MOVES):
        assert np.array_equal(turn.matrices[row].numpy(), made.matrix)


def test_each_row_has_its_sample_and_its_prompt(turn):
    n = turn.size.num_samples
    assert turn.sample_of_row[:3].tolist() == [0, 1, 2]
    assert turn.prompts[:3].tolist() == [23, 21, 22]
    assert turn.sample_of_row[n : n + 2].tolist() == [0, 2]
    assert turn.prompts[n : n + 2].tolist() == [30, 31]


def test_an_unguided_sample_is_its_own_uncond_row(turn):
    n = turn.size.num_samples
    assert turn.uncond_row[:3].tolist() == [n, 1, n + 1]


def test_padding_writes_to_the_padding_slot_and_every_index_is_in_range(turn):
    assert set(turn.slots[3:].tolist()) <= {PADDING_SLOT}
    assert not turn.matrices[3:].any()
    assert int(turn.sample_of_row.max()) < turn.size.num_samples
    assert int(turn.uncond_row.max()) < turn.size.num_rows


def test_a_turn_is_refilled_without_a_trace_of_the_one_before(turn):
    turn.fill(MOVES[1:2], PADDING_SLOT)
    fresh = Turn(turn.size, 4, torch.device("cpu"))
    fresh.fill(MOVES[1:2], PADDING_SLOT)
    for name in ("slots", "times", "uncond_row", "prompts", "sample_of_row", "input_scale", "guidance_scale", "matrices"):
        assert torch.equal(getattr(turn, name), getattr(fresh, name)), name


def test_noise_goes_to_the_sample_that_drew_it(turn):
    noise = torch.full((4, 4, 4), 2.0)
    turn.fill((MOVES[0], move(5, noise=noise)), PADDING_SLOT)
    assert torch.equal(turn.noise[1], noise)
    assert not turn.noise[0].any()
