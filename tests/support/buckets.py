"""Holds every prepared size of an engine's lattice against the same turn made without being prepared."""

from __future__ import annotations

import numpy as np
import torch

from mii_serve.engine.native import NativeEngine
from mii_serve.engine.native.turn import Move
from mii_serve.samplers.table import INPUT_PLANES, STATE_PLANES


def worst_bucket(engine: NativeEngine) -> tuple[float, int]:
    """The largest relative error (root mean square) of any size, and how many sizes there are."""
    denoiser, worst = engine._denoiser, 0.0
    assert set(denoiser._prepared) == set(engine._lattice)
    with torch.inference_mode():
        for size, prepared in denoiser._prepared.items():
            shape = (size.height, size.width)
            bank = denoiser.bank(shape)
            start = torch.randn(bank.state.shape, generator=torch.Generator().manual_seed(0)).to(bank.state.device)
            num_guided = size.num_rows - size.num_samples
            moves = [_move(slot, is_guided=slot < num_guided) for slot in range(size.num_samples)]
            bank.state.copy_(start)
            replayed, state = prepared(moves), bank.state.clone()
            bank.state.copy_(start)
            kept, denoiser._prepared = denoiser._prepared, {}
            try:
                direct = denoiser._call(moves, shape)
            finally:
                denoiser._prepared = kept
            assert not torch.equal(bank.state, start), "the samples have moved"
            for made, true in zip((*replayed, state[:-1]), (*direct, bank.state[:-1]), strict=True):
                worst = max(worst, float((made - true).square().mean().sqrt() / true.square().mean().sqrt()))
        for bank in denoiser._banks.values():
            bank.state.zero_()
    return worst, len(denoiser._prepared)


def _move(slot: int, *, is_guided: bool) -> Move:
    """Of the first time and the first two prompts the engine knows, by a step that keeps numbers small."""
    return Move(
        slot=slot,
        time=0,
        prompt=0,
        negative_prompt=1 if is_guided else None,
        guidance_scale=7.5 if is_guided else 1.0,
        input_scale=1.0,
        matrix=np.full((STATE_PLANES, INPUT_PLANES), 0.1, np.float32),
        noise=None,
    )
