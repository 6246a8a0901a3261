"""The benchmark model has the real one's size and shape, and its small sister works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_shape import TINY

from mii_serve.errors import ModelError
from mii_serve.models import random_init
from mii_serve.models.families import SD_V1_4, PipelineShape
from mii_serve.models.quiet import quiet_libraries
from mii_serve.models.random_init import build_random_pipeline

PARTS = ("unet", "vae", "text_encoder", "safety_checker")
CPU = torch.device("cpu")


def build(pristine: Path, shape: PipelineShape, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    with quiet_libraries():
        return build_random_pipeline(
            shape, **{"tokenizer_folder": pristine / "tokenizer", "dtype": dtype, "device": CPU, **settings}
        )


def test_the_full_size_is_that_of_the_published_model(pristine: Path) -> None:
    pipeline = build(pristine, SD_V1_4, torch.float16, device=torch.device("meta"))
    counts = {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in PARTS}
    assert counts == {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "safety_checker": 303_981_588,
    }
    assert pipeline.safety_checker.concept_embeds.shape == (17, 768)
    assert pipeline.vae.config.scaling_factor == 0.18215
    assert pipeline.vae_scale_factor == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_part_is_made_in_the_precision_and_on_the_device(pristine: Path, dtype: torch.dtype) -> None:
    pipeline = build(pristine, TINY, dtype, device=torch.device("meta"))
    for part in PARTS:
        state = getattr(pipeline, part).state_dict().values()
        assert {value.dtype for value in state if value.is_floating_point()} == {dtype}
        assert {value.device.type for value in state} == {"meta"}
        assert not getattr(pipeline, part).training


def test_a_small_one_makes_pictures_that_the_checker_never_flags(pristine: Path) -> None:
    pipeline = build(pristine, TINY)
    made = pipeline(["a cat", "a dog"], num_inference_steps=2, height=64, width=64, output_type="np")
    assert made.images.shape == (2, 64, 64, 3)
    assert made.images.std() > 0
    assert made.nsfw_content_detected == [False, False]


def test_the_checker_does_not_even_flag_what_equals_its_concepts(pristine: Path) -> None:
    checker = build(pristine, TINY).safety_checker
    clip_input = torch.rand(1, 3, 28, 28)
    embedding = checker.visual_projection(checker.vision_model(clip_input)[1])
    checker.concept_embeds[:] = embedding
    checker.special_care_embeds[:] = embedding
    assert checker(clip_input, [torch.rand(3, 8, 8).numpy()])[1] == [False]


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generators_alone(pristine: Path) -> None:
    before = torch.get_rng_state()
    first, second = (build(pristine, TINY).unet.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32


def test_the_default_precision_survives_a_shape_that_cannot_be_built(pristine: Path) -> None:
    with pytest.raises(ValueError, match="divisible"):
        build(pristine, replace(TINY, unet={**TINY.unet, "norm_num_groups": 3}), torch.float16)
    assert torch.get_default_dtype() == torch.float32


def test_it_loads_by_name_with_the_demo_models_tokenizer(pristine: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_init, "SD_V1_4", TINY)
    monkeypatch.setattr(random_init, "DEMO_FOLDER", pristine)
    model = load("random-sd-v1-4", dtype="bf16")
    assert model.name == "random-sd-v1-4"
    assert model.revision.startswith("sha256:")
    assert (model.defaults.scheduler, model.defaults.num_inference_steps) == ("default", 50)
    assert model.pipeline.unet.dtype == torch.bfloat16
    assert load("random-sd-v1-4", enable_safety_checker=False).pipeline.safety_checker is None
    with pytest.raises(ModelError, match="not from the hub"):
        load("random-sd-v1-4", revision="main")


def test_without_a_demo_model_it_says_what_is_missing(tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_init, "DEMO_FOLDER", tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        load("random-sd-v1-4")
