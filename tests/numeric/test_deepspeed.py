"""DeepSpeed's own blocks in a UNet, its compiled operations replaced by torch equivalents that have their faults.

Every precaution of `mii_serve.engine.kernels.deepspeed` is tested twice: with it the answers are right, and without it they are
not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed_operations import Operations, OutsideMemoryError, torch_operations
from diffusers import UNet2DConditionModel
from drawing import draw

from mii_serve.config import LimitsConfig
from mii_serve.engine.batched.buckets import declare_buckets
from mii_serve.engine.factory import deepspeed_engine
from mii_serve.engine.kernels.deepspeed import DeepSpeedKernels, FusedDeepSpeedKernels, install_kernels
from mii_serve.engine.kernels.deepspeed.injection import (
    FUSED_NORM,
    inject,
    injected_attentions,
    injected_blocks,
    why_not_injectable,
)
from mii_serve.engine.kernels.deepspeed.self_check import MAX_ERROR, compare, predictions
from mii_serve.engine.kernels.deepspeed.workspace import Workspace, elements_per_token, num_elements
from mii_serve.engine.kernels.fused.forward import FusedKernels
from mii_serve.engine.kernels.fused.install import Installed
from mii_serve.engine.kernels.fused.operations import TorchOperations
from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.errors import UnusableEngineError
from mii_serve.models import LoadedModel, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_PICTURE_ERROR = 0.005
"""Of [0, 1], before rounding to levels: what half precision and another order of summing may cost."""

V1 = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 48,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
NUM_TOKENS = 77
SIZES = {
    "one block of 64": (8, 8),
    "two blocks of 128, then of 64": (16, 16),
    "81 tokens, then 25": (9, 9),
    "96 tokens, then 24": (12, 8),
    "odd and even": (9, 7),
}
TIMES = torch.tensor([999.0, 1.0, 340.5])
SAMPLE_OF_ROW = torch.tensor([0, 1, 2, 0, 2])


@pytest.fixture(autouse=True)
def operations():
    with torch_operations() as replaced, torch.inference_mode():
        yield replaced


def make_unet(**config: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=8, **{**V1, **config}).eval().requires_grad_(False)
    return unet.half().to(memory_format=torch.channels_last)


def make_injected(
    *, max_latent_pixels: int = 5 * 256, sides: range = range(7, 17), **config: Any
) -> tuple[UNet2DConditionModel, DeepSpeedKernels, Workspace]:
    """The same UNet before the injection, in float32, and after."""
    unet = make_unet(**config)
    before = copy.deepcopy(unet).float()
    inject(unet)
    workspace = Workspace(unet, max_latent_pixels=max_latent_pixels, sides=sides)
    return before, DeepSpeedKernels(unet, workspace), workspace


@pytest.fixture
def pair():
    before, injected, workspace = make_injected()
    yield before, injected
    workspace.release()


def error(before: UNet2DConditionModel, injected: DeepSpeedKernels, size: tuple[int, int] = (8, 8), seed: int = 1) -> float:
    """How far the injected UNet is from `UNet2DConditionModel.forward` in float32, of the answer's root mean square."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(3, 4, *size, generator=generator)
    embeds = torch.randn(len(SAMPLE_OF_ROW), NUM_TOKENS, before.config.cross_attention_dim, generator=generator)
    embeds[:, -1] *= 8  # the last token weighs most
    true = before(latents[SAMPLE_OF_ROW], TIMES[SAMPLE_OF_ROW], encoder_hidden_states=embeds).sample
    time, prompts = injected.embed_timesteps(TIMES), injected.project_prompts(embeds.half())
    model_input = latents.half().contiguous(memory_format=torch.channels_last)
    made = injected.predict_noise(model_input, time, prompts, SAMPLE_OF_ROW).float()
    return float((made - true).square().mean().sqrt() / true.square().mean().sqrt())


RIGHT = 0.005
"""What half precision costs these UNets is below it, what the faults cost above."""


