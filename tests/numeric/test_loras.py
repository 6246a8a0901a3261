"""LoRAs: the reference engine against diffusers' own loader, and different ones in one UNet call against the reference."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drawing import draw, draw_batch
from lora_truth import CALL, CASES, PROMPT, SEED, TRUTH, write_loras
from PIL import Image
from safetensors.torch import save_file

from mii_serve.engine.batched import BatchedEngine
from mii_serve.engine.factory import native_engine
from mii_serve.engine.kernels.fused.forward import FusedKernels
from mii_serve.engine.kernels.fused.operations import TorchOperations
from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.engine.kernels.rows import RowParallelKernels
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.errors import ModelError
from mii_serve.models import LoadedModel
from mii_serve.models.loras import load_loras
from mii_serve.types import RequestedParams

MIXED: list[dict[str, object]] = [
    {"loras": None},
    {"loras": {"plain": 1.0}},
    {"loras": {"text": 0.8}, "seed": 4},
    {"loras": {"wide": 1.0}, "guidance_scale": 1.0},
    {"loras": {"plain": 0.5, "peft": -0.7}, "scheduler": "tcd", "num_inference_steps": 4},
    {"loras": {"wide": 0.0}},
    {"loras": {"words": 2.0}},
]


@pytest.fixture(scope="module")
def model(demo, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    paths = write_loras(tmp_path_factory.mktemp("loras"), demo.pipeline)
    return replace(demo, pipeline=copy.copy(demo.pipeline), loras=load_loras(paths, demo.pipeline))


@pytest.fixture(scope="module")
def reference(model) -> ReferenceEngine:
    return ReferenceEngine(model)


@pytest.fixture(scope="module")
def expected(reference) -> list[np.ndarray]:
    return [levels(draw(reference, **asked(one))) for one in MIXED]


def asked(more: dict[str, object]) -> dict[str, object]:
    return {"prompt": PROMPT, "seed": SEED, "scheduler": "default", **CALL, **more}


def levels(picture) -> np.ndarray:
    return np.frombuffer(picture.rgb, np.uint8).astype(int).reshape(picture.height, picture.width, 3)


def farthest(pictures, expected: list[np.ndarray]) -> int:
    return max(int(np.abs(levels(mine) - theirs).max()) for mine, theirs in zip(pictures, expected, strict=True))


@pytest.mark.parametrize("index", range(len(CASES)))
def test_the_reference_draws_what_diffusers_draws_with_peft(reference, index: int) -> None:
    strip = np.asarray(Image.open(TRUTH)).astype(int)
    theirs = np.split(strip, len(CASES), axis=1)[index]
    assert np.abs(levels(draw(reference, **asked({"loras": CASES[index]}))) - theirs).max() <= 1


def test_samples_with_different_loras_and_none_share_a_call(model, expected) -> None:
    drawn = draw_batch(native_engine(model), [asked(one) for one in MIXED])
    assert farthest(drawn, expected) <= 1
    for changed in (1, 3):
        assert np.abs(expected[changed] - expected[0]).max() > 20
    assert np.abs(expected[5] - expected[0]).max() == 0
    alone = native_engine(replace(model, loras={"words": model.loras["words"]}))  # no pool is needed for it
    assert farthest(draw_batch(alone, [asked(MIXED[6])]), [expected[6]]) <= 1


def test_the_fused_kernels_take_them_too(model, expected) -> None:
    pipeline = copy.copy(model.pipeline)
    pipeline.unet = copy.deepcopy(model.pipeline.unet).to(memory_format=torch.channels_last)
    fused = BatchedEngine(replace(model, pipeline=pipeline), FusedKernels(pipeline.unet, TorchOperations()))
    assert farthest(draw_batch(fused, [asked(one) for one in MIXED]), expected) <= 1
    assert (
        farthest(
            draw_batch(fused, [asked({"loras": {"conv": 0.8}})]),
            [levels(draw(ReferenceEngine(model), **asked({"loras": {"conv": 0.8}})))],
        )
        <= 1
    )


@pytest.mark.parametrize("loras", [{"conv": 0.8}, {"deep": 1.0, "plain": 0.5}])
def test_what_shares_no_call_with_others_is_right(model, reference, loras: dict[str, float]) -> None:
    native = native_engine(model)
    requests = [asked({"loras": loras}), asked({"loras": loras, "seed": 9, "guidance_scale": 1.0})]
    keys = [_resolved(native, one).batch_key for one in (*requests, asked({}), asked({"loras": {"deep": 1.0}}))]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert farthest(draw_batch(native, requests), [levels(draw(reference, **one)) for one in requests]) <= 1


def test_ranks_that_share_the_rows_of_a_call(model) -> None:
    """Two ranks one after the other: the second one's predictions wait for the first."""
    kernels = NativeKernels(model.pipeline.unet)
    engine = native_engine(model)
    entries = [
        engine.loras.acquire(_resolved(engine, asked({"loras": one})).lora_choice)
        for one in ({"plain": 1.0}, {}, {"wide": 1.0})
    ]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    prompts = kernels.project_prompts(torch.randn(6, 77, model.pipeline.unet.config.cross_attention_dim, generator=generator))
    times = kernels.embed_timesteps(torch.tensor([999.0, 1.0, 340.5]))
    rows = torch.arange(6) % 3
    with torch.inference_mode():
        alone = kernels.predict_noise(latents, times, prompts, rows, engine.loras.of_call(entries))
        group = _Ranks()
        for rank in (1, 0):
            group.rank = rank
            both = RowParallelKernels(kernels, group).predict_noise(
                latents, times, prompts, rows, engine.loras.of_call(entries)
            )
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)


