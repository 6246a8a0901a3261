"""The kernel sets: how the UNet call of a batch is computed. The loop around it, `engine.batched`, is the same for all of them.

`KernelSet` below is all that the loop asks of one. `native` is our own, `deepspeed` puts DeepSpeed's transformer blocks under
it.
"""

from __future__ import annotations

from typing import Protocol

import torch

from mii_serve.engine.kernels.loras import CallLoras, LoraLayout
from mii_serve.engine.kernels.sampler import SamplerKernels
from mii_serve.types import EngineName


class KernelSet(Protocol):
    """One UNet on one device. Tensors are of the UNet's dtype and on its device unless said otherwise.

    No state is kept between calls, so that a call can be captured as a CUDA graph. What depends on the prompt alone, or on the
    timestep alone, is computed once by `project_prompts` and `embed_timesteps`, kept by the loop, and handed to each
    `predict_noise`. What it holds is up to the kernel set.
    """

    @property
    def name(self) -> EngineName:
        """The engine's name in every answer."""
        ...

    @property
    def prompt_width(self) -> int:
        """Numbers kept for each token of a prompt."""
        ...

    @property
    def timestep_width(self) -> int:
        """Numbers kept for each timestep."""
        ...

    @property
    def max_latent_pixels_per_call(self) -> int | None:
        """The largest call (rows × latent height × latent width) that the memory set aside has room for; None without a bound.

        A call for one sample of the largest size always fits.
        """
        ...

    @property
    def lora_layout(self) -> LoraLayout | None:
        """The layers that each sample of a call can have its own LoRA of; None where the kernels compute no LoRAs."""
        ...

    @property
    def sampler(self) -> SamplerKernels:
        """What is done around `predict_noise`."""
        ...

    def project_prompts(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """B × tokens × `prompt_width` from the text encoder's output, B × tokens × text width."""
        ...

    def embed_timesteps(self, timesteps: torch.Tensor, guidance: torch.Tensor | None = None) -> torch.Tensor:
        """N × `timestep_width` from N timesteps in float32, which need not be whole numbers.

        `guidance`, N in float32, is the guidance scale less one, for UNets that take it in (latent consistency models).
        """
        ...

    def predict_noise(
        self,
        model_input: torch.Tensor,
        timestep_embeds: torch.Tensor,
        prompts: torch.Tensor,
        sample_of_row: torch.Tensor | None = None,
        loras: CallLoras | None = None,
    ) -> torch.Tensor:
        """The UNet's output for R rows of N samples, R × C × H × W.

        `model_input` is N × C × H × W in channels-last memory format, `timestep_embeds` N × `timestep_width`, `prompts` R ×
        tokens × `prompt_width`. `sample_of_row` holds R indices into the samples, int64; None where each sample has one row, so
        that R = N. Guided samples come first, and their second rows come after the rows of all samples. On several ranks row
        N + i is the second of sample i; on one, a captured call may be padded with samples that have no row. `loras` has an
        entry for each sample; what LoRAs change of prompts and timesteps is in `prompts` and `timestep_embeds` already.

        Raises:
            torch.OutOfMemoryError: the call is too large for the device; a smaller one may fit.
        """
        ...

    def close(self) -> None:
        """Give back what is held beside the model. No call is made afterwards."""
        ...