class TestInjection:
    @pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
    def test_the_injected_unet_answers_what_the_fp32_unet_answers(self, pair, size):
        assert error(*pair, size) < RIGHT

    @pytest.mark.parametrize("config", [{"use_linear_projection": True}, {"transformer_layers_per_block": 2}], ids=str)
    def test_so_do_its_relatives(self, config):
        before, injected, workspace = make_injected(**config)
        assert error(before, injected) < RIGHT
        workspace.release()

    def test_what_computes_is_deepspeeds(self, pair, operations):
        unet = pair[1]._unet
        assert type(unet) is UNet2DConditionModel
        assert {type(block).__module__.partition(".")[0] for block in injected_blocks(unet)} == {"deepspeed"}
        assert not any(type(module).__name__ == "BasicTransformerBlock" for module in unet.modules())
        operations.calls.clear()
        error(*pair)
        blocks = len(injected_blocks(unet))
        assert blocks == 7
        assert operations.calls == {
            "layer_norm": blocks,
            "fused_layer_norm": 2 * blocks,
            "gated_activation": blocks,
            "bias_add_add": blocks,
            "linear_layer": 3 * blocks,
            "flash": 3,  # the upper level's have 64 tokens, the others fewer
        }

    def test_a_text_as_wide_as_the_image_is_not_taken_for_the_image(self):
        before, injected, workspace = make_injected(cross_attention_dim=64)
        assert error(before, injected) < RIGHT
        workspace.release()

    def test_tokens_laid_out_otherwise_are_not_read_as_they_lie(self, pair):
        """Tokens may be a view of an image, channels first, and the kernels know no strides."""
        injected = pair[1]
        embeds = torch.randn(3, NUM_TOKENS, 48).half()
        call = injected.forward_pass(injected, injected.embed_timesteps(TIMES), embeds, None)
        block, view = injected_blocks(injected._unet)[0], torch.randn(3, 32, 64).half().transpose(1, 2)
        made, _ = call._block(block, view, view)
        assert torch.equal(made, call._block(block, view.contiguous(), view)[0])

    def test_nothing_is_printed_where_results_go(self, capsys):
        inject(make_unet())
        assert capsys.readouterr().out == ""

    def test_a_unet_without_transformer_blocks_is_refused(self):
        plain = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
        with pytest.raises(UnusableEngineError, match="replaced 0 transformer blocks"):
            inject(make_unet(**plain, mid_block_type=None))

    def test_an_extension_of_another_release_is_refused(self, monkeypatch):
        monkeypatch.delattr(Operations, FUSED_NORM)
        with pytest.raises(UnusableEngineError, match="built from another release"):
            inject(make_unet())

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda unet: unet.float(), "its weights are float32, and the kernels compute in float16"),
            (lambda unet: unet.bfloat16(), "its weights are bfloat16, and the kernels compute in float16"),
            (lambda unet: make_unet(attention_head_dim=8), "heads of 4 channels, no multiple of 8"),
        ],
        ids=["float32", "bfloat16", "narrow heads"],
    )
    def test_what_the_kernels_cannot_do_is_named(self, change, named):
        assert why_not_injectable(make_unet()) is None
        assert why_not_injectable(change(make_unet())) == named


class WrongNorm(TorchOperations):
    def group_norm(self, *arguments: Any, **named: Any) -> Any:
        normed, total = super().group_norm(*arguments, **named)
        return 1.2 * normed, total


class TestFusedAroundTheBlocks:
    @pytest.mark.parametrize("size", [(8, 8), (9, 7)], ids=str)
    @pytest.mark.parametrize("config", [{}, {"use_linear_projection": True}, {"transformer_layers_per_block": 2}], ids=str)
    def test_the_injected_unet_answers_what_the_fp32_unet_answers(self, config, size):
        before, plain, workspace = make_injected(**config)
        assert error(before, FusedDeepSpeedKernels(plain._unet, workspace, TorchOperations()), size) < RIGHT
        workspace.release()

    @pytest.mark.parametrize(
        ("operations_around", "kind"), [(TorchOperations, FusedDeepSpeedKernels), (WrongNorm, DeepSpeedKernels)]
    )
    def test_they_run_where_they_pass_the_check(self, operations_around, kind, caplog):
        model = load("fp16", LimitsConfig(min_size_px=64, max_size_px=64))
        unet = model.pipeline.unet.to(memory_format=torch.channels_last)
        around = Installed(FusedKernels(unet, operations_around()), "fused: as measured")
        installed = install_kernels(model, max_slots=1, around=around)
        assert type(installed.kernels) is kind
        is_fused = kind is FusedDeepSpeedKernels
        assert installed.about.startswith("fused: as measured" if is_fused else "not fused around DeepSpeed's blocks: ")
        assert is_fused or " off for latents of " in caplog.text
        installed.kernels.close()


def undo(name: str, unguarded: Callable[[Any], Any]) -> Callable[[DeepSpeedKernels], None]:
    def apply(injected: DeepSpeedKernels) -> None:
        for attention in injected_attentions(injected._unet):
            setattr(attention, name, unguarded(attention))

    return apply


def deepspeeds_own_split(attention: Any) -> Any:
    from deepspeed.ops.transformer.inference.op_binding.pad_transform import PadTransformOp

    return PadTransformOp(attention.config)


