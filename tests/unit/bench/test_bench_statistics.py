"""The arithmetic, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mii_serve.bench.spread import block_length, differences, interval, resampled, spread
from mii_serve.bench.statistics import percentile, summarize
from mii_serve.bench.values import Record


def record(index: int, *, at: float, total: float, code: str = "OK", num_images: int = 1) -> Record:
    return Record(index=index, kind="k", num_images=num_images, intended_s=at, sent_s=at, ended_s=at + total, code=code)


@pytest.mark.parametrize(
    ("values", "percent", "answer"),
    [
        ([1, 2, 3, 4], 50, 2.5),
        ([4, 1, 3, 2], 25, 1.75),
        ([10], 99, 10),
        ([1, 2], 90, 1.9),
        (list(range(1, 101)), 95, 95.05),
        (list(range(1, 101)), 99, 99.01),
        ([5, 5, 5], 95, 5),
        ([1, 2, 3], 0, 1),
        ([1, 2, 3], 100, 3),
    ],
)
def test_percentiles_lie_between_the_nearest_ranks(values, percent, answer):
    assert percentile(values, percent) == pytest.approx(answer)
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_of_nothing_there_is_no_percentile():
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    assert summarize([]) is None


def test_a_summary_has_count_mean_percentiles_and_maximum():
    assert summarize([1.0, 3.0]) == {"count": 2, "mean": 2.0, "p50": 2.0, "p90": 2.8, "p95": 2.9, "p99": 2.98, "max": 3.0}


def test_the_interval_of_a_mean_is_the_textbooks_where_requests_are_independent():
    rows = np.random.default_rng(0).normal(10.0, 2.0, (400, 1))
    low, high = interval(resampled(rows, lambda runs: runs.mean(axis=1), seed=1))
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / 400**0.5, rel=0.25)
    assert low < rows.mean() < high


def test_a_run_whose_requests_hang_together_is_less_certain():
    """Twenty stretches of twenty equal requests hold about as much as twenty requests, not four hundred."""
    values = np.repeat(np.random.default_rng(0).normal(10.0, 2.0, 20), 20)[:, None]
    low, high = interval(resampled(values, lambda runs: runs.mean(axis=1), seed=1))
    independent = 2 * 1.96 * values.std() / 400**0.5
    assert high - low > 2.5 * independent


def test_blocks_are_the_square_root_and_never_empty():
    assert [block_length(count) for count in (1, 4, 100, 1000)] == [1, 2, 10, 32]


def test_resampling_is_the_same_each_time():
    rows = np.arange(50.0)[:, None]
    first, second = (resampled(rows, lambda runs: runs.mean(axis=1), seed=3, num_resamples=20) for _ in range(2))
    assert (first == second).all()


def test_a_slower_second_run_is_told_apart_and_the_same_run_is_not():
    chance = np.random.default_rng(2)
    first = [record(i, at=i * 0.1, total=float(t)) for i, t in enumerate(chance.gamma(4, 0.1, 300))]
    same = [record(i, at=i * 0.1, total=float(t)) for i, t in enumerate(chance.gamma(4, 0.1, 300))]
    slower = [record(i, at=i * 0.1, total=1.5 * float(t)) for i, t in enumerate(chance.gamma(4, 0.1, 300))]
    figures = {"total_mean": 0.4, "total_p50": 0.37}
    later = {name: 1.5 * value for name, value in figures.items()}
    verdicts = [one.verdict for one in differences(first, same, target_s=None, figures=(figures, figures))]
    assert verdicts == ["no difference shown"] * 2
    found = differences(first, slower, target_s=None, figures=(figures, later))
    assert [(one.name, one.verdict) for one in found] == [("total_mean", "higher"), ("total_p50", "higher")]
    assert found[0].low < 0.5 < found[0].high


def test_of_few_requests_no_spread_is_claimed():
    few = [record(i, at=i, total=0.5) for i in range(9)]
    assert spread(few, target_s=1.0).figures == {}
    hundred = [record(i, at=i, total=0.5) for i in range(100)]
    assert set(spread(hundred, target_s=None).figures) == {
        "total_mean", "total_p50", "total_p90", "total_p95", "requests_per_s", "images_per_s",
    }  # fmt: skip


def test_rates_count_what_went_well_by_the_time_it_took():
    records = [record(i, at=i * 0.5, total=0.5, code="OK" if i % 2 else "UNAVAILABLE", num_images=2) for i in range(200)]
    figures = spread(records, target_s=0.1).figures
    assert np.median(figures["requests_per_s"]) == pytest.approx(1.0, rel=0.1)
    assert np.median(figures["images_per_s"]) == pytest.approx(2.0, rel=0.1)
    assert figures["goodput_per_s"].max() == 0
