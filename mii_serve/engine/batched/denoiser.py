"""One step of a batch: from each sample's state, timestep and prompts to its next state, with one UNet call for all.

On CUDA the declared buckets are captured as graphs, and a batch that fits one is a single replay; other batches, and those with
LoRAs, run kernel by kernel and are counted. What a graph replays, `_run`, is the same code that runs without one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mii_serve.engine.batched.batch_inputs import BatchInputs, SampleInputs, batch_shape
from mii_serve.engine.batched.buckets import BatchShape, choose_bucket
from mii_serve.engine.batched.loras import BatchedLoras
from mii_serve.engine.batched.prompt_cache import PromptCache
from mii_serve.engine.batched.slot_pool import SlotPool
from mii_serve.engine.batched.timestep_cache import TimestepCache
from mii_serve.engine.kernels import KernelSet
from mii_serve.engine.kernels.loras import CallLoras
from mii_serve.engine.ranks.group import RankGroup
from mii_serve.errors import EngineError
from mii_serve.types import LatentShape

logger = logging.getLogger(__name__)

StepOutputs = tuple[torch.Tensor, torch.Tensor]
"""The UNet's input and its prediction after guidance, both N × channels × height × width in float32."""

MAX_KEPT_INPUTS = 64
"""Batch shapes without a bucket whose input tensors are kept."""

MAX_CAPTURE_S = 60.0
"""For the captures of all buckets together; the one that begins last may take longer."""

NUM_RUNS_BEFORE_CAPTURE = 2
"""Libraries choose their kernels and allocate their workspace in the first calls."""


