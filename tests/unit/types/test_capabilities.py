"""What a request may ask for, rule by rule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from mii_serve.errors import InvalidRequestError
from mii_serve.types import (
    MAX_SEED,
    Capabilities,
    GenerationDefaults,
    ImageFormat,
    Limits,
    ModelParts,
    OutputOptions,
    PromptEmbeds,
    RequestedParams,
)

CAPABILITIES = Capabilities(
    limits=Limits(),
    defaults=GenerationDefaults(scheduler="dpm++_2m", num_inference_steps=20, guidance_scale=3.0, height=64, width=128),
    schedulers={"pndm": "pndm", "PNDMScheduler": "pndm", "dpm++_2m": "dpm++_2m"},
)


def resolve(**asked):
    return CAPABILITIES.resolve(RequestedParams(**{"prompt": "a red circle", **asked}), fallback_seed=7)


def test_what_is_left_out_gets_the_models_defaults():
    params = resolve()
    assert (params.scheduler, params.num_inference_steps, params.guidance_scale) == ("dpm++_2m", 20, 3.0)
    assert (params.height, params.width, params.num_images_per_prompt) == (64, 128, 1)
    assert (params.negative_prompt, params.seed) == ("", 7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", " \n\t"),
        ("prompt", "x" * 4097),
        ("prompt", "x" * 100_000),
        ("prompt", "\ud800"),
        ("prompt", None),
        ("prompt", ["a", "b"]),
        ("negative_prompt", "x" * 4097),
        ("negative_prompt", "\udfff"),
        ("height", 63),
        ("height", 56),
        ("height", 1032),
        ("height", -64),
        ("width", 0),
        ("width", 100),
        ("width", 64.0),
        ("num_inference_steps", 0),
        ("num_inference_steps", -5),
        ("num_inference_steps", 1001),
        ("num_inference_steps", True),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("guidance_scale", -math.inf),
        ("guidance_scale", -0.1),
        ("guidance_scale", 50.001),
        ("guidance_scale", "7"),
        ("num_images_per_prompt", 0),
        ("num_images_per_prompt", 17),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("seed", 1.0),
        ("scheduler", "ddimm"),
        ("scheduler", ""),
    ],
)
def test_a_broken_rule_names_its_field(field, value):
    with pytest.raises(InvalidRequestError) as caught:
        resolve(**{field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "x" * 4096),
        ("prompt", "漢字 ü 🎨 \x00"),
        ("height", 1024),
        ("num_inference_steps", 1000),
        ("guidance_scale", 0),
        ("guidance_scale", 50),
        ("num_images_per_prompt", 16),
        ("seed", 0),
        ("seed", MAX_SEED),
    ],
)
def test_the_edges_of_every_rule_are_inside(field, value):
    assert getattr(resolve(**{field: value}), field) == value


def test_a_scheduler_is_answered_with_its_short_name():
    assert resolve(scheduler="PNDMScheduler").scheduler == "pndm"
    assert resolve(scheduler="PNDM").scheduler == "pndm"


def test_image_seeds_count_up_and_wrap():
    params = resolve(seed=MAX_SEED, num_images_per_prompt=2)
    assert [params.seed_of(i) for i in range(2)] == [MAX_SEED, 0]


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("output.quality", {"format": ImageFormat.JPEG, "quality": 0, "embed_metadata": False}),
        ("output.quality", {"format": ImageFormat.JPEG, "quality": 101, "embed_metadata": False}),
        ("output.quality", {"format": ImageFormat.PNG, "quality": 90, "embed_metadata": False}),
        ("output.embed_metadata", {"format": ImageFormat.JPEG, "quality": None, "embed_metadata": True}),
    ],
)
def test_output_options_that_do_not_go_together_are_refused(field, options):
    with pytest.raises(InvalidRequestError) as caught:
        OutputOptions.checked(**options)
    assert caught.value.field == field


def test_prompts_stay_out_of_repr():
    asked = RequestedParams(prompt="a secret", negative_prompt="another secret")
    assert "secret" not in repr(asked)
    assert "secret" not in repr(CAPABILITIES.resolve(asked, fallback_seed=0))


def embeds(num_tokens: int = 77, width: int = 768, dtype: str = "fp16", number: bytes = b"", data: bytes = b"") -> PromptEmbeds:
    number = number or (b"\x00\x3c" if dtype == "fp16" else b"\x00\x00\x80\x3f")
    return PromptEmbeds(num_tokens=num_tokens, width=width, dtype=dtype, data=data or number * max(0, num_tokens * width))


class TestConditioning:
    @pytest.mark.parametrize(
        ("asked", "text"),
        [
            ({"clip_skip": 0}, r"clip_skip: must be in \[1, 11\]: the model's text encoder has 12 layers, got 0"),
            ({"clip_skip": 12}, r"clip_skip: must be in \[1, 11\]"),
            ({"clip_skip": True}, "clip_skip: must be a whole number"),
            ({"eta": 1.01}, r"eta: must be a finite number in \[0, 1\]"),
            ({"eta": math.nan}, "eta: must be a finite number"),
            ({"timesteps": ()}, "timesteps: must have 1 to 1000 numbers, got 0"),
            ({"timesteps": (1,) * 1001}, "timesteps: must have 1 to 1000 numbers, got 1001"),
            ({"timesteps": (1000,)}, r"timesteps: must each be in \[0, 999\], got 1000"),
            ({"timesteps": (1.5,)}, "timesteps: must be a whole number"),
            ({"timesteps": 5}, "timesteps: must be a list of numbers"),
            ({"sigmas": (1.0,)}, "sigmas: must have 2 to 1001 numbers, got 1"),
            ({"sigmas": (math.inf, 0.0)}, "sigmas: must be a finite number"),
            ({"sigmas": (math.nan, 0.0)}, "sigmas: must be a finite number"),
            ({"sigmas": (-1.0, 0.0)}, "sigmas: must be a finite number"),
            ({"sigmas": (1.0, 0.0), "timesteps": (1,)}, "sigmas: cannot go with timesteps"),
            (
                {"timesteps": (9, 5), "num_inference_steps": 3},
                "num_inference_steps: must be left out, or 2, with these timesteps",
            ),
        ],
    )
    def test_what_breaks_a_rule_is_named(self, asked, text):
        with pytest.raises(InvalidRequestError, match=text):
            resolve(**asked)

    @pytest.mark.parametrize(
        ("asked", "text"),
        [
            ({"prompt": "a", "prompt_embeds": embeds()}, "prompt: must be left out with prompt_embeds"),
            ({"negative_prompt": "a", "negative_prompt_embeds": embeds()}, "negative_prompt: must be left out with"),
            ({"prompt_embeds": embeds(num_tokens=76)}, "prompt_embeds: must have a multiple of 77 tokens, at most 616, got 76"),
            ({"prompt_embeds": embeds(num_tokens=77 * 9)}, "prompt_embeds: must have a multiple of 77 tokens"),
            ({"prompt_embeds": embeds(num_tokens=-77)}, "prompt_embeds: must have a multiple of 77 tokens"),
            ({"prompt_embeds": embeds(width=767)}, "prompt_embeds: must be 768 wide"),
            ({"prompt_embeds": embeds(dtype="bf16")}, "prompt_embeds: must be of a dtype among fp32, fp16, got 'bf16'"),
            ({"prompt_embeds": embeds(data=b"1")}, "prompt_embeds: must have 118272 bytes of data, got 1"),
            ({"prompt_embeds": embeds(number=b"\x00\x7e")}, "prompt_embeds: must be finite numbers"),
            ({"prompt_embeds": embeds(number=b"\x00\xfc")}, "prompt_embeds: must be finite numbers"),
            ({"prompt_embeds": embeds(number=b"\x00\x00\xc0\x7f", dtype="fp32")}, "prompt_embeds: must be finite numbers"),
            ({"prompt_embeds": embeds(num_tokens=154)}, "negative_prompt_embeds: must have as many tokens as the prompt, 154"),
            ({"prompt_embeds": embeds(), "clip_skip": 1}, "clip_skip: cannot go with prompt_embeds"),
            ({"prompt_embeds": embeds(), "prompt_syntax": "a1111"}, "prompt_syntax: cannot go with prompt_embeds"),
        ],
    )
    def test_embeddings_that_break_a_rule_are_named(self, asked, text):
        asked = {"prompt": "" if "prompt_embeds" in asked else "a", **asked}
        with pytest.raises(InvalidRequestError, match=text):
            CAPABILITIES.resolve(RequestedParams(**asked), fallback_seed=0)

    def test_embeddings_are_in_the_place_of_the_prompt(self):
        given = embeds(num_tokens=154)
        params = resolve(prompt="", prompt_embeds=given, guidance_scale=1.0)
        assert (params.prompt, params.prompt_embeds, "bytes" in repr(params)) == ("", given, False)
        assert resolve(negative_prompt_embeds=embeds()).negative_prompt == ""

    def test_steps_of_ones_own_say_how_many_there_are(self):
        assert resolve(timesteps=[9, 5], num_inference_steps=2).num_inference_steps == 2
        params = resolve(sigmas=[14, 2.0, 0.0])
        assert (params.num_inference_steps, params.sigmas, params.timesteps) == (2, (14.0, 2.0, 0.0), None)
        assert (resolve().clip_skip, resolve().eta, resolve().sigmas) == (None, 0.0, None)


def test_a_guided_image_of_a_latent_consistency_model_costs_one_row():
    of_lcm = replace(CAPABILITIES, parts=ModelParts(embeds_guidance=True))
    params = of_lcm.resolve(RequestedParams(prompt="a", guidance_scale=8.0), fallback_seed=1)
    assert (params.num_rows, params.work_per_call, params.is_guided) == (1, 8 * 16, False)
    assert (resolve(guidance_scale=8.0).num_rows, resolve(guidance_scale=1.0).num_rows) == (2, 1)
