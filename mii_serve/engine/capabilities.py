"""An engine's description of itself, and what requests to its model may ask for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from mii_serve.errors import InvalidRequestError, ModelError
from mii_serve.models import LoadedModel
from mii_serve.models.architecture import INPAINTING_CHANNELS
from mii_serve.models.loading import TORCH_DTYPES
from mii_serve.samplers.build import ModelSchedulers, first_line
from mii_serve.samplers.run import SamplerRun
from mii_serve.samplers.sampling import Uncompiled
from mii_serve.types import DEFAULT_SCHEDULER, Capabilities, EngineDescription, EngineName, ModelParts

FEW_STEPS = 4
"""The scheduler of a distilled model may have fewer than diffusers' default of 50."""

logger = logging.getLogger(__name__)


def takes_mask_in(unet: Any) -> bool:
    """Whether the UNet is an inpainting model's, which takes a mask and the rest of an image beside the latents."""
    return bool(unet.config.in_channels == INPAINTING_CHANNELS)


def takes_guidance_in(unet: Any) -> bool:
    """Whether the UNet is a latent consistency model's, which makes no second row of a guided sample."""
    return getattr(unet.config, "time_cond_proj_dim", None) is not None


def parts_of(pipeline: Any) -> ModelParts:
    return ModelParts(
        num_text_layers=pipeline.text_encoder.config.num_hidden_layers,
        num_text_tokens=pipeline.tokenizer.model_max_length,
        text_width=pipeline.text_encoder.config.hidden_size,
        num_train_timesteps=int(pipeline.scheduler.config.get("num_train_timesteps", 1000)),
        embeds_guidance=takes_guidance_in(pipeline.unet),
    )


def description_of(model: LoadedModel, engine: EngineName, note: str) -> EngineDescription:
    pipeline = model.pipeline
    return EngineDescription(
        engine=engine,
        dtype=next(name for name, dtype in TORCH_DTYPES.items() if dtype == pipeline.unet.dtype),
        device=str(pipeline.device),
        model=model.name,
        model_revision=model.revision,
        has_safety_checker=pipeline.safety_checker is not None,
        note=note,
        devices=(_device_name(pipeline.device),),
    )


def _device_name(device: torch.device) -> str:
    """Of a GPU its name and the driver's id for it, which no CUDA_VISIBLE_DEVICES changes; of a CPU the number of threads."""
    if device.type != "cuda":
        num_threads = torch.get_num_threads()
        return f"{device}, {num_threads} thread{'s' if num_threads > 1 else ''}"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} GPU-{properties.uuid}"


def capabilities_of(
    model: LoadedModel, schedulers: ModelSchedulers, check: Callable[[SamplerRun], object], *, needs_mask: bool = False
) -> Capabilities:
    """The model's limits and defaults with the names of its schedulers. `check` tries a run of one.

    Raises:
        ModelError: the default scheduler cannot draw; the text is for the operator.
    """
    declared, num_steps = model.defaults.scheduler, model.defaults.num_inference_steps
    capabilities = Capabilities(
        limits=model.limits,
        defaults=model.defaults,
        schedulers=schedulers.accepted_names,
        needs_mask=needs_mask,
        parts=parts_of(model.pipeline),
    )
    try:
        name = capabilities.scheduler_named(declared)
        try:
            sampling = check(SamplerRun(name, num_steps))
        except InvalidRequestError as error:
            sampling = check(SamplerRun(name, FEW_STEPS))
            logger.warning("a request that names no num_inference_steps will be refused: the default does not work: %s", error)
    except InvalidRequestError as error:
        is_own = schedulers.accepted_names.get(declared) == DEFAULT_SCHEDULER
        called = f"default scheduler, {schedulers.own_class}," if is_own else f"default scheduler {declared!r}"
        reason = error.rule if error.__cause__ is None else f"{type(error.__cause__).__name__}: {first_line(error.__cause__)}"
        raise ModelError(
            f"{model.name}: its {called} cannot draw: {reason}. Name another in mii_serve_defaults.json, for example"
            ' {"scheduler": "euler"}'
        ) from error
    if isinstance(sampling, Uncompiled):
        logger.warning(
            "the model's default scheduler %s is not compiled: %s. Its samples are stepped one by one, in the same batch",
            schedulers.describe(name, is_compiled=False).class_name,
            sampling.reason,
        )
    return replace(capabilities, defaults=replace(model.defaults, scheduler=name))
