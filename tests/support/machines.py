"""Machines we do not have: one that can run every engine, and those that miss something."""

from __future__ import annotations

from dataclasses import replace

from mii_serve.engine.machine import Extensions, Gpu, Machine

COMPLETE = Machine(
    system="Linux",
    python="3.12.1",
    num_cores=16,
    packages={
        "torch": "2.13.0+cu130",
        "triton": "3.7.1",
        "diffusers": "0.42.1",
        "transformers": "5.23.0",
        "safetensors": "0.8.0",
        "deepspeed": "0.19.8",
    },
    torch_cuda="13.0",
    gpus=(Gpu(name="NVIDIA A100", compute_capability=(8, 0), memory_bytes=80 << 30),),
    extensions=Extensions(
        names=frozenset({"transformer_inference", "spatial_inference", "fused_adam"}),
        torch_version="2.13",
        cuda_version="13.0",
        accelerator="cuda",
    ),
    nvcc="13.0",
)


def without(*names: str) -> Machine:
    return replace(COMPLETE, packages={name: v for name, v in COMPLETE.packages.items() if name not in names})


def with_version(name: str, version: str) -> Machine:
    return replace(COMPLETE, packages={**COMPLETE.packages, name: version})


def with_extensions(**changes: object) -> Machine:
    assert COMPLETE.extensions is not None
    return replace(COMPLETE, extensions=replace(COMPLETE.extensions, **changes))


LACKS = {
    "no gpu": (replace(COMPLETE, gpus=()), "a CUDA device", "none", "nvidia-smi"),
    "an old gpu": (
        replace(COMPLETE, gpus=(Gpu(name="V100", compute_capability=(7, 0), memory_bytes=16 << 30),)),
        "compute capability 8.0 or more",
        "V100 (7.0)",
        "such a GPU",
    ),
    "torch for cpu": (replace(COMPLETE, torch_cuda=None), "torch built for CUDA", "a build without CUDA", "whl/cu130"),
    "no deepspeed": (without("deepspeed"), "deepspeed 0.19", "not installed", "pip install 'mii-serve[deepspeed]'"),
    "another deepspeed": (with_version("deepspeed", "0.20.0"), "deepspeed 0.19", "0.20.0", "mii-serve[deepspeed]"),
    "triton 3.9": (with_version("triton", "3.9.0"), "triton before 3.9", "3.9.0", "torch<2.15"),
    "triton 4": (with_version("triton", "4.0.1"), "triton before 3.9", "4.0.1", "torch<2.15"),
    "no triton": (without("triton"), "triton before 3.9", "not installed", "torch<2.15"),
    "deepspeed from the registry": (
        with_extensions(names=frozenset()),
        "DeepSpeed's extensions",
        "not built",
        "build_deepspeed_ops.sh --torch 2.13.0)",
    ),
    "one extension of two": (
        with_extensions(names=frozenset({"transformer_inference"})),
        "DeepSpeed's extensions",
        "not built",
        "build_deepspeed_ops.sh",
    ),
    "built for another torch": (
        with_extensions(torch_version="2.11"),
        "DeepSpeed's extensions",
        "for torch 2.11 and CUDA 13.0",
        "build_deepspeed_ops.sh",
    ),
    "built for another cuda": (
        with_extensions(cuda_version="12.8"),
        "DeepSpeed's extensions",
        "for torch 2.13 and CUDA 12.8",
        "build_deepspeed_ops.sh",
    ),
    "built on a machine that took itself for a cpu": (
        with_extensions(accelerator="cpu"),
        "DeepSpeed's extensions",
        "for torch 2.13 and CUDA 13.0",
        "build_deepspeed_ops.sh",
    ),
}
