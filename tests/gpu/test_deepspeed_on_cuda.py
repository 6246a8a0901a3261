"""DeepSpeed's compiled kernels and the engine that uses them, on a GPU: against torch, against FP32, graphs against none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from buckets import worst_bucket
from drawing import draw, draw_batch
from torch.nn import functional

from mii_serve.config import LimitsConfig
from mii_serve.engine.machine import inspect_machine
from mii_serve.engine.requirements import first_missing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SD_LEVELS = [(320, 64), (640, 32), (1280, 16), (1280, 8)]
"""Channels and latent side of the levels of Stable Diffusion v1 at 512 × 512; 8 heads in each."""

NUM_HEADS = 8
MAX_ERROR = 0.005
"""Root mean square, of the right answer's own."""

MIN_PSNR_DB = 30.0


@pytest.fixture(scope="module", autouse=True)
def deepspeed():
    """Skips what cannot run without it."""
    if (missing := first_missing("deepspeed", inspect_machine())) is not None:
        pytest.skip(f"{missing.what}: {missing.found}; fix it with: {missing.remedy}")


@pytest.fixture(scope="class")
def operations():
    """The compiled extensions, with room for the shapes below."""
    from deepspeed.ops.op_builder import InferenceBuilder

    loaded = InferenceBuilder().load()
    tokens = 16_384
    loaded.allocate_workspace_fp16(32, 1, 0, 1, 0, 1, True, 0, tokens, tokens)
    yield loaded
    torch.cuda.synchronize()
    loaded.release_workspace()


@pytest.fixture(autouse=True)
def inference():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def half(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).half()


def relative(made: torch.Tensor, true: torch.Tensor) -> float:
    made, true = made.float(), true.float()
    return float((made - true).square().mean().sqrt() / true.square().mean().sqrt())


