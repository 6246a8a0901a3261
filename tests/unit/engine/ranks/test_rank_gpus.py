"""Which GPU each rank gets."""

from __future__ import annotations

import pytest
import torch

from mii_serve.config import DeployConfig
from mii_serve.engine.ranks.leader import _gpus
from mii_serve.errors import ConfigError


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def gpus(**settings) -> list[str]:
    return _gpus(DeployConfig.load({"tensor_parallel": 3, **settings}))


def test_rank_i_gets_the_ith_gpu_of_its_replica(monkeypatch):
    assert gpus() == ["0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b, 5,1")
    assert gpus() == ["GPU-b", "5", "1"]


def test_on_a_cpu_there_is_none():
    assert gpus(device="cpu") == []


def test_too_few_are_counted(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match="tensor_parallel: 3 ranks need a GPU each, and 2 can be seen"):
        gpus()
