"""A batch's tensors hold what its samples hold, whatever the batch is padded to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mii_serve.engine.batched.batch_inputs import BatchInputs, SampleInputs, batch_shape
from mii_serve.engine.batched.buckets import BatchShape

PADDING_SLOT = 9


def sample(slot: int, *, negative: int | None = None, noise: torch.Tensor | None = None) -> SampleInputs:
    return SampleInputs(
        slot=slot,
        timestep_row=10 + slot,
        prompt_row=20 + slot,
        negative_prompt_row=negative,
        guidance_scale=7.5 if negative is not None else 1.0,
        input_scale=0.5 + slot,
        matrix=np.arange(35, dtype=np.float32).reshape(5, 7) + slot,
        noise=noise,
    )


SAMPLES = (sample(3, negative=30), sample(1), sample(2, negative=31))


@pytest.fixture(params=[(3, 5, True), (3, 6, True), (4, 8, True), (6, 9, True), (3, 6, False), (5, 5, False), (6, 9, False)])
def inputs(request):
    num_samples, num_rows, has_fixed_rows = request.param
    shape = BatchShape(num_samples, num_rows, 4, 4)
    filled = BatchInputs(shape, 4, torch.device("cpu"), has_fixed_rows=has_fixed_rows)
    filled.first_negative = num_samples if has_fixed_rows else len(SAMPLES)
    filled.fill(SAMPLES, PADDING_SLOT)
    return filled


def test_the_size_counts_a_row_more_for_each_guided_sample():
    assert batch_shape(SAMPLES, (4, 4)) == BatchShape(3, 5, 4, 4)


def test_each_sample_has_its_own_numbers(inputs):
    assert inputs.slots[:3].tolist() == [3, 1, 2]
    assert inputs.timestep_rows[:3].tolist() == [13, 11, 12]
    assert inputs.input_scale[:3].tolist() == [3.5, 1.5, 2.5]
    for row, one in enumerate(SAMPLES):
        assert np.array_equal(inputs.matrices[row].numpy(), one.matrix)


def test_each_row_has_its_sample_and_its_prompt(inputs):
    n = inputs.first_negative
    assert inputs.sample_of_row[:3].tolist() == [0, 1, 2]
    assert inputs.prompt_rows[:3].tolist() == [23, 21, 22]
    assert inputs.sample_of_row[n : n + 2].tolist() == [0, 2]
    assert inputs.prompt_rows[n : n + 2].tolist() == [30, 31]


def test_an_unguided_sample_is_its_own_uncond_row(inputs):
    n = inputs.first_negative
    assert inputs.uncond_row[:3].tolist() == [n, 1, n + 1]


def test_padding_writes_to_the_padding_slot_and_every_index_is_in_range(inputs):
    assert set(inputs.slots[3:].tolist()) <= {PADDING_SLOT}
    assert not inputs.matrices[3:].any()
    assert int(inputs.sample_of_row.max()) < inputs.shape.num_samples
    assert int(inputs.uncond_row.max()) < inputs.shape.num_rows


def test_inputs_are_refilled_without_a_trace_of_the_batch_before(inputs):
    inputs.fill(SAMPLES[1:2], PADDING_SLOT)
    fresh = BatchInputs(inputs.shape, 4, torch.device("cpu"), has_fixed_rows=inputs.has_fixed_rows)
    fresh.fill(SAMPLES[1:2], PADDING_SLOT)
    for name in (
        "slots",
        "timestep_rows",
        "uncond_row",
        "prompt_rows",
        "sample_of_row",
        "input_scale",
        "guidance_scale",
        "matrices",
    ):
        assert torch.equal(getattr(inputs, name), getattr(fresh, name)), name


def test_noise_goes_to_the_sample_that_drew_it(inputs):
    noise = torch.full((4, 4, 4), 2.0)
    inputs.fill((SAMPLES[0], sample(5, noise=noise)), PADDING_SLOT)
    assert torch.equal(inputs.noise[1], noise)
    assert not inputs.noise[0].any()
