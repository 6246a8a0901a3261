"""The batched engine's stages one by one, through the same caches, denoiser and CUDA graphs as its turns."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from mii_serve.engine.batched.batch_inputs import SampleInputs
from mii_serve.engine.batched.denoiser import Denoiser
from mii_serve.engine.batched.prompt_cache import PromptCache
from mii_serve.engine.batched.stepping import NO_UPDATE
from mii_serve.engine.batched.timestep_cache import TimestepCache
from mii_serve.engine.decode import decode
from mii_serve.engine.probe import UNetCall, without_checker
from mii_serve.types import EngineCapacity


@dataclass(frozen=True, slots=True, eq=False)
class BatchedProbe:
    """Implements `mii_serve.engine.probe.Probe`."""

    pipeline: Any
    prompts: PromptCache
    timesteps: TimestepCache
    denoiser: Denoiser
    capacity: EngineCapacity

    @property
    def num_channels(self) -> int:
        return int(self.pipeline.unet.config.in_channels)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        return _on_cpu(self.prompts.embed(prompts))

    @torch.inference_mode()
    def predict(self, calls: Sequence[UNetCall]) -> torch.Tensor:
        most = self.capacity.max_slots
        order = sorted(range(len(calls)), key=lambda i: calls[i].negative_prompt_embeds is None)  # guided ones first
        ordered = [calls[i] for i in order]
        predictions = torch.cat([self._predict(ordered[i : i + most]) for i in range(0, len(calls), most)])
        return predictions[torch.tensor(order).argsort()]

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        batches = latents.to(self.pipeline.device).split(self.capacity.max_decodes)
        return torch.cat([_on_cpu(decode(self.pipeline.vae, batch).images) for batch in batches])

    def without_checker(self) -> AbstractContextManager[None]:
        return without_checker(self.pipeline)

    def _predict(self, calls: Sequence[UNetCall]) -> torch.Tensor:
        latent_shape = calls[0].latent_shape
        pool = self.denoiser.pool(latent_shape)
        embeds = [call.prompt_embeds for call in calls]
        embeds += [call.negative_prompt_embeds for call in calls if call.negative_prompt_embeds is not None]
        num_channels = pool.state.shape[2]  # the rest is what an inpainting model takes in beside the latents
        inputs_of = [call.latents.to(self.pipeline.device) for call in calls]
        slots = [pool.acquire(one[:num_channels], one[num_channels:]) for one in inputs_of]
        try:
            with self.prompts.temporary_rows(torch.stack(embeds)) as prompt_rows:
                negative_rows = iter(prompt_rows[len(calls) :])
                timestep_rows = self.timesteps.rows([call.timestep for call in calls])
                inputs = [
                    SampleInputs(
                        slot=slot,
                        timestep_row=timestep_row,
                        prompt_row=prompt_row,
                        negative_prompt_row=None if call.negative_prompt_embeds is None else next(negative_rows),
                        guidance_scale=call.guidance_scale,
                        input_scale=1.0,
                        matrix=NO_UPDATE,
                        noise=None,
                    )
                    for call, slot, timestep_row, prompt_row in zip(calls, slots, timestep_rows, prompt_rows, strict=False)
                ]
                outputs = self.denoiser.step(inputs, latent_shape)
                assert outputs is not None
                return _on_cpu(outputs[1])
        finally:
            for slot in slots:
                pool.release(slot)
            self.denoiser.free_unused(latent_shape)


def _on_cpu(output: torch.Tensor) -> torch.Tensor:
    """A float32 copy: the output of a captured graph is overwritten by its next replay."""
    return output.to("cpu", torch.float32, copy=True)
