"""The fused kernels compile for an A100 and an H100 without a GPU, with the tiles that run there, and fit."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

if sys.platform != "linux":
    pytest.skip("there is no Triton for this system", allow_module_level=True)

import kernel_resources
import torch
from kernel_resources import MAX_SHARED_BYTES, Compilation

from mii_serve.engine.kernels.fused import tiles
from mii_serve.engine.kernels.fused.triton_operations import TritonOperations

pytestmark = pytest.mark.slow

EVERY_KERNEL = {
    "attention", "group_apply", "group_norm_whole", "group_scales", "group_sums", "layer_norm", "linear_geglu", "sampler_begin",
    "sampler_end", "upsample",
}  # fmt: skip


@pytest.fixture(scope="module")
def compilations() -> list[Compilation]:
    return kernel_resources.one_of_each_tile(kernel_resources.of_full_size(num_samples=[1]))


def test_every_kernel_of_a_turn_and_a_decode_is_there(compilations):
    assert {one.name for one in compilations} == EVERY_KERNEL


@pytest.mark.parametrize("capability", MAX_SHARED_BYTES)
def test_none_spills_or_takes_too_much(compilations, capability):
    found = {one: kernel_resources.compiled(one, capability) for one in compilations}
    too_much = {
        f"{one.name} {one.tile}": excess
        for one, taken in found.items()
        if (excess := kernel_resources.excess(one, capability, taken)) is not None
    }
    assert too_much == {}


def test_a_spill_is_found(monkeypatch):
    """A group of 65 536 numbers in one program: as many as there are registers."""
    monkeypatch.setattr(tiles, "MAX_WHOLE", 1 << 17)
    found: list[Compilation] = []

    def launch(kernel, grid, tile, tensors, numbers, options, flops=0):
        found.append(kernel_resources.compilation(kernel, tile, tensors, numbers, options))

    half = {"dtype": torch.float16, "device": "meta"}
    image = torch.empty(1, 320, 64, 64, **half).to(memory_format=torch.channels_last)
    norm = SimpleNamespace(weight=torch.empty(320, **half), bias=torch.empty(320, **half), eps=1e-5, num_groups=32)
    TritonOperations(launch).group_norm(image, norm, is_silu=True)
    [one] = found
    assert one.name == "group_norm_whole"
    assert "spilled" in (kernel_resources.excess(one, 80, kernel_resources.compiled(one, 80)) or "")
