"""The fused kernels compute what they should: in Triton's interpreter, and their twins in a model's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from drawing import largest_difference, run_alone
from patience import PATIENCE_S

from mii_serve.config import LimitsConfig
from mii_serve.engine.batched import BatchedEngine
from mii_serve.engine.kernels.fused.forward import FusedKernels
from mii_serve.engine.kernels.fused.operations import TorchOperations
from mii_serve.engine.kernels.fused.vae import FusedDecoder, why_vae_not_fusible
from mii_serve.models import load_model
from mii_serve.types import RequestedParams

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "interpreted_kernels.py"

MAX_TORCH_ERROR = 1.5e-3
"""On a CPU torch's GroupNorm in float16 is off by as much where the mean is far from zero."""

needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="there is no Triton for this system")


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    """In a process of its own, as Triton asks for it."""
    command = [sys.executable, str(SCRIPT)]
    alone = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    alone["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=alone)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout)


@needs_triton
def test_kernels_in_the_interpreter(errors):
    assert len(errors) > 20
    assert {name: of for name, of in errors.items() if not of["triton"] <= of["most"]} == {}


@needs_triton
def test_their_twins_in_torch(errors):
    assert {name: of for name, of in errors.items() if not of["torch"] <= MAX_TORCH_ERROR} == {}


def test_the_fused_decoder_decodes_what_the_decoder_decodes():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        norm_num_groups=8,
    )
    vae = vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    assert why_vae_not_fusible(vae) is None
    latents = torch.randn(2, 4, 6, 5)
    own, in_double = vae.decode(latents).sample, vae.double().decode(latents.double()).sample
    vae.float()
    vae.decoder = FusedDecoder(vae.decoder, TorchOperations())
    torch.testing.assert_close(vae.decode(latents).sample, own, rtol=0, atol=2e-6 * own.abs().max().item())
    again = vae.double().decode(latents.double()).sample
    assert torch.equal(again, in_double), "in another precision the decoder's own modules"
    vae.float()
    torch.testing.assert_close(vae.decode(latents).sample, own, rtol=0, atol=2e-6 * own.abs().max().item())


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_pictures_are_those_of_the_reference(engine, guidance_scale):
    model = load_model("demo", revision=None, dtype="fp32", device="cpu", limits=LimitsConfig(), enable_safety_checker=False)
    pipeline = model.pipeline
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.vae.decoder = FusedDecoder(pipeline.vae.decoder, TorchOperations())
    fused = BatchedEngine(model, FusedKernels(pipeline.unet, TorchOperations()))
    asked = RequestedParams(prompt="a red circle", seed=3, num_inference_steps=4, guidance_scale=guidance_scale)
    params = engine.capabilities.resolve(asked, fallback_seed=0)
    made, true = (run_alone(one, params, 0)[0] for one in (fused, engine))
    assert largest_difference(made.rgb, true.rgb) <= 1
