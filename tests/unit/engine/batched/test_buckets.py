"""Which buckets are declared, and which one a batch is padded to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mii_serve.engine.batched.buckets import BatchShape, choose_bucket, declare_buckets


@st.composite
def batches(draw: st.DrawFn, max_slots: int = 24) -> BatchShape:
    n = draw(st.integers(1, max_slots))
    return BatchShape(n, n + draw(st.integers(0, n)), 64, 64)


def test_powers_of_two_with_and_without_guidance_largest_first():
    sizes = [(size.num_samples, size.num_rows) for size in declare_buckets(6, 64, 64)]
    assert sizes == [(6, 12), (4, 8), (6, 6), (4, 4), (2, 4), (2, 2), (1, 2), (1, 1)]


@given(batches())
def test_every_batch_of_the_declared_latent_shape_has_a_bucket(batch):
    buckets = declare_buckets(24, 64, 64)
    chosen = choose_bucket(buckets, batch)
    assert chosen is not None and chosen.holds(batch)
    assert chosen.num_latent_pixels == min(size.num_latent_pixels for size in buckets if size.holds(batch))


@given(batches())
def test_padding_costs_less_than_twice_the_rows_when_all_are_guided(batch):
    guided = BatchShape(batch.num_samples, 2 * batch.num_samples, 64, 64)
    assert choose_bucket(declare_buckets(24, 64, 64), guided).num_rows < 2 * guided.num_rows


def test_what_the_buckets_lacks_has_no_size():
    buckets = declare_buckets(4, 64, 64)
    assert choose_bucket(buckets, BatchShape(1, 2, 64, 96)) is None
    assert choose_bucket(buckets, BatchShape(5, 5, 64, 64)) is None
    assert choose_bucket((), BatchShape(1, 1, 64, 64)) is None


def test_a_bucket_holds_no_more_guided_samples_than_it_has_rows_for():
    assert BatchShape(4, 8, 8, 8).holds(BatchShape(3, 6, 8, 8))
    assert not BatchShape(4, 4, 8, 8).holds(BatchShape(3, 4, 8, 8))
    assert not BatchShape(4, 8, 8, 8).holds(BatchShape(4, 8, 8, 16))
