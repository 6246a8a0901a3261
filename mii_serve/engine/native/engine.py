"""Makes a turn: prompts of those who join, one UNet call for all who step, pictures of those who end.

The UNet takes a timestep per row, so samples at different steps of different samplers share a call; the samplers are tables
(`samplers/table.py`), and one small matrix product updates all of them; what is no table is stepped by a scheduler object.
With its own kernels, what differs from the `reference` engine is only the order of float operations: a picture is within one
level of 255 of the reference's in float32. Other kernels (`kernels.py`) go under the same loop.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.utils.torch_utils import randn_tensor

from mii_serve.engine.decode import Decoded, decode, is_finite, not_finite
from mii_serve.engine.failures import is_of_one_sample
from mii_serve.engine.native.denoiser import Denoiser
from mii_serve.engine.native.kernels import KernelSet
from mii_serve.engine.native.lattice import TurnSize, declare
from mii_serve.engine.native.probe import NativeProbe
from mii_serve.engine.native.prompts import Prompt, PromptBank
from mii_serve.engine.native.slots import SlotBank
from mii_serve.engine.native.stepping import ObjectStepping, Stepping, TableStepping
from mii_serve.engine.native.times import TimeTable
from mii_serve.engine.native.turn import Move
from mii_serve.engine.native.unet import RowUNet
from mii_serve.engine.schedulers import capabilities_of
from mii_serve.engine.stages import StageClock
from mii_serve.engine.warmup import make_pictures, warm_up_request
from mii_serve.errors import EngineError, NotFiniteError
from mii_serve.models import LoadedModel
from mii_serve.safety.checker import checked_pictures
from mii_serve.samplers.build import ModelSchedulers
from mii_serve.samplers.sampling import Samplings, Uncompiled
from mii_serve.samplers.update import estimate_x0
from mii_serve.types import (
    LATENT_SCALE,
    Capabilities,
    EngineCapacity,
    EngineDescription,
    GenerationParams,
    Picture,
    Sample,
    SampleId,
    SampleProgress,
    SchedulerDescription,
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
    stepping: Stepping
    prompt: Prompt
    negative_prompt: Prompt | None
    slot: int
    step: int = 0

    @property
    def progress(self) -> SampleProgress:
        return SampleProgress(id=self.sample.id, step=self.step, num_steps=self.stepping.num_calls)

    @property
    def shape(self) -> Shape:
        return self.sample.params.latent_shape

    @property
    def prompts(self) -> list[Prompt]:
        return [self.prompt] if self.negative_prompt is None else [self.prompt, self.negative_prompt]


class NativeEngine:
    """Implements `mii_serve.engine.Engine` and `mii_serve.engine.probe.ProbedEngine`."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        max_slots: int | None = None,
        lattice: Sequence[TurnSize] | None = None,
        kernels: KernelSet | None = None,
        note: str = "",
    ) -> None:
        """`model` has a UNet that `unet.why_unsupported` has nothing against. `lattice` are the sizes of turns to prepare:
        when left out, on CUDA what `lattice.declare` declares for the model's default size, on a CPU none. `kernels` compute
        the UNet, by default our own. `note` becomes the description's.
        """
        self._pipeline = pipeline = model.pipeline
        self._device = torch.device(pipeline.device)
        self._channels = pipeline.unet.config.in_channels
        self._schedulers = ModelSchedulers(pipeline.scheduler)
        self._samplings = Samplings(self._schedulers)
        is_cuda = self._device.type == "cuda"
        slots = max_slots or (CUDA_SLOTS if is_cuda else CPU_SLOTS)
        self._max_slots = slots
        self._capabilities = capabilities_of(model, self._schedulers, self._samplings.of)
        if lattice is None:
            defaults = model.defaults
            lattice = declare(slots, defaults.height // LATENT_SCALE, defaults.width // LATENT_SCALE) if is_cuda else ()
        self._lattice = tuple(lattice)
        dtype = pipeline.unet.dtype
        kernels = kernels or KernelSet(name="native", unet=RowUNet(pipeline.unet))
        pipeline.unet.to(memory_format=torch.channels_last)
        row_unet = kernels.unet
        self._prompts = PromptBank(pipeline, row_unet, max_in_use=2 * slots)
        self._times = TimeTable(row_unet, dtype=dtype, device=self._device)
        self._denoiser = Denoiser(
            row_unet,
            max_slots=slots,
            num_channels=self._channels,
            dtype=dtype,
            key_values=self._prompts.key_values,
            time_projections=self._times.projections,
            lattice=self._lattice,
            max_cells_per_call=kernels.max_cells_per_call,
        )
        self._clock = StageClock()
        self._running: dict[SampleId, _Running] = {}
        self._description = EngineDescription(
            engine=kernels.name,
            dtype=str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf"),
            device=str(self._device),
            model=model.name,
            model_revision=model.revision,
            has_safety_checker=pipeline.safety_checker is not None,
            note=note,
        )

    @property
    def description(self) -> EngineDescription:
        return self._description

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def capacity(self) -> EngineCapacity:
        bound = self._denoiser.max_cells_per_call
        return EngineCapacity(max_slots=self._max_slots, max_decodes=MAX_DECODES, max_cells_per_call=bound)

    @property
    def num_graph_misses(self) -> int:
        return self._denoiser.num_graph_misses

    def stage_seconds(self) -> dict[str, float]:
        return self._clock.take()

    def check(self, params: GenerationParams) -> int:
        return self._samplings.of(params.scheduler, params.num_inference_steps).num_calls

    def describe_scheduler(self, params: GenerationParams) -> SchedulerDescription:
        is_compiled = self._samplings.is_compiled(params.scheduler, params.num_inference_steps)
        return self._schedulers.describe(params.scheduler, is_compiled=is_compiled)

    def warmup(self) -> None:
        """Capture the lattice, and make pictures through every size of it."""
        with torch.inference_mode():
            self._denoiser.prepare()
        asked = warm_up_request(self)
        make_pictures(self, asked)
        for size in self._lattice:
            make_pictures(
                self,
                replace(
                    asked,
                    guidance_scale=7.5 if size.num_rows > size.num_samples else 1.0,
                    height=size.height * LATENT_SCALE,
                    width=size.width * LATENT_SCALE,
                ),
                count=size.num_samples,
            )

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
            raise EngineError(f"the engine {self._description.engine} failed: {type(error).__name__}: {error}") from error

    def probe(self) -> NativeProbe:
        return NativeProbe(self._pipeline, self._prompts, self._times, self._denoiser, self.capacity, self._decode)

    def close(self) -> None:
        self._running.clear()

    def _forget(self, sample_id: SampleId) -> None:
        if (running := self._running.pop(sample_id, None)) is not None:
            self._prompts.release(running.prompts)
            self._denoiser.bank(running.shape).give_back(running.slot)
            self._denoiser.tidy(running.shape)

    def _take_in(self, joins: Sequence[Sample]) -> None:
        texts = [sample.params.prompt for sample in joins]
        texts += [sample.params.negative_prompt for sample in joins if sample.params.is_guided]
        if not joins:
            return
        with self._clock.time("encode"):
            prompts = self._prompts.acquire(texts)
        negatives = iter(prompts[len(joins) :])
        for sample, prompt in zip(joins, prompts, strict=False):  # the negative ones follow
            params = sample.params
            generator = torch.Generator("cpu").manual_seed(sample.seed)
            stepping = self._stepping(params, generator)
            # In float32 whatever the UNet computes in, so that every engine starts from the same noise.
            size = (1, self._channels, *params.latent_shape)
            latents = randn_tensor(size, generator=generator, dtype=torch.float32)[0] * stepping.init_noise_sigma
            self._running[sample.id] = _Running(
                sample=sample,
                stepping=stepping,
                prompt=prompt,
                negative_prompt=next(negatives) if params.is_guided else None,
                slot=self._denoiser.bank(params.latent_shape).take(latents.to(self._device)),
            )

    def _stepping(self, params: GenerationParams, generator: torch.Generator) -> Stepping:
        sampling = self._samplings.of(params.scheduler, params.num_inference_steps)
        if not isinstance(sampling, Uncompiled):
            return TableStepping(sampling, generator)
        scheduler = self._schedulers.make(params.scheduler, params.num_inference_steps, self._device)
        return ObjectStepping(scheduler, generator)

    def _step(self, ids: Sequence[SampleId], shown: Sequence[SampleId]) -> dict[SampleId, SampleProgress]:
        if not ids:
            return {}
        made: dict[SampleId, SampleProgress] = {}
        asked = [self._running[sample_id] for sample_id in ids]
        with self._clock.time("denoise"):
            group, moves = self._moves(asked, made)
            if not group:
                return made
            bank = self._denoiser.bank(group[0].shape)
            model_input, prediction = self._denoiser.step(moves, group[0].shape)
            for running, noise_pred in zip(group, prediction, strict=True):
                with self._failing_alone(running, made):
                    running.stepping.after(running.step, bank.state[running.slot], noise_pred)
        for running in group:
            running.step += 1
        previews: dict[SampleId, Picture | NotFiniteError] = {}
        if rows := [row for row, one in enumerate(group) if one.sample.id in shown and one.sample.id not in made]:
            seen = [group[row] for row in rows]
            x0 = torch.tensor([running.stepping.x0(running.step - 1) for running in seen], device=self._device)
            previews = self._pictures(seen, estimate_x0(model_input[rows], prediction[rows], x0))
        return {one.sample.id: made.get(one.sample.id) or self._stepped(one, previews.get(one.sample.id)) for one in asked}

    def _moves(self, asked: Sequence[_Running], made: dict[SampleId, SampleProgress]) -> tuple[list[_Running], list[Move]]:
        """The next steps of those samples that can make one; into `made` goes what became of the others."""
        bank, group, moves = self._denoiser.bank(asked[0].shape), [], []
        times = self._times.rows([running.stepping.timestep(running.step) for running in asked])
        for running, time in zip(asked, times, strict=True):
            with self._failing_alone(running, made):
                moves.append(self._move(running, time, bank))
                group.append(running)
        return group, moves

    @contextlib.contextmanager
    def _failing_alone(self, running: _Running, made: dict[SampleId, SampleProgress]) -> Iterator[None]:
        """What the sample's own scheduler object raises in the block costs that sample only."""
        try:
            yield
        except Exception as error:
            if not is_of_one_sample(error):
                raise
            logger.exception("a sample failed, request_id=%s", running.sample.id.request_id)
            self._forget(running.sample.id)
            reason = EngineError(f"this image failed after step {running.step}: {type(error).__name__}: {error}")
            made[running.sample.id] = replace(running.progress, error=reason)

    def _stepped(self, running: _Running, preview: Picture | NotFiniteError | None) -> SampleProgress:
        """Where only the preview is not finite, as of a v-prediction model's first step, it is left out: the sample is well."""
        if not isinstance(preview, NotFiniteError):
            return replace(running.progress, preview=preview)
        if is_finite(self._denoiser.bank(running.shape).state[running.slot, 0]):
            return running.progress
        self._forget(running.sample.id)
        return replace(running.progress, error=preview)

    def _move(self, running: _Running, time: int, bank: SlotBank) -> Move:
        """The sample's next step."""
        input_scale, matrix, noise = running.stepping.before(running.step, bank.state[running.slot])
        return Move(
            slot=running.slot,
            time=time,
            prompt=running.prompt.row,
            negative_prompt=None if running.negative_prompt is None else running.negative_prompt.row,
            guidance_scale=running.sample.params.guidance_scale,
            input_scale=input_scale,
            matrix=matrix,
            noise=noise,
        )

    def _finish(self, ids: Sequence[SampleId]) -> dict[SampleId, SampleProgress]:
        """Decode samples that have made all their calls, those of one shape together."""
        by_shape: dict[Shape, list[_Running]] = {}
        for sample_id in ids:
            if (running := self._running.get(sample_id)) is not None:
                by_shape.setdefault(running.shape, []).append(running)
        made: dict[SampleId, SampleProgress] = {}
        for shape, group in by_shape.items():
            slots = torch.tensor([running.slot for running in group], device=self._device)
            for sample_id, picture in self._pictures(group, self._denoiser.bank(shape).state[slots, 0]).items():
                progress = self._running[sample_id].progress
                if isinstance(picture, NotFiniteError):
                    made[sample_id] = replace(progress, error=picture)
                else:
                    made[sample_id] = replace(progress, picture=picture)
        for sample_id in made:
            self._forget(sample_id)
        return made

    def _pictures(self, group: Sequence[_Running], latents: torch.Tensor) -> dict[SampleId, Picture | NotFiniteError]:
        """Of each sample its picture, or why it has none."""
        with self._clock.time("decode"):
            decoded = self._decode(latents)
        vae, unet = self._pipeline.vae, self._pipeline.unet
        made: dict[SampleId, Picture | NotFiniteError] = {
            running.sample.id: not_finite(fault, step=running.step, vae=vae, unet=unet)
            for running, fault in zip(group, decoded.faults, strict=True)
            if fault is not None
        }
        good = [group[index] for index in decoded.good]
        if not good:
            return made
        with self._clock.time("safety"):
            pictures, flags = checked_pictures(self._pipeline, decoded.good_images)
        return made | {
            running.sample.id: Picture(
                width=picture.width,
                height=picture.height,
                rgb=picture.convert("RGB").tobytes(),
                nsfw_content_detected=None if flags is None else flags[index],
                dropped_prompt=running.prompt.dropped,
                dropped_negative_prompt=running.negative_prompt.dropped if running.negative_prompt else "",
            )
            for index, (running, picture) in enumerate(zip(good, pictures, strict=True))
        }

    def _decode(self, latents: torch.Tensor) -> Decoded:
        """Images from latents in float32."""
        return decode(self._pipeline.vae, latents)
