"""Which buckets are declared, and which one a batch is padded to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii_serve.engine.batched.buckets import MAX_PADDING, BatchShape, choose_bucket, declare_buckets


@st.composite
def batches(draw: st.DrawFn, max_slots: int) -> BatchShape:
    n = draw(st.integers(1, max_slots))
    return BatchShape(n, n + draw(st.integers(0, n)), 64, 64)


@given(st.data(), st.integers(1, 40))
def test_any_mix_of_guided_and_unguided_samples_has_a_bucket_with_little_padding(data, max_slots):
    buckets = declare_buckets(max_slots, 64, 64)
    batch = data.draw(batches(max_slots))
    chosen = choose_bucket(buckets, batch)
    assert chosen is not None and chosen.holds(batch)
    assert chosen.num_samples <= max_slots
    assert chosen.num_rows - batch.num_rows <= MAX_PADDING * chosen.num_rows


@given(st.data(), st.integers(1, 40))
def test_where_all_are_guided_little_is_computed_for_samples_that_are_not_there(data, max_slots):
    """What a sample's two rows have in common is computed for each sample of the bucket."""
    num_samples = data.draw(st.integers(1, max_slots))
    chosen = choose_bucket(declare_buckets(max_slots, 64, 64), BatchShape(num_samples, 2 * num_samples, 64, 64))
    assert chosen.num_samples - num_samples <= MAX_PADDING * chosen.num_samples


@pytest.mark.parametrize(("max_slots", "num_buckets"), [(1, 2), (4, 10), (8, 18), (16, 26), (32, 36)])
def test_so_many_are_captured_largest_first(max_slots, num_buckets):
    buckets = declare_buckets(max_slots, 64, 64)
    assert len(buckets) == len(set(buckets)) == num_buckets
    sizes = [bucket.num_latent_pixels for bucket in buckets]
    assert sizes == sorted(sizes, reverse=True)


@given(st.data(), st.integers(1, 24))
def test_with_fixed_rows_every_batch_has_a_bucket_too(data, max_slots):
    batch = data.draw(batches(max_slots))
    chosen = choose_bucket(declare_buckets(max_slots, 64, 64), batch, has_fixed_rows=True)
    assert chosen is not None
    assert chosen.num_rows - chosen.num_samples >= batch.num_rows - batch.num_samples


def test_what_the_buckets_lack_has_no_size():
    buckets = declare_buckets(4, 64, 64)
    assert choose_bucket(buckets, BatchShape(1, 2, 64, 96)) is None
    assert choose_bucket(buckets, BatchShape(5, 5, 64, 64)) is None
    assert choose_bucket((), BatchShape(1, 1, 64, 64)) is None


def test_a_bucket_holds_what_has_no_more_samples_and_rows():
    assert BatchShape(4, 6, 8, 8).holds(BatchShape(3, 6, 8, 8))
    assert not BatchShape(4, 6, 8, 8).holds(BatchShape(3, 6, 8, 8), has_fixed_rows=True), "its second rows have fixed places"
    assert not BatchShape(4, 5, 8, 8).holds(BatchShape(3, 6, 8, 8))
    assert not BatchShape(4, 8, 8, 8).holds(BatchShape(4, 8, 8, 16))


def test_where_no_sample_has_two_rows_no_bucket_has_more_rows_than_samples():
    buckets = declare_buckets(16, 64, 64, may_be_guided=False)
    assert (
        all(bucket.num_rows == bucket.num_samples for bucket in buckets) and len(buckets) < len(declare_buckets(16, 64, 64)) / 2
    )
    assert all(choose_bucket(buckets, BatchShape(n, n, 64, 64)) is not None for n in range(1, 17))
