"""Which samplers tests go through where all of the grammar's names would take too long, and schedulers for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers

from mii_serve.samplers.build import ModelSchedulers, repaired
from mii_serve.samplers.names import SAMPLERS

USUAL = (
    *("pndm", "ddim", "ddpm", "euler", "euler_karras", "euler_a", "heun", "kdpm2", "kdpm2_a", "lms"),
    *("dpm++_2m", "dpm++_2m_karras", "dpm++_3m", "dpm++_2m_sde", "dpm++_2m_sde_karras", "dpm++_2s"),
    *("unipc", "deis", "lcm", "tcd"),
)
"""One or more of every solver."""

ALL = tuple(name for name, spec in SAMPLERS.items() if spec.class_name != "DPMSolverSDEScheduler")
"""Without those that need a package which is not among this project's."""


def schedulers(config: Mapping[str, Any], class_name: str = "PNDMScheduler") -> ModelSchedulers:
    """Those of a model whose scheduler_config.json says this."""
    return ModelSchedulers(repaired(getattr(diffusers, class_name).from_config(dict(config))))
