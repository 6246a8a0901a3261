"""The fused kernels on a GPU: each against float32, the UNet and the decoder against their own modules, and in a graph."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MAX_PASS_ERROR = 0.02
"""Of a whole pass in float16, as root mean square over the right answer's own."""


@pytest.fixture(autouse=True)
def inference():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        yield


def load(dtype: str):
    from mii_serve.config import LimitsConfig
    from mii_serve.models import load_model

    limits = LimitsConfig()
    return load_model("random-sd-v1-4", revision=None, dtype=dtype, device="cuda", limits=limits, enable_safety_checker=False)


@pytest.fixture(scope="module")
def model():
    return load("fp16")


@pytest.fixture(scope="module")
def operations():
    from mii_serve.engine.kernels.fused.triton_operations import TritonOperations

    return TritonOperations()


def test_every_kernel_computes_what_float32_computes(operations):
    from interpreted_kernels import cases, error, max_error

    with torch.device("cuda"):
        errors = {name: error(*make(operations)) for name, make in cases()}
    assert {name: found for name, found in errors.items() if not found <= max_error(name)} == {}


def test_a_whole_pass_predicts_what_the_unets_own_modules_predict(model, operations):
    from mii_serve.engine.kernels.fused.forward import FusedKernels
    from mii_serve.engine.kernels.fused.install import PassInputs
    from mii_serve.engine.kernels.fused.measuring import error
    from mii_serve.engine.kernels.native import NativeKernels

    unet = model.pipeline.unet.to(memory_format=torch.channels_last)
    for latent_shape in ((64, 64), (72, 56), (33, 31)):
        inputs = PassInputs(unet, latent_shape)
        expected = inputs.prediction(NativeKernels(unet), 3)
        assert error(inputs.prediction(FusedKernels(unet, operations), 3), expected) <= MAX_PASS_ERROR


def test_the_same_pass_twice_is_the_same_bits_and_a_graph_replays_them(model, operations):
    from mii_serve.engine.kernels.fused.forward import FusedKernels

    unet = model.pipeline.unet.to(memory_format=torch.channels_last)
    kernels = FusedKernels(unet, operations)
    latents = torch.randn(2, 4, 64, 64, device="cuda").half().to(memory_format=torch.channels_last)
    timesteps = kernels.embed_timesteps(torch.tensor([999.0, 1.0], device="cuda"))
    prompts = kernels.project_prompts(torch.randn(4, 77, 768, device="cuda").half())
    rows = torch.tensor([0, 1, 0, 1], device="cuda")
    first, second = (kernels.predict_noise(latents, timesteps, prompts, rows) for _ in range(2))
    assert torch.equal(first, second)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = kernels.predict_noise(latents, timesteps, prompts, rows)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, first)


def test_the_decoder_decodes_what_its_own_modules_decode(model, operations):
    from mii_serve.engine.kernels.fused.measuring import error
    from mii_serve.engine.kernels.fused.vae import FusedDecoder

    decoder = model.pipeline.vae.decoder
    latents = torch.randn(2, 4, 64, 64, device="cuda").half()
    expected = decoder(latents)
    assert error(FusedDecoder(decoder.to(memory_format=torch.channels_last), operations)(latents), expected) <= MAX_PASS_ERROR


def test_the_choice_is_made_and_kept(tmp_path):
    from mii_serve.engine.kernels.fused.forward import FusedKernels
    from mii_serve.engine.kernels.fused.install import install, this_device

    device = this_device(torch.device("cuda"))
    first = install(load("fp16"), device, num_samples=(1,), folder=tmp_path)
    assert isinstance(first.kernels, FusedKernels), first.about
    assert install(load("fp16"), device, num_samples=(1,), folder=tmp_path).about == first.about