class _Ranks:
    rank, size = 0, 2

    def __init__(self) -> None:
        self._sent: dict[int, torch.Tensor] = {}

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._sent[self.rank] = tensor
        return torch.cat([self._sent.get(rank, tensor) for rank in range(self.size)])


def _resolved(engine, one: dict[str, object]):
    return engine.capabilities.resolve(RequestedParams(**one), fallback_seed=0)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (
            {"unet.conv_in.lora_A.weight": (4, 3, 3, 3), "unet.conv_in.lora_B.weight": (64, 4, 1, 1)},
            "is for another model: unet.conv_in has",
        ),
        (
            {"unet.nowhere.lora_A.weight": (4, 8), "unet.nowhere.lora_B.weight": (8, 4)},
            "is for another model: it changes unet.nowhere",
        ),
        ({"unet.conv_in.lora_A.weight": (4, 4, 3, 3)}, "is not whole: unet.conv_in"),
        ({"unet.conv_in.lora_A.weight": (4, 4, 3, 3), "unet.conv_in.lora_B.bias": (64,)}, "is a LoRA with biases"),
        ({"lora_unet_conv_in.hada_w1_a": (4, 4)}, "is a LoHa"),
        ({"lora_unet_conv_in.lora_down.weight": (4, 4, 3, 3), "lora_unet_conv_in.dora_scale": (64, 1)}, "is a DoRA"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 1280)}, "is a LoRA of Stable Diffusion XL"),
        ({"lora_unet_conv_in.diff": (4, 4)}, "has a tensor that is no LoRA's"),
        ({"first_stage_model.x": (4,)}, "has a tensor that is no LoRA's"),
    ],
)
def test_what_is_no_lora_of_this_model_is_told_so(demo, tmp_path: Path, made: dict[str, tuple[int, ...]], says: str) -> None:
    file = tmp_path / "it.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in made.items()}, file)
    with pytest.raises(ModelError, match=re.escape(says)):
        load_loras({"it": file}, demo.pipeline)


def test_a_path_without_a_lora_is_told_so(demo, tmp_path: Path) -> None:
    for path, says in ((tmp_path / "missing", "there is no file or folder"), (tmp_path, "holds no .safetensors file")):
        with pytest.raises(ModelError, match=says):
            load_loras({"it": path}, demo.pipeline)
