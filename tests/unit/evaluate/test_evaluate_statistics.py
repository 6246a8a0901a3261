"""The figures of an evaluation: distances and intervals against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mii_serve.evaluate.estimates import figure_of, mean_of
from mii_serve.evaluate.frechet import Normal, Reference


def normal(mean: list[float], variances: list[float]) -> Normal:
    return Normal(np.array(mean, dtype=float), np.diag(np.sqrt(variances)))


def test_the_distance_of_two_normals_with_diagonal_covariances_is_that_of_the_formula():
    found = Reference(normal([0, 0], [4, 9])).distance(normal([3, 4], [1, 16]))
    assert found == pytest.approx(3**2 + 4**2 + (2 - 1) ** 2 + (3 - 4) ** 2)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(1, 8))
def test_a_distance_is_symmetric_and_zero_to_itself_even_with_fewer_pictures_than_dimensions(seed: int, count: int, size: int):
    random = np.random.default_rng(seed)
    first, second = (Normal.of(random.normal(size=(count, size)) @ random.normal(size=(size, size))) for _ in range(2))
    there, back = Reference(first).distance(second), Reference(second).distance(first)
    assert there == pytest.approx(back, rel=1e-6, abs=1e-5 * first.trace)
    assert Reference(first).distance(first) == pytest.approx(0, abs=1e-5 * max(1.0, first.trace))


def test_counts_are_the_same_as_rows_that_are_there_so_often():
    values, counts = np.random.default_rng(0).normal(size=(5, 3)), np.array([2, 0, 1, 3, 0])
    one, other = Normal.of(values, counts), Normal.of(np.repeat(values, counts, axis=0))
    assert np.allclose(one.mean, other.mean) and np.allclose(one.root.T @ one.root, other.root.T @ other.root)


def test_the_interval_of_a_share_covers_it_as_often_as_it_says():
    random, covered = np.random.default_rng(1), 0
    for _ in range(40):
        found = mean_of((random.random(60) < 0.4).astype(float).tolist(), range(60), is_share=True)
        assert found.low is not None and found.high is not None and found.low <= found.value <= found.high
        covered += found.low <= 0.4 <= found.high
    assert covered >= 34


@pytest.mark.parametrize(("value", "bounds"), [(0.0, (0.0, 0.03)), (1.0, (0.97, 1.0))])
def test_where_all_pictures_agree_the_interval_of_a_share_is_not_empty(value: float, bounds: tuple[float, float]):
    found = mean_of([value] * 100, range(100), is_share=True)
    assert (found.value, found.low, found.high) == (value, *map(pytest.approx, bounds))


def test_pictures_of_one_prompt_do_not_count_as_many_prompts():
    values = [0.0, 1.0] * 10
    apart = mean_of([one for one in values for _ in range(8)], range(160), is_share=True)
    alike = mean_of([one for one in values for _ in range(8)], [n // 8 for n in range(160)], is_share=True)
    assert alike.num_prompts == 20 and alike.high - alike.low > 2 * (apart.high - apart.low)


def test_a_distance_says_by_how_much_so_few_pictures_make_it_too_large():
    random = np.random.default_rng(2)
    reference, seen = Reference(Normal.of(random.normal(size=(2000, 6)))), random.normal(size=(40, 6))
    found = figure_of(lambda counts: reference.distance(Normal.of(seen, counts)), range(40))
    assert found.low is not None and found.low <= found.value <= found.high
    assert found.bias is not None and 0.3 * found.value < found.bias < 3 * found.value, "all of the distance is bias here"
    assert found == figure_of(lambda counts: reference.distance(Normal.of(seen, counts)), range(40))


def test_one_prompt_has_no_interval():
    found = mean_of([1.0, 0.0], [0, 0], is_share=True)
    assert (found.value, found.low, found.num_pictures, found.num_prompts) == (0.5, None, 2, 1)
