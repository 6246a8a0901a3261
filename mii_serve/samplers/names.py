"""The names a request can call a sampler by. No torch, so that the names alone cost nothing to import.

A name is a solver and, after it, how the noise levels are spaced: `euler`, `heun_karras`, `dpm++_3m_sde_exponential`.

- Solvers with orders name the order (`unipc_3`); without it the model's own order stays (`unipc`).
- DPM-Solver names its kind: `dpm++` or `dpm` (the older algorithm, which ends at the last noise level of the training), the
  order, `m` for multistep or `s` for singlestep, and `sde` for the stochastic variant.
- Spacings are `karras`, `exponential`, `beta`, `lu` (uniform log-SNR) and `flow`, for the classes that have them. A name
  without one means none of the first four, whatever the model's config has; flow is a property of the model and stays unless
  named.

Every other setting is the model's own. The model's scheduler itself, every option of it, is called `default`, and a diffusers
class name means that class with the model's config and nothing else (`samplers/build.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class SamplerSpec:
    """A diffusers scheduler class and the settings that make it this sampler; the rest is the model's own config."""

    class_name: str
    overrides: Mapping[str, object] = field(default_factory=dict)


_SPACINGS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
    "flow": "use_flow_sigmas",
}
_THREE = ("karras", "exponential", "beta")
_SPACINGS_OF: Mapping[str, tuple[str, ...]] = {
    "EulerDiscreteScheduler": _THREE,
    "HeunDiscreteScheduler": _THREE,
    "KDPM2DiscreteScheduler": _THREE,
    "KDPM2AncestralDiscreteScheduler": _THREE,
    "LMSDiscreteScheduler": _THREE,
    "DPMSolverMultistepScheduler": (*_THREE, "lu", "flow"),
    "DPMSolverSinglestepScheduler": (*_THREE, "flow"),
    "UniPCMultistepScheduler": (*_THREE, "flow"),
    "DEISMultistepScheduler": (*_THREE, "flow"),
    "SASolverScheduler": (*_THREE, "flow"),
    "DPMSolverSDEScheduler": _THREE,
}
_ORDERS = (1, 2, 3)


def _solvers() -> Iterator[tuple[str, SamplerSpec]]:
    """The names before their spacings. What an algorithm cannot be without, in whatever config, is among its settings."""
    # As Stable Diffusion means them: its pipeline never clips, and its PNDM never takes Runge-Kutta steps.
    yield "pndm", SamplerSpec("PNDMScheduler", {"skip_prk_steps": True})
    yield "ddim", SamplerSpec("DDIMScheduler")
    yield "ddpm", SamplerSpec("DDPMScheduler")
    yield "euler", SamplerSpec("EulerDiscreteScheduler")
    yield "euler_a", SamplerSpec("EulerAncestralDiscreteScheduler")
    yield "heun", SamplerSpec("HeunDiscreteScheduler")
    yield "kdpm2", SamplerSpec("KDPM2DiscreteScheduler")
    yield "kdpm2_a", SamplerSpec("KDPM2AncestralDiscreteScheduler")
    yield "lms", SamplerSpec("LMSDiscreteScheduler")
    yield "ipndm", SamplerSpec("IPNDMScheduler")
    yield "lcm", SamplerSpec("LCMScheduler")
    yield "tcd", SamplerSpec("TCDScheduler")
    yield "sa_solver", SamplerSpec("SASolverScheduler", {"algorithm_type": "data_prediction"})
    yield "dpm++_sde", SamplerSpec("DPMSolverSDEScheduler")
    yield from _dpm("++", "dpmsolver++", {})
    yield from _dpm("", "dpmsolver", {"final_sigmas_type": "sigma_min"})
    for name, class_name, settings in (
        ("unipc", "UniPCMultistepScheduler", {}),
        ("deis", "DEISMultistepScheduler", {"algorithm_type": "deis"}),
    ):
        yield name, SamplerSpec(class_name, settings)
        for order in _ORDERS:
            yield f"{name}_{order}", SamplerSpec(class_name, {**settings, "solver_order": order})


def _dpm(mark: str, algorithm: str, settings: Mapping[str, object]) -> Iterator[tuple[str, SamplerSpec]]:
    for order in _ORDERS:
        for suffix, kind in (("", ""), ("_sde", "sde-")):
            for letter, class_name in (("m", "DPMSolverMultistepScheduler"), ("s", "DPMSolverSinglestepScheduler")):
                if kind and (letter == "s" or not mark) and (order == 3 or (not mark and letter == "s")):
                    continue  # diffusers has no such solver
                overrides = {**settings, "algorithm_type": kind + algorithm, "solver_order": order}
                if letter == "m" and not mark:
                    overrides["euler_at_final"] = True  # a higher order would divide by the last step's length, which is zero
                yield f"dpm{mark}_{order}{letter}{suffix}", SamplerSpec(class_name, overrides)


def _samplers() -> Iterator[tuple[str, SamplerSpec]]:
    for name, solver in _solvers():
        spacings = _SPACINGS_OF.get(solver.class_name, ())
        none = {_SPACINGS[spacing]: False for spacing in spacings if spacing != "flow"}
        yield name, SamplerSpec(solver.class_name, {**solver.overrides, **none})
        for spacing in spacings:
            yield f"{name}_{spacing}", SamplerSpec(solver.class_name, {**solver.overrides, **none, _SPACINGS[spacing]: True})


SAMPLERS: Mapping[str, SamplerSpec] = MappingProxyType(dict(_samplers()))

OTHER_CLASSES = ("DDIMParallelScheduler", "DDPMParallelScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
"""Classes that are known by their class name only."""

CLASS_NAMES = tuple(sorted({spec.class_name for spec in SAMPLERS.values()} | set(OTHER_CLASSES)))

OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {"euler_ancestral": "euler_a", "dpm2": "kdpm2", "dpm2_a": "kdpm2_a", "dpm++": "dpm++_2m"}
)
"""Spellings that image-generation tools show for the same samplers."""
