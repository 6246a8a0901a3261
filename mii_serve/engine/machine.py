"""What this machine has for computing: packages, devices, compiled extensions. Facts only; rules are in `requirements.py`.

Nothing here fails: what cannot be found out is absent. torch is imported to ask for devices, DeepSpeed never is.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = (
    "mii-serve",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "grpcio",
    "protobuf",
    "deepspeed",
    "deepspeed-mii",
    "starlette",
    "uvicorn",
    "opentelemetry-sdk",
)

NVCC_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Extensions:
    """DeepSpeed's compiled extensions: their names, and the torch and CUDA they were compiled for."""

    names: frozenset[str]
    torch_version: str
    cuda_version: str
    accelerator: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """`packages` holds the installed ones. `torch_error` is what importing torch ended with, where it did not work.

    `torch_cuda` is the CUDA version torch was built for, None for a build without. `nvcc` is the compiler's CUDA version.
    """

    system: str
    python: str
    num_cores: int
    packages: Mapping[str, str] = field(default_factory=dict)
    torch_error: str | None = None
    torch_cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    extensions: Extensions | None = None
    nvcc: str | None = None


def inspect_machine() -> Machine:
    """Find out; takes as long as importing torch."""
    torch_error, torch_cuda, gpus = _devices()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        packages={name: version for name in PACKAGES if (version := _version(name)) is not None},
        torch_error=torch_error,
        torch_cuda=torch_cuda,
        gpus=gpus,
        extensions=_extensions(),
        nvcc=_nvcc(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> tuple[str | None, str | None, tuple[Gpu, ...]]:
    try:
        import torch
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # as a broken installation or driver fails
        return f"{type(error).__name__}: {error}", None, ()
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            seen = torch.cuda.get_device_properties(index)
            gpus.append(Gpu(name=seen.name, compute_capability=(seen.major, seen.minor), memory_bytes=seen.total_memory))
    return None, torch.version.cuda, tuple(gpus)


def _extensions() -> Extensions | None:
    """Read from the file DeepSpeed's set-up writes; importing DeepSpeed takes seconds and logs."""
    try:
        package = importlib.util.find_spec("deepspeed")
        if package is None or package.origin is None:
            return None
        tree = ast.parse(Path(package.origin).with_name("git_version_info_installed.py").read_text())
        written = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        return Extensions(
            names=frozenset(name for name, is_built in written["installed_ops"].items() if is_built),
            torch_version=written["torch_info"]["version"],
            cuda_version=written["torch_info"]["cuda_version"],
            accelerator=written["accelerator_name"],
        )
    except (OSError, SyntaxError, ValueError, KeyError, ImportError, AttributeError, TypeError):
        return None


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if path is None:
        return None
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=NVCC_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.partition("release ")[2].partition(",")[0] or None
