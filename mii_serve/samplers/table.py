"""Compiles a linear diffusers scheduler into one small matrix per UNet call, by running the scheduler itself.

Every linear sampler makes its step out of seven things: the latents now and one call ago, three remembered history entries, the
model output, and fresh noise. What it makes of them are two linear combinations:

    history  h_k     = p·x_k + q·out_k                      (the model output, or the clean latents or slope it stands for)
    latents  x_{k+1} = a·x_k + a'·x_{k-1} + b0·h_k + b1·h_{k-1} + b2·h_{k-2} + b3·h_{k-3} + n·noise

The coefficients come from a run of the real scheduler on random probe vectors: what `step` returns lies in the span of vectors
we know, and least squares names it. Where the latents are changed between two calls, as inpainting does, each call gets fresh
ones, so that nothing is explained by what they were before they were changed. A second run on other, large vectors proves the
table; a scheduler that clips, thresholds or is not linear in another way does not pass, and its samples are stepped by
scheduler objects (`samplers/sampling.py`). Nothing of a sampler is written down here, so that fixes in diffusers come along.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mii_serve.samplers.build import REFUSALS, ModelSchedulers, first_call, first_line, noise_level, step_kwargs
from mii_serve.samplers.preview import clean_latents, x0_coefficients
from mii_serve.samplers.run import SamplerRun

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


class NotCompiledError(Exception):
    """The scheduler cannot be compiled; the text gives the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerTable:
    """What one sampler does in a run of so many steps; the first axis of each array counts UNet calls.

    The UNet gets `input_scale` × latents and `timesteps`. New state = `matrices` (5 × 7) × (state, model output, noise).
    Clean latents are estimated as x0[0] × (UNet input) + x0[1] × (UNet output).
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
    noise_levels: tuple[tuple[float, float], ...] | None
    """Before each call, the factors of an image's latents and of the noise that make its noisy latents; after the last call the
    image's latents alone. None where the scheduler cannot add noise."""

    @property
    def num_calls(self) -> int:
        return len(self.timesteps)


@dataclass(slots=True)
class _Run:
    """A recorded run of the real scheduler from its call `first` on.

    All vectors are rows of float64: `step` makes `y` of `x` and `out`; `noise` is None where none was drawn.
    """

    scheduler: Any
    first: int
    x: list[Array] = field(default_factory=list)
    y: list[Array] = field(default_factory=list)
    out: list[Array] = field(default_factory=list)
    noise: list[Array | None] = field(default_factory=list)
    scaled: list[Array] = field(default_factory=list)
    kept: list[dict[str, Array]] = field(default_factory=list)
    levels: list[tuple[float, float]] = field(default_factory=list)

    @property
    def timesteps(self) -> Any:
        return self.scheduler.timesteps[self.first :]


def compile_table(schedulers: ModelSchedulers, run: SamplerRun, *, is_blended: bool = False) -> SamplerTable:
    """The table of a sampler's run. `is_blended`: the latents are changed between the calls.

    Raises:
        InvalidRequestError: the sampler cannot make these steps, or this model's config has no such sampler.
        NotCompiledError: it is not linear, or fails on the way; then it may still work as an object.
    """
    recorded, proof = (
        _record(schedulers, run, seed=seed, amplitude=amplitude, is_blended=is_blended)
        for seed, amplitude in ((1, 1.0), (2, 30.0))
    )
    worst = np.inf
    for history in _histories(recorded):
        coefficients = [_solve(recorded, k, history) for k in range(len(recorded.out))]
        residuals = [_residual(_explained(proof, k, history, c), proof.y[k]) for k, c in enumerate(coefficients)]
        if (worst := min(worst, max(residuals))) <= LINEAR_ENOUGH:
            return _table(recorded, run, history, coefficients)
    guilty = [option for option in ("clip_sample", "thresholding") if recorded.scheduler.config.get(option)]
    cause = " and ".join(f"{option}=True" for option in guilty) or f"residual {worst:.1e}"
    raise NotCompiledError(f"it is not linear in the model output ({cause})")


