"""The figures: held against scikit-image, which is not a dependency, and against cases that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mii_serve.verify.compare import K1, difference, picture_difference, psnr_db, ssim


def picture() -> np.ndarray:
    y, x, color = np.mgrid[0:37, 0:29, 0:3]
    return ((x * 7 + y * 3 + color * 40) % 256).astype(float)


def ruffled(one: np.ndarray) -> np.ndarray:
    y, x, color = np.mgrid[0:37, 0:29, 0:3]
    return np.clip(one + ((x * 5 + y * 11 + color * 3) % 23 - 11), 0, 255)


@pytest.mark.parametrize(
    ("other", "expected_ssim", "expected_psnr"),
    [
        # scikit-image 0.26.0: structural_similarity(..., data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5,
        # use_sample_covariance=False) and peak_signal_noise_ratio(..., data_range=255)
        (ruffled(picture()), 0.9073096637050355, 31.806139485857067),
        ((picture() + 128) % 256, 0.2667853329572733, 5.986604215721735),
        (255 - picture(), -0.4531424933509503, 4.727670726086154),
    ],
    ids=["ruffled", "shifted", "negative"],
)
def test_pictures_compare_as_in_scikit_image(other, expected_ssim, expected_psnr):
    assert ssim(picture(), other) == pytest.approx(expected_ssim, abs=1e-12)
    assert ssim(other, picture()) == pytest.approx(expected_ssim, abs=1e-12)
    assert psnr_db(picture(), other) == pytest.approx(expected_psnr, abs=1e-9)


def test_flat_pictures_are_as_similar_as_the_formula_says():
    c1 = (K1 * 255) ** 2
    flat = [np.full((20, 20, 3), level) for level in (60.0, 90.0)]
    assert ssim(*flat) == pytest.approx((2 * 60 * 90 + c1) / (60**2 + 90**2 + c1))
    assert psnr_db(*flat) == pytest.approx(20 * math.log10(255 / 30))


def test_the_same_picture_is_the_same():
    found = picture_difference(picture(), picture())
    assert (found.max, found.mean, found.relative_max, found.relative_rms) == (0, 0, 0, 0)
    assert (found.psnr_db, found.ssim) == (math.inf, pytest.approx(1.0))


def test_figures_of_a_tensor_worked_out_by_hand():
    found = difference([0.0, 4.5, -2.0], [0.0, 4.0, -3.0])
    assert (found.max, found.mean) == (1.0, 0.5)
    assert found.relative_max == 0.25
    assert found.relative_rms == pytest.approx(math.sqrt(1.25) / 5)
    assert found.psnr_db is None and found.ssim is None


def test_a_truth_of_zeros_is_met_exactly_or_infinitely_far_off():
    assert difference(np.zeros(3), np.zeros(3)).relative_rms == 0
    assert difference(np.ones(3), np.zeros(3)).relative_rms == math.inf


def test_one_value_that_is_no_number_spoils_every_figure():
    spoilt = picture()
    spoilt[20, 20, 1] = math.nan
    found = picture_difference(spoilt, picture())
    figures = [found.max, found.mean, found.relative_max, found.relative_rms, found.psnr_db, found.ssim]
    assert all(math.isnan(figure) for figure in figures)
