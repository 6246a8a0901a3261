"""Which devices each replica gets, decided without torch: by what the environment and the driver say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mii_serve.config import DeployConfig
from mii_serve.errors import ConfigError

DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")
"""One folder for each GPU that NVIDIA's driver sees."""

THREADS = "OMP_NUM_THREADS"
VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environment: Mapping[str, str], driver: Path = DRIVER_GPUS) -> list[str]:
    """The GPUs a process started now may use, as `CUDA_VISIBLE_DEVICES` names them."""
    if (named := environment.get(VISIBLE)) is not None:
        return [name for name in (part.strip() for part in named.split(",")) if name and name != "-1"]
    return [str(number) for number in range(len(list(driver.iterdir())))] if driver.is_dir() else []


def place(
    config: DeployConfig, environment: Mapping[str, str] | None = None, driver: Path = DRIVER_GPUS
) -> list[dict[str, str]]:
    """What to add to the environment of each replica: its own GPUs, or its share of the CPU's threads.

    The ranks of a replica share what it gets.

    Raises:
        ConfigError: there are fewer GPUs than the replicas need.
    """
    environment = os.environ if environment is None else environment
    gpus = [] if config.device == "cpu" else visible_gpus(environment, driver)
    needed = config.replicas * config.tensor_parallel
    if not gpus:
        return _on_cpu(config, environment)
    if needed == 1:
        return [{}]
    if config.device.startswith("cuda:"):
        raise ConfigError("device", f"{config.device!r} is one GPU and {config.replicas} replicas need one each; use 'cuda'")
    if needed > len(gpus):
        shape = f"{config.replicas} replicas × {config.tensor_parallel} GPUs need {needed}, and {len(gpus)} can be seen"
        remedy = f"another {VISIBLE}, or the device 'cpu'"
        if config.tensor_parallel > len(gpus):
            raise ConfigError("tensor_parallel", f"{shape}; use at most {len(gpus)}, {remedy}")
        raise ConfigError("replicas", f"{shape}; use fewer replicas, {remedy}")
    size = config.tensor_parallel
    return [{VISIBLE: ",".join(gpus[i * size : (i + 1) * size])} for i in range(config.replicas)]


def _on_cpu(config: DeployConfig, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Processes that all take all cores are slower together than each on its share."""
    num_processes = config.replicas * config.tensor_parallel
    if num_processes == 1 or THREADS in environment:
        return [{}] * config.replicas
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [{THREADS: str(max(1, cores // num_processes))}] * config.replicas
