"""The engine that runs many samples at once: text encoder for joining samples, one UNet call for all due ones, VAE at the end.

The UNet takes a timestep per row, so samples at different steps of different samplers share a call; the samplers are tables
(`samplers/table.py`), and one small matrix product updates all of them. A sampler that is no table is stepped by a scheduler
object. With the `native` kernel set only the order of float operations differs from the `reference` engine: a picture is
within one level of 255 of the reference's in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.utils.torch_utils import randn_tensor

from mii_serve.engine.batched.batch_inputs import SampleInputs
from mii_serve.engine.batched.buckets import BatchShape, declare_buckets
from mii_serve.engine.batched.denoiser import Denoiser
from mii_serve.engine.batched.probe import BatchedProbe
from mii_serve.engine.batched.prompt_cache import Prompt, PromptCache
from mii_serve.engine.batched.stepping import ObjectStepping, Stepping, TableStepping
from mii_serve.engine.batched.timestep_cache import TimestepCache
from mii_serve.engine.capabilities import capabilities_of, description_of
from mii_serve.engine.decode import decode, is_finite
from mii_serve.engine.kernels import KernelSet
from mii_serve.engine.ranks.group import RankGroup
from mii_serve.engine.sample_errors import is_of_one_sample, not_finite, sample_error
from mii_serve.engine.stage_timer import StageTimer
from mii_serve.engine.warmup import make_pictures, warm_up_request
from mii_serve.errors import EngineError, NotFiniteError
from mii_serve.models import LoadedModel
from mii_serve.safety.checker import checked_pictures
from mii_serve.samplers.build import ModelSchedulers
from mii_serve.samplers.sampling import Samplings, Uncompiled
from mii_serve.samplers.update import estimate_x0
from mii_serve.types import (
    LATENT_SCALE,
    EngineCapacity,
    GenerationParams,
    LatentShape,
    Picture,
    Sample,
    SampleId,
    SampleProgress,
    SchedulerDescription,
    StepPlan,
)

CPU_SLOTS, CUDA_SLOTS = 8, 16
"""Default number of samples at once. On a CPU 16 are no faster than 8 (`benchmarks/engines.py`); on CUDA not measured yet."""

MAX_DECODES = 4
"""Pictures decoded in one VAE call, which needs far more memory per sample than the UNet."""

Results = dict[SampleId, SampleProgress]
Pictures = dict[SampleId, Picture | NotFiniteError]


@dataclass(slots=True, eq=False)
class BatchedSample:
    """A sample that holds a slot; `step` counts the UNet calls it has made."""

    sample: Sample
    stepping: Stepping
    prompt: Prompt
    negative_prompt: Prompt | None
    slot: int
    step: int = 0

    @property
    def progress(self) -> SampleProgress:
        return SampleProgress(id=self.sample.id, step=self.step, num_steps=self.stepping.num_calls)

    @property
    def latent_shape(self) -> LatentShape:
        return self.sample.params.latent_shape

    @property
    def prompts(self) -> list[Prompt]:
        return [self.prompt] if self.negative_prompt is None else [self.prompt, self.negative_prompt]


class BatchedEngine:
    """Implements `mii_serve.engine.Engine` and `mii_serve.engine.probe.ProbedEngine`."""

    def __init__(
        self,
        model: LoadedModel,
        kernels: KernelSet,
        *,
        max_slots: int | None = None,
        buckets: Sequence[BatchShape] | None = None,
        note: str = "",
        group: RankGroup | None = None,
    ) -> None:
        """`kernels` compute the model's UNet, and are closed with the engine. `max_slots` is the number of samples at once.

        `buckets` are the batch shapes to capture at warm-up. When left out: on CUDA those that `declare_buckets` declares for
        the model's default size, on a CPU none. `note` becomes the description's. With a `group` this is one of its ranks,
        the kernels are, too, and all ranks run the same plans.

        Raises:
            ModelError: the model's default scheduler cannot draw.
        """
        self._pipeline = pipeline = model.pipeline
        self._kernels = kernels
        self._group = group
        self._device = torch.device(pipeline.device)
        self._num_channels = pipeline.unet.config.in_channels
        self._schedulers = ModelSchedulers(pipeline.scheduler)
        self._samplings = Samplings(self._schedulers)
        self._max_slots = max_slots or (CUDA_SLOTS if self._device.type == "cuda" else CPU_SLOTS)
        self.capabilities = capabilities_of(model, self._schedulers, self._samplings.of)
        if buckets is None:
            latent_shape = model.defaults.height // LATENT_SCALE, model.defaults.width // LATENT_SCALE
            buckets = declare_buckets(self._max_slots, *latent_shape) if self._device.type == "cuda" else ()
        self._buckets = tuple(buckets)
        pipeline.unet.to(memory_format=torch.channels_last)
        self._prompts = PromptCache(pipeline, kernels, max_in_use=2 * self._max_slots)
        self._timesteps = TimestepCache(kernels, dtype=pipeline.unet.dtype, device=self._device)
        self._denoiser = Denoiser(
            kernels,
            self._prompts,
            self._timesteps,
            max_slots=self._max_slots,
            num_channels=self._num_channels,
            buckets=self._buckets,
            group=group,
        )
        self._timer = StageTimer()
        self._samples: dict[SampleId, BatchedSample] = {}
        self.description = description_of(model, kernels.name, note)

    @property
    def capacity(self) -> EngineCapacity:
        return EngineCapacity(
            max_slots=self._max_slots,
            max_decodes=MAX_DECODES,
            max_latent_pixels_per_call=self._denoiser.max_latent_pixels_per_call,
        )

    @property
    def num_graph_misses(self) -> int:
        return self._denoiser.num_graph_misses

    def stage_seconds(self) -> dict[str, float]:
        return self._timer.take()

    def check(self, params: GenerationParams) -> int:
        return self._samplings.of(params.scheduler, params.num_inference_steps).num_calls

    def describe_scheduler(self, params: GenerationParams) -> SchedulerDescription:
        is_compiled = self._samplings.is_compiled(params.scheduler, params.num_inference_steps)
        return self._schedulers.describe(params.scheduler, is_compiled=is_compiled)

    def warmup(self) -> None:
        """Capture the buckets, and make pictures through each of them."""
        with torch.inference_mode():
            self._denoiser.prepare()
        asked = warm_up_request(self)
        make_pictures(self, asked)
        for bucket in self._buckets:
            make_pictures(
                self,
                replace(
                    asked,
                    guidance_scale=7.5 if bucket.num_rows > bucket.num_samples else 1.0,
                    height=bucket.height * LATENT_SCALE,
                    width=bucket.width * LATENT_SCALE,
                ),
                count=bucket.num_samples,
            )

    def run(self, plan: StepPlan) -> tuple[SampleProgress, ...]:
        try:
            with torch.inference_mode():
                for sample_id in plan.leaves:
                    self._forget(sample_id)
                self._join(plan.joins)
                results = self._step(plan.steps, plan.previews)
                results.update(self._finish(plan.decodes))
                return tuple(results.values())
        except Exception as error:
            raise EngineError(f"the engine {self.description.engine} failed: {type(error).__name__}: {error}") from error

    def probe(self) -> BatchedProbe:
        return BatchedProbe(self._pipeline, self._prompts, self._timesteps, self._denoiser, self.capacity)

    def states(self) -> list[torch.Tensor]:
        """The sampler state of every latent shape in use."""
        return self._denoiser.states()

    def close(self) -> None:
        self._samples.clear()
        self._kernels.close()

    def _forget(self, sample_id: SampleId) -> None:
        if (one := self._samples.pop(sample_id, None)) is not None:
            self._prompts.release(one.prompts)
            self._denoiser.pool(one.latent_shape).release(one.slot)
            self._denoiser.free_unused(one.latent_shape)

    def _join(self, joins: Sequence[Sample]) -> None:
        if not joins:
            return
        texts = [sample.params.prompt for sample in joins]
        texts += [sample.params.negative_prompt for sample in joins if sample.params.is_guided]
        with self._timer.time("encode"):
            prompts = self._prompts.acquire(texts)
        negative_prompts = iter(prompts[len(joins) :])
        for sample, prompt in zip(joins, prompts, strict=False):  # the negative ones follow
            params = sample.params
            generator = torch.Generator("cpu").manual_seed(sample.seed)
            stepping = self._stepping(params, generator)
            # In float32 whatever the UNet's dtype, so that every engine starts from the same noise.
            size = (1, self._num_channels, *params.latent_shape)
            latents = randn_tensor(size, generator=generator, dtype=torch.float32)[0] * stepping.init_noise_sigma
            self._samples[sample.id] = BatchedSample(
                sample=sample,
                stepping=stepping,
                prompt=prompt,
                negative_prompt=next(negative_prompts) if params.is_guided else None,
                slot=self._denoiser.pool(params.latent_shape).acquire(latents.to(self._device)),
            )

    def _stepping(self, params: GenerationParams, generator: torch.Generator) -> Stepping:
        sampling = self._samplings.of(params.scheduler, params.num_inference_steps)
        if not isinstance(sampling, Uncompiled):
            return TableStepping(sampling, generator)
        scheduler = self._schedulers.make(params.scheduler, params.num_inference_steps, self._device)
        return ObjectStepping(scheduler, generator)

    def _step(self, ids: Sequence[SampleId], shown: Sequence[SampleId]) -> Results:
        if not ids:
            return {}
        due = [self._samples[sample_id] for sample_id in ids]
        assert len({one.sample.params.batch_key for one in due}) == 1, "these samples cannot share a UNet call"
        latent_shape = due[0].latent_shape
        failed: Results = {}
        with self._timer.time("denoise"):
            stepped, inputs = self._inputs(sorted(due, key=lambda one: one.negative_prompt is None), failed)
            if not stepped:
                return failed
            model_input, prediction = self._denoiser.step(inputs, latent_shape)
            state = self._denoiser.pool(latent_shape).state
            for one, noise_pred in zip(stepped, prediction, strict=True):
                with self._failing_alone(one, failed):
                    one.stepping.after(one.step, state[one.slot], noise_pred)
        for one in stepped:
            one.step += 1
        previews: Pictures = {}
        if rows := [row for row, one in enumerate(stepped) if one.sample.id in shown and one.sample.id not in failed]:
            previewed = [stepped[row] for row in rows]
            x0 = torch.tensor([one.stepping.x0(one.step - 1) for one in previewed], device=self._device)
            previews = self._pictures(previewed, estimate_x0(model_input[rows], prediction[rows], x0))
        return {one.sample.id: failed.get(one.sample.id) or self._progress(one, previews.get(one.sample.id)) for one in due}

    def _inputs(self, due: Sequence[BatchedSample], failed: Results) -> tuple[list[BatchedSample], list[SampleInputs]]:
        """The samples that can make their next step, and the inputs of it; the others are added to `failed`."""
        pool, able, inputs = self._denoiser.pool(due[0].latent_shape), [], []
        timestep_rows = self._timesteps.rows([one.stepping.timestep(one.step) for one in due])
        for one, timestep_row in zip(due, timestep_rows, strict=True):
            with self._failing_alone(one, failed):
                input_scale, matrix, noise = one.stepping.before(one.step, pool.state[one.slot])
                inputs.append(
                    SampleInputs(
                        slot=one.slot,
                        timestep_row=timestep_row,
                        prompt_row=one.prompt.row,
                        negative_prompt_row=None if one.negative_prompt is None else one.negative_prompt.row,
                        guidance_scale=one.sample.params.guidance_scale,
                        guidance_rescale=one.sample.params.guidance_rescale,
                        input_scale=input_scale,
                        matrix=matrix,
                        noise=noise,
                    )
                )
                able.append(one)
        return able, inputs

    @contextlib.contextmanager
    def _failing_alone(self, one: BatchedSample, failed: Results) -> Iterator[None]:
        """An error that the sample's own scheduler object raises in the block fails this sample only."""
        try:
            yield
        except Exception as error:
            if not is_of_one_sample(error):
                raise
            failed[one.sample.id] = replace(one.progress, error=sample_error(error, one.sample, one.step))
            self._forget(one.sample.id)

    def _progress(self, one: BatchedSample, preview: Picture | NotFiniteError | None) -> SampleProgress:
        """Where only the preview is not finite, as in a v-prediction model's first step, it is left out."""
        if not isinstance(preview, NotFiniteError):
            return replace(one.progress, preview=preview)
        if is_finite(self._denoiser.pool(one.latent_shape).state[one.slot, 0]):
            return one.progress
        self._forget(one.sample.id)
        return replace(one.progress, error=preview)

    def _finish(self, ids: Sequence[SampleId]) -> Results:
        """Decode samples that have made all their calls, those of one latent shape together."""
        by_shape: dict[LatentShape, list[BatchedSample]] = {}
        for sample_id in ids:
            if (one := self._samples.get(sample_id)) is not None:
                by_shape.setdefault(one.latent_shape, []).append(one)
        results: Results = {}
        for latent_shape, finished in by_shape.items():
            slots = torch.tensor([one.slot for one in finished], device=self._device)
            pictures = self._pictures(finished, self._denoiser.pool(latent_shape).state[slots, 0])
            for sample_id, picture in pictures.items():
                progress = self._samples[sample_id].progress
                if isinstance(picture, Picture):
                    results[sample_id] = replace(progress, picture=picture)
                else:
                    results[sample_id] = replace(progress, error=picture)
        for sample_id in results:
            self._forget(sample_id)
        return results

    def _pictures(self, samples: Sequence[BatchedSample], latents: torch.Tensor) -> Pictures:
        """The picture of each sample, or why it has none. `latents` is N × channels × height × width in float32.

        In a group, sample i is decoded on rank i mod N, and all ranks get all pictures.
        """
        if self._group is None:
            return self._decoded(samples, latents)
        own = slice(self._group.rank, None, self._group.size)
        decoded = self._decoded(samples[own], latents[own]) if samples[own] else {}
        with self._timer.time("decode"):
            of_all: Pictures = {key: one for part in self._group.gather_objects(decoded) for key, one in part.items()}
        return {one.sample.id: of_all[one.sample.id] for one in samples}

    def _decoded(self, samples: Sequence[BatchedSample], latents: torch.Tensor) -> Pictures:
        with self._timer.time("decode"):
            decoded = decode(self._pipeline.vae, latents)
        results: Pictures = {
            one.sample.id: not_finite(fault, step=one.step, pipeline=self._pipeline)
            for one, fault in zip(samples, decoded.faults, strict=True)
            if fault is not None
        }
        good = [samples[index] for index in decoded.good]
        if not good:
            return results
        with self._timer.time("safety"):
            images, flags = checked_pictures(self._pipeline, decoded.good_images)
        return results | {
            one.sample.id: Picture(
                width=image.width,
                height=image.height,
                rgb=image.convert("RGB").tobytes(),
                nsfw_content_detected=None if flags is None else flags[index],
                dropped_prompt=one.prompt.dropped,
                dropped_negative_prompt=one.negative_prompt.dropped if one.negative_prompt else "",
            )
            for index, (one, image) in enumerate(zip(good, images, strict=True))
        }
