"""Makes pictures on an engine, so that "ready" means "has worked"."""

from __future__ import annotations

from mii_serve.engine import Engine
from mii_serve.errors import EngineError, InvalidRequestError, NotFiniteError
from mii_serve.types import GenerationParams, InputImage, RequestedParams, Sample, SampleId, SampleProgress, StepPlan

FEW_STEPS = (2, 4, 6, 10, 20)


def warm_up_request(engine: Engine) -> RequestedParams:
    """A request for few steps of the default scheduler; some cannot make as few as two."""
    for num_inference_steps in (*FEW_STEPS, engine.capabilities.defaults.num_inference_steps):
        asked = RequestedParams(prompt="warm-up", num_inference_steps=num_inference_steps, seed=0)
        asked = engine.capabilities.with_mask_if_needed(asked)
        try:
            engine.check(engine.capabilities.resolve(asked, fallback_seed=0))
        except InvalidRequestError:
            continue
        return asked
    raise EngineError("the model's default scheduler cannot make a picture")


def input_image_of(params: GenerationParams) -> InputImage | None:
    """The image that a request of ours with a mask starts from: its left half is repainted."""
    if not params.has_mask:
        return None
    row = bytes(255 if x < params.width // 2 else 0 for x in range(params.width))
    gradient = bytes(255 * x // params.width for x in range(params.width) for _ in range(3))
    return InputImage(rgb=gradient * params.height, mask=row * params.height)


def make_pictures(engine: Engine, *asked: RequestedParams) -> None:
    """Run samples with equal numbers of UNet calls together to their last call, and decode as many as are decoded in one go.

    They must fit into the engine.

    Raises:
        EngineError: the engine failed, or a picture is empty or not finite.
    """
    resolved = [engine.capabilities.resolve(one, fallback_seed=0) for one in asked]
    samples = tuple(
        Sample(id=SampleId("warm-up", i), params=params, input_image=input_image_of(params))
        for i, params in enumerate(resolved)
    )
    ids = tuple(sample.id for sample in samples)
    for step in range(engine.check(resolved[0])):
        for progress in engine.run(StepPlan(joins=() if step else samples, steps=ids)):
            _raise_error(progress)
    decodes = ids[: engine.capacity.max_decodes]
    for progress in engine.run(StepPlan(decodes=decodes, leaves=ids[len(decodes) :])):
        _raise_error(progress)
        if progress.picture is None or not progress.picture.rgb:
            raise EngineError("a warm-up picture is empty")


def _raise_error(progress: SampleProgress) -> None:
    if isinstance(progress.error, NotFiniteError):
        raise EngineError(f"the warm-up picture is not finite, so the model cannot be served like this: {progress.error}")
    if progress.error is not None:
        raise progress.error
