"""Compares every captured bucket of an engine with the same step made without it."""

from __future__ import annotations

import numpy as np
import torch

from mii_serve.engine.batched import BatchedEngine
from mii_serve.engine.batched.batch_inputs import SampleInputs
from mii_serve.samplers.table import INPUT_PLANES, STATE_PLANES


def worst_bucket(engine: BatchedEngine) -> tuple[float, int]:
    """The largest relative error (root mean square) of any bucket, and the number of buckets."""
    denoiser, worst = engine._denoiser, 0.0
    assert set(denoiser._prepared) == set(engine._buckets)
    with torch.inference_mode():
        for size, prepared in denoiser._prepared.items():
            latent_shape = (size.height, size.width)
            pool = denoiser.pool(latent_shape)
            start = torch.randn(pool.state.shape, generator=torch.Generator().manual_seed(0)).to(pool.state.device)
            num_guided = size.num_rows - size.num_samples
            samples = [sample_inputs(slot, is_guided=slot < num_guided) for slot in range(size.num_samples)]
            pool.state.copy_(start)
            replayed, state = [output.clone() for output in prepared(samples)], pool.state.clone()
            pool.state.copy_(start)
            kept, denoiser._prepared = denoiser._prepared, {}
            try:
                direct = denoiser._call(samples, latent_shape)
            finally:
                denoiser._prepared = kept
            assert not torch.equal(pool.state, start), "the samples have moved"
            for made, true in zip((*replayed, state[:-1]), (*direct, pool.state[:-1]), strict=True):
                worst = max(worst, float((made - true).square().mean().sqrt() / true.square().mean().sqrt()))
        for pool in denoiser._pools.values():
            pool.state.zero_()
    return worst, len(denoiser._prepared)


def sample_inputs(slot: int, *, is_guided: bool) -> SampleInputs:
    """Of the first timestep and the first two prompts the engine knows, by a step that keeps numbers small."""
    return SampleInputs(
        slot=slot,
        timestep_row=0,
        prompt_row=0,
        negative_prompt_row=1 if is_guided else None,
        guidance_scale=7.5 if is_guided else 1.0,
        input_scale=1.0,
        matrix=np.full((STATE_PLANES, INPUT_PLANES), 0.1, np.float32),
        noise=None,
    )
