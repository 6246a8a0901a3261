"""The engine that the others are compared with: FP32, plain diffusers modules, one diffusers scheduler object per image.

Computes what `StableDiffusionPipeline.__call__` computes, and for a request with an image `StableDiffusionImg2ImgPipeline`
or, with a mask, `StableDiffusionInpaintPipeline`, operation by operation, so that on the same machine its pictures are
the same bits; only the loop is turned inside out, one UNet call per turn. A LoRA is added to the outputs of the layers that it
changes, as PEFT does. Slow on purpose and never optimised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.utils.torch_utils import randn_tensor

from mii_serve.engine.capabilities import capabilities_of, description_of, takes_guidance_in, takes_mask_in
from mii_serve.engine.decode import decode, is_finite
from mii_serve.engine.input_images import KeptImage, mask_of, masked_pixels_of, pixels_of, skip_masked_image
from mii_serve.engine.loras import NOTHING, Combination, LoraStore, applied
from mii_serve.engine.probe import UNetCall, without_checker
from mii_serve.engine.prompt_chunks import Chunk, Chunker, tensor_of, weighted
from mii_serve.engine.sample_errors import is_of_one_sample, not_finite, sample_error
from mii_serve.engine.stage_timer import StageTimer
from mii_serve.engine.text_encoding import encoded, has_text_model
from mii_serve.engine.truncation import dropped_text
from mii_serve.engine.warmup import make_pictures, warm_up_request
from mii_serve.errors import EngineError, NotFiniteError
from mii_serve.models import LoadedModel
from mii_serve.safety.checker import checked_pictures
from mii_serve.samplers.build import ModelSchedulers, first_call, refuse_without_noise, step_kwargs, try_scheduler
from mii_serve.samplers.preview import x0_coefficients
from mii_serve.samplers.run import SamplerRun
from mii_serve.samplers.update import estimate_x0
from mii_serve.types import (
    EMBEDS,
    LATENT_SCALE,
    PLAIN,
    Capabilities,
    EngineCapacity,
    GenerationParams,
    Picture,
    Sample,
    SampleId,
    SampleProgress,
    SchedulerDescription,
    StepPlan,
)

MAX_COUNTED = 1000
"""Samplers and numbers of steps whose UNet calls are kept counted."""


@dataclass(slots=True)
class ReferenceSample:
    """One image in the making: everything `StableDiffusionPipeline.__call__` keeps in local variables."""

    sample: Sample
    scheduler: Any
    timesteps: torch.Tensor
    step_kwargs: dict[str, Any]
    generator: torch.Generator
    prompt_embeds: torch.Tensor
    latents: torch.Tensor
    loras: Combination = NOTHING
    kept_image: KeptImage | None = None
    condition: torch.Tensor | None = None
    step: int = 0

    @property
    def progress(self) -> SampleProgress:
        return SampleProgress(id=self.sample.id, step=self.step, num_steps=len(self.timesteps))


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    """What a sample starts from, what it keeps of its image, and what an inpainting model's UNet takes in of it."""

    latents: torch.Tensor
    kept_image: KeptImage | None = None
    condition: torch.Tensor | None = None


