"""Which errors cost one sample, and which cost the engine."""

from __future__ import annotations

import pytest
import torch

from mii_serve.engine.sample_errors import is_of_one_sample


def test_what_python_and_shapes_raise_is_of_one_sample_and_what_a_device_says_is_not():
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) + torch.zeros(3)
    assert is_of_one_sample(caught.value)
    assert all(
        is_of_one_sample(kind("x")) for kind in (IndexError, TypeError, ValueError, ZeroDivisionError, UnboundLocalError)
    )
    assert not is_of_one_sample(torch.OutOfMemoryError("x"))
    assert not is_of_one_sample(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_of_one_sample(MemoryError())