class TestWithoutThePrecautions:
    def test_the_77th_token_would_be_lost(self, pair):
        undo("pad_transform_func", deepspeeds_own_split)(pair[1])
        assert not error(*pair) < 2 * MAX_ERROR, "stale memory in its place"

    @pytest.mark.parametrize("size", [(9, 9), (12, 8), (9, 7)], ids=str)
    def test_the_flash_kernel_would_leave_its_tensors(self, pair, size):
        assert error(*pair, size) < RIGHT
        undo("triton_flash_attn_kernel", lambda attention: attention.triton_flash_attn_kernel.kernel)(pair[1])
        with pytest.raises(OutsideMemoryError):
            error(*pair, size)

    def test_two_norms_of_three_would_not_be_fused(self, pair, operations):
        for block in injected_blocks(pair[1]._unet):
            delattr(block.layer_norm, FUSED_NORM)
        operations.calls.clear()
        assert error(*pair) < RIGHT
        assert operations.calls["fused_layer_norm"] == 0

    def test_the_workspace_would_be_taken_again_in_a_call(self, pair, operations):
        injected_attentions(pair[1]._unet)[0].config.layer_id = 0
        operations.calls.clear()
        operations.free_bytes = 600 << 20  # it would take all there is
        workspace = operations.workspace
        error(*pair)
        assert operations.calls["allocate_workspace"] == 1 and operations.workspace is not workspace

    def test_a_second_unet_would_have_no_workspace(self):
        before, injected, workspace = make_injected()
        workspace.release()
        with pytest.raises(OutsideMemoryError):
            error(before, injected)

    def test_the_self_check_finds_them(self):
        unet = make_unet()
        checked = unet, NUM_TOKENS, ((8, 8), (9, 9))
        expected = predictions(NativeKernels(unet), *checked)
        inject(unet)
        workspace = Workspace(unet, max_latent_pixels=3 * 81, sides=range(8, 10))
        injected = DeepSpeedKernels(unet, workspace)
        assert compare(predictions(injected, *checked), expected) < RIGHT
        undo("pad_transform_func", deepspeeds_own_split)(injected)
        with pytest.raises(UnusableEngineError, match=r"DeepSpeed's kernels are .* off for latents of 8 × 8"):
            compare(predictions(injected, *checked), expected)
        workspace.release()


