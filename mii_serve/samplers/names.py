"""The names a request can call a sampler by. No torch: the front process reads this table too.

Short names follow what image-generation tools commonly show; the diffusers class names are accepted as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from mii_serve.errors import ModelError


@dataclass(frozen=True, slots=True)
class SamplerSpec:
    """A diffusers scheduler class and the settings that make it this sampler; the rest is the model's own config."""

    class_name: str
    overrides: Mapping[str, object] = field(default_factory=dict)


def _dpm(order: int, algorithm: str = "dpmsolver++", *, karras: bool = False) -> SamplerSpec:
    overrides = {"algorithm_type": algorithm, "solver_order": order, "use_karras_sigmas": karras}
    return SamplerSpec("DPMSolverMultistepScheduler", overrides)


SAMPLERS: Mapping[str, SamplerSpec] = MappingProxyType(
    {
        "pndm": SamplerSpec("PNDMScheduler"),
        "ddim": SamplerSpec("DDIMScheduler"),
        "ddpm": SamplerSpec("DDPMScheduler"),
        "euler": SamplerSpec("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
        "euler_karras": SamplerSpec("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        "euler_a": SamplerSpec("EulerAncestralDiscreteScheduler"),
        "heun": SamplerSpec("HeunDiscreteScheduler", {"use_karras_sigmas": False}),
        "kdpm2": SamplerSpec("KDPM2DiscreteScheduler", {"use_karras_sigmas": False}),
        "kdpm2_a": SamplerSpec("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": False}),
        "lms": SamplerSpec("LMSDiscreteScheduler", {"use_karras_sigmas": False}),
        "dpm++_2m": _dpm(2),
        "dpm++_2m_karras": _dpm(2, karras=True),
        "dpm++_3m": _dpm(3),
        "dpm++_2m_sde": _dpm(2, "sde-dpmsolver++"),
        "dpm++_2m_sde_karras": _dpm(2, "sde-dpmsolver++", karras=True),
        "dpm++_2s": SamplerSpec("DPMSolverSinglestepScheduler", {"use_karras_sigmas": False}),
        "unipc": SamplerSpec("UniPCMultistepScheduler", {"use_karras_sigmas": False}),
        "deis": SamplerSpec("DEISMultistepScheduler", {"use_karras_sigmas": False}),
        "lcm": SamplerSpec("LCMScheduler"),
        "tcd": SamplerSpec("TCDScheduler"),
    }
)

_OTHER_NAMES = {"euler_ancestral": "euler_a", "dpm2": "kdpm2", "dpm2_a": "kdpm2_a", "dpm++": "dpm++_2m"}


def _accepted_names() -> Mapping[str, str]:
    names = {name: name for name in SAMPLERS} | _OTHER_NAMES
    for name, spec in SAMPLERS.items():
        names.setdefault(spec.class_name, name)
        names.setdefault(spec.class_name.lower(), name)
    return MappingProxyType(names)


ACCEPTED_NAMES = _accepted_names()
"""Every accepted spelling, and the short name it stands for."""


def short_name(model_scheduler: str) -> str:
    """The short name of the scheduler a model declares.

    Raises:
        ModelError: it is not one of `SAMPLERS`.
    """
    name = ACCEPTED_NAMES.get(model_scheduler)
    if name is None:
        known = ", ".join(sorted({spec.class_name for spec in SAMPLERS.values()}))
        raise ModelError(f"the model's default scheduler {model_scheduler!r} is not supported; supported are {known}")
    return name
