"""What a model declares in `mii_serve_defaults.json`, and how the operator's limits change it.

Every key may be left out:

    scheduler              a name requests can use        else `default`, the model's own scheduler
    num_inference_steps                                   else 50, as in diffusers (4 with a latent consistency pipeline)
    guidance_scale                                        else 7.5 (8.5 with a latent consistency pipeline)
    height, width          multiples of 8                 else the size the UNet was trained for
    min_size_px, max_size_px                              else 64 and 1024

The operator's bounds win over the model's. A default that they forbid is moved to the nearest one they allow.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mii_serve.config import LimitsConfig
from mii_serve.errors import ConfigError, ModelError
from mii_serve.models.check import read_json
from mii_serve.models.hints import MODEL_INDEX
from mii_serve.types import DEFAULT_SCHEDULER, LATENT_SCALE, GenerationDefaults, Limits

DEFAULTS_FILE = "mii_serve_defaults.json"

_logger = logging.getLogger(__name__)


class DeclaredDefaults(BaseModel):
    """The file's content; None where it does not name the key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    scheduler: str | None = Field(None, min_length=1, max_length=80)
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, allow_inf_nan=False)
    height: int | None = Field(None, ge=LATENT_SCALE, multiple_of=LATENT_SCALE)
    width: int | None = Field(None, ge=LATENT_SCALE, multiple_of=LATENT_SCALE)
    min_size_px: int | None = Field(None, ge=LATENT_SCALE, multiple_of=LATENT_SCALE)
    max_size_px: int | None = Field(None, ge=LATENT_SCALE, multiple_of=LATENT_SCALE)


_LCM = DeclaredDefaults(num_inference_steps=4, guidance_scale=8.5)
_OF_PIPELINES = {"LatentConsistencyModelPipeline": _LCM, "LatentConsistencyModelImg2ImgPipeline": _LCM}
"""What diffusers' pipelines draw with where nothing is said, if it is not what `StableDiffusionPipeline` does."""


def defaults_files(folder: Path) -> tuple[Path, ...]:
    """The file where there is one: its content changes pictures."""
    file = folder / DEFAULTS_FILE
    return (file,) if file.is_file() else ()


def read_defaults(folder: Path) -> DeclaredDefaults:
    """What the model declares; where it has no such file, what its pipeline does if that is not the usual.

    Raises:
        ModelError: naming the key and the rule it breaks.
    """
    file = folder / DEFAULTS_FILE
    if not file.is_file():
        return _of_pipeline(folder)
    try:
        declared = DeclaredDefaults.model_validate(read_json(file))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(DeclaredDefaults.model_fields)
            raise ModelError(f"{file}: there is no key {key!r}; the keys are {known}") from None
        raise ModelError(f"{file}: {key}: {problem['msg']}, got {problem['input']!r}") from None
    least, most = _first(declared.min_size_px, Limits().min_size_px), _first(declared.max_size_px, Limits().max_size_px)
    if least > most:
        raise ModelError(f"{file}: min_size_px {least} is more than max_size_px {most}")
    for key, size in (("height", declared.height), ("width", declared.width)):
        if size is not None and not least <= size <= most:
            raise ModelError(f"{file}: {key} {size} is outside of min_size_px {least} to max_size_px {most}")
    return declared


def _of_pipeline(folder: Path) -> DeclaredDefaults:
    if not (folder / MODEL_INDEX).is_file():
        return DeclaredDefaults()
    return _OF_PIPELINES.get(str(read_json(folder / MODEL_INDEX).get("_class_name")), DeclaredDefaults())


def settle(
    declared: DeclaredDefaults, bounds: LimitsConfig, *, sample_size: int | Sequence[int] | None
) -> tuple[GenerationDefaults, Limits]:
    """Combine the model's declaration, its configuration and the operator's bounds.

    Raises:
        ConfigError: the bounds leave no size.
    """
    limits = _limits(declared, bounds)
    height, width = _trained_size(sample_size)
    usual = GenerationDefaults(scheduler=DEFAULT_SCHEDULER)
    wanted = GenerationDefaults(
        scheduler=declared.scheduler or usual.scheduler,
        num_inference_steps=declared.num_inference_steps or usual.num_inference_steps,
        guidance_scale=usual.guidance_scale if declared.guidance_scale is None else declared.guidance_scale,
        height=declared.height or height,
        width=declared.width or width,
    )
    defaults = GenerationDefaults(
        scheduler=wanted.scheduler,
        num_inference_steps=min(wanted.num_inference_steps, limits.max_num_inference_steps),
        guidance_scale=min(wanted.guidance_scale, limits.max_guidance_scale),
        height=_within(wanted.height, limits),
        width=_within(wanted.width, limits),
    )
    if defaults != wanted:
        _logger.warning("the limits forbid the model's defaults: %s became %s", wanted, defaults)
    return defaults, limits


def _limits(declared: DeclaredDefaults, bounds: LimitsConfig) -> Limits:
    least = _first(bounds.min_size_px, declared.min_size_px, Limits().min_size_px)
    most = _first(bounds.max_size_px, declared.max_size_px, Limits().max_size_px)
    if least > most:
        raise ConfigError(
            "limits.min_size_px" if bounds.min_size_px is not None else "limits.max_size_px",
            f"leaves no size: images would need at least {least} and at most {most} pixels; set both min_size_px and"
            " max_size_px, or neither",
        )
    return Limits(
        max_prompt_chars=bounds.max_prompt_chars,
        max_num_inference_steps=bounds.max_num_inference_steps,
        max_guidance_scale=bounds.max_guidance_scale,
        min_size_px=least,
        max_size_px=most,
        max_images_per_prompt=bounds.max_images_per_prompt,
    )


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _trained_size(sample_size: int | Sequence[int] | None) -> tuple[int, int]:
    """Height and width in pixels; 512 where the configuration has none, as in diffusers."""
    if sample_size is None:
        return 512, 512
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return height * LATENT_SCALE, width * LATENT_SCALE


def _within(size: int, limits: Limits) -> int:
    """The bounds are multiples of the latent scale, so the nearest allowed size is one too."""
    return max(limits.min_size_px, min(size, limits.max_size_px))
