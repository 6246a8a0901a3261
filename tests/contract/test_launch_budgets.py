"""What a turn and a decode of Stable Diffusion v1-4 in half precision launch on CUDA, traced and within budgets."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("there is no Triton for this system", allow_module_level=True)

import fake_cuda
import torch
import traced_engine
import traced_turns
from cuda_trace import Record, Trace
from roofline import figures
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from mii_serve.engine.engine_times import COMPUTED_TO_BE_FASTER

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "roofline.json"

MAX_KERNELS = 420
MAX_TURN_GB = {1: 4.6, 8: 24.7, 16: 47.8}
MAX_PEAK_GIB = 1.5
"""Of the activations of a turn of 16 guided samples."""
MAX_DEEPSPEED_KERNELS = 685
MAX_DEEPSPEED_TURN_GB = {1: 7.2, 8: 45.6}
MAX_DEEPSPEED_PEAK_GIB = 1.1
"""Of the activations of a turn of 8 guided samples, with what its kernels write to the workspace."""
MAX_UNSTEADY_KERNELS = 680
MAX_UNSTEADY_GB = {
    "a guided sample joins": 5.35,
    "an unguided one joins": 6.8,
    "both end": 6.1,
    "the tail of both": 13.9,
}
WAITS_OF_THE_TAIL = {
    "_local_scalar_dense at engine/decode.py",
    "event at engine/batched/decoding.py",
    "copy device to host at diffusers/pipelines/stable_diffusion/safety_checker.py",
}
"""In the decoding thread, for its own stream: whether the images are finite, the pictures, the checker's scores."""
MAX_DECODE_KERNELS = 150
MAX_DECODE_GB = 5.9


@pytest.fixture(scope="module")
def turns() -> dict[int, Record]:
    return {num_samples: traced_turns.native_turn(num_samples) for num_samples in MAX_TURN_GB}


@pytest.fixture(scope="module")
def deepspeed_turns() -> dict[int, Record]:
    pytest.importorskip("deepspeed")
    return {num_samples: traced_turns.deepspeed_turn(num_samples) for num_samples in MAX_DEEPSPEED_TURN_GB}


@pytest.fixture(scope="module")
def unsteady() -> dict[str, Record]:
    return traced_engine.unsteady()


@pytest.fixture(scope="module")
def decode() -> Record:
    return traced_turns.native_decode()


def test_kernels_of_a_turn(turns):
    assert {record.num_kernels for record in turns.values()} == {turns[1].num_kernels}, "the same at every size"
    assert turns[1].num_kernels <= MAX_KERNELS


@pytest.mark.parametrize("num_samples", MAX_TURN_GB)
def test_bytes_of_a_turn(turns, num_samples):
    assert turns[num_samples].num_bytes <= MAX_TURN_GB[num_samples] * 1e9


def test_nothing_but_the_latents_of_a_decode_changes_its_layout(turns, decode):
    assert turns[8].layout_conversions == []
    assert [one.shape[1] for one in decode.layout_conversions] == [traced_turns.NUM_CHANNELS]


def test_the_host_does_not_wait_in_a_turn(turns):
    assert turns[1].waits == {}


def test_nothing_is_computed_in_float64(turns, decode):
    assert turns[1].in_float64 == decode.in_float64 == []


def test_peak_memory_of_a_turn(turns):
    assert turns[16].peak_bytes <= MAX_PEAK_GIB * 2**30


def test_a_turn_with_deepspeeds_blocks(deepspeed_turns):
    assert {record.num_kernels for record in deepspeed_turns.values()} == {deepspeed_turns[1].num_kernels}
    assert deepspeed_turns[1].num_kernels <= MAX_DEEPSPEED_KERNELS
    for num_samples, record in deepspeed_turns.items():
        assert record.num_bytes <= MAX_DEEPSPEED_TURN_GB[num_samples] * 1e9
        assert record.layout_conversions == record.in_float64 == []
        assert record.waits == {}
    assert deepspeed_turns[8].peak_bytes <= MAX_DEEPSPEED_PEAK_GIB * 2**30


def test_turns_in_which_samples_join_are_mixed_and_end(unsteady):
    assert MAX_UNSTEADY_GB.keys() == unsteady.keys()
    for name, record in unsteady.items():
        assert record.num_bytes <= MAX_UNSTEADY_GB[name] * 1e9, name
        assert record.num_kernels <= MAX_UNSTEADY_KERNELS
        assert record.in_float64 == []
        if name != "the tail of both":
            assert record.waits == {}, name
            assert record.layout_conversions == [], name


