"""Compiles a linear diffusers scheduler into one small matrix per UNet call, by running the scheduler itself.

Every sampler this server knows makes its step out of seven things: the latents now and one call ago, three remembered history
entries, the model output, and fresh noise. What it makes of them are two linear combinations:

    history  h_k     = p·x_k + q·out_k                      (the model output, or the clean latents or slope it stands for)
    latents  x_{k+1} = a·x_k + a'·x_{k-1} + b0·h_k + b1·h_{k-1} + b2·h_{k-2} + b3·h_{k-3} + n·noise

The coefficients come from a run of the real scheduler on random probe vectors: what `step` returns lies in the span of vectors
we know, and least squares names it. A second run on other, large vectors proves the table; a scheduler that clips, thresholds
or is not linear in another way does not pass. Nothing of a sampler is written down here, so that fixes in diffusers come along.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mii_serve.errors import InvalidRequestError
from mii_serve.samplers.build import REFUSALS, make_scheduler, refusal, step_kwargs

Array = npt.NDArray[np.float64]

STATE_PLANES = 5
"""What a sample keeps between calls: latents now, latents one call ago, the last three history entries."""

INPUT_PLANES = STATE_PLANES + 2
"""The state, the model output, the noise: what `matrices` multiply."""

NUM_PROBE_VALUES = 64
SIMPLE_ENOUGH = 2e-7
"""Relative residual at which fewer terms are taken instead of more; some schedulers compute in float32 inside."""
LINEAR_ENOUGH = 1e-5
"""Relative residual of the proof; float32 inside a scheduler stays two orders below, clipping two orders above."""

MAX_CACHED_TABLES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerTable:
    """What one sampler does in a run of so many steps; the first axis of each array counts UNet calls.

    The UNet gets `input_scale` × latents and `timesteps`. New state = `matrices` (5 × 7) × (state, model output, noise).
    Clean latents are estimated as x0[0] × (what the UNet got) + x0[1] × (what it answered).
    """

    sampler: str
    num_inference_steps: int
    init_noise_sigma: float
    timesteps: Array
    input_scale: npt.NDArray[np.float32]
    matrices: npt.NDArray[np.float32]
    x0: npt.NDArray[np.float32]
    draws_noise: tuple[bool, ...]
    """Whether diffusers takes noise from the sample's generator in this call, used or not: one draw of the latents' shape."""

    @property
    def num_calls(self) -> int:
        return len(self.timesteps)


_cache: OrderedDict[tuple[str, str, int], SamplerTable] = OrderedDict()
_cache_lock = threading.Lock()


def compile_table(model_config: dict[str, Any], sampler: str, num_inference_steps: int) -> SamplerTable:
    """The table of a sampler of `SAMPLERS` for the model's scheduler config, from the cache where it has been made before.

    Raises:
        InvalidRequestError: the sampler cannot make that many steps, or is not linear with this model's settings.
    """
    key = json.dumps(model_config, sort_keys=True, default=str), sampler, num_inference_steps
    with _cache_lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
    table = _compile(model_config, sampler, num_inference_steps)
    with _cache_lock:
        _cache[key] = table
        while len(_cache) > MAX_CACHED_TABLES:
            _cache.popitem(last=False)
    return table


@dataclass(slots=True)
class _Run:
    """A recorded run of the real scheduler; all vectors are rows of float64, `noise` is None where none was drawn."""

    scheduler: Any
    x: list[Array]
    out: list[Array]
    noise: list[Array | None]
    scaled: list[Array]


def _compile(model_config: dict[str, Any], sampler: str, num_inference_steps: int) -> SamplerTable:
    run = _record(model_config, sampler, num_inference_steps, seed=1, amplitude=1.0)
    proof = _record(model_config, sampler, num_inference_steps, seed=2, amplitude=30.0)
    worst = np.inf
    for history in _histories(run.scheduler, len(run.out)):
        coefficients = [_solve(run, k, history) for k in range(len(run.out))]
        residuals = [_residual(_explained(proof, k, history, c), proof.x[k + 1]) for k, c in enumerate(coefficients)]
        if (worst := min(worst, max(residuals))) <= LINEAR_ENOUGH:
            return _table(run, sampler, num_inference_steps, history, coefficients)
    raise _not_linear(run.scheduler, sampler, float(worst))


def _record(model_config: dict[str, Any], sampler: str, num_inference_steps: int, *, seed: int, amplitude: float) -> _Run:
    scheduler = make_scheduler(model_config, sampler, num_inference_steps, torch.device("cpu"))
    # Different seeds: noise that repeats a probe could not be told from it.
    probes, generator = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)
    kwargs = step_kwargs(scheduler, generator)
    shape = (1, 1, 1, NUM_PROBE_VALUES)

    def probe() -> torch.Tensor:
        return amplitude * torch.randn(shape, generator=probes, dtype=torch.float64)

    sample = probe() * scheduler.init_noise_sigma
    run = _Run(scheduler, [_row(sample)], [], [], [])
    try:
        for timestep in scheduler.timesteps:
            run.scaled.append(_row(scheduler.scale_model_input(sample, timestep)))
            model_output = probe()
            before = generator.get_state()
            sample = scheduler.step(model_output, timestep, sample, **kwargs, return_dict=False)[0]
            run.out.append(_row(model_output))
            run.noise.append(_drawn_since(before, generator, shape))
            run.x.append(_row(sample))
            # Some schedulers answer in float32; carrying on in float64 keeps the columns of the next call exact.
            sample = sample.double()
    except REFUSALS as error:
        raise refusal(sampler, num_inference_steps, f"{type(error).__name__} on the way: {str(error)[:100]}") from error
    if not all(np.isfinite(x).all() for x in run.x):
        raise refusal(sampler, num_inference_steps, "its result would not be finite")
    return run


def _row(tensor: torch.Tensor) -> Array:
    return np.array(tensor.double().flatten().numpy())


def _drawn_since(before: torch.Tensor, generator: torch.Generator, shape: tuple[int, ...]) -> Array | None:
    """The noise that was drawn, by drawing it again: in one piece of the sample's shape, which is how all of them draw."""
    after = generator.get_state()
    if torch.equal(before, after):
        return None
    for dtype in (torch.float64, torch.float32):  # the model output's dtype, or float32 whatever that is
        again = torch.Generator()
        again.set_state(before)
        noise = torch.randn(shape, generator=again, dtype=dtype)
        if torch.equal(again.get_state(), after):
            return _row(noise)
    raise InvalidRequestError("scheduler", "must draw its noise in one piece of the latents' shape")


