"""A group whose ranks are apart: no process has been connected here, so that any exchange would fail."""

from __future__ import annotations

import pytest
import torch

from mii_serve.engine.ranks.group import RankGroup


def test_ranks_that_are_apart_exchange_nothing_and_take_the_same_memory():
    group = RankGroup(0, 3)
    tensor = torch.arange(8.0).reshape(2, 4)
    with group.apart():
        gathered = group.all_gather(tensor)
        group.all_reduce(tensor)
    assert gathered.shape == (6, 4) and gathered.dtype == tensor.dtype
    assert gathered.isfinite().all()
    assert torch.equal(tensor, torch.arange(8.0).reshape(2, 4))
    assert (group.num_collectives, group.num_sent_bytes) == (0, 0)


def test_they_are_together_again_after_a_failure():
    group = RankGroup(0, 2)
    with pytest.raises(torch.OutOfMemoryError), group.apart():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ValueError, match="process group has not been initialized"):
        group.all_gather(torch.zeros(1))
