"""Makes a turn: prompts of those who join, one UNet call for all who step, pictures of those who end.

The UNet takes a timestep per row, so samples at different steps of different samplers share a call; the samplers are tables
(`samplers/table.py`), and one small matrix product updates all of them. What differs from the `reference` engine is only the
order of float operations: a picture is within one level of 255 of the reference's in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from mii_serve.engine.native.prompts import EncodedPrompt, PromptCache
from mii_serve.engine.native.slots import SlotBank
from mii_serve.engine.warmup import make_picture
from mii_serve.errors import EngineError
from mii_serve.models import LoadedModel
from mii_serve.safety.checker import checked_pictures
from mii_serve.samplers.names import ACCEPTED_NAMES, short_name
from mii_serve.samplers.table import SamplerTable, compile_table
from mii_serve.samplers.update import estimate_x0, step
from mii_serve.types import (
    Capabilities,
    EngineCapacity,
    EngineDescription,
    GenerationParams,
    Picture,
    RequestedParams,
    Sample,
    SampleId,
    SampleProgress,
    StepPlan,
)

logger = logging.getLogger(__name__)

CPU_SLOTS, CUDA_SLOTS = 8, 16
"""Samples at once unless the operator says otherwise: where a larger batch stops to pay."""

MAX_DECODES = 4
"""Pictures decoded in one go; the decoder needs far more memory per sample than the UNet."""

Shape = tuple[int, int]


@dataclass(slots=True, eq=False)
class _Running:
    sample: Sample
    table: SamplerTable
    generator: torch.Generator
    prompt: EncodedPrompt
    negative_prompt: EncodedPrompt | None
    slot: int
    step: int = 0

    @property
    def progress(self) -> SampleProgress:
        return SampleProgress(id=self.sample.id, step=self.step, num_steps=self.table.num_calls)

    @property
    def shape(self) -> Shape:
        return self.sample.params.latent_shape


class NativeEngine:
    """Implements `mii_serve.engine.Engine`."""

    num_graph_misses = 0

    def __init__(self, model: LoadedModel, *, max_slots: int | None = None) -> None:
        self._pipeline = pipeline = model.pipeline
        self._device = torch.device(pipeline.device)
        self._dtype = pipeline.unet.dtype
        self._channels = pipeline.unet.config.in_channels
        self._scheduler_config = dict(pipeline.scheduler.config)
        slots = max_slots or (CUDA_SLOTS if self._device.type == "cuda" else CPU_SLOTS)
        self._capacity = EngineCapacity(max_slots=slots, max_decodes=MAX_DECODES)
        self._prompts = PromptCache(pipeline)
        self._banks: dict[Shape, SlotBank] = {}
        self._running: dict[SampleId, _Running] = {}
        self._capabilities = Capabilities(
            limits=model.limits,
            defaults=replace(model.defaults, scheduler=short_name(model.defaults.scheduler)),
            schedulers=ACCEPTED_NAMES,
        )
        self._description = EngineDescription(
            engine="native",
            dtype=str(self._dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf"),
            device=str(self._device),
            model=model.name,
            model_revision=model.revision,
            has_safety_checker=pipeline.safety_checker is not None,
        )

    @property
    def description(self) -> EngineDescription:
        return self._description

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def capacity(self) -> EngineCapacity:
        return self._capacity

    def check(self, params: GenerationParams) -> int:
        return compile_table(self._scheduler_config, params.scheduler, params.num_inference_steps).num_calls

    def warmup(self) -> None:
        make_picture(self, RequestedParams(prompt="warm-up", num_inference_steps=2, seed=0))

    def run(self, plan: StepPlan) -> tuple[SampleProgress, ...]:
        try:
            with torch.inference_mode():
                for sample_id in plan.leaves:
                    self._forget(sample_id)
                self._take_in(plan.joins)
                made = self._step(plan.steps, plan.previews)
                made.update(self._finish(plan.decodes))
                return tuple(made.values())
        except Exception as error:
            raise EngineError(f"the native engine failed: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        self._running.clear()
        self._banks.clear()

    def _forget(self, sample_id: SampleId) -> None:
        if (running := self._running.pop(sample_id, None)) is not None:
            bank = self._banks[running.shape]
            bank.give_back(running.slot)
            if bank.is_empty:
                del self._banks[running.shape]

    def _take_in(self, joins: Sequence[Sample]) -> None:
        if not joins:
            return
        texts = [sample.params.prompt for sample in joins]
        encoded = self._prompts.encode([*texts, *(s.params.negative_prompt for s in joins if s.params.is_guided)])
        for sample in joins:
            params = sample.params
            table = compile_table(self._scheduler_config, params.scheduler, params.num_inference_steps)
            generator = torch.Generator("cpu").manual_seed(sample.seed)
            size = (self._channels, *params.latent_shape)
            # In float32 whatever the UNet computes in, so that every engine starts from the same noise.
            latents = randn_tensor((1, *size), generator=generator, dtype=torch.float32)[0] * table.init_noise_sigma
            if (bank := self._banks.get(params.latent_shape)) is None:
                bank = self._banks[params.latent_shape] = SlotBank(self._capacity.max_slots, size, self._device)
            self._running[sample.id] = _Running(
                sample=sample,
                table=table,
                generator=generator,
                prompt=encoded[params.prompt],
                negative_prompt=encoded[params.negative_prompt] if params.is_guided else None,
                slot=bank.take(latents.to(self._device)),
            )

    def _step(self, ids: Sequence[SampleId], shown: Sequence[SampleId]) -> dict[SampleId, SampleProgress]:
        if not ids:
            return {}
        group = [self._running[sample_id] for sample_id in ids]
        bank = self._banks[group[0].shape]
        slots = torch.tensor([running.slot for running in group], device=self._device)
        state = bank.state[slots]
        scale = self._rows([running.table.input_scale[running.step] for running in group])
        model_input = state[:, 0] * scale[:, None, None, None]
        noise_pred = self._predict(group, model_input)
        matrices = self._rows([running.table.matrices[running.step] for running in group])
        bank.state[slots] = step(state, noise_pred, self._noise(group, noise_pred), matrices)
        previews = self._previews([group[ids.index(i)] for i in shown], ids, model_input, noise_pred)
        for running in group:
            running.step += 1
        return {r.sample.id: replace(r.progress, preview=previews.get(r.sample.id)) for r in group}

    def _rows(self, rows: Sequence[np.ndarray | np.float32]) -> torch.Tensor:
        return torch.from_numpy(np.stack(rows)).to(self._device, non_blocking=True)

    def _noise(self, group: Sequence[_Running], like: torch.Tensor) -> torch.Tensor:
        """Each sample's own draw, from its own generator, when its sampler draws; in the order diffusers draws alone."""
        noise = torch.zeros(like.shape, dtype=torch.float32)
        for row, running in enumerate(group):
            if running.table.draws_noise[running.step]:
                noise[row] = torch.randn((1, *like.shape[1:]), generator=running.generator)[0]
        return noise.to(self._device, non_blocking=True)

    def _predict(self, group: Sequence[_Running], model_input: torch.Tensor) -> torch.Tensor:
        """The guided noise prediction of every sample, N × 4 × H × W in float32, in as few UNet calls as memory allows."""
        rows_per_sample = 2 if any(running.negative_prompt is not None for running in group) else 1
        cells = model_input.shape[-1] * model_input.shape[-2] * rows_per_sample
        bound = self._capacity.max_cells_per_call
        at_once = len(group) if bound is None else max(1, bound // cells)
        try:
            parts = [
                self._predict_at_once(group[i : i + at_once], model_input[i : i + at_once])
                for i in range(0, len(group), at_once)
            ]
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            self._capacity = replace(self._capacity, max_cells_per_call=max(1, min(at_once, len(group)) // 2) * cells)
            logger.warning("out of memory; UNet calls are now at most %d rows × cells", self._capacity.max_cells_per_call)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            return self._predict(group, model_input)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _predict_at_once(self, group: Sequence[_Running], model_input: torch.Tensor) -> torch.Tensor:
        guided = [row for row, running in enumerate(group) if running.negative_prompt is not None]
        sample_of_row = [*range(len(group)), *guided]
        timesteps = torch.tensor([group[row].table.timesteps[group[row].step] for row in sample_of_row], dtype=torch.float32)
        negatives = [running.negative_prompt.embeds for running in group if running.negative_prompt is not None]
        noise_pred = self._pipeline.unet(
            model_input[sample_of_row].to(self._dtype),
            timesteps.to(self._device),
            encoder_hidden_states=torch.stack([*(running.prompt.embeds for running in group), *negatives]),
            return_dict=False,
        )[0].float()
        prediction: torch.Tensor = noise_pred[: len(group)]
        if guided:
            scale = torch.tensor([group[row].sample.params.guidance_scale for row in guided], device=self._device)
            text, uncond = prediction[guided], noise_pred[len(group) :]
            prediction = prediction.clone()
            prediction[guided] = uncond + scale[:, None, None, None] * (text - uncond)
        return prediction

    def _previews(
        self, shown: Sequence[_Running], ids: Sequence[SampleId], model_input: torch.Tensor, noise_pred: torch.Tensor
    ) -> dict[SampleId, Picture]:
        if not shown:
            return {}
        rows = [ids.index(running.sample.id) for running in shown]
        x0 = self._rows([running.table.x0[running.step] for running in shown])
        return self._pictures(shown, estimate_x0(model_input[rows], noise_pred[rows], x0))

    def _finish(self, ids: Sequence[SampleId]) -> dict[SampleId, SampleProgress]:
        """Decode samples that have made all their calls, those of one shape together."""
        by_shape: dict[Shape, list[_Running]] = {}
        for sample_id in ids:
            if (running := self._running.get(sample_id)) is not None:
                by_shape.setdefault(running.shape, []).append(running)
        pictures: dict[SampleId, Picture] = {}
        for shape, group in by_shape.items():
            slots = torch.tensor([running.slot for running in group], device=self._device)
            pictures |= self._pictures(group, self._banks[shape].state[slots, 0])
        made = {sample_id: replace(self._running[sample_id].progress, picture=pictures[sample_id]) for sample_id in pictures}
        for sample_id in made:
            self._forget(sample_id)
        return made

    def _pictures(self, group: Sequence[_Running], latents: torch.Tensor) -> dict[SampleId, Picture]:
        vae = self._pipeline.vae
        images = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        pictures, flags = checked_pictures(self._pipeline, images)
        return {
            running.sample.id: Picture(
                width=picture.width,
                height=picture.height,
                rgb=picture.convert("RGB").tobytes(),
                nsfw_content_detected=None if flags is None else flags[index],
                dropped_prompt=running.prompt.dropped,
                dropped_negative_prompt=running.negative_prompt.dropped if running.negative_prompt else "",
            )
            for index, (running, picture) in enumerate(zip(group, pictures, strict=True))
        }
