"""The UNet with DeepSpeed's transformer blocks in the place of its own.

What `native` saves around the blocks stays saved: the timesteps' projections, and the rows shared until the first block. Inside
the blocks everything is DeepSpeed's, so keys and values of the prompts are computed in every call, and a guided sample is two
rows from the first block on. For v1-4 that is 3 to 4 % of the arithmetic.

What the machine must have is in `engine/requirements.py`; here it is taken for granted.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch

from mii_serve.engine.kernels.deepspeed.injection import inject, why_not_injectable
from mii_serve.engine.kernels.deepspeed.self_check import NUM_ROWS, compare, predictions
from mii_serve.engine.kernels.deepspeed.workspace import Workspace
from mii_serve.engine.kernels.native import ForwardPass, NativeKernels
from mii_serve.errors import UnusableEngineError
from mii_serve.models import LoadedModel
from mii_serve.types import LATENT_SCALE, EngineName

logger = logging.getLogger(__name__)

ODD_SIDE = 9
"""Latent height and width of the second size that is checked: its 81 tokens fill no block of the flash kernel."""


class _ForwardPass(ForwardPass):
    def _block(self, block: Any, tokens: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.sample_of_row is not None:
            tokens, hidden = self._expand_to_rows(tokens, hidden)
        # The kernels read memory in order, whatever the tensors' strides.
        return block(tokens.contiguous(), encoder_hidden_states=self.prompts.contiguous()), hidden


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

    def project_prompts(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return prompt_embeds

    def close(self) -> None:
        self._workspace.release()


def install_kernels(model: LoadedModel, *, max_slots: int) -> DeepSpeedKernels:
    """Put DeepSpeed's blocks into the UNet of a model in float16, in place, and compare them with the UNet's own.

    The UNet is one for which `why_unsupported` returns None. A call has room for `max_slots` guided samples of the model's
    default size, or for one of its largest size; a larger batch takes several calls.

    Raises:
        UnusableEngineError: DeepSpeed cannot do it, or its kernels do not compute what the UNet computes.
    """
    unet, defaults = model.pipeline.unet, model.defaults
    if (reason := why_not_injectable(unet)) is not None:
        raise UnusableEngineError(f"DeepSpeed's kernels cannot compute this UNet: {reason}")
    if unet.device.type == "cuda":
        torch.cuda.set_device(unet.device)  # the workspace is taken on the current device
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
                kernels = DeepSpeedKernels(unet, workspace, max_latent_pixels_per_call=max_latent_pixels)
                worst_error = compare(predictions(kernels, unet, *checked), expected)
                undo.pop_all()  # the kernels hold it from here on
        except UnusableEngineError:
            raise
        except Exception as error:  # from DeepSpeed's internals, which change, or from a kernel that this device cannot run
            raise UnusableEngineError(f"DeepSpeed fails here: {type(error).__name__}: {error}") from error
    logger.info("DeepSpeed computes %d transformer blocks, %.2g off the UNet's own modules", num_blocks, worst_error)
    return kernels