class ReferenceEngine:
    """Implements `mii_serve.engine.Engine` and `mii_serve.engine.probe.ProbedEngine`."""

    capacity = EngineCapacity(max_slots=1)
    num_graph_misses = 0

    def __init__(self, model: LoadedModel, *, note: str = "") -> None:
        """`note` becomes the description's."""
        self._pipeline = model.pipeline
        self._device = torch.device(model.pipeline.device)
        self._schedulers = ModelSchedulers(model.pipeline.scheduler)
        self._takes_mask = takes_mask_in(model.pipeline.unet)
        self._chunker = Chunker(model.pipeline)
        self._timer = StageTimer()
        self._samples: dict[SampleId, ReferenceSample] = {}
        self._num_calls: dict[SamplerRun, int] = {}
        self.loras = LoraStore(model.pipeline, model.loras)
        self._capabilities = capabilities_of(model, self._schedulers, self._count_calls, needs_mask=self._takes_mask)
        self.description = description_of(model, "reference", note)

    @property
    def capabilities(self) -> Capabilities:
        return self.loras.added_to(self._capabilities)

    def stage_seconds(self) -> dict[str, float]:
        return self._timer.take()

    def check(self, params: GenerationParams) -> int:
        num_calls = self._count_calls(SamplerRun.of(params))
        refuse_without_noise(self._schedulers, params, has_blending=not self._takes_mask)
        self.loras.check(params.lora_choice)
        return num_calls

    def _count_calls(self, run: SamplerRun) -> int:
        if run not in self._num_calls:
            if len(self._num_calls) >= MAX_COUNTED:
                self._num_calls.clear()
            self._num_calls[run] = try_scheduler(self._schedulers, run)
        return self._num_calls[run]

    def describe_scheduler(self, params: GenerationParams) -> SchedulerDescription:
        return self._schedulers.describe(params.scheduler, is_compiled=False)

    def warmup(self) -> None:
        make_pictures(self, warm_up_request(self))

    def run(self, plan: StepPlan) -> tuple[SampleProgress, ...]:
        try:
            with torch.no_grad():
                for sample_id in plan.leaves:
                    self._samples.pop(sample_id, None)
                for sample in plan.joins:
                    self._samples[sample.id] = self._start(sample)
                results = {
                    sample_id: self._or_failed(self._step, self._samples[sample_id], sample_id in plan.previews)
                    for sample_id in plan.steps
                }
                for sample_id in plan.decodes:
                    if (running := self._samples.get(sample_id)) is not None:
                        results[sample_id] = self._or_failed(self._finish, running)
                return tuple(results.values())
        except Exception as error:
            raise EngineError(f"the reference engine failed: {type(error).__name__}: {error}") from error

    def probe(self) -> ReferenceProbe:
        return ReferenceProbe(self._pipeline)

    def close(self) -> None:
        self._samples.clear()

    def _start(self, sample: Sample) -> ReferenceSample:
        params, pipeline = sample.params, self._pipeline
        run = SamplerRun.of(params)
        scheduler = self._schedulers.make(run, self._device)
        timesteps = scheduler.timesteps[first_call(scheduler, run.num_skipped_steps) :]
        loras = self.loras.combination(params.lora_choice)
        with self._timer.time("encode"), applied(pipeline.text_encoder, loras.text_encoder):
            prompt_embeds = self._encode(params)
        generator = torch.Generator("cpu").manual_seed(sample.seed)
        channels = pipeline.unet.config.out_channels
        shape = (1, channels, params.height // LATENT_SCALE, params.width // LATENT_SCALE)
        first = self._first_latents(sample, scheduler, timesteps[:1], generator, shape)
        return ReferenceSample(
            sample=sample,
            scheduler=scheduler,
            timesteps=timesteps,
            step_kwargs=step_kwargs(scheduler, generator, run.eta),
            generator=generator,
            prompt_embeds=prompt_embeds,
            latents=first.latents,
            loras=loras,
            kept_image=first.kept_image,
            condition=first.condition,
        )

    def _encode(self, params: GenerationParams) -> torch.Tensor:
        """The embeddings of the prompt; with guidance, those of the negative prompt before them."""
        if params.prompt_syntax == PLAIN:
            given = {name: tensor_of(embeds)[None] for name in EMBEDS if (embeds := getattr(params, name)) is not None}
            text = None if "prompt_embeds" in given else params.prompt
            texts = text, self._device, 1, params.is_guided, params.negative_prompt
            with has_text_model(self._pipeline.text_encoder):
                prompt_embeds, negative = self._pipeline.encode_prompt(*texts, **given, clip_skip=params.clip_skip)
            return torch.cat([negative, prompt_embeds]) if params.is_guided else prompt_embeds
        read = [self._chunker.read(params.prompt).chunks]
        if params.is_guided:
            read.append(self._chunker.read(params.negative_prompt).chunks)
        num_chunks = max(map(len, read))
        clip_skips = params.clip_skip, None
        embeds = [self._embed_chunks(*one, num_chunks) for one in zip(read, clip_skips, strict=False)]
        return torch.cat(embeds[::-1])

    def _embed_chunks(self, chunks: Sequence[Chunk], clip_skip: int | None, num_chunks: int) -> torch.Tensor:
        encoder, parts = self._pipeline.text_encoder, []
        for chunk in [*chunks, *[Chunk()] * (num_chunks - len(chunks))]:
            ids, mask = (tensor.to(self._device) for tensor in self._chunker.tokens([chunk]))
            uses_mask = getattr(encoder.config, "use_attention_mask", None)
            parts.append(weighted(encoded(encoder, ids, mask if uses_mask else None, [clip_skip])[0], chunk))
        return torch.cat(parts)[None]

    def _dropped(self, params: GenerationParams, text: str) -> str:
        return dropped_text(self._pipeline, text) if params.prompt_syntax == PLAIN else self._chunker.read(text).dropped

    def _first_latents(
        self, sample: Sample, scheduler: Any, timestep: torch.Tensor, generator: torch.Generator, shape: tuple[int, ...]
    ) -> First:
        image, vae, params = sample.input_image, self._pipeline.vae, sample.params
        if image is None:
            noise = randn_tensor(shape, generator=generator, device=self._device, dtype=self._pipeline.unet.dtype)
            return First(latents=noise * scheduler.init_noise_sigma)

        def encoded(pixels: torch.Tensor) -> tuple[torch.Tensor, bool]:
            """The latents, and whether they are drawn from a distribution."""
            with self._timer.time("encode"):
                output = vae.encode(pixels.to(self._device))
            return vae.config.scaling_factor * retrieve_latents(output, generator=generator), hasattr(output, "latent_dist")

        mask, takes_mask, is_noise = mask_of(image, params), self._takes_mask, params.has_mask and params.strength == 1.0
        image_latents, is_drawn, dtype = None, False, self._pipeline.unet.dtype
        if not (takes_mask and is_noise):
            image_latents, is_drawn = encoded(pixels_of(image, params))
            dtype = image_latents.dtype
            if mask is not None:  # as the pipeline's: convolutions sum in the order of the memory
                image_latents = image_latents.contiguous()
        noise = randn_tensor(shape, generator=generator, device=self._device, dtype=dtype)
        kept_image = condition = None
        if mask is not None and takes_mask:
            condition = torch.cat([mask.to(self._device), encoded(masked_pixels_of(image, params))[0]], dim=1)
        elif mask is not None and image_latents is not None:
            kept_image = KeptImage(mask=mask.to(self._device), image_latents=image_latents, noise=noise)
            if is_drawn:
                skip_masked_image(noise, generator)
        if is_noise or image_latents is None:
            latents = noise * scheduler.init_noise_sigma
        else:
            latents = scheduler.add_noise(image_latents, noise, timestep)
        return First(latents=latents, kept_image=kept_image, condition=condition)

    def _or_failed(self, do: Callable[..., SampleProgress], running: ReferenceSample, *arguments: bool) -> SampleProgress:
        try:
            return do(running, *arguments)
        except Exception as error:
            if not is_of_one_sample(error):
                raise
            failed = replace(running.progress, error=sample_error(error, running.sample, running.step))
            del self._samples[running.sample.id]
            return failed

    def _step(self, running: ReferenceSample, is_shown: bool) -> SampleProgress:
        scheduler, latents = running.scheduler, running.latents
        timestep = running.timesteps[running.step]
        guidance_scale, guidance_rescale = running.sample.params.guidance_scale, running.sample.params.guidance_rescale
        is_guided = running.sample.params.is_guided
        model_input = torch.cat([latents] * 2) if is_guided else latents
        model_input = scheduler.scale_model_input(model_input, timestep)
        with self._timer.time("denoise"):
            unet_input = model_input
            if running.condition is not None:
                unet_input = torch.cat([model_input, torch.cat([running.condition] * len(model_input))], dim=1)
            with applied(self._pipeline.unet, running.loras.unet):
                noise_pred = self._pipeline.unet(
                    unet_input,
                    timestep,
                    encoder_hidden_states=running.prompt_embeds,
                    timestep_cond=self._embedded_guidance(guidance_scale, latents.dtype),
                    return_dict=False,
                )[0]
            if is_guided:
                noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
                noise_pred = noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)
                if guidance_rescale > 0:
                    noise_pred = rescale_noise_cfg(noise_pred, noise_pred_text, guidance_rescale)
            running.latents = scheduler.step(noise_pred, timestep, latents, **running.step_kwargs, return_dict=False)[0]
        running.step += 1
        if (kept := running.kept_image) is not None:
            original = kept.image_latents
            if running.step < len(running.timesteps):
                original = scheduler.add_noise(original, kept.noise, running.timesteps[running.step].reshape(1))
            running.latents = (1 - kept.mask) * original + kept.mask * running.latents
        preview = None
        if is_shown:
            first = len(scheduler.timesteps) - len(running.timesteps)
            x0 = torch.from_numpy(x0_coefficients(scheduler, first=first)[running.step - 1 : running.step]).to(self._device)
            preview = self._preview(running, estimate_x0(model_input[:1], noise_pred, x0))
        return replace(running.progress, preview=preview)

    def _embedded_guidance(self, guidance_scale: float, dtype: torch.dtype) -> torch.Tensor | None:
        """What a latent consistency model takes in, None for any other."""
        unet = self._pipeline.unet
        if not takes_guidance_in(unet):
            return None
        width = unet.config.time_cond_proj_dim
        embedded = self._pipeline.get_guidance_scale_embedding(torch.tensor([guidance_scale - 1.0]), embedding_dim=width)
        return embedded.to(device=self._device, dtype=dtype)

    def _finish(self, running: ReferenceSample) -> SampleProgress:
        picture = self._picture(running, running.latents)
        del self._samples[running.sample.id]
        return replace(running.progress, picture=picture)

    def _preview(self, running: ReferenceSample, x0: torch.Tensor) -> Picture | None:
        """None where only the estimate is not finite, as in a v-prediction model's first step: the sample is sound."""
        try:
            return self._picture(running, x0)
        except NotFiniteError:
            if is_finite(running.latents):
                return None
            raise

    def _picture(self, running: ReferenceSample, latents: torch.Tensor) -> Picture:
        params = running.sample.params
        with self._timer.time("decode"):
            decoded = decode(self._pipeline.vae, latents, running.generator)
        if (fault := decoded.faults[0]) is not None:
            raise not_finite(fault, step=running.step, pipeline=self._pipeline)
        with self._timer.time("safety"):
            pictures, flags = checked_pictures(self._pipeline, decoded.images)
        picture = pictures[0].convert("RGB")
        return Picture(
            width=picture.width,
            height=picture.height,
            rgb=picture.tobytes(),
            nsfw_content_detected=None if flags is None else flags[0],
            dropped_prompt=self._dropped(params, params.prompt),
            dropped_negative_prompt=self._dropped(params, params.negative_prompt) if params.is_guided else "",
        )