def _histories(scheduler: Any, num_calls: int) -> list[Array]:
    """(p, q) per call: the model output; then, where the scheduler goes by noise levels, what it makes of the output."""
    histories = [np.tile([0.0, 1.0], (num_calls, 1))]
    if not hasattr(scheduler, "sigmas"):
        return histories
    kind, sigmas = scheduler.config.prediction_type, np.array(scheduler.sigmas[:num_calls], dtype=np.float64)
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        levels = [scheduler._sigma_to_alpha_sigma_t(torch.tensor(sigma)) for sigma in sigmas]
        histories.append(np.array([_clean(kind, float(alpha), float(sigma)) for alpha, sigma in levels]))
    elif kind == "v_prediction":
        histories.append(np.stack([sigmas / (sigmas**2 + 1), 1 / np.sqrt(sigmas**2 + 1)], axis=1))
    elif kind == "sample":
        histories.append(np.stack([1 / sigmas, -1 / sigmas], axis=1))
    return histories


def _clean(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Clean latents = first × noisy latents + second × model output (Salimans and Ho 2022, appendix D)."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    return (alpha, -sigma) if prediction_type == "v_prediction" else (0.0, 1.0)


def _columns(run: _Run, k: int, history: Array) -> list[Array]:
    """The vectors that call k may combine, in the order x, x', h_k … h_{k-3}, noise; zeros before the beginning."""
    nothing = np.zeros_like(run.x[0])
    entries = [history[i, 0] * run.x[i] + history[i, 1] * run.out[i] if i >= 0 else nothing for i in range(k, k - 4, -1)]
    noise = run.noise[k]
    return [run.x[k], run.x[k - 1] if k else nothing, *entries, nothing if noise is None else noise]


def _explained(run: _Run, k: int, history: Array, coefficients: Array) -> Array:
    return np.array(coefficients @ np.stack(_columns(run, k, history)))


def _residual(found: Array, true: Array) -> float:
    return float(np.linalg.norm(found - true) / max(float(np.linalg.norm(true)), 1e-30))


def _solve(run: _Run, k: int, history: Array) -> Array:
    """The fewest terms that explain call k, or all of them; latents one call ago come last, being nearly those of now."""
    columns = np.stack(_columns(run, k, history))
    lengths = np.linalg.norm(columns, axis=1)
    best = np.zeros(len(columns))
    for wanted in ((0, 2, 6), (0, 2, 3, 4, 5, 6), (0, 1, 2, 3, 4, 5, 6)):
        used = [i for i in wanted if lengths[i] > 0]
        scaled = (columns[used] / lengths[used, None]).T
        best = np.zeros(len(columns))
        best[used] = np.linalg.lstsq(scaled, run.x[k + 1], rcond=None)[0] / lengths[used]
        if _residual(best @ columns, run.x[k + 1]) <= SIMPLE_ENOUGH:
            break
    return best


def _table(run: _Run, sampler: str, num_inference_steps: int, history: Array, coefficients: list[Array]) -> SamplerTable:
    matrices = np.zeros((len(coefficients), STATE_PLANES, INPUT_PLANES))
    for k, (a, a_before, b0, b1, b2, b3, n) in enumerate(coefficients):
        p, q = history[k]
        matrices[k, 0] = [a + b0 * p, a_before, b1, b2, b3, b0 * q, n]
        matrices[k, 1, 0] = 1  # latents now become latents one call ago
        matrices[k, 2, [0, 5]] = p, q
        matrices[k, 3, 2] = matrices[k, 4, 3] = 1  # the history moves on
    timesteps = np.array([float(t) for t in run.scheduler.timesteps])
    scales = [scaled @ x / (x @ x) for scaled, x in zip(run.scaled, run.x[:-1], strict=True)]
    return SamplerTable(
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        init_noise_sigma=float(run.scheduler.init_noise_sigma),
        timesteps=timesteps,
        input_scale=np.array(scales, dtype=np.float32),
        matrices=matrices.astype(np.float32),
        x0=x0_coefficients(run.scheduler, *timesteps.tolist()).numpy(),
        draws_noise=tuple(noise is not None for noise in run.noise),
    )


def x0_coefficients(scheduler: Any, *timesteps: float) -> torch.Tensor:
    """What `estimate_x0` needs, N × 2 in float32.

    Whatever a sampler's own scaling is, its UNet input has variance-preserving noise of the level of its timestep.
    """
    alphas_cumprod = scheduler.alphas_cumprod.double().cpu().numpy()
    at = np.interp(timesteps, np.arange(len(alphas_cumprod)), alphas_cumprod)
    kind = scheduler.config.prediction_type
    return torch.tensor([_clean(kind, a**0.5, (1 - a) ** 0.5) for a in at.tolist()], dtype=torch.float32)


def _not_linear(scheduler: Any, sampler: str, residual: float) -> InvalidRequestError:
    guilty = [option for option in ("clip_sample", "thresholding") if scheduler.config.get(option)]
    cause = " and ".join(f"{option}=True" for option in guilty) or f"unknown, residual {residual:.1e}"
    others = ", ".join(itertools.islice((n for n in ("euler", "dpm++_2m", "pndm") if n != sampler), 2))
    rule = (
        f"must be linear in the model output, which {sampler} is not with this model's scheduler config ({cause}); try {others}"
    )
    return InvalidRequestError("scheduler", rule, repr(sampler))
