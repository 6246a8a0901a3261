"""Which rows of a UNet call each rank computes."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from mii_serve.engine.kernels.rows import RowParallelKernels
from mii_serve.engine.kernels.shares import Share, shares


@st.composite
def calls(draw):
    """Samples, rows and ranks."""
    num_samples = draw(st.integers(1, 40))
    return num_samples, num_samples + draw(st.integers(0, num_samples)), draw(st.integers(1, 9))


@given(calls())
def test_every_row_is_on_exactly_one_rank(call):
    num_samples, num_rows, num_ranks = call
    rows = [row for share in shares(num_samples, num_rows, num_ranks) for row in share.rows]
    assert sorted(rows) == list(range(num_rows))


@given(calls())
def test_no_rank_has_two_rows_more_than_another(call):
    sizes = [len(share.rows) for share in shares(*call)]
    assert len(sizes) == call[2]
    assert max(sizes) - min(sizes) <= 1


@given(calls())
def test_a_share_names_the_sample_of_each_of_its_rows(call):
    num_samples, _, _ = call
    for share in shares(*call):
        assert [share.samples[index] for index in share.sample_of_row] == [row % num_samples for row in share.rows]
        assert len(set(share.samples)) == len(share.samples)


@given(calls())
def test_no_more_pairs_are_apart_than_even_shares_need(call):
    """A rank with an odd number of rows has at most one row of a pair that is apart, and an even one has none to spare."""
    num_samples, num_rows, _ = call
    num_pairs = num_rows - num_samples
    together = sum(len(share.rows) - len(share.samples) for share in shares(*call))
    room = sum(len(share.rows) // 2 for share in shares(*call))
    assert together == min(num_pairs, room)


def test_a_guided_sample_alone_is_split_into_its_two_rows():
    assert shares(1, 2, 2) == (Share((0,), (0,), (0,)), Share((1,), (0,), (0,)))


def test_two_guided_samples_are_one_for_each_rank():
    assert shares(2, 4, 2) == (Share((0, 2), (0,), (0, 0)), Share((1, 3), (1,), (0, 0)))


def test_a_rank_too_many_has_nothing():
    assert [len(share.rows) for share in shares(1, 1, 3)] == [1, 0, 0]


def test_unguided_samples_fill_up_what_pairs_leave():
    assert [share.rows for share in shares(3, 5, 2)] == [(0, 2, 3), (1, 4)]


def test_an_inpainting_model_predicts_for_the_latents_alone():
    def predict(model_input, timestep_embeds, prompts, sample_of_row):
        return torch.ones(len(prompts), 4, *model_input.shape[2:])

    widths = {"prompt_width": 1, "timestep_width": 1, "max_latent_pixels_per_call": None}
    kernels = SimpleNamespace(name="native", sampler=None, predict_noise=predict, **widths)
    group = SimpleNamespace(rank=0, size=1, all_gather=lambda sent: sent)
    made = RowParallelKernels(kernels, group).predict_noise(torch.zeros(2, 9, 8, 8), torch.zeros(2, 1), torch.zeros(3, 77, 1))
    assert made.shape == (3, 4, 8, 8)
