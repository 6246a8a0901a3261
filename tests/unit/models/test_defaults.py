"""What a model declares is checked, completed, and kept within the operator's bounds."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mii_serve.config import LimitsConfig
from mii_serve.errors import ConfigError, ModelError
from mii_serve.models.defaults import DEFAULTS_FILE, DeclaredDefaults, read_defaults, settle
from mii_serve.types import GenerationDefaults, Limits

FULL = {
    "scheduler": "dpm++_2m",
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "height": 64,
    "width": 96,
    "min_size_px": 32,
    "max_size_px": 256,
}


def declare(folder: Path, content: object) -> Path:
    (folder / DEFAULTS_FILE).write_text(json.dumps(content))
    return folder


def settled(
    declared: DeclaredDefaults, sample_size: int | list[int] | None = 64, **bounds: float
) -> tuple[GenerationDefaults, Limits]:
    return settle(
        declared,
        LimitsConfig(**bounds),  # type: ignore[arg-type]
        sample_size=sample_size,
    )


def test_a_full_declaration_is_what_requests_get(tmp_path: Path) -> None:
    defaults, limits = settled(read_defaults(declare(tmp_path, FULL)))
    assert defaults == GenerationDefaults(scheduler="dpm++_2m", num_inference_steps=20, guidance_scale=3.0, height=64, width=96)
    assert limits == Limits(min_size_px=32, max_size_px=256)


def test_without_a_declaration_diffusers_defaults_hold(tmp_path: Path) -> None:
    defaults, limits = settled(read_defaults(tmp_path))
    assert defaults == GenerationDefaults(
        scheduler="default", num_inference_steps=50, guidance_scale=7.5, height=512, width=512
    )
    assert limits == Limits(min_size_px=64, max_size_px=1024)


@pytest.mark.parametrize(("sample_size", "size"), [(96, (768, 768)), ([64, 96], (512, 768)), (None, (512, 512))])
def test_the_size_the_unet_was_trained_for_is_the_default(sample_size: int | list[int] | None, size: tuple[int, int]) -> None:
    defaults, _ = settled(DeclaredDefaults(), sample_size)
    assert (defaults.height, defaults.width) == size


def test_a_guidance_scale_of_zero_is_kept() -> None:
    assert settled(DeclaredDefaults(guidance_scale=0.0))[0].guidance_scale == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 20}, "no key 'steps'"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": "20"}, "num_inference_steps"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"height": 60}, "height"),
        ({"scheduler": ""}, "scheduler"),
        ({"min_size_px": 512}, "min_size_px 512 is more than max_size_px 256"),
        ({"width": 512}, "width 512 is outside"),
        ({"height": 16}, "height 16 is outside"),
    ],
)
def test_a_declaration_that_breaks_a_rule_is_refused_by_key(tmp_path: Path, change: dict[str, object], named: str) -> None:
    declare(tmp_path, FULL | change)
    with pytest.raises(ModelError) as caught:
        read_defaults(tmp_path)
    assert named in str(caught.value)
    assert str(tmp_path / DEFAULTS_FILE) in str(caught.value)


def test_the_operators_size_bounds_win_over_the_models() -> None:
    _, limits = settled(DeclaredDefaults(**FULL), min_size_px=64, max_size_px=2048)  # type: ignore[arg-type]
    assert (limits.min_size_px, limits.max_size_px) == (64, 2048)


def test_the_operators_other_limits_are_kept() -> None:
    _, limits = settled(DeclaredDefaults(), max_prompt_chars=10, max_images_per_prompt=2, max_guidance_scale=9)
    assert (limits.max_prompt_chars, limits.max_images_per_prompt, limits.max_guidance_scale) == (10, 2, 9)


def test_a_default_beyond_the_operators_limit_moves_to_it_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        defaults, _ = settled(DeclaredDefaults(), max_size_px=256, max_num_inference_steps=30, max_guidance_scale=5)
    assert (defaults.height, defaults.num_inference_steps, defaults.guidance_scale) == (256, 30, 5)
    assert "forbid the model's defaults" in caplog.text


def test_bounds_that_leave_no_size_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"limits\.min_size_px.*leaves no size"):
        settled(DeclaredDefaults(max_size_px=256), min_size_px=512)
