"""Models of full size on a CUDA device that is not there: every tensor has its shape, its dtype and its device, and no memory.

PyTorch's fake tensors compute shapes and nothing else. A build without CUDA lets them say that they are on a CUDA device once
the device guard of `meta`, which does nothing, stands in for CUDA's.
"""

from __future__ import annotations

import contextlib
import ctypes
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mii_serve.models.families import SD_V1_4

DEVICE = torch.device("cuda:0")
CUDA, META, NUM_DEVICE_TYPES = 1, 14, 21
"""Of `c10::DeviceType`."""
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """In the block new tensors are fake, and may be on `DEVICE`. There are no gradients."""
    if not torch.cuda.is_available():
        _install_guard()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        yield fake


def unet(fake: FakeTensorMode, dtype: torch.dtype = torch.float16) -> Any:
    """The UNet of Stable Diffusion v1-4 on `DEVICE`."""
    return _placed(lambda: UNet2DConditionModel(**SD_V1_4.unet), fake, dtype)


def vae(fake: FakeTensorMode, dtype: torch.dtype = torch.float16) -> Any:
    """The VAE of Stable Diffusion v1-4 on `DEVICE`."""
    return _placed(lambda: AutoencoderKL(**SD_V1_4.vae), fake, dtype)


def _to(self: nn.Module, device: Any = None, *, memory_format: torch.memory_format | None = None) -> nn.Module:
    """`nn.Module.to`, which cannot swap fake parameters."""
    for module in self.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                made = value.detach() if device is None else value.detach().to(device)
                made = made.to(memory_format=memory_format) if memory_format and made.dim() == 4 else made
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
    return self


def _placed(make: Any, fake: FakeTensorMode, dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch._C._DisableTorchDispatch(), torch.device("meta"):
            model = make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    return place(model, fake)


def place(model: nn.Module, fake: FakeTensorMode) -> Any:
    """Its parameters and buffers, which are on the device `meta`, on `DEVICE`."""
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                module._parameters[name] = nn.Parameter(_on_device(value, fake), requires_grad=False)
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = _on_device(value, fake)
    model.to = types.MethodType(_to, model)
    return model


def _on_device(value: torch.Tensor, fake: FakeTensorMode) -> torch.Tensor:
    return FakeTensor(fake, value.detach().to("meta"), DEVICE)


def _install_guard() -> None:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * NUM_DEVICE_TYPES).in_dll(library, GUARDS)
    if not guards[CUDA]:
        guards[CUDA] = guards[META]
