"""Which engine a machine can run, and what mends it, for machines we do not have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mii_serve.engine.machine import Extensions, Gpu, Machine, look
from mii_serve.engine.requirements import first_missing, preferred, requirements
from mii_serve.types import ENGINES

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


def test_a_complete_machine_lacks_nothing_and_auto_takes_what_was_installed_on_purpose():
    for engine in ENGINES:
        assert first_missing(engine, COMPLETE) is None
        assert all(one.is_met and not one.remedy for one in requirements(engine, COMPLETE))
    assert preferred(COMPLETE) == "deepspeed"


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


@pytest.mark.parametrize(("machine", "what", "found", "remedy"), LACKS.values(), ids=list(LACKS))
def test_each_lack_is_named_with_its_remedy_and_leaves_native_alone(machine, what, found, remedy):
    lack = first_missing("deepspeed", machine)
    assert lack is not None
    assert what in lack.what and lack.found == found and remedy in lack.remedy
    others = [one.what for one in requirements("deepspeed", machine) if not one.is_met and one != lack]
    if machine.torch_cuda is not None:
        assert others == [], "and nothing else is wrong"
    else:
        assert others == ["DeepSpeed's extensions, built for this torch and its CUDA"], "which has none"
    assert first_missing("native", machine) is None and preferred(machine) == "native"


def test_without_nvcc_the_extensions_are_built_elsewhere():
    lack = first_missing("deepspeed", replace(with_extensions(names=frozenset()), nvcc=None))
    assert lack is not None and lack.remedy.endswith("on any machine with nvcc")


def test_a_torch_that_cannot_be_imported_is_everybodys_lack():
    broken = replace(COMPLETE, torch_error="OSError: libcudart.so.13: cannot open shared object file", torch_cuda=None, gpus=())
    for engine in ENGINES:
        lack = first_missing(engine, broken)
        assert lack is not None and "libcudart" in lack.found and lack.remedy.startswith("pip install torch")


def test_this_machine_is_seen_as_it_is():
    import torch

    machine = look()
    assert machine.packages["torch"] == torch.__version__
    assert machine.torch_cuda == torch.version.cuda and len(machine.gpus) == torch.cuda.device_count()
    assert machine.packages["deepspeed"].startswith("0.19.")
    assert machine.extensions is not None, "what DeepSpeed's set-up has written can be read"
    from deepspeed.git_version_info import installed_ops

    assert machine.extensions.names == {name for name, is_built in installed_ops.items() if is_built}


def test_a_deepspeed_that_says_nothing_about_itself_has_no_extensions(tmp_path, monkeypatch):
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "deepspeed", raising=False)
    assert look().extensions is None
    (tmp_path / "deepspeed" / "git_version_info_installed.py").write_text("installed_ops = open('/etc/passwd')")
    assert look().extensions is None, "read as data, never run"
