"""A captured turn answers into always the same tensors. What the denoiser hands out is not them.

On a CPU there are no graphs, but a prepared turn keeps its tensors all the same, so what sharing them would do shows here too.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from buckets import worst_bucket
from drawing import draw

from mii_serve.engine.native import NativeEngine
from mii_serve.engine.native.kernels import KernelSet
from mii_serve.engine.native.lattice import declare
from mii_serve.engine.native.unet import RowUNet
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.types import Picture, RequestedParams, Sample, SampleId, StepPlan


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CELLS_OF_TWO = 2 * 2 * 64
"""Two guided samples of 64 × 64 pixels."""


def engine(demo, *, max_cells: int | None = None, lattice: bool = True) -> NativeEngine:
    kernels = KernelSet(name="native", unet=RowUNet(demo.pipeline.unet), max_cells_per_call=max_cells)
    return NativeEngine(demo, max_slots=4, lattice=declare(4, 8, 8) if lattice else (), kernels=kernels)


def prepare(built: NativeEngine) -> None:
    with torch.inference_mode():
        built._denoiser.prepare()


def previews(built: NativeEngine) -> list[Picture]:
    """Of four samples in one turn."""
    prepare(built)
    asked = [RequestedParams(prompt="a red circle", seed=i, num_inference_steps=4) for i in range(4)]
    samples = [
        Sample(id=SampleId("r", i), params=built.capabilities.resolve(one, fallback_seed=0)) for i, one in enumerate(asked)
    ]
    ids = tuple(sample.id for sample in samples)
    made = [progress.preview for progress in built.run(StepPlan(joins=tuple(samples), steps=ids, previews=ids))]
    built.run(StepPlan(leaves=ids))
    return made


def levels_off(one: Picture, other: Picture) -> int:
    return int(np.abs(np.frombuffer(one.rgb, np.uint8).astype(int) - np.frombuffer(other.rgb, np.uint8)).max())


def test_two_calls_of_one_prepared_size_in_a_turn_do_not_overwrite_each_other(demo):
    true = previews(engine(demo, lattice=False))
    assert levels_off(true[0], true[2]) > 20, "the first and the third sample, in the same place of the two calls, differ"
    for made, expected in zip(previews(engine(demo, max_cells=CELLS_OF_TWO)), true, strict=True):
        assert levels_off(made, expected) <= 1


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0, 3.0])
def test_pndm_keeps_no_history_in_them(demo, guidance_scale):
    built = engine(demo)
    prepare(built)
    asked = {"scheduler": "pndm", "guidance_scale": guidance_scale, "num_inference_steps": 4}
    assert levels_off(draw(built, **asked), draw(ReferenceEngine(demo), **asked)) <= 1
    assert built.num_graph_misses == 0


def test_a_bound_given_beforehand_is_kept_and_told(demo):
    built = engine(demo, max_cells=CELLS_OF_TWO)
    seen = []
    hook = demo.pipeline.unet.conv_out.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0] * 64))
    previews(built)
    hook.remove()
    assert max(seen) == CELLS_OF_TWO == built.capacity.max_cells_per_call


def test_what_it_hands_out_is_its_callers(demo):
    built = engine(demo)
    prepare(built)
    [prepared] = [make for size, make in built._denoiser._prepared.items() if (size.num_samples, size.num_rows) == (1, 1)]
    with torch.inference_mode():
        first = prepared(())
        kept = [tensor.clone() for tensor in first]
        for tensor in prepared(()):
            tensor.fill_(7.0)
    assert all(torch.equal(tensor, before) for tensor, before in zip(first, kept, strict=True))


def test_every_prepared_size_makes_what_is_made_without_it(demo):
    built = engine(demo)
    prepare(built)
    draw(built, num_inference_steps=1)  # so that it knows a time and two prompts
    error, num_sizes = worst_bucket(built)
    assert num_sizes == 6 and error < 1e-5