class TestWorkspace:
    @pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
    def test_it_holds_the_largest_call_and_little_more(self, size, operations):
        rows, latent_pixels = len(SAMPLE_OF_ROW), len(SAMPLE_OF_ROW) * size[0] * size[1]
        before, injected, workspace = make_injected(max_latent_pixels=latent_pixels, sides=range(7, 17))
        assert error(before, injected, size) < RIGHT
        needed = num_elements(injected._unet, max_latent_pixels=latent_pixels, sides=range(7, 17))
        assert operations.most_used <= needed <= operations.workspace.numel() < needed + 10_000
        assert needed < 2 * operations.most_used, rows
        workspace.release()

    def test_odd_sides_have_more_than_a_quarter_of_the_tokens_below(self, operations):
        below = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (32, 64),
        }
        before, injected, workspace = make_injected(max_latent_pixels=len(SAMPLE_OF_ROW) * 49, sides=range(7, 8), **below)
        assert error(before, injected, (7, 7)) < RIGHT
        workspace.release()

    def test_calls_of_all_sizes_leave_it_where_it_is(self, pair, operations):
        taken = operations.workspace
        for size in ((8, 8), (16, 16), (9, 7), (16, 16), (8, 8)):
            assert error(*pair, size) < RIGHT
        assert operations.workspace is taken and operations.calls["allocate_workspace"] == 1

    def test_a_second_pipeline_shares_it_and_outlives_the_first(self, operations):
        first, injected, workspace = make_injected()
        second, also_injected, same_workspace = make_injected(max_latent_pixels=640)
        for pair in ((first, injected), (second, also_injected), (first, injected)):
            assert error(*pair) < RIGHT
        assert operations.calls["allocate_workspace"] == 1
        workspace.release()
        workspace.release()
        assert error(second, also_injected) < RIGHT
        same_workspace.release()
        assert operations.workspace is None and operations.calls["release_workspace"] == 1

    def test_it_does_not_move_for_a_larger_one_while_it_is_in_use(self, operations):
        *_, workspace = make_injected(max_latent_pixels=640)
        taken = operations.workspace
        with pytest.raises(UnusableEngineError, match="a smaller one is in use"):
            make_injected(max_latent_pixels=64000)
        assert operations.workspace is taken
        workspace.release()
        before, injected, workspace = make_injected(max_latent_pixels=64000)
        assert error(before, injected) < RIGHT
        workspace.release()

    def test_too_little_memory_is_said_and_not_half_taken(self, operations):
        operations.free_bytes = 600 << 20
        with pytest.raises(UnusableEngineError, match="no memory for DeepSpeed's workspace of"):
            make_injected(max_latent_pixels=1_000_000)
        operations.free_bytes = 8 << 30
        *_, workspace = make_injected()
        workspace.release()

    def test_at_sds_widths_it_is_what_was_measured_and_not_a_language_models_cache(self):
        """32 rows at 512 × 512: 1.06 GB, where DeepSpeed would take 18.5 GB."""
        per_row = max(4096 // 4**level * elements_per_token(width, 8) for level, width in enumerate((320, 640, 1280)))
        assert 32 * per_row * 2 == pytest.approx(1.06e9, rel=0.01)


def load(dtype: str, limits: LimitsConfig | None = None) -> LoadedModel:
    limits = limits or LimitsConfig()
    return load_model("demo", revision=None, dtype=dtype, device="cpu", limits=limits, enable_safety_checker=False)


@pytest.fixture(scope="module")
def reference() -> ReferenceEngine:
    return ReferenceEngine(load("fp32"))


@pytest.fixture(scope="class")
def engine():
    with torch_operations() as replaced:
        built = deepspeed_engine(load("fp16"), max_slots=2, buckets=declare_buckets(2, 8, 8))
        replaced.calls.clear()
        yield built
        built.close()


def last_decoded(engine: Any, **asked: object) -> np.ndarray:
    """A picture as the decoder makes it, in [0, 1] before rounding."""
    seen = []
    hook = engine._pipeline.vae.decoder.register_forward_hook(lambda *call: seen.append(call[2]))
    draw(engine, **asked)
    hook.remove()
    return (seen[-1].float() / 2 + 0.5).clamp(0, 1).numpy()


class TestEngine:
    @pytest.fixture
    def operations(self):
        """Those the engine was built with: an extension is loaded once in a process."""
        from deepspeed.ops.transformer.inference.op_binding.base import BaseOp

        return BaseOp.inference_module

    @pytest.mark.parametrize(
        "asked",
        [
            {"num_inference_steps": 3, "scheduler": "pndm", "guidance_scale": 1.0},
            {"num_inference_steps": 2, "height": 40, "width": 56, "scheduler": "euler_a"},
        ],
        ids=["pndm without guidance", "odd latents, guided"],
    )
    def test_pictures_are_the_references(self, engine, reference, operations, asked):
        made, true = (last_decoded(one, **asked) for one in (engine, reference))
        assert np.abs(made - true).max() <= MAX_PICTURE_ERROR
        assert operations.calls["allocate_workspace"] == 0, "the engine's set-up has done it"

    def test_it_says_what_it_is(self, engine):
        assert (engine.description.engine, engine.description.dtype) == ("deepspeed", "fp16")

    def test_what_was_set_aside_bounds_a_call(self, engine):
        assert engine.capacity.max_latent_pixels_per_call == 2 * 32 * 32, "one guided sample of the largest size"


class TestEngineThatCannotBe:
    def test_kernels_that_compute_something_else_are_found_before_the_first_picture(self, operations, monkeypatch):
        right = Operations.gated_activation
        monkeypatch.setattr(Operations, "gated_activation", lambda *given: 1.2 * right(*given))
        with pytest.raises(UnusableEngineError, match=r"DeepSpeed's kernels are .* off"):
            deepspeed_engine(load("fp16"), max_slots=2)
        assert operations.workspace is None, "given back"

    def test_one_slot_and_one_size_are_room_enough_for_the_self_check(self, operations):
        model = load("fp16", LimitsConfig(min_size_px=64, max_size_px=64))
        built = deepspeed_engine(model, max_slots=1)
        assert operations.most_used <= operations.workspace.numel()
        built.close()
        assert operations.workspace is None

    @pytest.mark.parametrize(
        ("name", "problem", "said"),
        [
            (
                "linear_layer_fp16",
                RuntimeError("CUDA error: no kernel image"),
                "RuntimeError: CUDA error: no kernel image",
            ),
            ("layer_norm", torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
            ("allocate_workspace_fp16", TypeError("incompatible arguments"), "TypeError: incompatible arguments"),
        ],
        ids=["no kernel for this gpu", "out of memory", "another signature"],
    )
    def test_what_fails_inside_it_is_a_reason_to_take_another_engine(self, operations, monkeypatch, name, problem, said):
        def fail(*_):
            raise problem

        monkeypatch.setattr(Operations, name, fail)
        with pytest.raises(UnusableEngineError, match=f"DeepSpeed fails here: {said}"):
            deepspeed_engine(load("fp16"), max_slots=1)
        assert operations.workspace is None

    def test_a_model_in_another_precision_is_refused(self):
        with pytest.raises(UnusableEngineError, match="float32"):
            deepspeed_engine(load("fp32"), max_slots=2)