class TestKernels:
    @pytest.mark.parametrize(("width", "side"), SD_LEVELS, ids=str)
    @pytest.mark.parametrize("rows", [1, 2, 5])
    def test_self_attention_with_the_flash_kernel(self, operations, width, side, rows):
        from deepspeed.ops.transformer.inference.triton_ops import triton_flash_attn

        if width // NUM_HEADS > 128 or side * side % 64:
            pytest.skip("DeepSpeed makes this one without it")
        tokens, head = side * side, width // NUM_HEADS
        hidden, weight = half(rows, tokens, width), half(width, 3 * width, scale=width**-0.5)
        qkv = operations.linear_layer_fp16(hidden, weight, weight, False, True, NUM_HEADS, False, 10000.0)
        made = triton_flash_attn()(*qkv, head**-0.5, tokens % 128 == 0)[..., :head]
        query, key, value = (hidden.float() @ weight.float()).view(rows, tokens, 3, NUM_HEADS, head).permute(2, 0, 3, 1, 4)
        assert relative(made, functional.scaled_dot_product_attention(query, key, value)) < MAX_ERROR

    @pytest.mark.parametrize("tokens", [63, 77, 81, 1295, 1296, 64], ids=str)
    def test_queries_keys_and_values_of_any_number_of_tokens(self, operations, tokens):
        hidden, weight = half(2, tokens, 320), half(320, 960, scale=320**-0.5)
        made = operations.linear_layer_fp16(hidden, weight, weight, False, True, NUM_HEADS, False, 10000.0)
        assert made.shape == (3, 2, NUM_HEADS, tokens, 64), "heads of 40 are padded to 64"
        true = (hidden.float() @ weight.float()).view(2, tokens, 3, NUM_HEADS, 40).permute(2, 0, 3, 1, 4)
        assert relative(made[..., :40], true) < MAX_ERROR
        assert not made[..., 40:].any()

    @pytest.mark.parametrize(("width", "side"), SD_LEVELS, ids=str)
    @pytest.mark.parametrize("tokens", [None, 77, 81], ids=str)
    def test_norm_with_bias_and_residual(self, operations, width, side, tokens):
        tokens = tokens or side * side
        hidden, residual = half(2, tokens, width), half(2, tokens, width)
        bias, gamma, beta = half(width), half(width), half(width)
        normed, summed = operations.layer_norm_residual_store_pre_ln_res(hidden, bias, residual, gamma, beta, 1e-5)
        true_sum = hidden.float() + bias.float() + residual.float()
        assert relative(summed, true_sum) < MAX_ERROR
        true = functional.layer_norm(true_sum, (width,), gamma.float(), beta.float(), 1e-5)
        assert relative(normed, true) < MAX_ERROR
        alone = operations.layer_norm(hidden, gamma, beta, 1e-5)
        assert relative(alone, functional.layer_norm(hidden.float(), (width,), gamma.float(), beta.float(), 1e-5)) < MAX_ERROR

    @pytest.mark.parametrize(("width", "side"), SD_LEVELS, ids=str)
    def test_geglu_and_the_last_sum(self, operations, width, side):
        from deepspeed.ops.transformer.inference.bias_add import nhwc_bias_add
        from deepspeed.utils.types import ActivationFuncType

        tokens = side * side + 1
        hidden, bias = half(2, tokens, 8 * width), half(8 * width)
        made = operations.gated_activation(hidden, bias, ActivationFuncType.GATED_GELU)
        value, gate = (hidden.float() + bias.float()).chunk(2, dim=-1)
        assert relative(made, value * functional.gelu(gate)) < MAX_ERROR
        one, other, bias = half(2, tokens, width), half(2, tokens, width), half(width)
        assert relative(nhwc_bias_add(one, bias, other=other), one.float() + bias.float() + other.float()) < MAX_ERROR

    def test_the_77th_token_is_still_lost_by_the_operation_we_replace(self, operations):
        """Should this fail, DeepSpeed has mended it, and `SplitHeads` can go."""
        query, key, value = half(2, 64, 320), half(2, 77, 320), half(2, 77, 320)
        filled = torch.full((1, 16_384, 320), 7.0, device="cuda", dtype=torch.float16)
        operations.linear_layer_fp16(filled, half(320, 320), half(320), False, False, NUM_HEADS, False, 10000.0)
        _, made, _ = operations.pad_transform_fp16(query, key, value, NUM_HEADS, False)
        true = key.view(2, 77, NUM_HEADS, 40).transpose(1, 2)
        wrong = (made[..., :40] - true).abs().amax((0, 1, 3)) > 0.01
        assert wrong.nonzero().flatten().tolist() == [76]


def load(dtype: str, model: str = "demo") -> Any:
    from mii_serve.models import load_model

    return load_model(model, revision=None, dtype=dtype, device="cuda", limits=LimitsConfig(), enable_safety_checker=False)


@pytest.fixture(scope="class")
def engine():
    from mii_serve.engine.factory import deepspeed_engine

    built = deepspeed_engine(load("fp16"), max_slots=8)
    built.warmup()
    yield built
    torch.cuda.synchronize()
    built.close()


@pytest.fixture(scope="module")
def reference():
    from mii_serve.engine.reference import ReferenceEngine

    return ReferenceEngine(load("fp32"))


def psnr(made: Any, true: Any) -> float:
    one, other = (np.frombuffer(picture.rgb, np.uint8).astype(float) for picture in (made, true))
    return float(10 * np.log10(255**2 / max(np.mean((one - other) ** 2), 1e-9)))


