"""What each process of tests/numeric/test_sharded_ranks.py does, and the models and the batch it does it with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from drawing import draw_batch
from rank_groups import GlooRanks

from mii_serve.config import LimitsConfig
from mii_serve.engine.batched import BatchedEngine
from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.engine.kernels.sharded import ShardedKernels
from mii_serve.models import LoadedModel, load_model
from mii_serve.models.families import SD_V1_4
from mii_serve.models.tensor_parallel import TensorShard, keep_shard

SIZES = (2, 4)
"""The groups: the first two processes, and all."""

V1 = {**SD_V1_4.unet, "block_out_channels": [64, 96, 128, 128], "cross_attention_dim": 32}
"""The levels, heads and groups of Stable Diffusion v1, with few channels."""

DTYPES = {"v1": torch.float32, "v1 in bf16": torch.bfloat16, "v1 in fp16": torch.float16}

MODEL_INPUT_SHAPE = (3, 4, 16, 8)
TIMESTEPS = (999.0, 1.0, 340.5)
SAMPLE_OF_ROW = (0, 1, 2, 0, 2)
"""The second sample is not guided."""

REQUESTS: list[dict[str, object]] = [
    {"num_inference_steps": 5, "guidance_scale": 7.5, "scheduler": "pndm", "prompt": "a red circle", "seed": 1},
    {"num_inference_steps": 3, "guidance_scale": 1.0, "scheduler": "ddim", "prompt": "a green square", "seed": 2},
    {
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "scheduler": "euler_a",
        "prompt": "a star",
        "negative_prompt": "circle",
        "seed": 3,
    },
]


def demo_model(shard: TensorShard) -> LoadedModel:
    return load_model(
        "demo",
        revision=None,
        dtype="fp32",
        device="cpu",
        enable_safety_checker=False,  # which takes a picture of three steps for what it likes and blackens it
        limits=LimitsConfig(),
        shard=shard,
    )


def v1_unet(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**V1).eval().requires_grad_(False)
    return unet.to(dtype=dtype, memory_format=torch.channels_last)


@dataclass(frozen=True)
class Call:
    """What came of one UNet call of a rank."""

    prediction: torch.Tensor
    num_sums: int
    num_bytes: int
    num_weights: int


def predict(kernels: NativeKernels, unet: Any) -> torch.Tensor:
    """For the batch: three samples, two of them guided, at three timesteps."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(MODEL_INPUT_SHAPE, generator=generator).contiguous(memory_format=torch.channels_last)
    embeds = torch.randn(len(SAMPLE_OF_ROW), 77, unet.config.cross_attention_dim, generator=generator)
    latents, embeds = latents.to(unet.dtype), embeds.to(unet.dtype)
    timestep_embeds, prompts = kernels.embed_timesteps(torch.tensor(TIMESTEPS)), kernels.project_prompts(embeds)
    return kernels.predict_noise(latents, timestep_embeds, prompts, torch.tensor(SAMPLE_OF_ROW))


def num_weights(unet: Any) -> int:
    return sum(parameter.numel() for parameter in unet.parameters())


def work(rank: int) -> dict[Any, Any]:
    """A call of each model, and the pictures of `REQUESTS`, in each group that this rank is in."""
    done: dict[Any, Any] = {}
    for size, group in [(size, GlooRanks(size)) for size in SIZES]:
        if rank >= size:
            continue
        shard = TensorShard(rank=rank, world_size=size)
        for name, dtype in DTYPES.items():
            unet = v1_unet(dtype)
            keep_shard(unet, shard)
            done[name, size] = _call(unet, ShardedKernels(unet, group), group)
        demo = demo_model(shard)
        kernels = ShardedKernels(demo.pipeline.unet, group)
        done["demo", size] = _call(demo.pipeline.unet, kernels, group)
        engine = BatchedEngine(demo, kernels, max_slots=4)
        engine.warmup()
        done["pictures", size] = draw_batch(engine, REQUESTS)
    return done


@torch.inference_mode()
def _call(unet: Any, kernels: ShardedKernels, group: GlooRanks) -> Call:
    unet.to(memory_format=torch.channels_last)
    group.sent.clear()
    prediction = predict(kernels, unet)
    return Call(prediction, len(group.sent), sum(group.sent), num_weights(unet))
