"""The pool of combinations: bounded, and what it gives a call is what was asked for, whatever came and went before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_files import all_linear, write_lora
from operation_doubles import tiny_model

from mii_serve.engine.batched.loras import NUM_SPARE_ROWS, BatchedLoras
from mii_serve.engine.kernels.loras import LoraLayout, LoraRows
from mii_serve.engine.loras import Combination
from mii_serve.models.loras import load_loras
from mii_serve.types import NO_LORAS, LoraChoice
from mii_serve.types.loras import chosen_loras

MAX_IN_USE = 3
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def pipeline():
    return tiny_model().pipeline


@pytest.fixture(scope="module")
def adapters(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    paths = {
        name: write_lora(folder / f"{name}.safetensors", pipeline, wanted=all_linear, rank=rank, seed=rank)
        for name, rank in zip(NAMES, (2, 3, 9), strict=True)
    }
    return load_loras(paths, pipeline)


scales = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([-1.0, 0.5, 1.0, 2.0]), max_size=3)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(scales, st.integers(0, MAX_IN_USE - 1)), min_size=1, max_size=30))
def test_a_call_gets_the_changes_of_its_samples(pipeline, adapters, steps):
    layout = LoraLayout(pipeline.unet)
    pool = BatchedLoras(pipeline, layout, adapters, max_in_use=MAX_IN_USE)
    by_revision = {adapter.revision: adapter for adapter in adapters.values()}
    slots: list[tuple[LoraChoice, object]] = [(NO_LORAS, None)] * MAX_IN_USE
    for asked, slot in steps:
        pool.release(slots[slot][1])
        choice = chosen_loras(asked, pool.store.loras)
        slots[slot] = choice, pool.acquire(choice)
        loras = pool.of_call([entry for _, entry in slots])
        used = [choice for choice, _ in slots if choice]
        assert (loras is None) == (not used)
        assert len(pool._known) <= MAX_IN_USE + NUM_SPARE_ROWS
        if loras is None:
            continue
        assert isinstance(loras, LoraRows)
        for index, (choice, _) in enumerate(slots):
            expected = Combination.of(choice.parts, by_revision).unet
            for name, layer in list(layout.layers.items())[:: len(layout.layers) // 3]:
                inputs, outputs = layout.places[layer]
                product = loras.up[index, :, outputs].t() @ loras.down[index, :, inputs]
                wanted = torch.zeros_like(product)
                if (change := expected.get(name)) is not None:
                    wanted = change.up.flatten(1) @ change.down.flatten(1)
                torch.testing.assert_close(product, wanted, rtol=1e-4, atol=1e-5)


def test_a_removed_one_stays_until_it_is_not_used_and_another_of_its_name_is_another(pipeline, adapters):
    pool = BatchedLoras(pipeline, LoraLayout(pipeline.unet), {"a": adapters["a"]}, max_in_use=MAX_IN_USE)
    old = chosen_loras({"a": 1.0}, pool.store.loras)
    pool.remove("a")
    pool.store.check(old)
    assert pool.acquire(old) is not None
    pool.forget_unused(set())
    with pytest.raises(Exception, match="removed or replaced"):
        pool.store.check(old)
