"""Scheduler configs as model folders hold them, by name: what `scheduler/scheduler_config.json` says, `_class_name` included.

`LINEAR` ones make each step out of a linear combination of what they remember, so an engine may compile them. `NOT_LINEAR` ones
do not, or remember too much for a table, and have to be drawn through the scheduler object itself. `NAMED` are samplers
that a request may ask for by name on any model, and what each means to a user of diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
"""What Stable Diffusion v1 was trained with."""

SD = {**BETAS, "steps_offset": 1, "trained_betas": None}
EPSILON_MODEL_SIGMAS = {"sigma_min": 0.0292, "sigma_max": 14.6146}


def _pndm(**options: Any) -> Config:
    return {"_class_name": "PNDMScheduler", **SD, "set_alpha_to_one": False, "skip_prk_steps": True, **options}


def _ddim(**options: Any) -> Config:
    return {"_class_name": "DDIMScheduler", **SD, "clip_sample": False, "set_alpha_to_one": False, **options}


def _ddpm(**options: Any) -> Config:
    return {"_class_name": "DDPMScheduler", **BETAS, "clip_sample": False, **options}


def _euler(**options: Any) -> Config:
    return {"_class_name": "EulerDiscreteScheduler", **SD, **options}


def _euler_a(**options: Any) -> Config:
    return {"_class_name": "EulerAncestralDiscreteScheduler", **SD, **options}


def _sigmas(class_name: str, **options: Any) -> Config:
    return {"_class_name": class_name, **SD, **options}


def _dpm(**options: Any) -> Config:
    return {"_class_name": "DPMSolverMultistepScheduler", **SD, **options}


def _dpm_single(**options: Any) -> Config:
    return {"_class_name": "DPMSolverSinglestepScheduler", **BETAS, **options}


def _unipc(**options: Any) -> Config:
    return {"_class_name": "UniPCMultistepScheduler", **SD, **options}


LINEAR: Mapping[str, Config] = {
    # PNDM, which Stable Diffusion v1 came with
    "pndm": _pndm(),
    "pndm without steps_offset": {key: value for key, value in _pndm().items() if key != "steps_offset"},
    "pndm with steps_offset 0": _pndm(steps_offset=0),
    "pndm trailing": _pndm(timestep_spacing="trailing"),
    "pndm linspace": _pndm(timestep_spacing="linspace"),
    "pndm v-prediction": _pndm(prediction_type="v_prediction"),
    "pndm set_alpha_to_one": _pndm(set_alpha_to_one=True),
    # DDIM
    "ddim": _ddim(),
    "ddim without clip_sample": {key: value for key, value in _ddim().items() if key != "clip_sample"},
    "ddim with clip_sample true": _ddim(clip_sample=True),
    "ddim with betas only": {"_class_name": "DDIMScheduler", **BETAS},
    "ddim set_alpha_to_one": _ddim(set_alpha_to_one=True),
    "ddim v-prediction, zero snr, trailing": _ddim(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "ddim predicting the sample": _ddim(prediction_type="sample"),
    "ddim linspace": _ddim(timestep_spacing="linspace"),
    "ddim linear betas": _ddim(beta_schedule="linear"),
    "ddim cosine betas": _ddim(beta_schedule="squaredcos_cap_v2"),
    "ddim trained betas": _ddim(trained_betas=[0.00085 + 0.0112 * (i / 999) ** 2 for i in range(1000)]),
    "ddim parallel": _ddim(_class_name="DDIMParallelScheduler"),
    # DDPM
    "ddpm": _ddpm(),
    "ddpm without clip_sample": {key: value for key, value in _ddpm().items() if key != "clip_sample"},
    "ddpm fixed_small_log": _ddpm(variance_type="fixed_small_log"),
    "ddpm fixed_large": _ddpm(variance_type="fixed_large"),
    "ddpm trailing": _ddpm(timestep_spacing="trailing"),
    "ddpm v-prediction": _ddpm(prediction_type="v_prediction"),
    "ddpm parallel": _ddpm(_class_name="DDPMParallelScheduler"),
    # Euler
    "euler": _euler(),
    "euler leading": _euler(timestep_spacing="leading"),
    "euler leading without steps_offset": {
        "_class_name": "EulerDiscreteScheduler",
        **BETAS,
        "timestep_spacing": "leading",
    },
    "euler trailing": _euler(timestep_spacing="trailing"),
    "euler karras": _euler(use_karras_sigmas=True),
    "euler exponential": _euler(use_exponential_sigmas=True),
    "euler beta": _euler(use_beta_sigmas=True),
    "euler v-prediction": _euler(prediction_type="v_prediction"),
    "euler v-prediction, zero snr, trailing": _euler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "euler v-prediction, continuous": _euler(
        prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=14.0, use_karras_sigmas=True
    ),
    "euler log-linear": _euler(interpolation_type="log_linear"),
    "euler karras, own sigmas": _euler(use_karras_sigmas=True, sigma_min=0.1, sigma_max=10.0),
    "euler ending at sigma_min": _euler(final_sigmas_type="sigma_min"),
    "euler predicting the sample": _euler(prediction_type="sample"),
    "euler_a": _euler_a(),
    "euler_a leading": _euler_a(timestep_spacing="leading"),
    "euler_a v-prediction, zero snr, trailing": _euler_a(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    # second order
    "heun": _sigmas("HeunDiscreteScheduler"),
    "heun karras": _sigmas("HeunDiscreteScheduler", use_karras_sigmas=True),
    "heun exponential": _sigmas("HeunDiscreteScheduler", use_exponential_sigmas=True),
    "heun beta, v-prediction": _sigmas("HeunDiscreteScheduler", use_beta_sigmas=True, prediction_type="v_prediction"),
    "kdpm2": _sigmas("KDPM2DiscreteScheduler"),
    "kdpm2 karras": _sigmas("KDPM2DiscreteScheduler", use_karras_sigmas=True),
    "kdpm2 exponential": _sigmas("KDPM2DiscreteScheduler", use_exponential_sigmas=True),
    "kdpm2_a": _sigmas("KDPM2AncestralDiscreteScheduler"),
    "kdpm2_a karras": _sigmas("KDPM2AncestralDiscreteScheduler", use_karras_sigmas=True),
    "lms": _sigmas("LMSDiscreteScheduler"),
    "lms karras": _sigmas("LMSDiscreteScheduler", use_karras_sigmas=True),
    "lms exponential": _sigmas("LMSDiscreteScheduler", use_exponential_sigmas=True),
    "lms beta": _sigmas("LMSDiscreteScheduler", use_beta_sigmas=True),
    # DPM-Solver
    "dpm": _dpm(),
    "dpm order 1": _dpm(solver_order=1),
    "dpm order 3, karras": _dpm(solver_order=3, use_karras_sigmas=True),
    "dpm heun, not lower_order_final": _dpm(solver_type="heun", lower_order_final=False),
    "dpm euler_at_final": _dpm(euler_at_final=True, use_karras_sigmas=True),
    "dpm lu": _dpm(use_lu_lambdas=True),
    "dpm exponential": _dpm(use_exponential_sigmas=True),
    "dpm beta": _dpm(use_beta_sigmas=True),
    "dpm sde, karras": _dpm(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True),
    "dpm sde, order 1": _dpm(algorithm_type="sde-dpmsolver++", solver_order=1),
    "dpm sde, heun": _dpm(algorithm_type="sde-dpmsolver++", solver_type="heun"),
    "dpm sde, order 3": _dpm(algorithm_type="sde-dpmsolver++", solver_order=3, use_exponential_sigmas=True),
    "dpm dpmsolver": _dpm(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "dpm sde-dpmsolver": _dpm(algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"),
    "dpm trailing": _dpm(timestep_spacing="trailing"),
    "dpm leading": _dpm(timestep_spacing="leading"),
    "dpm v-prediction, zero snr, trailing": _dpm(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "dpm predicting the sample": _dpm(prediction_type="sample"),
    "dpm clipped lambda, cosine betas": _dpm(lambda_min_clipped=-5.1, beta_schedule="squaredcos_cap_v2"),
    "dpm flow": _dpm(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "dpm single": _dpm_single(),
    "dpm single order 1": _dpm_single(solver_order=1, lower_order_final=True),
    "dpm single order 3, karras": _dpm_single(solver_order=3, use_karras_sigmas=True),
    "dpm single heun, lower_order_final": _dpm_single(solver_type="heun", lower_order_final=True),
    "dpm single v-prediction": _dpm_single(prediction_type="v_prediction", use_exponential_sigmas=True),
    # UniPC, DEIS
    "unipc": _unipc(),
    "unipc order 1": _unipc(solver_order=1),
    "unipc order 3": _unipc(solver_order=3),
    "unipc bh1": _unipc(solver_type="bh1", final_sigmas_type="sigma_min"),
    "unipc epsilon inside": _unipc(predict_x0=False, final_sigmas_type="sigma_min"),
    "unipc without corrector": _unipc(disable_corrector=[0, 1]),
    "unipc karras, v-prediction": _unipc(use_karras_sigmas=True, prediction_type="v_prediction"),
    "unipc flow": _unipc(prediction_type="flow_prediction", use_flow_sigmas=True),
    "deis": _sigmas("DEISMultistepScheduler"),
    "deis order 1": _sigmas("DEISMultistepScheduler", solver_order=1),
    "deis order 3, karras": _sigmas("DEISMultistepScheduler", solver_order=3, use_karras_sigmas=True),
    "deis exponential": _sigmas("DEISMultistepScheduler", use_exponential_sigmas=True),
    # few steps
    "lcm": {"_class_name": "LCMScheduler", **SD, "set_alpha_to_one": False, "clip_sample": False},
    "lcm of 100 original steps": {
        "_class_name": "LCMScheduler",
        **BETAS,
        "original_inference_steps": 100,
        "timestep_scaling": 5.0,
    },
    "tcd": {"_class_name": "TCDScheduler", **SD, "set_alpha_to_one": False, "clip_sample": False},
}

NOT_LINEAR: Mapping[str, Config] = {
    "pndm with Runge-Kutta steps": _pndm(skip_prk_steps=False),
    "pndm with betas only": {"_class_name": "PNDMScheduler", **BETAS},
    "ddim thresholding": _ddim(thresholding=True, sample_max_value=3.0),
    "ddpm thresholding": _ddpm(thresholding=True, sample_max_value=3.0),
    "dpm thresholding": _dpm(thresholding=True, sample_max_value=3.0),
    "dpm single thresholding": _dpm_single(thresholding=True, sample_max_value=3.0),
    "unipc thresholding": _unipc(thresholding=True, sample_max_value=3.0),
    "deis thresholding": _sigmas("DEISMultistepScheduler", thresholding=True, sample_max_value=3.0),
    "sasolver": {"_class_name": "SASolverScheduler", **SD},
    "sasolver karras, order 3": {
        "_class_name": "SASolverScheduler",
        **SD,
        "use_karras_sigmas": True,
        "predictor_order": 3,
        "corrector_order": 3,
    },
    "ipndm": {"_class_name": "IPNDMScheduler", "num_train_timesteps": 1000},
    "edm euler": {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, **EPSILON_MODEL_SIGMAS},
    "edm dpm": {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 1.0, **EPSILON_MODEL_SIGMAS},
    "edm dpm sde": {
        "_class_name": "EDMDPMSolverMultistepScheduler",
        "sigma_data": 1.0,
        "algorithm_type": "sde-dpmsolver++",
        **EPSILON_MODEL_SIGMAS,
    },
    "consistency": {"_class_name": "CMStochasticIterativeScheduler", "sigma_max": 14.6, "clip_denoised": False},
    "dpm inverse": _sigmas("DPMSolverMultistepInverseScheduler"),
}
"""Or so they may be: an engine that can compile one of them may."""

SCHEDULER_CONFIGS: Mapping[str, Config] = {**LINEAR, **NOT_LINEAR}

_PLAIN_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_PLAIN_DPM = {**_PLAIN_SIGMAS, "use_lu_lambdas": False, "steps_offset": 1, "solver_order": 2}

NAMED: Mapping[str, tuple[str, Config]] = {
    "pndm": ("PNDMScheduler", {"steps_offset": 1, "skip_prk_steps": True}),
    "ddim": ("DDIMScheduler", {"steps_offset": 1, "clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"steps_offset": 1, "clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {"steps_offset": 1, **_PLAIN_SIGMAS}),
    "euler_karras": ("EulerDiscreteScheduler", {"steps_offset": 1, **_PLAIN_SIGMAS, "use_karras_sigmas": True}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {"steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", {"steps_offset": 1, "clip_sample": False, **_PLAIN_SIGMAS}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {**_PLAIN_DPM, "algorithm_type": "dpmsolver++"}),
    "dpm++_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {**_PLAIN_DPM, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {"steps_offset": 1, **_PLAIN_SIGMAS}),
}
"""A diffusers class and what a user would hand to its `from_config` beside the pipeline's own config."""