class TestUNet:
    @pytest.mark.parametrize("size", [(64, 64), (72, 72), (9, 7), (33, 31), (96, 64)], ids=str)
    def test_the_injected_unet_answers_what_the_fp32_unet_answers(self, size):
        """Full width, random weights; none of the odd sizes is a whole number of the flash kernel's blocks."""
        from mii_serve.engine.kernels.deepspeed import DeepSpeedKernels
        from mii_serve.engine.kernels.deepspeed.injection import inject, injected_attentions
        from mii_serve.engine.kernels.deepspeed.workspace import Workspace

        unet = load("fp16", "random-sd-v1-4").pipeline.unet.to(memory_format=torch.channels_last)
        before = load("fp32", "random-sd-v1-4").pipeline.unet
        before.load_state_dict({name: tensor.float() for name, tensor in unet.state_dict().items()})
        rows, times = torch.tensor([0, 1, 1], device="cuda"), torch.tensor([999.0, 1.0], device="cuda")
        latents, embeds = half(2, 4, *size), half(3, 77, 768)
        embeds[:, -1] *= 8  # the last token weighs most
        true = before(latents.float()[rows], times[rows], encoder_hidden_states=embeds.float()).sample
        assert inject(unet) == 16
        assert {parameter.device.type for parameter in unet.parameters()} == {"cuda"}
        assert len(injected_attentions(unet)) == 32
        workspace = Workspace(unet, max_latent_pixels=3 * size[0] * size[1], sides=range(min(size), max(size) + 1))
        injected = DeepSpeedKernels(unet, workspace)
        model_input = latents.contiguous(memory_format=torch.channels_last)
        made = injected.predict_noise(model_input, injected.embed_timesteps(times), injected.project_prompts(embeds), rows)
        torch.cuda.synchronize()
        workspace.release()
        assert relative(made, true) < 0.01


class TestEngine:
    def test_every_bucket_replays_what_is_made_without_a_graph(self, engine):
        error, num_buckets = worst_bucket(engine)
        assert num_buckets == 18 and error < MAX_ERROR

    @pytest.mark.parametrize("scheduler", ["pndm", "euler_a", "dpm++_2m", "unipc"])
    @pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 7.5])
    def test_pictures_are_close_to_the_references(self, engine, reference, scheduler, guidance_scale):
        asked = {"scheduler": scheduler, "guidance_scale": guidance_scale, "num_inference_steps": 20}
        assert psnr(draw(engine, **asked), draw(reference, **asked)) >= MIN_PSNR_DB

    def test_changing_batch_size_and_steps_between_replays_changes_no_picture(self, engine, reference):
        kinds = [
            {"prompt": "a red circle", "seed": 1, "scheduler": "pndm", "num_inference_steps": 12, "guidance_scale": 1.0},
            {"prompt": "a green star", "seed": 2, "scheduler": "euler_a", "num_inference_steps": 5},
            {"prompt": "a blue ring", "seed": 3, "scheduler": "dpm++_2m", "num_inference_steps": 9, "guidance_scale": 5.0},
        ]
        true = [draw(reference, **one) for one in kinds]
        for chosen in ([0], [0, 1, 2], [2, 1], [1, 1, 0, 2, 2, 0, 1], [0, 0]):
            for index, made in zip(chosen, draw_batch(engine, [kinds[i] for i in chosen]), strict=True):
                assert psnr(made, true[index]) >= MIN_PSNR_DB
            other = {"height": 72, "width": 96, "num_inference_steps": 3}
            assert psnr(draw(engine, **other), draw(reference, **other)) >= MIN_PSNR_DB, "made without a graph in between"


class TestFullSize:
    def test_random_weights_make_a_batch_and_auto_takes_deepspeed(self):
        from mii_serve.config import DeployConfig
        from mii_serve.engine.factory import build_engine

        built = build_engine(DeployConfig.load({"model": "random-sd-v1-4", "engine": "auto", "max_slots": 4}))
        assert (built.description.engine, built.description.note) == ("deepspeed", "")
        built.warmup()
        asked = [{"prompt": f"number {i}", "seed": i, "num_inference_steps": 3 + i} for i in range(4)]
        assert all(len(set(picture.rgb)) > 8 for picture in draw_batch(built, asked))
        assert built.num_graph_misses == 0
        built.close()
