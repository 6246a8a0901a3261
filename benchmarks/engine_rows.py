"""What `engines.py` times: our engines through their three methods, and the ways other people run the same pipeline.

Every row loads the same folder, makes bursts of images of one request (seed, seed + 1, …), and tells its stages through a
`StageTimer`. A row that cannot run here says why by raising `UnableError`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from mii_serve.config import DeployConfig
from mii_serve.engine import Engine
from mii_serve.engine.batched import BatchedEngine
from mii_serve.engine.factory import build_engine, native_engine
from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.engine.stage_timer import StageTimer
from mii_serve.errors import MiiServeError
from mii_serve.models import load_model
from mii_serve.samplers.build import ModelSchedulers
from mii_serve.samplers.run import SamplerRun
from mii_serve.types import GenerationParams, RequestedParams, Sample, SampleId, StepPlan


class UnableError(Exception):
    """This row cannot run here; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where everything runs, and on which weights: a diffusers folder, or the built-in model."""

    model: str
    device: str
    dtype: str


class Row(Protocol):
    """One way to make pictures, loaded and warm."""

    @property
    def dtype(self) -> str: ...
    def burst(self, asked: RequestedParams, count: int) -> list[Image.Image]:
        """Make `count` images together, as this way makes them."""
        ...

    def stage_seconds(self) -> dict[str, float]: ...
    def close(self) -> None: ...


class EngineRow:
    """One of ours."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        engine.warmup()
        self.dtype = engine.description.dtype

    def resolved(self, asked: RequestedParams) -> GenerationParams:
        return self._engine.capabilities.resolve(asked, fallback_seed=0)

    def burst(self, asked: RequestedParams, count: int) -> list[Image.Image]:
        engine, params = self._engine, self.resolved(asked)
        waiting = [Sample(id=SampleId("benchmark", i), params=params) for i in range(count)]
        calls_left: dict[SampleId, int] = {}
        pictures: dict[SampleId, Image.Image] = {}
        num_calls = engine.check(params)
        while waiting or calls_left:
            room = engine.capacity.max_slots - len(calls_left)
            joins = tuple(waiting.pop(0) for _ in range(min(len(waiting), room)))
            calls_left |= {sample.id: num_calls for sample in joins}
            steps = tuple(sample_id for sample_id, left in calls_left.items() if left)
            ended = [sample_id for sample_id, left in calls_left.items() if left <= 1]
            decodes = tuple(ended[: engine.capacity.max_decodes])
            for made in engine.run(StepPlan(joins=joins, steps=steps, decodes=decodes)):
                if made.error is not None:
                    raise made.error
                if (done := made.picture) is not None:
                    pictures[made.id] = Image.frombytes("RGB", (done.width, done.height), done.rgb)
            calls_left = {sample_id: max(0, left - 1) for sample_id, left in calls_left.items() if sample_id not in decodes}
        return [pictures[sample_id] for sample_id in sorted(pictures)]

    def stage_seconds(self) -> dict[str, float]:
        return self._engine.stage_seconds()

    def close(self) -> None:
        self._engine.close()


class PipelineRow:
    """`StableDiffusionPipeline` as people call it, a whole batch from start to end."""

    def __init__(self, place: Place, change: Callable[[Any], Any] = lambda pipeline: pipeline) -> None:
        self.dtype, self._device = place.dtype, place.device
        limits = DeployConfig.load({"model": place.model}).limits
        loaded = load_model(place.model, revision=None, dtype=place.dtype, device=place.device, limits=limits)
        self._defaults, self._clock = loaded.defaults, StageTimer()
        self._schedulers = ModelSchedulers(loaded.pipeline.scheduler)
        self._pipeline = pipeline = change(loaded.pipeline)
        for holder, name, stage in (
            (pipeline, "encode_prompt", "encode"),
            (pipeline.unet, "forward", "denoise"),
            (pipeline.vae, "decode", "decode"),
            (pipeline, "run_safety_checker", "safety"),
        ):
            setattr(holder, name, self._timed(getattr(holder, name), stage))

    def _timed(self, call: Callable[..., Any], stage: str) -> Callable[..., Any]:
        # A benchmark's own wrapper: `torch.compile` has made its graph below it.
        @functools.wraps(call)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self._clock.time(stage):
                return call(*arguments, **named)

        return timed

    def burst(self, asked: RequestedParams, count: int) -> list[Image.Image]:
        defaults = self._defaults
        steps = asked.num_inference_steps or defaults.num_inference_steps
        scheduler = self._schedulers.make(SamplerRun(asked.scheduler or defaults.scheduler, steps), torch.device(self._device))
        self._pipeline.scheduler = scheduler
        with torch.inference_mode():
            made = self._pipeline(
                asked.prompt,
                num_images_per_prompt=count,
                height=asked.height or defaults.height,
                width=asked.width or defaults.width,
                num_inference_steps=steps,
                guidance_scale=defaults.guidance_scale if asked.guidance_scale is None else asked.guidance_scale,
                generator=[torch.Generator("cpu").manual_seed((asked.seed or 0) + i) for i in range(count)],
            )
        return list(made.images)

    def stage_seconds(self) -> dict[str, float]:
        return self._clock.take()

    def close(self) -> None:
        del self._pipeline