def _record(schedulers: ModelSchedulers, asked: SamplerRun, *, seed: int, amplitude: float, is_blended: bool) -> _Run:
    scheduler = schedulers.make(asked, torch.device("cpu"))
    # Different seeds: noise that repeats a probe could not be distinguished from it.
    probes, generator = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)
    shape = (1, 4, 1, NUM_PROBE_VALUES // 4)  # channels as latents have them: some schedulers take them apart

    def probe() -> torch.Tensor:
        return amplitude * torch.randn(shape, generator=probes, dtype=torch.float64)

    try:
        kwargs = step_kwargs(scheduler, generator, asked.eta)
        sample = probe() * scheduler.init_noise_sigma
        run = _Run(scheduler, first_call(scheduler, asked.num_skipped_steps))
        for timestep in run.timesteps:
            _add_level(run, timestep)
            run.x.append(_row(sample))
            run.scaled.append(_row(scheduler.scale_model_input(sample, timestep)))
            model_output = probe()
            before = generator.get_state()
            sample = scheduler.step(model_output, timestep, sample, **kwargs, return_dict=False)[0]
            run.out.append(_row(model_output))
            run.noise.append(_drawn_since(before, generator, shape))
            run.y.append(_row(sample))
            run.kept.append(_kept(scheduler, shape))
            # Some schedulers return float32; carrying on in float64 keeps the columns of the next call exact.
            sample = probe() if is_blended else sample.double()
    except REFUSALS as error:
        raise NotCompiledError(f"{type(error).__name__} on the way: {first_line(error)}") from error
    if not all(np.isfinite(y).all() for y in run.y):
        raise NotCompiledError("its result would not be finite")
    return run


def _add_level(run: _Run, timestep: torch.Tensor) -> None:
    if len(run.levels) < len(run.x):
        return  # it could not add noise before
    try:
        run.levels.append(noise_level(run.scheduler, timestep))
    except REFUSALS:
        run.levels.clear()


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
    raise NotCompiledError("it does not draw its noise in one piece of the latents' shape")


def _kept(scheduler: Any, shape: tuple[int, ...]) -> dict[str, Array]:
    """What the scheduler keeps of this call in lists for later ones, by attribute."""
    lists = {name: value for name, value in vars(scheduler).items() if isinstance(value, list) and value}
    newest = {name: next((one for one in reversed(value) if one is not None), None) for name, value in lists.items()}
    return {name: _row(one) for name, one in newest.items() if isinstance(one, torch.Tensor) and one.shape == shape}


def _histories(run: _Run) -> list[Array]:
    """(p, q) per call: the model output; what the scheduler makes of it by its noise levels; what it was seen to keep."""
    scheduler, num_calls = run.scheduler, len(run.out)
    return [np.tile([0.0, 1.0], (num_calls, 1)), *_levels(scheduler, run.first, num_calls), *_seen(run)]


def _seen(run: _Run) -> list[Array]:
    """For every list the scheduler keeps: the latents and the model output its newest entry is made of."""
    histories = []
    for name in run.kept[-1]:
        pairs = []
        for x, out, kept in zip(run.x, run.out, run.kept, strict=False):
            if name not in kept:
                break
            columns = np.stack([x, out]).T
            pair = np.linalg.lstsq(columns, kept[name], rcond=None)[0]
            if _residual(columns @ pair, kept[name]) > SIMPLE_ENOUGH:
                break
            pairs.append(pair)
        if len(pairs) == len(run.out):
            histories.append(np.array(pairs))
    return histories


def _levels(scheduler: Any, first: int, num_calls: int) -> list[Array]:
    histories: list[Array] = []
    if not hasattr(scheduler, "sigmas"):
        return histories
    kind, sigmas = (
        scheduler.config.get("prediction_type"),
        np.array(scheduler.sigmas[first : first + num_calls], dtype=np.float64),
    )
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        levels = [scheduler._sigma_to_alpha_sigma_t(torch.tensor(sigma)) for sigma in sigmas]
        histories.append(np.array([clean_latents(kind, float(alpha), float(sigma)) for alpha, sigma in levels]))
    elif kind == "v_prediction":
        histories.append(np.stack([sigmas / (sigmas**2 + 1), 1 / np.sqrt(sigmas**2 + 1)], axis=1))
    elif kind == "sample":
        histories.append(np.stack([1 / sigmas, -1 / sigmas], axis=1))
    return histories


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
        best[used] = np.linalg.lstsq(scaled, run.y[k], rcond=None)[0] / lengths[used]
        if _residual(best @ columns, run.y[k]) <= SIMPLE_ENOUGH:
            break
    return best


def _table(run: _Run, asked: SamplerRun, history: Array, coefficients: list[Array]) -> SamplerTable:
    matrices = np.zeros((len(coefficients), STATE_PLANES, INPUT_PLANES))
    for k, (a, a_before, b0, b1, b2, b3, n) in enumerate(coefficients):
        p, q = history[k]
        matrices[k, 0] = [a + b0 * p, a_before, b1, b2, b3, b0 * q, n]
        matrices[k, 1, 0] = 1  # latents now become latents one call ago
        matrices[k, 2, [0, 5]] = p, q
        matrices[k, 3, 2] = matrices[k, 4, 3] = 1  # the history moves on
    timesteps = np.array([float(t) for t in run.timesteps])
    scales = [float(scaled @ x / (x @ x)) for scaled, x in zip(run.scaled, run.x, strict=True)]
    return SamplerTable(
        sampler=asked.sampler,
        num_inference_steps=asked.num_inference_steps,
        init_noise_sigma=float(run.scheduler.init_noise_sigma),
        timesteps=timesteps,
        input_scale=np.array(scales, dtype=np.float32),
        matrices=matrices.astype(np.float32),
        x0=x0_coefficients(run.scheduler, scales, first=run.first),
        draws_noise=tuple(noise is not None for noise in run.noise),
        noise_levels=(*run.levels, (1.0, 0.0)) if len(run.levels) == len(run.x) else None,
    )
