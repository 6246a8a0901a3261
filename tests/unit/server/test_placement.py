"""Which devices each replica gets, from what the environment and the driver say."""

from __future__ import annotations

from pathlib import Path

import pytest

from mii_serve.config import DeployConfig
from mii_serve.errors import ConfigError
from mii_serve.server.placement import place, visible_gpus


@pytest.fixture
def four_gpus(tmp_path: Path) -> Path:
    for name in ("0000:01", "0000:02", "0000:03", "0000:04"):
        (tmp_path / name).mkdir()
    return tmp_path


def config(**settings) -> DeployConfig:
    return DeployConfig.load(settings)


def test_each_replica_gets_its_own_gpus(four_gpus):
    assert place(config(replicas=3), {}, four_gpus) == [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(3)]
    pairs = place(config(replicas=2, tensor_parallel=2), {}, four_gpus)
    assert pairs == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]


def test_only_the_gpus_the_operator_shows_are_used(four_gpus):
    environment = {"CUDA_VISIBLE_DEVICES": "GPU-b, 3"}
    assert visible_gpus(environment, four_gpus) == ["GPU-b", "3"]
    assert place(config(replicas=2), environment, four_gpus) == [
        {"CUDA_VISIBLE_DEVICES": "GPU-b"},
        {"CUDA_VISIBLE_DEVICES": "3"},
    ]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, four_gpus) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, four_gpus) == []


def test_too_few_gpus_is_an_error_that_says_what_to_change(four_gpus):
    with pytest.raises(ConfigError, match=r"replicas: 5 replicas × 1 GPUs need 5, and 4 can be seen; use fewer"):
        place(config(replicas=5), {}, four_gpus)
    with pytest.raises(ConfigError, match="device: 'cuda:1' is one GPU"):
        place(config(replicas=2, device="cuda:1"), {}, four_gpus)


def test_a_single_replica_of_several_ranks_has_a_gpu_for_each(four_gpus):
    assert place(config(tensor_parallel=3), {}, four_gpus) == [{"CUDA_VISIBLE_DEVICES": "0,1,2"}]
    with pytest.raises(ConfigError, match=r"tensor_parallel: 1 replicas × 5 GPUs need 5, and 4 can be seen; use at most 4"):
        place(config(tensor_parallel=5), {}, four_gpus)
    with pytest.raises(ConfigError, match=r"replicas: 3 replicas × 2 GPUs need 6, and 4 can be seen; use fewer replicas"):
        place(config(replicas=3, tensor_parallel=2), {}, four_gpus)


def test_a_single_replica_sees_what_the_operator_sees(four_gpus):
    assert place(config(), {}, four_gpus) == [{}]
    assert place(config(device="cuda:2"), {}, four_gpus) == [{}]


def test_on_a_cpu_replicas_share_the_cores(four_gpus, tmp_path):
    [first, second] = place(config(replicas=2, device="cpu"), {}, four_gpus)
    assert first == second and int(first["OMP_NUM_THREADS"]) >= 1
    assert place(config(replicas=2), {"OMP_NUM_THREADS": "3"}, tmp_path / "no driver") == [{}, {}]
    assert place(config(), {}, tmp_path / "no driver") == [{}]


def test_on_a_cpu_ranks_share_the_cores_with_each_other_and_other_replicas(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    assert place(config(tensor_parallel=2), {}, tmp_path / "no driver") == [{"OMP_NUM_THREADS": "6"}]
    assert place(config(replicas=2, tensor_parallel=3), {}, tmp_path / "no driver") == [{"OMP_NUM_THREADS": "2"}] * 2
    assert place(config(tensor_parallel=40), {}, tmp_path / "no driver") == [{"OMP_NUM_THREADS": "1"}]