# ---- the rows by name ----------------------------------------------------------------------------------------------


def reference(place: Place) -> Row:
    """The FP32 reference engine, one image at a time."""
    return _ours("reference", place, dtype="fp32")


def native(place: Place) -> Row:
    """The native engine as it is deployed."""
    return _ours("native", place, dtype=place.dtype)


def native_without_graphs(place: Place) -> Row:
    """The native engine with every turn launched kernel by kernel; what the captured graphs are worth is the difference."""
    if not place.device.startswith("cuda"):
        raise UnableError("there are no CUDA graphs on this device to do without")
    limits = DeployConfig.load({"model": place.model}).limits
    loaded = load_model(place.model, revision=None, dtype=place.dtype, device=place.device, limits=limits)
    return EngineRow(native_engine(loaded, buckets=()))


def native_unfused(place: Place) -> Row:
    """The native engine without the fused kernels; what they are worth is the difference."""
    if not place.device.startswith("cuda"):
        raise UnableError("there are no fused kernels on this device to do without")
    limits = DeployConfig.load({"model": place.model}).limits
    loaded = load_model(place.model, revision=None, dtype=place.dtype, device=place.device, limits=limits)
    return EngineRow(BatchedEngine(loaded, NativeKernels(loaded.pipeline.unet)))


def deepspeed(place: Place) -> Row:
    """DeepSpeed's kernels under our loop."""
    return _ours("deepspeed", place, dtype=place.dtype)


def diffusers_eager(place: Place) -> Row:
    """`StableDiffusionPipeline` as it is loaded."""
    return PipelineRow(place)


def diffusers_compiled(place: Place) -> Row:
    """diffusers' own advice for speed: channels last, fused projections, `torch.compile` with max-autotune."""
    if not place.device.startswith("cuda"):
        raise UnableError("max-autotune is for a GPU")

    def change(pipeline: Any) -> Any:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
        pipeline.fuse_qkv_projections()
        pipeline.unet.forward = torch.compile(pipeline.unet.forward, mode="max-autotune", fullgraph=True, dynamic=False)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode="max-autotune", fullgraph=True, dynamic=False)
        return pipeline

    return PipelineRow(place, change)


def diffusers_deepspeed(place: Place) -> Row:
    """DeepSpeed's injection as MII's legacy server calls it (mii/legacy/models/load_models.py): kernels and CUDA graphs."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UnableError("deepspeed is not installed")
    if not place.device.startswith("cuda") or place.dtype != "fp16":
        raise UnableError("DeepSpeed's injection needs a GPU and fp16")

    def change(pipeline: Any) -> Any:
        import deepspeed

        deepspeed.init_inference(pipeline, mp_size=1, dtype=torch.half, replace_with_kernel_inject=True, enable_cuda_graph=True)
        return pipeline

    return PipelineRow(place, change)


ROWS: dict[str, Callable[[Place], Row]] = {
    row.__name__: row
    for row in (
        reference,
        native,
        diffusers_eager,
        deepspeed,
        native_unfused,
        native_without_graphs,
        diffusers_compiled,
        diffusers_deepspeed,
    )
}
"""In the order they run: what matters most comes first, in case time runs out."""


def _ours(name: str, place: Place, *, dtype: str) -> Row:
    settings = {"model": place.model, "engine": name, "dtype": dtype, "device": place.device}
    try:
        return EngineRow(build_engine(DeployConfig.load(settings)))
    except MiiServeError as error:
        raise UnableError(str(error)) from error


@contextlib.contextmanager
def opened(name: str, place: Place) -> Iterator[Row]:
    """Load a row, and free what it held.

    Raises:
        UnableError: it cannot run here.
    """
    try:
        row = ROWS[name](place)
    except UnableError:
        raise
    except Exception as error:  # what a peer raises when it does not fit these versions is its business, and a result
        raise UnableError(f"{type(error).__name__}: {error}"[:500]) from error
    try:
        yield row
    finally:
        row.close()
        del row
        gc.collect()
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
