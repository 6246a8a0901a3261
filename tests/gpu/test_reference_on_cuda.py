"""The reference engine on a CUDA device: the same pictures as on the CPU, up to the device's own rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawing import draw

from mii_serve.config import LimitsConfig
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.models import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MAX_LEVELS_OFF = 2
"""Of 255: float32 kernels on the two devices sum in different orders, and rounding to bytes may double it."""


def engine_on(device: str, model: str = "demo") -> ReferenceEngine:
    loaded = load_model(model, revision=None, dtype="fp32", device=device, limits=LimitsConfig())
    return ReferenceEngine(loaded)


@pytest.fixture(scope="module")
def engines() -> tuple[ReferenceEngine, ReferenceEngine]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return engine_on("cpu"), engine_on("cuda")


@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "euler_a", "dpm++_2m", "unipc"])
def test_cuda_draws_what_the_cpu_draws(engines, scheduler):
    on_cpu, on_cuda = (draw(engine, scheduler=scheduler, num_inference_steps=10) for engine in engines)
    a, b = (np.frombuffer(picture.rgb, np.uint8).astype(int) for picture in (on_cpu, on_cuda))
    assert np.abs(a - b).max() <= MAX_LEVELS_OFF


def test_full_size_random_weights_make_a_picture_on_the_device():
    engine = engine_on("cuda", "random-sd-v1-4")
    picture = draw(engine, num_inference_steps=2)
    assert (picture.width, picture.height) == (512, 512)
    assert torch.cuda.max_memory_allocated() > 4 * 859_520_964, "the UNet alone is that large in float32"