class ReferenceProbe:
    """Implements `mii_serve.engine.probe.Probe` by the calls that the engine makes, one at a time."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._device = torch.device(pipeline.device)

    @property
    def num_channels(self) -> int:
        return int(self._pipeline.unet.config.in_channels)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        embeds = [self._pipeline.encode_prompt(prompt, self._device, 1, False)[0] for prompt in prompts]
        return torch.cat(embeds).cpu()

    @torch.no_grad()
    def predict(self, calls: Sequence[UNetCall]) -> torch.Tensor:
        return torch.stack([self._predict(call) for call in calls]).cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = [decode(self._pipeline.vae, one[None].to(self._device)).images for one in latents]
        return torch.cat(images).cpu()

    def without_checker(self) -> AbstractContextManager[None]:
        return without_checker(self._pipeline)

    def _predict(self, call: UNetCall) -> torch.Tensor:
        embeds = (
            [call.prompt_embeds] if call.negative_prompt_embeds is None else [call.negative_prompt_embeds, call.prompt_embeds]
        )
        model_input = torch.stack([call.latents] * len(embeds)).to(self._device)
        timestep = torch.tensor(call.timestep, device=self._device)
        text = torch.stack(embeds).to(self._device)
        noise_pred = self._pipeline.unet(model_input, timestep, encoder_hidden_states=text, return_dict=False)[0]
        if len(embeds) == 1:
            return noise_pred[0]
        noise_pred_uncond, noise_pred_text = noise_pred
        return noise_pred_uncond + call.guidance_scale * (noise_pred_text - noise_pred_uncond)
