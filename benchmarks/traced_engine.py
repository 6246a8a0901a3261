"""Traces of the turns that are not steady, by the whole batched engine: samples that join, guided and unguided ones together,
and the tail, which decodes and checks pictures in a thread of its own.

The engine, its pipeline at full size and its launches are the real ones, on fake CUDA tensors and without graphs. Streams and
events are doubles; an event that is waited for counts as a wait. Where the host reads what the device has computed, it reads
that all is finite, and zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import fake_cuda
import numpy as np
import torch
from cuda_trace import Record, Trace
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from traced_turns import launcher

from mii_serve.engine.batched import BatchedEngine
from mii_serve.engine.batched import engine as engine_module
from mii_serve.engine.batched.decoding import Decoding
from mii_serve.engine.kernels.fused.forward import FusedKernels
from mii_serve.engine.kernels.fused.sampler import FusedSampler
from mii_serve.engine.kernels.fused.triton_operations import TritonOperations
from mii_serve.engine.kernels.fused.vae import FusedDecoder
from mii_serve.models import LoadedModel
from mii_serve.models.random_init import SD_V1_4, build_random_pipeline
from mii_serve.models.source import DEMO_FOLDER
from mii_serve.types import GenerationDefaults, Limits, RequestedParams, Sample, SampleId, StepPlan


class TracedEngine:
    """Within `traced_engine`. Each method is one turn, and returns what it launched."""

    def __init__(self, trace: Trace, engine: BatchedEngine) -> None:
        self._trace, self._engine = trace, engine
        self._num_begun = 0
        self._running: list[SampleId] = []
        self.decodings: list[Decoding] = []
        engine._tail.add = self.decodings.append

    def join(self, *asked: RequestedParams) -> Record:
        """A turn in which these samples join and all that are there make a step."""
        joins = []
        for one in asked:
            self._num_begun += 1
            params = self._engine.capabilities.resolve(one, fallback_seed=0)
            joins.append(Sample(id=SampleId("traced", self._num_begun), params=params))
        self._running += [one.id for one in joins]
        return self._turn(StepPlan(joins=tuple(joins), steps=tuple(self._running), decodes=()))

    def end(self, count: int) -> Record:
        """A turn in which all make a step, and so many their last one."""
        plan = StepPlan(joins=(), steps=tuple(self._running), decodes=tuple(self._running[:count]))
        del self._running[:count]
        return self._turn(plan)

    def tail(self) -> Record:
        """What the decoding thread does for the batch of pictures that ended last."""
        self._trace.begin()
        with torch.no_grad():
            self.decodings.pop().finish()
        return self._trace.record

    def _turn(self, plan: StepPlan) -> Record:
        self._trace.begin()
        self._engine.launch(plan)
        return self._trace.record


def unsteady() -> dict[str, Record]:
    """One turn of each kind that is not steady, one after the other, and the tail of its pictures."""
    with traced_engine(max_slots=4) as traced:
        return {
            "a guided sample joins": traced.join(RequestedParams(prompt="a red circle")),
            "an unguided one joins": traced.join(RequestedParams(prompt="a blue ring", guidance_scale=1.0)),
            "both end": traced.end(2),
            "the tail of both": traced.tail(),
        }


@contextlib.contextmanager
def traced_engine(*, max_slots: int) -> Iterator[TracedEngine]:
    """The native engine of Stable Diffusion v1-4 in half precision with all fused kernels."""
    with _doubles() as trace_of, fake_cuda.fake_cuda() as fake, Trace() as trace:
        trace_of.append(trace)
        model = _model(fake)
        unet, vae, launch = model.pipeline.unet, model.pipeline.vae, launcher(trace)
        for part in (unet, vae):
            part.to(memory_format=torch.channels_last)
        vae.decoder = FusedDecoder(vae.decoder, TritonOperations(launch))
        kernels = FusedKernels(unet, TritonOperations(launch), sampler=FusedSampler(launch))
        engine = BatchedEngine(model, kernels, max_slots=max_slots, buckets=())
        engine._samplings.of = _on_real_tensors(engine._samplings.of)
        try:
            yield TracedEngine(trace, engine)
        finally:
            engine.close()


def _model(fake: FakeTensorMode) -> LoadedModel:
    with _disable_current_modes():
        pipeline = build_random_pipeline(
            SD_V1_4, tokenizer_folder=DEMO_FOLDER / "tokenizer", dtype=torch.float16, device=torch.device("meta")
        )
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.safety_checker):
        fake_cuda.place(part, fake)
    return LoadedModel(
        pipeline=pipeline,
        name="v1-4",
        revision="",
        defaults=GenerationDefaults(scheduler="default", height=512, width=512),
        limits=Limits(),
    )


def _on_real_tensors(call: Callable[..., Any]) -> Callable[..., Any]:
    """Sampler tables are computed, not traced."""

    def computed(*arguments: Any, **named: Any) -> Any:
        with _disable_current_modes():
            return call(*arguments, **named)

    return computed


@contextlib.contextmanager
def _doubles() -> Iterator[list[Trace]]:
    """Yields a list, to which the trace is to be added."""
    traces: list[Trace] = []

    class Event:
        def __init__(self, **_: Any) -> None: ...
        def record(self, stream: Any = None) -> None: ...
        def wait(self, stream: Any = None) -> None: ...
        def synchronize(self) -> None:
            traces[0].wait("event")

    class Stream:
        def __init__(self, *_: Any) -> None: ...

    patches = (
        mock.patch.object(torch.cuda, "Event", Event),
        mock.patch.object(torch.cuda, "Stream", Stream),
        mock.patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None),
        mock.patch.object(FakeTensor, "numpy", lambda tensor: np.zeros(tensor.shape, _numpy_type(tensor.dtype)), create=True),
        mock.patch.object(torch, "inference_mode", lambda mode=True: torch.no_grad()),  # fake tensors are not traced in it
        mock.patch.object(engine_module, "capabilities_of", _on_real_tensors(engine_module.capabilities_of)),
        mock.patch.object(engine_module, "description_of"),
        mock.patch.object(engine_module, "ModelSchedulers", _on_real_tensors(engine_module.ModelSchedulers)),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield traces


def _numpy_type(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")