class Denoiser:
    """Holds the sampler state of every latent shape in use, and steps it."""

    def __init__(
        self,
        kernels: KernelSet,
        prompts: PromptCache,
        timesteps: TimestepCache,
        *,
        max_slots: int,
        num_channels: int,
        num_condition_channels: int = 0,
        buckets: Sequence[BatchShape] = (),
        group: RankGroup | None = None,
        loras: BatchedLoras | None = None,
    ) -> None:
        """`prompts` and `timesteps` are the caches that the rows of `SampleInputs` point into. The channels are those of the
        latents, and those that the UNet takes in beside them.

        The ranks of a `group` make the same calls, and divide each by its shape alone, so that the rows of a bucket are fixed.
        They agree beforehand which buckets fit into the memory of each; a later call that does not fit is not made smaller, as
        those of the others would not be.
        """
        self._kernels = kernels
        self._max_slots = max_slots
        self._num_channels = num_channels
        self._num_condition_channels = num_condition_channels
        self._prompts = prompts.projected
        self._timestep_embeds = timesteps.embeds
        self._device = self._prompts.device
        self._buckets = buckets
        self._group = group
        self._loras = loras
        self._pools: dict[LatentShape, SlotPool] = {}
        self._prepared: dict[BatchShape, Callable[[Sequence[SampleInputs]], StepOutputs]] = {}
        self._chosen: dict[BatchShape, BatchShape | None] = {}
        self._kept_inputs: dict[BatchShape, BatchInputs] = {}
        self._graph_memory: Any = None
        self.max_latent_pixels_per_call = kernels.max_latent_pixels_per_call
        """Of rows × latent height × latent width; becomes smaller when a call runs out of memory."""
        self.num_graph_misses = 0

    @property
    def captured_buckets(self) -> tuple[BatchShape, ...]:
        """The buckets that a batch can be padded to; none where nothing is gained by it."""
        return tuple(self._prepared) if self._device.type == "cuda" else ()

    def pool(self, latent_shape: LatentShape) -> SlotPool:
        """The slots of the samples of a latent shape."""
        if (pool := self._pools.get(latent_shape)) is None:
            pool = self._pools[latent_shape] = SlotPool(
                self._max_slots,
                (self._num_channels, *latent_shape),
                self._device,
                num_condition_channels=self._num_condition_channels,
                dtype=self._prompts.dtype,
            )
        return pool

    def states(self) -> list[torch.Tensor]:
        """Of every latent shape in use."""
        return [pool.state[:-1] for pool in self._pools.values()]

    def free_unused(self, latent_shape: LatentShape) -> None:
        """Free the slots of a latent shape that no sample has any more; captured graphs keep theirs."""
        if self._pools[latent_shape].is_empty and not any((one.height, one.width) == latent_shape for one in self._buckets):
            del self._pools[latent_shape]

    def prepare(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Capture every bucket. One that does not fit into memory is left out, and bounds the calls to come.

        After `MAX_CAPTURE_S` the rest is left out, and padded to the larger ones; the ranks of a group capture all.
        """
        start = clock()
        for bucket in self._buckets:
            if bucket in self._prepared or not self._has_room_for(bucket):
                continue
            if self._group is None and clock() - start > MAX_CAPTURE_S:
                break
            if self._group is not None and not self._group.agree(self._fits(bucket, self._group)):
                self._shrink(bucket.num_latent_pixels - 1)
                continue
            try:
                self._prepared[bucket] = self._capture(bucket)
                self._chosen.clear()
            except torch.OutOfMemoryError as error:
                if self._group is not None:
                    raise EngineError(f"out of memory with {bucket}; use a smaller max_slots") from error
                self._shrink(bucket.num_latent_pixels - 1)
        if self._buckets:
            num, seconds = len(self._prepared), clock() - start
            logger.info("captured %d of %d buckets in %.1f s%s", num, len(self._buckets), seconds, self._memory_note())

    def _memory_note(self) -> str:
        if self._device.type != "cuda":
            return ""
        return f"; {torch.cuda.memory_reserved(self._device) / 2**20:.0f} MiB are reserved"

    def _fits(self, bucket: BatchShape, group: RankGroup) -> bool:
        """Whether this rank has memory for a call of this shape, tried without the others."""
        inputs = BatchInputs(bucket, self._num_channels, self._device, has_fixed_rows=True)
        inputs.fill((), self.pool((bucket.height, bucket.width)).padding_slot)
        try:
            with group.apart():
                self._run(inputs)
        except torch.OutOfMemoryError:
            return False
        return True

    def step(
        self, samples: Sequence[SampleInputs], latent_shape: LatentShape, *, has_outputs: bool = True
    ) -> StepOutputs | None:
        """Step the samples in as few UNet calls as memory allows, halving them until it does.

        Samples with prompts of one length come together, and of these the guided ones first; each length has calls of its own.

        The outputs are the caller's; without them it returns None and copies nothing.

        Raises:
            torch.OutOfMemoryError: not even one sample fits.
        """
        order = [(sample.num_text_tokens, sample.negative_prompt_row is None) for sample in samples]
        assert order == sorted(order), "guided samples come first"
        outputs: list[StepOutputs] = []
        num_stepped = 0
        while num_stepped < len(samples):
            batch = self._first_batch(samples[num_stepped:], latent_shape)
            try:
                called = self._call(batch, latent_shape, has_outputs=has_outputs)
                if called is not None:
                    outputs.append(called)
            except torch.OutOfMemoryError:
                if len(batch) == 1 or self._group is not None:
                    raise
                self._shrink(batch_shape(batch[: len(batch) // 2], latent_shape).num_latent_pixels)
                continue
            num_stepped += len(batch)
        if len(outputs) <= 1:
            return outputs[0] if outputs else None
        model_inputs, predictions = zip(*outputs, strict=True)
        return torch.cat(model_inputs), torch.cat(predictions)

    def _has_room_for(self, shape: BatchShape) -> bool:
        return self.max_latent_pixels_per_call is None or shape.num_latent_pixels <= self.max_latent_pixels_per_call

    def _first_batch(self, samples: Sequence[SampleInputs], latent_shape: LatentShape) -> Sequence[SampleInputs]:
        count = sum(sample.num_text_tokens == samples[0].num_text_tokens for sample in samples)
        while count > 1 and not self._has_room_for(batch_shape(samples[:count], latent_shape)):
            count -= 1
        return samples[:count]

    def _call(
        self, samples: Sequence[SampleInputs], latent_shape: LatentShape, *, has_outputs: bool = True
    ) -> StepOutputs | None:
        shape = batch_shape(samples, latent_shape)
        loras = None if self._loras is None else self._loras.of_call([sample.loras for sample in samples])
        is_usual = loras is None and not samples[0].num_text_tokens
        if is_usual and (bucket := self._bucket_of(shape)) is not None:
            model_input, prediction = self._prepared[bucket](samples)
            # Copies: the next replay of any bucket overwrites what this one has made.
            return (model_input[: len(samples)].clone(), prediction[: len(samples)].clone()) if has_outputs else None
        self.num_graph_misses += bool(self._buckets)
        inputs = self._inputs_of(shape)
        inputs.fill(samples, self.pool(latent_shape).padding_slot)
        outputs = self._run(inputs, loras, _long_prompts(samples))
        return outputs if has_outputs else None

    def _bucket_of(self, shape: BatchShape) -> BatchShape | None:
        if not self._prepared:
            return None
        if shape not in self._chosen:
            if len(self._chosen) >= MAX_KEPT_INPUTS:
                self._chosen.clear()
            self._chosen[shape] = choose_bucket(self._prepared, shape, has_fixed_rows=self._group is not None)
        return self._chosen[shape]

    def _inputs_of(self, shape: BatchShape) -> BatchInputs:
        if (kept := self._kept_inputs.get(shape)) is None:
            if len(self._kept_inputs) >= MAX_KEPT_INPUTS:
                self._kept_inputs.clear()
            kept = self._kept_inputs[shape] = BatchInputs(shape, self._num_channels, self._device, has_fixed_rows=True)
        return kept

    def _run(
        self, inputs: BatchInputs, loras: CallLoras | None = None, long_prompts: torch.Tensor | None = None
    ) -> StepOutputs:
        """The step itself: reads and writes tensors on the device, nothing else."""
        shape = inputs.shape
        pool = self._pools[shape.height, shape.width]
        state = pool.state
        sampler = self._kernels.sampler
        model_input, latents = sampler.begin(state, inputs.slots, inputs.input_scale, self._prompts.dtype)
        if pool.condition is not None:
            latents = torch.cat((latents, pool.condition[inputs.slots]), dim=1)
            latents = latents.contiguous(memory_format=torch.channels_last)
        noise_pred = self._kernels.predict_noise(
            latents,
            self._timestep_embeds[inputs.timestep_rows],
            self._prompts[inputs.prompt_rows] if long_prompts is None else long_prompts,
            inputs.sample_of_row if inputs.may_be_guided else None,
            loras,
        )
        prediction = sampler.end(
            state,
            inputs.slots,
            noise_pred,
            inputs.uncond_row,
            inputs.guidance_scale,
            inputs.guidance_rescale,
            inputs.noise,
            inputs.matrices,
            is_guided=inputs.may_be_guided,
        )
        return model_input, prediction

    def _capture(self, bucket: BatchShape) -> Callable[[Sequence[SampleInputs]], StepOutputs]:
        """A function that steps a batch of this shape. Its outputs are overwritten by the next replay of any bucket."""
        pool = self.pool((bucket.height, bucket.width))
        inputs = BatchInputs(bucket, self._num_channels, self._device, has_fixed_rows=self._group is not None)
        inputs.fill((), pool.padding_slot)
        replay, (model_input, prediction) = self._record(inputs)

        def step_batch(samples: Sequence[SampleInputs]) -> StepOutputs:
            inputs.fill(samples, pool.padding_slot)
            replay()
            return model_input, prediction

        return step_batch

    def _record(self, inputs: BatchInputs) -> tuple[Callable[[], None], StepOutputs]:
        """A function that runs the step again, always into the same output tensors.

        On a CPU there is no graph, but the output tensors are reused all the same, so that faults of sharing them show there
        too.
        """
        if self._device.type != "cuda":
            kept = torch.zeros_like(inputs.noise), torch.zeros_like(inputs.noise)

            def run_again() -> None:
                for tensor, output in zip(kept, self._run(inputs), strict=True):
                    tensor.copy_(output)

            return run_again, kept

        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(NUM_RUNS_BEFORE_CAPTURE):
                self._run(inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._graph_memory = self._graph_memory or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_memory, stream=stream):
            outputs = self._run(inputs)
        return graph.replay, outputs

    def _shrink(self, max_latent_pixels: int) -> None:
        self.max_latent_pixels_per_call = min(max_latent_pixels, self.max_latent_pixels_per_call or max_latent_pixels)
        self._prepared = {bucket: step_batch for bucket, step_batch in self._prepared.items() if self._has_room_for(bucket)}
        self._chosen.clear()
        logger.warning("out of memory; UNet calls are now at most %d rows × latent pixels", self.max_latent_pixels_per_call)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _long_prompts(samples: Sequence[SampleInputs]) -> torch.Tensor | None:
    """The prompts of all rows, where they are in no rows of the prompt cache: those of all samples, then the negative ones."""
    own = [sample.prompt_chunks for sample in samples if sample.prompt_chunks is not None]
    return torch.stack([chunks[0] for chunks in own] + [chunks[1] for chunks in own if len(chunks) > 1]) if own else None
