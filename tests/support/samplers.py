"""Which samplers tests go through where all of the grammar's names would take too long, and schedulers for them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

import mii_serve.models
from mii_serve.samplers.build import ModelSchedulers, repaired
from mii_serve.samplers.names import SAMPLERS
from mii_serve.samplers.run import SamplerRun
from mii_serve.samplers.sampling import Samplings
from mii_serve.samplers.table import SamplerTable

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


CONFIG = json.loads((Path(mii_serve.models.__file__).parent / "demo" / "scheduler" / "scheduler_config.json").read_text())


CPU = torch.device("cpu")


def kept_schedulers(config: Mapping[str, Any]) -> ModelSchedulers:
    """The same object for the same config: some classes take half a second to be made."""
    return _kept(json.dumps(config, sort_keys=True))[0]


def compile_table(config: Mapping[str, Any], sampler: str, num_steps: int) -> SamplerTable:
    found = _kept(json.dumps(config, sort_keys=True))[1].of(SamplerRun(sampler, num_steps))
    assert isinstance(found, SamplerTable), found
    return found


@functools.cache
def _kept(config: str) -> tuple[ModelSchedulers, Samplings]:
    found = schedulers(json.loads(config))
    return found, Samplings(found)


SD_V1_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}


SD_V1 = schedulers(SD_V1_CONFIG)
