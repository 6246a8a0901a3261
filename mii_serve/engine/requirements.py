"""What each engine needs of a machine, the command that installs what is missing, and which engine `auto` takes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mii_serve.engine.engine_times import COMPUTED_TO_BE_FASTER, EngineTimes
from mii_serve.engine.machine import Machine
from mii_serve.extras import how_to_get
from mii_serve.types import EngineName

EXTENSIONS = ("transformer_inference", "spatial_inference")
"""DeepSpeed's compiled extensions that its Stable Diffusion blocks call."""

DEEPSPEED_SERIES = (0, 19)
"""The releases of DeepSpeed whose internals `engine/kernels/deepspeed` was written against."""

FIRST_TRITON_WITHOUT_BLOCK_POINTERS = (3, 9)
"""DeepSpeed's flash kernel calls `tl.make_block_ptr`."""
MIN_COMPUTE_CAPABILITY = (8, 0)

BUILD_EXTENSIONS = "pip install --force-reinstall --no-deps $(tools/build_deepspeed_ops.sh --torch {torch})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """One line of `mii_serve doctor`. `remedy` is the command that fixes it, empty where it is met."""

    what: str
    found: str
    is_met: bool
    remedy: str = ""


def requirements(engine: EngineName, machine: Machine) -> tuple[Requirement, ...]:
    """Everything an engine needs, in the order in which it makes sense to install it."""
    every = (_torch(machine), *(_package(machine, name) for name in ("diffusers", "transformers", "safetensors")))
    return (*every, *_deepspeed(machine)) if engine == "deepspeed" else every


def first_missing(engine: EngineName, machine: Machine) -> Requirement | None:
    return next((one for one in requirements(engine, machine) if not one.is_met), None)


def preferred(machine: Machine, times: EngineTimes | None) -> EngineName:
    """The engine `auto` takes by what is known: `native` where `deepspeed` cannot run, else what was measured to be faster.

    `times` are those of a start on this machine; where there are none, computed bounds decide.
    """
    if first_missing("deepspeed", machine) is not None:
        return "native"
    return COMPUTED_TO_BE_FASTER if times is None else times.faster


def _deepspeed(machine: Machine) -> Sequence[Requirement]:
    torch = machine.packages.get("torch", "").partition("+")[0]
    cuda = machine.torch_cuda
    gpus = ", ".join(f"{gpu.name} ({_dotted(gpu.compute_capability)})" for gpu in machine.gpus)
    triton, deepspeed = machine.packages.get("triton"), machine.packages.get("deepspeed")
    return (
        _line(
            "torch built for CUDA",
            f"CUDA {cuda}" if cuda else "a build without CUDA",
            cuda is not None,
            f"pip install --force-reinstall torch=={torch or '2.13.0'} --index-url https://download.pytorch.org/whl/cu130",
        ),
        _line(
            f"a CUDA device of compute capability {_dotted(MIN_COMPUTE_CAPABILITY)} or more",
            gpus or "none",
            any(gpu.compute_capability >= MIN_COMPUTE_CAPABILITY for gpu in machine.gpus),
            "run on a machine with such a GPU and NVIDIA's driver; nvidia-smi lists what the driver sees",
        ),
        _line(
            f"deepspeed {_dotted(DEEPSPEED_SERIES)}",
            deepspeed or "not installed",
            deepspeed is not None and _numbers(deepspeed)[:2] == DEEPSPEED_SERIES,
            how_to_get("deepspeed"),
        ),
        _line(
            f"triton before {_dotted(FIRST_TRITON_WITHOUT_BLOCK_POINTERS)}",
            triton or "not installed",
            triton is not None and _numbers(triton)[:2] < FIRST_TRITON_WITHOUT_BLOCK_POINTERS,
            "pip install 'torch<2.15' with CUDA, which brings it",
        ),
        _extensions(machine, torch),
    )


def _extensions(machine: Machine, torch: str) -> Requirement:
    built = machine.extensions
    missing = [name for name in EXTENSIONS if built is None or name not in built.names]
    wanted = _series(torch), _series(machine.torch_cuda or "")
    if built is None or missing:
        found, is_met = "not built", False
    else:
        found = f"for torch {built.torch_version} and CUDA {built.cuda_version}"
        is_met = (built.torch_version, built.cuda_version) == wanted and built.accelerator == "cuda"
    remedy = BUILD_EXTENSIONS.format(torch=torch or "2.13.0")
    if not is_met and machine.nvcc is None:
        remedy += ", on any machine with nvcc"
    return _line("DeepSpeed's extensions, built for this torch and its CUDA", found, is_met, remedy)


def _torch(machine: Machine) -> Requirement:
    if "torch" not in machine.packages:
        return _line("torch that can be imported", "not installed", False, how_to_get("server"))
    found = machine.torch_error or machine.packages["torch"]
    return _line("torch that can be imported", found, machine.torch_error is None, "pip install torch==2.13.0")


def _package(machine: Machine, name: str) -> Requirement:
    version = machine.packages.get(name)
    return _line(name, version or "not installed", version is not None, how_to_get("server"))


def _line(what: str, found: str, is_met: bool, remedy: str) -> Requirement:
    return Requirement(what=what, found=found, is_met=is_met, remedy="" if is_met else remedy)


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.partition("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def _series(version: str) -> str:
    return _dotted(_numbers(version)[:2])


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))