def test_the_decoding_thread_waits_for_nothing_but_results(unsteady):
    assert {place.rpartition(":")[0] for place in unsteady["the tail of both"].waits} == WAITS_OF_THE_TAIL


def test_kernels_and_bytes_of_a_decode(decode):
    assert decode.num_kernels <= MAX_DECODE_KERNELS
    assert decode.num_bytes <= MAX_DECODE_GB * 1e9


@pytest.fixture(scope="module")
def published() -> dict[tuple[str, str, int], dict[str, Any]]:
    return {(row["row"], row["what"], row["num_samples"]): row for row in json.loads(RESULTS.read_text())["rows"]}


def test_published_figures_are_those_of_today(published, turns, deepspeed_turns, unsteady, decode):
    of_today = {("native", "turn", num_samples): record for num_samples, record in turns.items()}
    of_today |= {("deepspeed", "turn", num_samples): record for num_samples, record in deepspeed_turns.items()}
    of_today["native", "decode", 1] = decode
    for name, record in of_today.items():
        assert published[name].items() >= figures(record).items(), "run benchmarks/roofline.py"
    for name, record in unsteady.items():  # a copy more or less is no news
        row, today = published[name, "unsteady", 2 - name.startswith("a guided")], figures(record)
        for figure in ("kernels", "gb"):
            assert row[figure] == pytest.approx(today[figure], rel=0.02), "run benchmarks/roofline.py"


def test_the_engine_that_auto_takes_unmeasured_is_the_one_with_the_lower_bound(published):
    other = next(engine for engine in ("native", "deepspeed") if engine != COMPUTED_TO_BE_FASTER)
    turns = [name for name in published if name[:2] == (COMPUTED_TO_BE_FASTER, "turn")]
    assert len(turns) == 3
    for _, what, num_samples in turns:
        for device, bound_ms in published[COMPUTED_TO_BE_FASTER, what, num_samples]["bound_ms"].items():
            assert bound_ms < published[other, what, num_samples]["bound_ms"][device]


class TestTrace:
    """What the budgets hold against is found."""

    @pytest.fixture
    def image(self):
        with fake_cuda.fake_cuda():
            yield torch.zeros(2, 64, 8, 8, dtype=torch.float16, device=fake_cuda.DEVICE).to(memory_format=torch.channels_last)

    def test_a_clone_and_a_layout_conversion(self, image):
        with Trace() as trace:
            image.clone()
            image.contiguous()
        copies = trace.record.copies + trace.record.layout_conversions
        assert [copy.num_bytes for copy in copies] == [2 * image.numel() * 2] * 2
        assert len(trace.record.layout_conversions) == 1

    def test_a_group_norm_in_channels_last_converts_its_input(self, image):
        with Trace() as trace:
            torch.nn.functional.group_norm(image, 32)
        assert len(trace.record.layout_conversions) == 1

    def test_a_convolution_converts_its_input(self, image):
        with Trace() as trace:
            torch.nn.functional.conv2d(image.contiguous(), image[:, :, :3, :3])
        assert [one.name for one in trace.record.layout_conversions] == ["clone", "convolution: input to NHWC"]

    @pytest.mark.parametrize("wait", [lambda image: image.cpu(), lambda image: image.nonzero()], ids=["fetch", "nonzero"])
    def test_what_makes_the_host_wait(self, image, wait):
        """Where the values decide what comes next, the trace cannot go on."""
        with Trace() as trace, contextlib.suppress(DynamicOutputShapeException):
            wait(image)
        assert trace.record.waits.total() == 1

    def test_a_copy_from_pageable_memory_waits_and_one_from_pinned_does_not(self, image):
        on_host = torch.zeros(image.shape, dtype=image.dtype)
        with Trace() as trace:
            image.copy_(on_host.pin_memory(), non_blocking=True)
            assert trace.record.waits.total() == 0
            image.copy_(on_host, non_blocking=True)
        assert trace.record.waits.total() == 1

    def test_float64(self, image):
        with Trace() as trace:
            image.double()
        assert len(trace.record.in_float64) == 1

    def test_memory_that_is_freed_does_not_count(self, image):
        with Trace() as trace:
            for _ in range(3):
                image + 1
        assert trace.record.peak_bytes == image.numel() * 2

    def test_attention_keeps_no_scores(self, image):
        with Trace() as trace:
            tokens = torch.zeros(2, 8, 4096, 40, dtype=torch.float16, device=fake_cuda.DEVICE)
            torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        assert trace.record.num_kernels == 2 and trace.record.launches[1].flops == 4 * 16 * 4096 * 4096 * 40
