"""The native engine's stages one by one, through the same banks, denoiser and graphs as its turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from mii_serve.engine.decode import Decoded
from mii_serve.engine.native.denoiser import Denoiser
from mii_serve.engine.native.prompts import PromptBank
from mii_serve.engine.native.stepping import STAND_STILL
from mii_serve.engine.native.times import TimeTable
from mii_serve.engine.native.turn import Move
from mii_serve.engine.probe import UNetCall, without_checker
from mii_serve.types import EngineCapacity


class NativeProbe:
    """Implements `mii_serve.engine.probe.Probe`."""

    def __init__(
        self,
        pipeline: Any,
        prompts: PromptBank,
        times: TimeTable,
        denoiser: Denoiser,
        capacity: EngineCapacity,
        decode: Callable[[torch.Tensor], Decoded],
    ) -> None:
        self._pipeline = pipeline
        self._device = prompts.key_values.device
        self._prompts = prompts
        self._times = times
        self._denoiser = denoiser
        self._capacity = capacity
        self._decode = decode

    @property
    def num_channels(self) -> int:
        return int(self._pipeline.unet.config.in_channels)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        return _answer(self._prompts.embed(prompts))

    @torch.inference_mode()
    def predict(self, calls: Sequence[UNetCall]) -> torch.Tensor:
        most = self._capacity.max_slots
        return torch.cat([self._predict(calls[i : i + most]) for i in range(0, len(calls), most)])

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        batches = latents.to(self._device).split(self._capacity.max_decodes)
        return torch.cat([_answer(self._decode(batch).images) for batch in batches])

    def without_checker(self) -> AbstractContextManager[None]:
        return without_checker(self._pipeline)

    def _predict(self, calls: Sequence[UNetCall]) -> torch.Tensor:
        shape = calls[0].shape
        bank = self._denoiser.bank(shape)
        embeds = [call.prompt_embeds for call in calls]
        embeds += [call.negative_prompt_embeds for call in calls if call.negative_prompt_embeds is not None]
        slots = [bank.take(call.latents.to(self._device)) for call in calls]
        try:
            with self._prompts.lent(torch.stack(embeds)) as rows:
                negatives = iter(rows[len(calls) :])
                moves = [
                    Move(
                        slot=slot,
                        time=time,
                        prompt=row,
                        negative_prompt=None if call.negative_prompt_embeds is None else next(negatives),
                        guidance_scale=call.guidance_scale,
                        input_scale=1.0,
                        matrix=STAND_STILL,
                        noise=None,
                    )
                    for call, slot, time, row in zip(
                        calls, slots, self._times.rows([call.timestep for call in calls]), rows, strict=False
                    )
                ]
                return _answer(self._denoiser.step(moves, shape)[1])
        finally:
            for slot in slots:
                bank.give_back(slot)
            self._denoiser.tidy(shape)


def _answer(computed: torch.Tensor) -> torch.Tensor:
    """A copy: what a captured graph answers with is overwritten by its next replay."""
    return computed.to("cpu", torch.float32, copy=True)
