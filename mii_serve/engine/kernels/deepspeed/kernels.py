"""The UNet with DeepSpeed's transformer blocks in the place of its own.

What `native` saves around the blocks stays saved: the timesteps' projections, and the rows shared until the first block; and
where `native` runs fused kernels, they run around the blocks, too. Inside the blocks everything is DeepSpeed's, so keys and
values of the prompts are computed in every call, and a guided sample is two rows from the first block on. For v1-4 that is 3 to
4 % of the arithmetic.

What the machine must have is in `engine/requirements.py`; here it is taken for granted.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch

from mii_serve.engine.kernels.deepspeed.injection import inject, why_not_injectable
from mii_serve.engine.kernels.deepspeed.self_check import NUM_ROWS, compare, predictions
from mii_serve.engine.kernels.deepspeed.workspace import Workspace
from mii_serve.engine.kernels.fused.forward import FusedKernels, FusedPass, Image, MergedTransformer
from mii_serve.engine.kernels.fused.install import Installed, native_kernels
from mii_serve.engine.kernels.fused.operations import Operations
from mii_serve.engine.kernels.native import ForwardPass, NativeKernels
from mii_serve.engine.kernels.sampler import SamplerKernels
from mii_serve.errors import UnusableEngineError
from mii_serve.models import LoadedModel
from mii_serve.types import LATENT_SCALE, EngineName, LatentShape

logger = logging.getLogger(__name__)

ODD_SIDE = 9
"""Latent height and width of the second size that is checked: its 81 tokens fill no block of the flash kernel."""


class _ForwardPass(ForwardPass):
    def _block(self, block: Any, tokens: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.sample_of_row is not None:
            tokens, hidden = self._expand_to_rows(tokens, hidden)
        # The kernels read memory in order, whatever the tensors' strides.
        return block(tokens.contiguous(), encoder_hidden_states=self.prompts.contiguous()), hidden


class _FusedPass(FusedPass):
    def _blocks(
        self, transformer: Any, merged: MergedTransformer, tokens: torch.Tensor, total: torch.Tensor, skips: list[Image]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.sample_of_row is not None:
            total, tokens = self._expand_to_rows(total, skips, tokens)
        tokens, prompts = tokens.view(len(total), -1, tokens.shape[1]), self.prompts.contiguous()
        for block in transformer.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=prompts)
        return tokens.flatten(0, 1), total


class DeepSpeedKernels(NativeKernels):
    """Implements `mii_serve.engine.kernels.KernelSet` for a UNet whose blocks `injection.inject` has replaced.

    What is kept of a prompt is the text encoder's output itself.
    """

    name: EngineName = "deepspeed"
    forward_pass = _ForwardPass

    def __init__(self, unet: Any, workspace: Workspace, *, max_latent_pixels_per_call: int | None = None) -> None:
        """`workspace` has room for calls of `max_latent_pixels_per_call` rows × latent height × latent width."""
        super().__init__(unet, max_latent_pixels_per_call=max_latent_pixels_per_call)
        self.prompt_width = unet.config.cross_attention_dim
        self._workspace = workspace

    @property
    def lora_layout(self) -> None:
        """What DeepSpeed computes inside its blocks cannot be changed for one sample."""

    def project_prompts(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return prompt_embeds

    def close(self) -> None:
        self._workspace.release()


class FusedDeepSpeedKernels(FusedKernels):
    """The same with our fused operations around DeepSpeed's blocks: norms, residual blocks, upsampling, sampler."""

    name: EngineName = "deepspeed"
    fused_pass = _FusedPass

    def __init__(
        self,
        unet: Any,
        workspace: Workspace,
        operations: Operations,
        *,
        sampler: SamplerKernels | None = None,
        max_latent_pixels_per_call: int | None = None,
    ) -> None:
        """As `DeepSpeedKernels`."""
        super().__init__(unet, operations, sampler=sampler, max_latent_pixels_per_call=max_latent_pixels_per_call)
        self.prompt_width = unet.config.cross_attention_dim
        self._workspace = workspace

    @property
    def lora_layout(self) -> None:
        """What DeepSpeed computes inside its blocks cannot be changed for one sample."""

    def project_prompts(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return prompt_embeds

    def close(self) -> None:
        self._workspace.release()

    def _merge(self, transformer: Any) -> MergedTransformer:
        """Nothing is merged of DeepSpeed's blocks, which add all their biases themselves."""
        return MergedTransformer((), transformer.proj_out.bias.to(torch.float32, copy=True))


def install_kernels(model: LoadedModel, *, max_slots: int, around: Installed | None = None) -> Installed:
    """Put DeepSpeed's blocks into the UNet of a model in float16, in place, and compare them with the UNet's own.

    The UNet is one for which `why_unsupported` returns None. A call has room for `max_slots` guided samples of the model's
    default size, or for one of its largest size; a larger batch takes several calls. `around` are the native engine's kernels
    of this model, which cannot be used any more afterwards; of them the fused ones run around the blocks.

    Raises:
        UnusableEngineError: DeepSpeed cannot do it, or its kernels do not compute what the UNet computes.
    """
    unet, defaults = model.pipeline.unet, model.defaults
    if (reason := why_not_injectable(unet)) is not None:
        raise UnusableEngineError(f"DeepSpeed's kernels cannot compute this UNet: {reason}")
    if unet.device.type == "cuda":
        torch.cuda.set_device(unet.device)  # the workspace is taken on the current device
    around = around or native_kernels(model, max_slots=max_slots)
    low, high = (side // LATENT_SCALE for side in (model.limits.min_size_px, model.limits.max_size_px))
    height, width = defaults.height // LATENT_SCALE, defaults.width // LATENT_SCALE
    odd = max(low, min(ODD_SIDE, high))
    max_latent_pixels = max(2 * max_slots * height * width, 2 * high * high, NUM_ROWS * max(height * width, odd * odd))
    with torch.inference_mode():
        unet.to(memory_format=torch.channels_last)
        checked = model.pipeline.tokenizer.model_max_length, ((height, width), (odd, odd))
        expected = predictions(NativeKernels(unet), unet, *checked)
        try:
            num_blocks = inject(unet)
            with contextlib.ExitStack() as undo:
                workspace = Workspace(unet, max_latent_pixels=max_latent_pixels, sides=range(low, high + 1))
                undo.callback(workspace.release)
                installed, worst_error = _proven(unet, workspace, around, expected, checked, max_latent_pixels)
                undo.pop_all()  # the kernels hold it from here on
        except UnusableEngineError:
            raise
        except Exception as error:  # from DeepSpeed's internals, which change, or from a kernel that this device cannot run
            raise UnusableEngineError(f"DeepSpeed fails here: {type(error).__name__}: {error}") from error
    logger.info("DeepSpeed computes %d transformer blocks, %.2g off the UNet's own modules", num_blocks, worst_error)
    return installed


def _proven(
    unet: Any,
    workspace: Workspace,
    around: Installed,
    expected: list[torch.Tensor],
    checked: tuple[int, Sequence[LatentShape]],
    max_latent_pixels: int,
) -> tuple[Installed, float]:
    """The injected UNet with the fused kernels around its blocks where that is right, else as it is; and its largest error.

    Raises:
        UnusableEngineError: neither is right.
    """
    about = around.about
    if isinstance(around.kernels, FusedKernels):
        fused = FusedDeepSpeedKernels(
            unet,
            workspace,
            around.kernels.operations,
            sampler=around.kernels.sampler,
            max_latent_pixels_per_call=max_latent_pixels,
        )
        try:
            return Installed(fused, about), compare(predictions(fused, unet, *checked), expected)
        except Exception as failure:  # noqa: BLE001 - wrong, or a kernel's
            about = f"not fused around DeepSpeed's blocks: {type(failure).__name__}: {failure}".splitlines()[0][:200]
            logger.warning("%s", about)
    plain = DeepSpeedKernels(unet, workspace, max_latent_pixels_per_call=max_latent_pixels)
    return Installed(plain, about), compare(predictions(plain, unet, *checked), expected)
