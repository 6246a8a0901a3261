"""The engine that runs many samples at once: text encoder for joining samples, one UNet call for all due ones, VAE at the end.

The UNet takes a timestep per row, so samples at different steps of different samplers share a call; the samplers are tables
(`samplers/table.py`), and one small matrix product updates all of them. A sampler that is no table is stepped by a scheduler
object. With the `native` kernel set only the order of float operations differs from the `reference` engine: a picture is
within one level of 255 of the reference's in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mii_serve.engine.batched.batch_inputs import SampleInputs
from mii_serve.engine.batched.buckets import BatchShape, declare_buckets
from mii_serve.engine.batched.decoding import Decoding, Undecoded, on_host
from mii_serve.engine.batched.denoiser import Denoiser
from mii_serve.engine.batched.first_latents import first_latents
from mii_serve.engine.batched.launched import LaunchedTurn
from mii_serve.engine.batched.loras import BatchedLoras, LoraEntry
from mii_serve.engine.batched.probe import BatchedProbe
from mii_serve.engine.batched.prompt_cache import Prompt, PromptCache
from mii_serve.engine.batched.slot_search import NUM_SAMPLES, find_slots
from mii_serve.engine.batched.stepping import ObjectStepping, Stepping, TableStepping
from mii_serve.engine.batched.tail import Tail
from mii_serve.engine.batched.timestep_cache import TimestepCache
from mii_serve.engine.capabilities import capabilities_of, description_of, takes_guidance_in, takes_mask_in
from mii_serve.engine.input_images import NOTHING, EncodedInput, KeptImage, encode_images, keep_unmasked
from mii_serve.engine.kernels import KernelSet
from mii_serve.engine.ranks.group import RankGroup
from mii_serve.engine.sample_errors import is_of_one_sample, sample_error
from mii_serve.engine.stage_timer import StageTimer
from mii_serve.engine.turns import TurnResult
from mii_serve.engine.upload import upload
from mii_serve.engine.warmup import make_pictures, warm_up_request
from mii_serve.errors import EngineError, ModelError
from mii_serve.models import LoadedModel
from mii_serve.safety.checker import keep_thresholds_on_host
from mii_serve.samplers.build import ModelSchedulers, refuse_without_noise
from mii_serve.samplers.run import SamplerRun
from mii_serve.samplers.sampling import Samplings
from mii_serve.samplers.update import estimate_x0
from mii_serve.types import (
    LATENT_SCALE,
    Capabilities,
    EngineCapacity,
    GenerationParams,
    InputImage,
    LatentShape,
    Sample,
    SampleId,
    SampleProgress,
    SchedulerDescription,
    StepPlan,
)

MAX_SLOTS = NUM_SAMPLES[-1]
"""The most samples at once, unless more are asked for; warm-up may find that fewer are as good."""
CPU_SLOTS = 8
"""On a CPU that is too slow to look for a better number."""

CPU_DECODES, CUDA_DECODES = 4, 2
"""Pictures decoded in one VAE call, which a turn may have to wait for; it needs far more memory per sample than the UNet. On
CUDA not measured yet."""

MAX_BEHIND = 8
"""Batches that wait for the decoder. Previews are left out while there are so many; of pictures the slots bound the number."""

Results = dict[SampleId, SampleProgress]


@dataclass(slots=True, eq=False)
class BatchedSample:
    """A sample that holds a slot; `step` counts the UNet calls it has made."""

    sample: Sample
    stepping: Stepping
    prompt: Prompt
    negative_prompt: Prompt | None
    slot: int
    loras: LoraEntry | None = None
    kept_image: KeptImage | None = None
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
    """Implements `mii_serve.engine.Engine`, and in addition `turns.LaunchingEngine` and `probe.ProbedEngine`."""

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
        When left out: what warm-up finds; the ranks of a group do not look for it, as each would find another number.

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
        num_channels = pipeline.unet.config.out_channels
        self._embeds_guidance = takes_guidance_in(pipeline.unet)
        self._schedulers = ModelSchedulers(pipeline.scheduler)
        takes_mask = takes_mask_in(pipeline.unet)
        self._samplings = Samplings(self._schedulers, has_blending=not takes_mask)
        self._looks_for_slots = max_slots is None and group is None
        self._max_slots = max_slots or (MAX_SLOTS if self._looks_for_slots or self._device.type == "cuda" else CPU_SLOTS)
        layout = kernels.lora_layout
        if layout is None and model.loras:
            raise ModelError(f"lora: the {kernels.name} engine computes no LoRAs here; use the engine 'native'")
        self.loras = None if layout is None else BatchedLoras(pipeline, layout, model.loras, max_in_use=self._max_slots)
        self._capabilities = capabilities_of(model, self._schedulers, self._samplings.of, needs_mask=takes_mask)
        if buckets is None:
            latent_shape = model.defaults.height // LATENT_SCALE, model.defaults.width // LATENT_SCALE
            has_pairs = not self._embeds_guidance
            on_cuda = self._device.type == "cuda"
            buckets = declare_buckets(self._max_slots, *latent_shape, may_be_guided=has_pairs) if on_cuda else ()
        self._buckets = tuple(buckets)
        pipeline.unet.to(memory_format=torch.channels_last)
        if self._device.type == "cpu":  # on CUDA the fused decoder sets its own
            pipeline.vae.to(memory_format=torch.channels_last)
        keep_thresholds_on_host(pipeline)
        self._prompts = PromptCache(pipeline, kernels, max_in_use=2 * self._max_slots, loras=self.loras)
        self._timesteps = TimestepCache(kernels, dtype=pipeline.unet.dtype, device=self._device, loras=self.loras)
        self._denoiser = Denoiser(
            kernels,
            self._prompts,
            self._timesteps,
            max_slots=self._max_slots,
            num_channels=num_channels,
            num_condition_channels=pipeline.unet.config.in_channels - num_channels,
            buckets=self._buckets,
            group=group,
            loras=self.loras,
        )
        self._stage_seconds: dict[str, float] = {}
        self._samples: dict[SampleId, BatchedSample] = {}
        self._failed: set[SampleId] = set()  # turns with them may have been planned already
        self._tail = Tail(self._device)
        self.description = description_of(model, kernels.name, note)

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities if self.loras is None else self.loras.added_to(self._capabilities)

    @property
    def capacity(self) -> EngineCapacity:
        return EngineCapacity(
            max_slots=self._max_slots,
            max_decodes=CUDA_DECODES if self._device.type == "cuda" else CPU_DECODES,
            max_latent_pixels_per_call=self._denoiser.max_latent_pixels_per_call,
            buckets=self._denoiser.captured_buckets,
            has_fixed_rows=self._group is not None,
        )

    @property
    def num_graph_misses(self) -> int:
        return self._denoiser.num_graph_misses

    def stage_seconds(self) -> dict[str, float]:
        seconds, self._stage_seconds = self._stage_seconds, {}
        return seconds

    def check(self, params: GenerationParams) -> int:
        sampling = self._samplings.of_request(params)
        refuse_without_noise(self._schedulers, params, has_blending=not self._capabilities.needs_mask)
        if params.lora_choice and self.loras is not None:
            self.loras.store.check(params.lora_choice)
        return sampling.num_calls

    def describe_scheduler(self, params: GenerationParams) -> SchedulerDescription:
        is_compiled = not self._must_step_by_objects(params) and self._samplings.is_compiled(params)
        return self._schedulers.describe(params.scheduler, is_compiled=is_compiled)

    def warmup(self) -> None:
        """Capture the buckets, make pictures through each of them, and find the number of slots."""
        with torch.inference_mode():
            self._denoiser.prepare()
        asked = warm_up_request(self)
        make_pictures(self, asked)
        for bucket in self._buckets:
            num_guided = bucket.num_rows - bucket.num_samples
            sized = replace(asked, height=bucket.height * LATENT_SCALE, width=bucket.width * LATENT_SCALE)
            scales = [7.5 if i < num_guided else 1.0 for i in range(bucket.num_samples)]
            make_pictures(self, *[replace(sized, guidance_scale=scale) for scale in scales])
        if self._looks_for_slots:
            params = self.capabilities.resolve(asked, fallback_seed=0)
            otherwise = MAX_SLOTS if self._device.type == "cuda" else CPU_SLOTS
            self._max_slots = find_slots(self, params, otherwise=otherwise)

    def run(self, plan: StepPlan) -> tuple[SampleProgress, ...]:
        turn = self.launch(plan).wait()
        with self._engine_errors(), torch.inference_mode():
            results = {one.id: one for one in turn.progress}
            for decoded in (turn, *self._taken(self._tail.drain())):
                for stage, seconds in decoded.stages.items():
                    self._stage_seconds[stage] = self._stage_seconds.get(stage, 0.0) + seconds
                _add_decoded(results, () if decoded is turn else decoded.progress)
        return tuple(results.values())

    def launch(self, plan: StepPlan) -> LaunchedTurn:
        with self._engine_errors(), torch.inference_mode():
            turn = LaunchedTurn(self._device)
            self._failed.difference_update(plan.leaves)
            for sample_id in plan.leaves:
                self._forget(sample_id)
            self._join(plan.joins, turn.timer)
            results = self._step(plan.steps, plan.previews, turn.timer)
            self._decode_finished(plan.decodes, results, turn.timer)
            turn.end(tuple(results.values()))
            return turn

    @property
    def on_decoded(self) -> Callable[[], None]:
        return self._tail.on_ready

    @on_decoded.setter
    def on_decoded(self, notify: Callable[[], None]) -> None:
        self._tail.on_ready = notify

    def has_decoded(self) -> bool:
        return self._tail.has_ready()

    def take_decoded(self) -> list[TurnResult]:
        with self._engine_errors(), torch.inference_mode():
            return self._taken(self._tail.take())

    @property
    def encodes_beside(self) -> bool:
        """See `turns.EncodingEngine`."""
        return self._tail.has_stream

    def encode_image(self, params: GenerationParams, image: InputImage) -> EncodedInput:
        """See `turns.EncodingEngine`; on the host, as it may wait there for long."""
        sample = Sample(id=SampleId("", 0), params=params, input_image=image)

        def encode() -> EncodedInput:
            [encoded] = encode_images(self._pipeline.vae, [sample], 1, takes_mask=self.capabilities.needs_mask).values()
            return encoded.moved(on_host)

        with self._engine_errors(), torch.inference_mode():
            return self._tail.compute(encode)

    def probe(self) -> BatchedProbe:
        return BatchedProbe(self._pipeline, self._prompts, self._timesteps, self._denoiser, self.capacity)

    def states(self) -> list[torch.Tensor]:
        """The sampler state of every latent shape in use."""
        return self._denoiser.states()

    def close(self) -> None:
        self._tail.close()
        self._samples.clear()
        self._kernels.close()

    @contextlib.contextmanager
    def _engine_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise EngineError(f"the engine {self.description.engine} failed: {type(error).__name__}: {error}") from error

    def _forget(self, sample_id: SampleId) -> None:
        if (one := self._samples.pop(sample_id, None)) is not None:
            self._prompts.release(one.prompts)
            if self.loras is not None:
                self.loras.release(one.loras)
            self._denoiser.pool(one.latent_shape).release(one.slot)
            self._denoiser.free_unused(one.latent_shape)

    def _join(self, joins: Sequence[Sample], timer: StageTimer) -> None:
        if not joins:
            return
        own_keys = [self._prompts.keys_of(sample.params) for sample in joins]
        keys = [key for key, _ in own_keys] + [negative for _, negative in own_keys if negative is not None]
        with timer.time("encode"):
            loras = [None if self.loras is None else self.loras.acquire(sample.params.lora_choice) for sample in joins]
            prompts = self._prompts.acquire(keys)
            max_images = self.capacity.max_decodes
            unencoded = [sample for sample in joins if sample.encoded_image is None]
            encoded = encode_images(self._pipeline.vae, unencoded, max_images, takes_mask=self._capabilities.needs_mask)
        negative_prompts = iter(prompts[len(joins) :])
        for sample, prompt, entry in zip(joins, prompts, loras, strict=False):  # the negative prompts follow
            params = sample.params
            self._failed.discard(sample.id)
            generator = torch.Generator("cpu").manual_seed(sample.seed)
            stepping = self._stepping(params, generator)
            image = encoded.get(sample.id, NOTHING)
            if isinstance(sample.encoded_image, EncodedInput):
                image = sample.encoded_image.moved(lambda tensor: upload(tensor, self._device))
            first = first_latents(self._pipeline.unet, self._device, sample, stepping, generator, image)
            self._samples[sample.id] = BatchedSample(
                sample=sample,
                stepping=stepping,
                prompt=prompt,
                negative_prompt=next(negative_prompts) if params.is_guided else None,
                slot=self._denoiser.pool(params.latent_shape).acquire(first.latents, first.condition),
                loras=entry,
                kept_image=first.kept_image,
            )

    def _stepping(self, params: GenerationParams, generator: torch.Generator) -> Stepping:
        table = None if self._must_step_by_objects(params) else self._samplings.table_of(params)
        if table is not None:
            return TableStepping(table, generator)
        run = SamplerRun.of(params)
        return ObjectStepping(self._schedulers.make(run, self._device), generator, run)

    def _must_step_by_objects(self, params: GenerationParams) -> bool:
        """In a group all ranks step alike, so what a rank's own cache still has must not decide."""
        return self._group is not None and SamplerRun.of(params).is_one_of_many

    def _step(self, ids: Sequence[SampleId], shown: Sequence[SampleId], timer: StageTimer) -> Results:
        due = [self._samples[sample_id] for sample_id in ids if sample_id not in self._failed]
        if not due:
            return {}
        assert len({one.sample.params.batch_key for one in due}) == 1, "these samples cannot share a UNet call"
        latent_shape = due[0].latent_shape
        failed: Results = {}
        with timer.time("denoise"):
            stepped, inputs = self._inputs(sorted(due, key=_place_in_batch), failed)
            if not stepped:
                return failed
            has_outputs = bool(shown) or any(one.stepping.reads_prediction for one in stepped)
            outputs = self._denoiser.step(inputs, latent_shape, has_outputs=has_outputs)
            state = self._denoiser.pool(latent_shape).state
            if outputs is not None:
                self._step_objects(stepped, state, outputs[1], failed)
            for one in stepped:
                one.step += 1
            masked = [one for one in stepped if one.kept_image is not None and one.sample.id not in failed]
            if masked:
                self._keep_unmasked(masked, state)
        results = {one.sample.id: failed.get(one.sample.id) or one.progress for one in due}
        rows = [row for row, one in enumerate(stepped) if one.sample.id in shown and one.sample.id not in failed]
        if rows and outputs is not None and self._tail.num_pending < MAX_BEHIND:
            previewed, (model_input, prediction) = [stepped[row] for row in rows], outputs
            x0 = upload(torch.tensor([one.stepping.x0(one.step - 1) for one in previewed]), self._device)
            seen = torch.stack([model_input[row] for row in rows]), torch.stack([prediction[row] for row in rows])
            sampled = torch.stack([state[one.slot, 0] for one in previewed])
            self._decode(previewed, estimate_x0(*seen, x0), results, timer, sampled=sampled)
        return results

    def _keep_unmasked(self, samples: Sequence[BatchedSample], state: torch.Tensor) -> None:
        slots = upload(torch.tensor([one.slot for one in samples]), self._device)
        levels = upload(torch.tensor([one.stepping.noise_level(one.step) for one in samples]), self._device)
        keep_unmasked(state, slots, levels, [one.kept_image for one in samples if one.kept_image is not None])

    def _inputs(self, due: Sequence[BatchedSample], failed: Results) -> tuple[list[BatchedSample], list[SampleInputs]]:
        """The samples that can make their next step, and the inputs of it; the others are added to `failed`."""
        pool, able, inputs = self._denoiser.pool(due[0].latent_shape), [], []
        scales = [one.sample.params.guidance_scale for one in due] if self._embeds_guidance else None
        timesteps = [one.stepping.timestep(one.step) for one in due]
        timestep_rows = self._timesteps.rows(timesteps, scales, [one.loras.time_parts if one.loras else () for one in due])
        for one, timestep_row in zip(due, timestep_rows, strict=True):
            try:
                input_scale, matrix, noise = one.stepping.before(one.step, pool.state, one.slot)
            except Exception as error:
                if not is_of_one_sample(error):
                    raise
                self._fail_alone(one, error, failed)
                continue
            inputs.append(
                SampleInputs(
                    slot=one.slot,
                    timestep_row=timestep_row,
                    prompt_row=one.prompt.row,
                    negative_prompt_row=None if one.negative_prompt is None else one.negative_prompt.row,
                    prompt_chunks=[prompt.chunks for prompt in one.prompts if prompt.chunks is not None] or None,
                    guidance_scale=one.sample.params.guidance_scale,
                    guidance_rescale=one.sample.params.guidance_rescale,
                    input_scale=input_scale,
                    matrix=matrix,
                    noise=noise,
                    loras=one.loras,
                )
            )
            able.append(one)
        return able, inputs

    def _step_objects(
        self, stepped: Sequence[BatchedSample], states: torch.Tensor, prediction: torch.Tensor, failed: Results
    ) -> None:
        for row, one in enumerate(stepped):
            if one.stepping.reads_prediction:
                try:
                    one.stepping.after(one.step, states, one.slot, prediction[row])
                except Exception as error:
                    if not is_of_one_sample(error):
                        raise
                    self._fail_alone(one, error, failed)

    def _fail_alone(self, one: BatchedSample, error: Exception, failed: Results) -> None:
        """An error that the sample's own scheduler object has raised fails this sample only."""
        failed[one.sample.id] = replace(one.progress, error=sample_error(error, one.sample, one.step))
        self._fail(one.sample.id)

    def _fail(self, sample_id: SampleId) -> None:
        self._forget(sample_id)
        self._failed.add(sample_id)

    def _decode_finished(self, ids: Sequence[SampleId], results: Results, timer: StageTimer) -> None:
        """Begin to decode samples that have made all their calls, those of one latent shape together. Their slots are free."""
        by_shape: dict[LatentShape, list[BatchedSample]] = {}
        for sample_id in ids:
            if (one := self._samples.get(sample_id)) is not None:
                by_shape.setdefault(one.latent_shape, []).append(one)
        for latent_shape, finished in by_shape.items():
            state = self._denoiser.pool(latent_shape).state
            latents = torch.stack([state[one.slot, 0] for one in finished])
            for one in finished:
                self._forget(one.sample.id)
            self._decode(finished, latents, results, timer)

    def _decode(
        self,
        samples: Sequence[BatchedSample],
        latents: torch.Tensor,
        results: Results,
        timer: StageTimer,
        sampled: torch.Tensor | None = None,
    ) -> None:
        """Begin to decode latents that show the samples; as previews where there are `sampled`, their true ones.

        In a group, sample i is decoded on rank i mod N at once, and all ranks get all pictures in the `results`.
        """
        wanted = [
            Undecoded(
                progress=one.progress,
                is_preview=sampled is not None,
                dropped_prompt=one.prompt.dropped,
                dropped_negative_prompt=one.negative_prompt.dropped if one.negative_prompt else "",
            )
            for one in samples
        ]
        if self._group is None:
            self._tail.add(Decoding(self._pipeline, wanted, latents, sampled))
            return
        own = slice(self._group.rank, None, self._group.size)
        decoded: tuple[SampleProgress, ...] = ()
        with timer.time("decode"):
            if wanted[own]:
                decoding = Decoding(self._pipeline, wanted[own], latents[own], None if sampled is None else sampled[own])
                decoding.finish()
                decoded = decoding.result().progress
            of_all = {one.id: one for part in self._group.gather_objects(decoded) for one in part}
        self._end_failed(of_all.values())
        _add_decoded(results, [of_all[one.sample.id] for one in samples if one.sample.id in of_all])

    def _taken(self, decodings: Iterable[Decoding]) -> list[TurnResult]:
        results = [decoding.result() for decoding in decodings]
        for result in results:
            self._end_failed(result.progress)
        return results

    def _end_failed(self, progress: Iterable[SampleProgress]) -> None:
        for one in progress:
            if one.error is not None and one.id in self._samples:
                self._fail(one.id)


def _place_in_batch(one: BatchedSample) -> tuple[int, bool]:
    return one.prompt.key.num_chunks, one.negative_prompt is None


def _add_decoded(results: Results, decoded: Iterable[SampleProgress]) -> None:
    """Add pictures, previews and errors to what is there of the same samples."""
    for one in decoded:
        if (before := results.get(one.id)) is not None:
            results[one.id] = replace(before, preview=one.preview, picture=one.picture, error=one.error)
        else:
            results[one.id] = one
